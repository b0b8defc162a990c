"""Training in half precision goes the way of float32 on the demo corpus.

Two runs part sooner or later, whatever the precision: a difference in the last digit grows from step to step. So each
step's loss is compared where both precisions see the same weights, and of runs on their own only the rough course.
"""

import csv
import statistics
from dataclasses import replace

import pytest
import torch

import data
from harness.devices import fast_bfloat16
from modules import FlowLoss
from tests.support.experiments import ROOT, run
from training.trainer import Trainer

STEPS = 200


def demo_run(folder, half, order, monkeypatch):
    """Each step's loss of a demo run in nats per sample, and what it is in the other precision."""
    in_the_other, step = [], Trainer.step

    @torch.no_grad()
    def step_and_compare(trainer, audio, mel):
        own = trainer.model.execution
        trainer.model.execution = replace(own, half=None if half else torch.bfloat16)
        in_the_other.append(FlowLoss()(trainer.model(audio, mel)).item())
        trainer.model.execution = own
        with torch.enable_grad():
            return step(trainer, audio, mel)

    settings = [
        f"train_config.fp16_run={str(half).lower()}",
        f"train_config.output_directory={folder}",
        f"waveflow_config.linear_prediction={order}",
    ]
    flags = [word for setting in settings for word in ("--set", setting)]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step_and_compare)
        assert run("-c", ROOT / "configs" / "demo.json", "--max_iterations", STEPS, *flags) == 0
    with open(folder / "nanoflow-demo" / "losses.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == len(in_the_other) == STEPS
    return losses, in_the_other


@pytest.mark.soak
@pytest.mark.skipif(not fast_bfloat16(), reason="this CPU has no bfloat16 products: hours instead of minutes")
@pytest.mark.parametrize(("order", "fall"), [(0, 2.0), (128, 0.2)])  # behind linear prediction losses begin low
def test_losses_in_bfloat16_are_those_of_float32_on_the_demo_corpus(order, fall, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.main(["demo", "demo/data"]) == 0
    full, full_in_half = demo_run(tmp_path / "float32", False, order, monkeypatch)
    half, half_in_full = demo_run(tmp_path / "bfloat16", True, order, monkeypatch)
    for losses, in_the_other in ((full, full_in_half), (half, half_in_full)):
        assert losses != in_the_other
        assert statistics.mean(losses) == pytest.approx(statistics.mean(in_the_other), abs=0.02)
    assert statistics.mean(half) == pytest.approx(statistics.mean(full), abs=0.15)
    assert statistics.mean(half[-50:]) < statistics.mean(half[:50]) - fall
