"""Two gloo processes do what one does: train, resume, evaluate, synthesize; and what happens when one dies."""

import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import train
from harness.batches import ShuffledBatches
from harness.errors import InputError
from harness.processes import agree, gather, mean, on_main, share
from harness.stopping import StopRequest
from image_density_experiments.checkpoint import load_checkpoint as load_image_checkpoint
from image_density_experiments.train import main as train_images
from tests.support.experiments import assert_same_wavs, fails, losses, run, wavs


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be_process(number, place, log, arguments):
    os.environ.update(place, RANK=str(number), LOCAL_RANK=str(number))
    torch.set_num_threads(1)
    with open(log, "a", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        job = train_images if "--dataroot" in arguments else train.main
        sys.exit(job(list(map(str, arguments))))


def start_two(log, *arguments, be=None, more=()):
    """The processes that torchrun would start, forked off this one."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=be or be_process, args=(n, place, log, arguments, *more)) for n in (0, 1)]
    for process in processes:
        process.start()
    return processes


def ended(processes, seconds=120):
    """Their exit statuses; none may hang."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def run_two(tmp_path, *arguments):
    """A job on two processes; returns what they said."""
    log = tmp_path / "said.txt"
    log.unlink(missing_ok=True)
    assert ended(start_two(log, *arguments)) == [0, 0], log.read_text()
    return log.read_text()


@pytest.fixture
def three_clips(config, corpus, tmp_path):
    """Experiment files whose three test clips two processes cannot share evenly; returns a function of an output."""
    (tmp_path / "three.txt").write_text("\n".join(str(corpus / f"clip{i}.wav") for i in (5, 6, 7)))

    def make(output, **changes):
        return config(data_config__test_files=str(tmp_path / "three.txt"), train_config__batch_size=4,
                      train_config__output_directory=str(tmp_path / output), **changes)  # fmt: skip

    return make


def curves(folder):
    return np.array([[float(value) for value in row] for row in losses(folder)])


def test_two_processes_follow_one_and_resume_each_other(three_clips, tmp_path):
    path = three_clips("one", train_config__ema_decay=0.9, train_config__accumulation_steps=2)
    assert run("-c", path, "--max_iterations", 8) == 0
    one = curves(tmp_path / "one" / "tiny")

    path = three_clips("two", train_config__ema_decay=0.9, train_config__accumulation_steps=2)
    said = run_two(tmp_path, "-c", path, "--max_iterations", 5)
    assert said.count("iteration 4, first 0.09 s of each test clip") == 1  # one of them speaks
    assert "mean over 3 clips" in said
    assert run("-c", path, "--max_iterations", 7, "--resume", "latest") == 0
    run_two(tmp_path, "-c", path, "--max_iterations", 8, "--resume", "latest")
    np.testing.assert_allclose(curves(tmp_path / "two" / "tiny"), one, atol=1e-5, rtol=1e-5)
    whole, parts = (ckpt.load_checkpoint(tmp_path / name / "tiny" / "waveflow_8") for name in ("one", "two"))
    for entry in ("model", "ema"):
        for name, value in whole[entry].items():
            torch.testing.assert_close(parts[entry][name], value, atol=1e-5, rtol=1e-4)


def test_evaluation_and_synthesis_are_those_of_one_process(three_clips, tmp_path):
    path = three_clips("run")
    assert run("-c", path, "--max_iterations", 2) == 0
    folder = tmp_path / "run" / "tiny"
    results = []
    for do in (lambda *job: run(*job), lambda *job: run_two(tmp_path, *job)):
        do("-c", path, "--evaluate")
        do("-c", path, "--synthesize")
        together = wavs(folder)
        do("-c", path, "--synthesize", "--batch_seconds", 0)
        results.append(((folder / "evaluation" / "waveflow_2.csv").read_text(), together, wavs(folder)))
    (table, sounds, alone), (other_table, other_sounds, other_alone) = results
    assert table.count("\n") == 4
    assert other_table == table
    assert sorted(sounds) == ["clip5", "clip6", "clip7"]
    assert_same_wavs(other_sounds, sounds)  # batches differ: to a step
    assert all(torch.equal(other_alone[name], audio) for name, audio in alone.items())  # one by one: the same bits


def wait_for_rows(table, n):
    for _ in range(600):
        if table.exists() and len(table.read_text().splitlines()) > n:
            return
        time.sleep(0.1)
    raise AssertionError(f"{table} did not grow")


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_others_with_an_error(config, tmp_path, which):
    log = tmp_path / "said.txt"
    path = config(train_config__iters_per_checkpoint=100_000)
    processes = start_two(log, "-c", path)
    wait_for_rows(tmp_path / "runs" / "tiny" / "losses.csv", 3)
    os.kill(processes[which].pid, signal.SIGKILL)
    codes = ended(processes, seconds=60)
    assert codes[which] == -signal.SIGKILL
    assert codes[1 - which] == 1
    assert "another process of this run died" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("signalled", [[0, 1], [1]])
def test_a_signal_stops_all_after_the_same_step(config, tmp_path, signalled):
    log = tmp_path / "said.txt"
    path = config(train_config__iters_per_checkpoint=100_000)
    processes = start_two(log, "-c", path)
    wait_for_rows(tmp_path / "runs" / "tiny" / "losses.csv", 3)
    for number in signalled:
        os.kill(processes[number].pid, signal.SIGTERM)
    assert ended(processes) == [128 + signal.SIGTERM] * 2, log.read_text()
    [saved] = ckpt.list_checkpoints(tmp_path / "runs" / "tiny")
    assert ckpt.load_checkpoint(saved)["iteration"] == int(losses(saved.parent)[-1][0])
    assert "stopped by SIGTERM; go on with --resume latest" in log.read_text()


def signal_at(point, when, nth):
    """Have this process send itself SIGTERM before or after the nth call of a function."""
    module, _, name = point.rpartition(".")
    owner = pkgutil.resolve_name(module)
    real, count = getattr(owner, name), itertools.count(1)

    def call(*arguments, **options):
        now = next(count) == nth
        if now and when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        result = real(*arguments, **options)
        if now and when == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    setattr(owner, name, call)


def be_signalled(number, place, log, arguments, who, *point):
    if number == who:
        signal_at(*point)
    be_process(number, place, log, arguments)


POINTS = [
    "training.trainer.Trainer.step", "training.trainer.Trainer.save", "harness.loop.agree", "training.loop.gather",
    "harness.processes.dist.all_reduce", "training.loop.clip_likelihoods", "training.loop.VocoderLoop.milestone",
    "harness.loop.Loop._read_back", "harness.loop.Saver.save",
]  # fmt: skip
QUICK = [("harness.loop.agree", "after", 3, 1), ("training.loop.gather", "before", 2, 1),
         ("training.loop.clip_likelihoods", "before", 2, 1), ("harness.loop.Saver.save", "after", 2, 0)]  # fmt: skip
ALL = list(itertools.product(POINTS, ("before", "after"), (1, 2), (0, 1)))


@pytest.mark.parametrize(
    ("point", "when", "nth", "who"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.soak) for case in ALL)]
)
def test_a_signal_at_any_point_ends_both_alike(config, tmp_path, point, when, nth, who):
    """The second milestone is the last: a signal there still is one of all, or of none."""
    log, path = tmp_path / "said.txt", config(train_config__iters_per_checkpoint=2)
    processes = start_two(log, "-c", path, "--max_iterations", 4, be=be_signalled, more=(who, point, when, nth))
    first, second = ended(processes)
    said = log.read_text()
    assert first == second and first in (0, 128 + signal.SIGTERM), said
    assert ("stopped by SIGTERM" in said) == (first != 0) and "Traceback" not in said
    saved, steps = ckpt.list_checkpoints(tmp_path / "runs" / "tiny"), losses(tmp_path / "runs" / "tiny")
    newest = ckpt.load_checkpoint(saved[0])["iteration"] if saved else 0  # stopped before its first step
    assert newest == (int(steps[-1][0]) if steps else 0)
    assert newest == 4 or first != 0


