"""The real command on made-up speech: every job, every way to start, every mistake."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
from tests.support.experiments import RATE, ROOT, fails, losses, run
from tests.support.vocoders import random_vocoder


def test_training_writes_checkpoints_samples_and_a_log_that_improves(config, tmp_path, capsys):
    path = config(train_config__with_tensorboard=True)
    assert run("-c", path, "--max_iterations", 12) == 0
    folder = tmp_path / "runs" / "tiny"
    assert [p.name for p in ckpt.list_checkpoints(folder)] == ["waveflow_12", "waveflow_8", "waveflow_4"]
    checkpoint = torch.load(folder / "waveflow_12", weights_only=True)
    assert {"model", "iteration", "optimizer", "scheduler", "learning_rate"} <= checkpoint.keys()
    assert "estimator.net.front_conv.0.conv.weight_g" in checkpoint["model"]
    table = losses(folder)
    assert [row[0] for row in table] == [str(i) for i in range(1, 13)]
    assert float(table[-1][1]) < float(table[0][1]) - 0.05
    with wave.open(str(folder / "samples" / "waveflow_12.wav")) as file:
        assert file.getnframes() == (int(0.37 * RATE) // 256) * 256
    assert any((folder / "tensorboard").iterdir())
    reported = [float(value) for value in re.findall(r"log-likelihood (-?[\d.]+) nats", capsys.readouterr().out)]
    assert len(reported) == 4  # untrained, then at each checkpoint
    assert reported[-1] > reported[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_goes_on_bit_identically(config, tmp_path, workers):
    whole = config(train_config__num_workers=workers)
    assert run("-c", whole, "--max_iterations", 8) == 0
    expected = losses(tmp_path / "runs" / "tiny")
    parts = config(train_config__num_workers=workers, train_config__output_directory=str(tmp_path / "parts"))
    assert run("-c", parts, "--max_iterations", 5) == 0  # in the middle of the second epoch
    assert run("-c", parts, "--max_iterations", 8, "--resume", "latest") == 0
    assert losses(tmp_path / "parts" / "tiny") == expected
    one, other = (ckpt.load_checkpoint(tmp_path / name / "tiny" / "waveflow_8")["model"] for name in ("runs", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_half_precision_trains_and_resumes(config, tmp_path):
    path = config(train_config__fp16_run=True)
    assert run("-c", path, "--max_iterations", 4) == 0
    assert run("-c", path, "--max_iterations", 6, "--resume", "latest") == 0
    assert len(losses(tmp_path / "runs" / "tiny")) == 6


def test_evaluation_writes_a_row_per_clip_and_both_means(trained, capsys):
    path, folder = trained
    assert run("-c", path, "--evaluate", "--set", f"train_config.checkpoint_path={folder}/waveflow_4") == 0
    with open(folder / "evaluation" / "waveflow_4.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values = np.array([float(row["log_likelihood"]) for row in rows])
    samples = np.array([int(row["samples"]) for row in rows])
    assert len(rows) == 2
    for row in rows:
        assert float(row["prior"]) + float(row["log_det"]) == pytest.approx(float(row["log_likelihood"]))
    out = capsys.readouterr().out
    assert f"log-likelihood {values.mean():.4f}" in out
    assert f"weighted by length {np.average(values, weights=samples):.4f}" in out


def test_synthesis_names_wavs_after_their_sources_and_accepts_mels(trained, tmp_path, capsys):
    path, folder = trained
    mel = torch.randn(80, 9).sub(5)
    np.save(tmp_path / "tacotron.npy", mel.numpy())
    torch.save(mel, tmp_path / "front end.pt")
    sources = [*(Path(json.loads(Path(path).read_text())["data_config"]["test_files"]).read_text().splitlines()),
               str(tmp_path / "tacotron.npy"), str(tmp_path / "front end.pt")]  # fmt: skip
    (tmp_path / "list.txt").write_text("\n".join(sources))
    assert run("-c", path, "-s", "-t", 0.8, "--set", f"data_config.test_files={tmp_path / 'list.txt'}") == 0
    output = folder / "synthesis" / "waveflow_8_temp0.8"
    lengths = {}
    for file in sorted(output.glob("*.wav")):
        with wave.open(str(file)) as wav:
            assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (1, 2, RATE)
            lengths[file.name] = wav.getnframes()
    assert sorted(lengths) == ["clip6.wav", "clip7.wav", "front end.wav", "tacotron.wav"]
    assert lengths["tacotron.wav"] == lengths["front end.wav"] == 8 * 256
    assert lengths["clip6.wav"] == int(0.37 * RATE) // 256 * 256
    out = capsys.readouterr().out
    assert "x real time" in out
    assert re.search(r"log-mel distance to the recording: [\d.]+ of the synthesis, [\d.]+ of the white noise", out)
    assert (output / "clip6.png").exists()


def test_synthesis_computes_in_the_precision_asked_for(trained, capsys, monkeypatch):
    path, folder = trained
    sounds, warnings = {}, {}
    for fast in (True, False):
        monkeypatch.setattr("fast.engine.fast_bfloat16", lambda fast=fast: fast)
        for precision in ("float32", "bfloat16"):
            assert run("-c", path, "--synthesize", "--precision", precision) == 0
            sounds[fast, precision] = (folder / "synthesis" / "waveflow_8_temp1" / "clip6.wav").read_bytes()
            warnings[fast, precision] = capsys.readouterr().err
    assert sounds[True, "float32"] == sounds[False, "float32"] == sounds[False, "bfloat16"] != sounds[True, "bfloat16"]
    assert [key for key, text in warnings.items() if "no bfloat16 products" in text] == [(False, "bfloat16")]


def test_the_average_is_used_and_written_by_every_job(trained, capsys):
    path, folder = trained
    expected = ckpt.average_checkpoints([folder / "waveflow_4", folder / "waveflow_8"])["model"]
    assert run("-c", path, "-a", 2, "--evaluate") == 0
    assert run("-c", path, "-a", 2, "--synthesize", "--set", f"train_config.checkpoint_path={folder}") == 0
    written = ckpt.load_checkpoint(folder / "waveflow_8_average2")["model"]
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert (folder / "evaluation" / "waveflow_8_average2.csv").exists()
    assert (folder / "synthesis" / "waveflow_8_average2_temp1" / "clip6.wav").exists()
    assert run("-c", path, "-a", 2, "-e", 0.25, "--max_iterations", 9) == 0  # alone: training goes on from it
    assert (folder / "waveflow_8_average2_epsilon0.25").exists()
    assert [row[0] for row in losses(folder)] == [str(i) for i in range(1, 10)]


def test_the_written_average_can_be_used_like_any_checkpoint(trained):
    path, folder = trained
    assert run("-c", path, "-a", 2, "--evaluate") == 0
    average = f"train_config.checkpoint_path={folder}/waveflow_8_average2"
    assert run("-c", path, "--evaluate", "--set", average) == 0
    assert run("-c", path, "--warm_start", "--set", average, "--set", f"train_config.output_directory={folder}/w",
               "--max_iterations", 1) == 0  # fmt: skip


def test_warm_start_takes_the_weights_and_nothing_else(trained, tmp_path):
    path, folder = trained
    start, output = (
        f"train_config.checkpoint_path={folder}/waveflow_8",
        f"train_config.output_directory={tmp_path / 'warm'}",
    )
    settings = ["--set", start, "--set", output, "--set", "train_config.learning_rate=1e-30"]
    assert run("-c", path, "-w", *settings, "--max_iterations", 1) == 0
    warm = ckpt.load_checkpoint(tmp_path / "warm" / "tiny" / "waveflow_1")
    source = ckpt.load_checkpoint(folder / "waveflow_8")
    assert warm["learning_rate"] == 1e-30
    for name, value in source["model"].items():
        torch.testing.assert_close(warm["model"][name], value, atol=1e-20, rtol=1e-6)


def test_published_weights_evaluate_resume_and_synthesize(config, tmp_path):
    golden = ROOT / "tests" / "golden" / "checkpoints_nanoflow" / "dataparallel" / "waveflow_60"
    path = config(waveflow_config__res_channels=8, waveflow_config__n_height=16, waveflow_config__n_flow=4,
                  waveflow_config__size_flow_embed=16)  # fmt: skip
    start = ["--set", f"train_config.checkpoint_path={golden}"]
    assert run("-c", path, "--evaluate", *start) == 0
    assert run("-c", path, "--synthesize", *start) == 0
    assert run("-c", path, *start, "--max_iterations", 62) == 0
    assert ckpt.load_checkpoint(tmp_path / "runs" / "tiny" / "waveflow_62")["iteration"] == 62


def test_the_newest_whole_checkpoint_is_resumed_and_the_broken_one_reported(trained, capsys):
    path, folder = trained
    (folder / "waveflow_8").write_bytes((folder / "waveflow_8").read_bytes()[:1000])
    assert run("-c", path, "--resume", "latest", "--max_iterations", 5) == 0
    assert "waveflow_8: refused, damaged" in capsys.readouterr().err


def test_fresh_training_never_overwrites_a_run(trained, capsys):
    path, folder = trained
    before = (folder / "waveflow_8").read_bytes()
    assert run("-c", path, "--max_iterations", 8) == 1
    assert "already holds 2 checkpoint(s)" in capsys.readouterr().err
    assert (folder / "waveflow_8").read_bytes() == before


@pytest.mark.parametrize("job", [[], ["--evaluate"], ["--synthesize"]])
def test_a_checkpoint_of_another_model_names_the_difference(config, tmp_path, capsys, job):
    ckpt.save_checkpoint(tmp_path / "waveflow_1", random_vocoder("waveflow"), iteration=1)
    path = config(train_config__checkpoint_path=str(tmp_path / "waveflow_1"))
    assert "another model" in fails(capsys, "-c", path, *job)
    assert not (tmp_path / "runs" / "tiny" / "losses.csv").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_config__batch_size": 7}, ["6 training clips", "batch_size 7"]),
        ({"train_config__checkpoint_path": "/none/waveflow_3"}, ["/none/waveflow_3", "no such file"]),
        ({"data_config__training_files": "/none/list.txt"}, ["/none/list.txt"]),
        ({"data_config__sampling_rate": 16_000}, ["clip0.wav", "22050", "16000"]),
    ],
)
def test_bad_input_is_one_line(config, capsys, changes, words):
    message = fails(capsys, "-c", config(**changes), "--max_iterations", 1)
    for word in words:
        assert word in message


def test_too_few_checkpoints_to_average(trained, capsys):
    path, _ = trained
    assert "holds 2 checkpoint(s), 20 are to be averaged; average fewer" in fails(
        capsys, "-c", path, "-a", 20, "--evaluate"
    )


def test_nothing_trained_yet(config, capsys):
    assert "no checkpoint in" in fails(capsys, "-c", config(), "--synthesize")


def test_warm_start_needs_a_checkpoint(config, capsys):
    assert "--warm_start takes weights from a checkpoint" in fails(capsys, "-c", config(), "--warm_start")


def test_unknown_devices_are_refused(config, capsys):
    assert "expected cpu, cuda" in fails(capsys, "-c", config(), "--device", "tpu0x")
    assert "cuda:99" in fails(capsys, "-c", config(), "--device", "cuda:99")


def test_overlapping_lists_warn(config, corpus, capsys):
    path = config(data_config__test_files=str(corpus / "train.txt"))
    assert run("-c", path, "--max_iterations", 1) == 0
    assert "warning: " in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(config, tmp_path, capsys):
    path = config(train_config__sigma=1e-25, train_config__max_bad_steps=3)  # z^2 over its square overflows
    message = fails(capsys, "-c", path, "--max_iterations", 8)
    assert "not finite in 3 steps in a row, up to iteration 3" in message and "clip0.wav" in message
    assert "no checkpoint was written yet" in message and "intact" not in message
    assert ckpt.list_checkpoints(tmp_path / "runs" / "tiny") == []


def heed_hang_ups():
    """Undo what nohup, under which these tests may run, would have a command inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_finish_the_step_and_save(config, tmp_path, number):
    path = config(train_config__iters_per_checkpoint=100_000, train_config__num_workers=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "-c", path], cwd=ROOT, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=heed_hang_ups)  # fmt: skip
    table = tmp_path / "runs" / "tiny" / "losses.csv"
    for _ in range(600):
        if table.exists() and len(table.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    if number == signal.SIGHUP:  # of a terminal: to all its processes, those that load data too
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    [saved] = ckpt.list_checkpoints(table.parent)
    assert ckpt.load_checkpoint(saved)["iteration"] == int(losses(table.parent)[-1][0])
    assert "--resume latest" in out
