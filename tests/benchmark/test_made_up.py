"""The benchmark's made-up corpus: the loader loads from it, the trainer starts on it."""

import torch

from benchmark.made_up import loader_speed, made_up_trainer
from config import load_config
from tests.support.experiments import ROOT


def test_the_loader_is_measured():
    assert loader_speed(load_config(ROOT / "configs" / "waveflow-h16-r64.json"), batches=2, clips=8) > 0


def test_the_trainer_has_its_moments_and_fresh_weights(config):
    trainer = made_up_trainer(load_config(config()), torch.device("cpu"), {"batch_size": 2})
    assert len(trainer.optimizer.state) == len(list(trainer.model.parameters()))
    torch.manual_seed(trainer.config.train_config.seed)
    fresh = type(trainer.model)(trainer.model.config)
    for name, value in fresh.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value)
