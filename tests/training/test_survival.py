"""Runs killed at random instants: nothing unreadable, nothing lost but the steps since the last checkpoint.

The quick versions run by default, the long ones with `make soak`.
"""

import multiprocessing
import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch

import checkpoint as ckpt
from image_density_experiments import checkpoint as image_ckpt
from image_density_experiments.train import main as image_main
from tests.support.experiments import log_all_to, losses, run, run_quietly

FORK = multiprocessing.get_context("fork")
PATIENCE = 120  # seconds within which a run must get as far as its first checkpoint


def same(one, other):
    """Whether two nested structures hold the same bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def kill(process, dice):
    os.kill(process.pid, signal.SIGKILL)


TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
STORMS = [
    [TERM],
    [INT],
    [TERM, INT],
    [INT, TERM],
    [TERM] * 4,
    [INT] * 3,
    [TERM, INT, TERM, TERM],
    [HUP],
    [HUP, TERM, INT],
]


def storm(process, dice):
    """Signals as people, batch queues and launchers send them: one wish, however many."""
    for number in dice.choice(STORMS):
        os.kill(process.pid, number)
        time.sleep(dice.choice([0, 0, 0.01, 0.05]))


def struck(start, checkpoints, dice, longest, strike):
    """Strike a run at a random instant: mostly some time after its first checkpoint, at times while it starts up.

    Returns the exit status, which is another where the run was through before that.
    """
    before, began = checkpoints()[:1], time.monotonic()
    process = FORK.Process(target=start)
    # INT as harness.start has it: a fork of Python's own can lose Ctrl-C. HUP is ignored where this runs under nohup.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (INT, HUP)}
    process.start()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    early = dice.random() < 0.2
    while not early and process.is_alive() and checkpoints()[:1] == before:
        assert time.monotonic() - began < PATIENCE, "no checkpoint appeared"
        time.sleep(0.005)
    process.join(dice.uniform(0, longest))
    if process.is_alive():
        strike(process, dice)
    process.join(PATIENCE)
    return process.exitcode


# Of a storm while Python starts, before the run takes signals for wishes: death by the signal.
STATUSES = {kill: (-signal.SIGKILL,), storm: (128 + TERM, 128 + INT, 128 + HUP, -TERM, -INT, -HUP)}


def survive(start, checkpoints, read_all, kills, longest, dice, strike=kill):
    """Strike and resume `kills` times; every checkpoint must be readable after each. Returns the strikes that hit.

    The run must be too long to get through before.
    """
    hits = 0
    for _ in range(kills):
        status = struck(start, checkpoints, dice, longest, strike)
        assert status in (0, *STATUSES[strike]), f"a resumed run failed with {status}"
        hits += status in STATUSES[strike]
        read_all()
    return hits


def survive_killing(config, tmp_path, kills, steps, workers, longest, strike=kill, **more):
    """The vocoder: `kills` of a run of `steps`, then on to its end; compare with an undisturbed one."""
    changes = {"train_config__num_workers": workers, "train_config__iters_per_checkpoint": 3,
               "train_config__keep_checkpoints": 3, **more}  # fmt: skip
    whole = config(**changes)
    assert run("-c", whole, "--max_iterations", steps) == 0
    parts = config(**changes, train_config__output_directory=str(tmp_path / "parts"))
    folder, log, progress = tmp_path / "parts" / "tiny", tmp_path / "log.txt", [0]

    def start():
        os.environ["TQDM_DISABLE"] = "1"
        torch.set_num_threads(1)
        run_quietly(["-c", parts, "--resume", "latest", "--max_iterations", steps], log)

    def read_all():
        found = [ckpt.load_checkpoint(path)["iteration"] for path in ckpt.list_checkpoints(folder)]
        assert max(found, default=0) >= progress[-1], "a checkpoint was lost"
        progress.append(max(found, default=0))

    hits = survive(start, lambda: ckpt.list_checkpoints(folder), read_all, kills, longest, random.Random(0), strike)
    assert run("-c", parts, "--resume", "latest", "--max_iterations", steps) == 0
    text = log.read_text()
    assert "iterations " in text and "refused" not in text and "error: " not in text, text[-2000:]
    # A worker whose run was just killed may be caught handing over a batch: that much, and no run's own, is allowed.
    assert text.count("Traceback") == text.count("multiprocessing/resource_sharer.py"), text[-2000:]
    ours, expected = (
        torch.load(tmp_path / name / "tiny" / f"waveflow_{steps}", weights_only=True) for name in ("parts", "runs")
    )
    for content in (ours, expected):
        content["config"]["train_config"].pop("output_directory")
        content.pop("digest")  # which covers the folder's name too
    assert same(ours, expected)
    assert losses(folder) == losses(tmp_path / "runs" / "tiny")
    assert not list(folder.rglob(".*.tmp"))
    return hits, progress


def test_a_run_killed_again_and_again_ends_with_the_same_bits(config, tmp_path):
    hits, progress = survive_killing(config, tmp_path, kills=6, steps=40, workers=1, longest=0.5)
    assert hits >= 3 and progress[-1] > 0


HALF = {"train_config__ema_decay": 0.9, "train_config__fp16_run": True, "train_config__amp_dtype": "bfloat16"}


def test_signals_cost_a_run_with_averaged_weights_in_half_precision_nothing(config, tmp_path):
    """Evaluations use the average: a signal in one must leave both sets of weights as they were."""
    hits, _ = survive_killing(config, tmp_path, kills=5, steps=40, workers=1, longest=0.4, strike=storm, **HALF)
    assert hits >= 2


@pytest.mark.soak
def test_a_hundred_storms_of_signals_end_with_the_same_bits(config, tmp_path):
    hits, progress = survive_killing(
        config, tmp_path, kills=100, steps=900, workers=1, longest=0.5, strike=storm, **HALF
    )
    print(f"{hits} storms, iterations of the newest checkpoint after each: {progress}")
    assert hits == 100, "the run was through before its storms were: give it more steps"


@pytest.mark.soak
def test_two_hundred_kills_end_with_the_same_bits(config, tmp_path):
    hits, progress = survive_killing(config, tmp_path, kills=200, steps=1_500, workers=1, longest=0.5)
    print(f"{hits} kills, iterations of the newest checkpoint after each: {progress}")
    assert hits == 200, "the run was through before its kills were: give it more steps"


def survive_killing_images(tmp_path, kills, epochs, longest):
    """The image models: checkpoints at the end of each epoch, of two steps."""
    smooth = np.random.default_rng(0).integers(0, 200, (10, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    np.save(tmp_path / "images.npy", smooth.astype(np.uint8))
    arguments = ["--model_type", "nanoflow", "--hidden_channels", "4", "--K", "2", "--L", "2", "--n_init_batches", "2",
                 "--batch_size", "4", "--warmup", "2", "--n_workers", "0", "--no_cuda", "--temperatures", "1",
                 "--sample_every", "1000", "--dataset", "folder", "--dataroot", str(tmp_path / "images.npy"),
                 "--epochs", str(epochs), "--max_grad_norm", "10"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert image_main([*arguments, "--output_dir", str(whole)]) == 0

    def resumed():
        known = ["--saved_model", str(parts)] if list(parts.glob("glow_model_*.pt")) else ["--fresh"]
        return [*arguments, "--output_dir", str(parts), *known]

    def start():
        log_all_to(tmp_path / "log.txt")
        torch.set_num_threads(1)
        sys.exit(image_main(resumed()))

    def read_all():
        for path in image_ckpt.list_checkpoints(parts):
            image_ckpt.load_checkpoint(path)

    hits = survive(start, lambda: image_ckpt.list_checkpoints(parts), read_all, kills, longest, random.Random(1))
    assert image_main(resumed()) == 0
    text = (tmp_path / "log.txt").read_text()
    assert "iterations " in text and "Traceback" not in text and "refused" not in text, text[-2000:]
    ours, expected = (image_ckpt.load_checkpoint(path / f"glow_model_{2 * epochs}.pt") for path in (parts, whole))
    assert same(ours, expected)
    return hits


def test_a_killed_run_of_the_image_models_ends_with_the_same_bits(tmp_path):
    assert survive_killing_images(tmp_path, kills=4, epochs=15, longest=0.4) >= 2


@pytest.mark.soak
def test_forty_kills_of_the_image_models_end_with_the_same_bits(tmp_path):
    assert survive_killing_images(tmp_path, kills=40, epochs=400, longest=0.4) == 40


def test_a_killed_data_worker_ends_the_run_in_one_line_and_it_goes_on(config, tmp_path):
    path = config(train_config__num_workers=2, train_config__iters_per_checkpoint=2)
    folder, log = tmp_path / "runs" / "tiny", tmp_path / "log.txt"
    process = FORK.Process(target=run_quietly, args=(["-c", path, "--max_iterations", 100_000], log))
    process.start()
    waited = time.monotonic()
    while not ckpt.list_checkpoints(folder):
        assert time.monotonic() - waited < PATIENCE and process.is_alive(), log.read_text()
        time.sleep(0.02)
    children = [int(number) for number in child_processes(process.pid)]
    assert len(children) >= 2
    os.kill(children[0], signal.SIGKILL)
    process.join(PATIENCE)
    text = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in text
    assert re.search(
        r"^error: a data loading process died \(.*\), as when memory runs out; .*--resume latest", text, re.M
    )
    newest = ckpt.load_checkpoint(ckpt.list_checkpoints(folder)[0])["iteration"]
    assert run("-c", path, "--resume", "latest", "--max_iterations", newest + 1) == 0


def child_processes(number):
    """The children of a process, by Linux' process table."""
    table = f"/proc/{number}/task/{number}/children"
    if not os.path.exists(table):
        pytest.skip("needs Linux' process table")
    with open(table) as file:
        return file.read().split()