def test_errors_of_the_main_process_are_said_once(config, tmp_path):
    log = tmp_path / "said.txt"
    path = config(train_config__checkpoint_path="/none/waveflow_3")
    assert ended(start_two(log, "-c", path)) == [1, 1]
    assert log.read_text().strip() == "error: checkpoint /none/waveflow_3: no such file"


IMAGE_RUN = [
    "--model_type",
    "nanoflow",
    "--hidden_channels",
    "4",
    "--K",
    "2",
    "--L",
    "2",
    "--batch_size",
    "4",
    "--n_workers",
    "0",
    "--no_cuda",
    "--warmup",
    "0",
    "--n_init_batches",
    "2",
    "--temperatures",
    "1",
    "--lr",
    "1e-3",
    "--dataset",
    "folder",
    "--max_grad_norm",
    "50",
]


@pytest.mark.parametrize("memory", [[], ["--reversible"]])
def test_images_train_on_two_processes_as_on_one(tmp_path, memory):
    images = np.random.default_rng(0).integers(0, 200, (20, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    np.save(tmp_path / "images.npy", images.astype(np.uint8))
    arguments = [*IMAGE_RUN, *memory, "--dataroot", str(tmp_path / "images.npy"), "--output_dir"]
    two = [*arguments, str(tmp_path / "two")]
    again = [*two, "--saved_model", str(tmp_path / "two"), "--max_iterations"]

    assert train_images([*arguments, str(tmp_path / "one"), "--max_iterations", "6"]) == 0
    run_two(tmp_path, *two, "--max_iterations", "4")
    if not memory:
        run_two(tmp_path, *again, "5")
    assert train_images([*again, "6"]) == 0
    one, two = (load_image_checkpoint(tmp_path / name / "glow_model_6.pt")["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-3)
    for table in ("losses.csv", "epochs.csv"):
        rows = [
            np.genfromtxt(tmp_path / name / table, delimiter=",", skip_header=1)[..., :4] for name in ("one", "two")
        ]
        np.testing.assert_allclose(*rows, atol=1e-5)


# --- the functions on one process ---------------------------------------------------------------------------


def test_alone_everything_is_as_if_there_were_no_processes():
    assert share([1, 2, 3]) == [1, 2, 3]
    assert gather([1, 2]) == [1, 2] and gather(None) is None
    assert on_main(lambda: 5) == 5
    assert mean(torch.tensor([2.0])).item() == 2
    assert not agree(StopRequest())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK ''"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(monkeypatch, config, capsys, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    message = fails(capsys, "-c", config())
    assert words in message and "torchrun" in message


def test_a_batch_is_shared_evenly_or_refused(monkeypatch, config, capsys):
    parts = [ShuffledBatches(10, 4, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    whole = next(iter(ShuffledBatches(10, 4, seed=3)))
    assert [key for part in parts for key in next(iter(part))] == whole
    with pytest.raises(InputError, match="cannot be shared evenly by 3 processes"):
        ShuffledBatches(10, 4, seed=3, world_size=3)
    message = fails(capsys, "-c", config(train_config__accumulation_steps=3))
    assert "batch_size 2 cannot be split into accumulation_steps 3" in message


def test_a_signal_that_comes_while_they_agree_is_not_lost(monkeypatch):
    stop = StopRequest()

    def all_reduce(asked, operation):  # what the processes asked before, none of them anything
        stop._note(signal.SIGTERM, None)

    monkeypatch.setattr("harness.processes.world_size", lambda: 2)
    monkeypatch.setattr("harness.processes.dist.all_reduce", all_reduce)
    assert not agree(stop)
    assert stop.signal == signal.SIGTERM
