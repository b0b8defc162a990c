"""The benchmark's training: its baseline is the same model, its options reach the step, its loader loads."""

import argparse

import pytest
import torch

from benchmark import __main__ as benchmark
from benchmark.workloads import loader_speed, plain_forward
from config import load_config
from modules import FlowLoss
from tests.support.experiments import ROOT
from tests.support.vocoders import random_input, random_vocoder


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


def test_a_training_workload_changes_the_weights():
    options = argparse.Namespace(batch=1, compile=False, device=torch.device("cpu"))
    for name in ("train_baseline", "train", "train_checkpointed"):
        model = random_vocoder()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        benchmark.BUILDERS[name](model, options, "float32")[0]()
        same = {key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])}
        assert same <= {"estimators.0.front_conv.weight_v"}  # of one input each: only its sign matters


def test_the_loader_is_measured():
    assert loader_speed(load_config(ROOT / "configs" / "waveflow-h16-r64.json"), batches=2, clips=8) > 0
