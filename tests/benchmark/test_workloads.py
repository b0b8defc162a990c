"""The benchmark's training: its options reach the step, its loader loads."""

import argparse

import torch

from benchmark import __main__ as benchmark
from benchmark.workloads import loader_speed
from config import load_config
from tests.support.experiments import ROOT
from tests.support.vocoders import random_vocoder


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
