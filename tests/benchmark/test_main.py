"""What `python -m benchmark` says is measured: workloads beside their baselines, memory, fidelity of a trained run."""

import json
import os

import pytest
import torch

from benchmark import __main__ as benchmark
from benchmark.memory import peak_memory
from benchmark.workloads import Conditions
from harness.errors import InputError
from tests.support.experiments import ROOT
from tests.support.vocoders import small_config

MEGABYTE = 2**20


@pytest.fixture
def tiny(tmp_path):
    """An experiment file of a small model."""
    sections = json.loads((ROOT / "configs" / "demo.json").read_text())
    sections["waveflow_config"] = small_config(model_name="tiny", n_flow=8, n_layer=4)
    (tmp_path / "config.json").write_text(json.dumps(sections))
    return str(tmp_path / "config.json")


def report_of(tmp_path, *flags):
    """What the command writes as JSON."""
    assert benchmark.main([*flags, "--threads", "1", "--json", str(tmp_path / "report.json")]) == 0
    return json.loads((tmp_path / "report.json").read_text())


def test_training_workloads_step_and_are_compared(tiny, tmp_path, capsys):
    flags = ["-w", "train_baseline", "train_checkpointed", "-p", "float32", "--repeats", "1"]
    plain, ours = report_of(tmp_path, "-c", tiny, *flags)["models"]["tiny"]["rows"]
    assert plain["ratio_to_train_baseline"] == 1
    assert ours["ratio_to_train_baseline"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert "x baseline" in capsys.readouterr().out


def test_baselines_are_measured_in_the_arithmetic_of_what_is_compared_with_them():
    workloads = ["queue", "engine", "train_baseline", "train"]
    for device in ("cpu", "cuda"):  # half-precision training on CUDA too, with what is asked for by default
        chosen = benchmark._chosen(workloads, ["float32", "bfloat16"], torch.device(device))
        assert chosen == [(name, precision) for name in workloads for precision in ("float32", "bfloat16")]
    assert ("train", "float16") in benchmark._chosen(workloads, ["float16"], torch.device("cuda"))


def test_ratios_compare_like_with_like_and_rows_name_their_arithmetic(tiny, tmp_path):
    flags = ["-w", "queue", "engine", "-p", "float64", "float32", "--repeats", "1", "--seconds", "0.1"]
    rows = report_of(tmp_path, "-c", tiny, *flags)["models"]["tiny"]["rows"]
    seconds = {(row["workload"], row["arithmetic"]): row["seconds"] for row in rows}
    for row in rows:
        ratio = seconds["queue", row["arithmetic"]] / row["seconds"]
        assert row["ratio_to_queue"] == pytest.approx(ratio)


def test_linear_prediction_is_timed_beside_the_engine_where_there_is_one(tiny, tmp_path, capsys):
    flags = ["-w", "engine", "linear_prediction", "-p", "float32", "--repeats", "1", "--seconds", "0.1"]
    [engine] = report_of(tmp_path, "-c", tiny, *flags)["models"]["tiny"]["rows"]
    assert engine["workload"] == "engine"
    assert benchmark.main(["-c", tiny, "-w", "linear_prediction"]) == 1
    assert "tiny has no linear prediction to time" in capsys.readouterr().err
    demo = str(ROOT / "configs" / "demo.json")
    engine, alone = report_of(tmp_path, "-c", demo, *flags)["models"]["nanoflow-demo"]["rows"]
    assert alone["ratio_to_engine"] == pytest.approx(engine["seconds"] / alone["seconds"])


def test_float32_on_cuda_is_with_tf32_or_without_in_convolutions_too():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    cuda = torch.device("cuda")
    try:
        for tf32, names in ((True, ["TF32", "TF32"]), (False, ["float32 (IEEE)", "float32 (3 x TF32)"])):
            conditions = Conditions(cuda, tf32=tf32)
            conditions.set_up()
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32
            assert [conditions.arithmetic(name, "float32") for name in ("queue", "engine")] == names
        assert conditions.arithmetic("engine", "float16") == "float16"
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def test_memory_alone_is_measured_without_times(tiny, tmp_path, capsys):
    flags = ["-w", "train", "train_checkpointed", "-p", "float32", "--memory", "--batch", "2"]
    plain, checkpointed = report_of(tmp_path, "-c", tiny, *flags)["models"]["tiny"]["rows"]
    assert "seconds" not in plain
    assert 0 < checkpointed["peak_memory_bytes"] < 0.9 * plain["peak_memory_bytes"]
    assert "tiny, train_checkpointed, float32: peak memory" in capsys.readouterr().out


def fill(megabytes):
    """Memory that is written to, and given back."""
    torch.ones(megabytes * MEGABYTE // 4)


def end():
    """As a process ends that the system kills."""
    os._exit(9)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell a process's memory")
def test_peak_memory_is_of_the_work_alone():
    held = torch.ones(300 * MEGABYTE // 4)
    assert 100 <= peak_memory(torch.device("cpu"), fill, 100) / MEGABYTE < 150
    del held


def test_a_process_that_is_killed_is_an_error():
    with pytest.raises(InputError, match="was ended"):
        peak_memory(torch.device("cpu"), end)


def test_fidelity_of_a_trained_run(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmark.fidelity.slow_precision_warning", lambda precision, device: None)
    monkeypatch.setattr("fast.engine.slow_precision_warning", lambda precision, device: None)
    path, _ = trained
    rows = report_of(tmp_path, "-c", path, "--fidelity")["models"]["tiny"]["fidelity"]
    assert [(row["temperature"], row["of"]) for row in rows] == [
        (temperature, of) for temperature in (0.6, 1.0) for of in ("float32", "bfloat16", "float16")
    ]
    for recording, bfloat16, float16 in (rows[:3], rows[3:]):
        assert 0 < float16["mean"] < bfloat16["mean"] < recording["mean"]
        assert all(row["mean"] <= row["largest"] for row in (recording, bfloat16, float16))
    assert "waveflow_8, 2 test clip(s)" in capsys.readouterr().out


def test_fidelity_needs_a_trained_run(config, capsys):
    assert benchmark.main(["-c", config(), "--fidelity"]) == 1
    assert "no checkpoint in" in capsys.readouterr().err
