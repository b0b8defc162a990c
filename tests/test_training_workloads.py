"""The benchmark's training: its baseline is the same model, its options reach the step, its loader loads."""

import argparse
import json

import pytest
import torch

import benchmark
from config import load_config
from experiments import ROOT
from modules import FlowLoss
from training_workloads import loader_speed, plain_forward
from vocoders import random_input, random_vocoder, small_config


@pytest.mark.parametrize("coupling_type", ["waveflow", "nanoflow_naive", "nanoflow_decomp", "nanoflow"])
def test_the_baseline_has_the_models_loss_and_gradients(coupling_type):
    model = random_vocoder(coupling_type)
    audio, mel = random_input(model)
    results = []
    for forward in (model, lambda *inputs: plain_forward(model, *inputs)):
        model.zero_grad()
        loss = FlowLoss()(forward(audio, mel))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


def test_training_workloads_step_and_are_compared(tmp_path, capsys):
    sections = json.loads((ROOT / "configs" / "demo.json").read_text())
    sections["waveflow_config"] = small_config(model_name="tiny")
    (tmp_path / "config.json").write_text(json.dumps(sections))
    flags = ["-c", str(tmp_path / "config.json"), "-w", "train_baseline", "train", "-p", "float32", "--repeats", "1"]
    assert benchmark.main([*flags, "--checkpoint_activations", "--json", str(tmp_path / "speed.json")]) == 0
    plain, ours = json.loads((tmp_path / "speed.json").read_text())["models"]["tiny"]["rows"]
    assert plain["ratio_to_train_baseline"] == 1
    assert ours["ratio_to_train_baseline"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert "x baseline" in capsys.readouterr().out


def test_a_training_workload_changes_the_weights():
    options = argparse.Namespace(batch=1, checkpoint_activations=False, compile=False, device=torch.device("cpu"))
    for name in ("train_baseline", "train"):
        model = random_vocoder()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        benchmark.BUILDERS[name](model, options, "float32")[0]()
        same = {key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])}
        assert same <= {"estimators.0.front_conv.weight_v"}  # of one input each: only its sign matters


def test_the_loader_is_measured():
    assert loader_speed(load_config(ROOT / "configs" / "waveflow-h16-r64.json"), batches=2, clips=8) > 0
