"""Experiments on a made-up corpus: the loader and the trainer as they are, with nothing to download."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio import write_wav
from config import Config, config_from_dict
from data import make_train_loader
from training.trainer import Trainer

LOADER_CLIPS, LOADER_SECONDS, LOADER_BATCHES = 200, 6.5, 400  # clips as long as LJSpeech's on average


def on_noise(config: Config, folder: Path, n_clips: int, seconds: float, changes: dict[str, Any]) -> Config:
    """The experiment with clips of noise, written into `folder`, and with changes of its train_config."""
    random = np.random.default_rng(0)
    rate = config.data_config.sampling_rate
    files = [folder / f"{number}.wav" for number in range(n_clips)]
    for file in files:
        write_wav(file, torch.from_numpy(0.1 * random.standard_normal(round(seconds * rate), dtype=np.float32)), rate)
    list_file = folder / "list.txt"
    list_file.write_text("\n".join(map(str, files)), encoding="utf-8")
    sections = config.to_dict()
    sections["train_config"].update(changes)
    sections["data_config"].update(training_files=str(list_file), test_files=str(list_file))
    return config_from_dict(sections)


def loader_speed(config: Config, batches: int = LOADER_BATCHES, clips: int = LOADER_CLIPS) -> float:
    """Audio samples per second, crops with their mels, from two workers."""
    with tempfile.TemporaryDirectory() as folder:
        loader = iter(make_train_loader(on_noise(config, Path(folder), clips, LOADER_SECONDS, {"num_workers": 2})))
        for _ in range(min(batches, 20)):
            next(loader)  # the workers have started
        began = time.perf_counter()
        samples = sum(next(loader)[0].numel() for _ in range(batches))
        return samples / (time.perf_counter() - began)


def made_up_trainer(config: Config, device: torch.device, changes: dict[str, Any]) -> Trainer:
    """A trainer with fresh weights and the optimizer's moments in memory, as in a run under way.

    For its `step` alone: its corpus is gone, and it must not save.
    """
    changes = {"num_workers": 0, "accumulation_steps": 1, "learning_rate": 1e-5, "ema_decay": 0, **changes}
    with tempfile.TemporaryDirectory() as folder:
        config = on_noise(config, Path(folder), changes["batch_size"], 0.1, changes)
        trainer = Trainer(config, device, Path(folder), None, warm=False)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()  # along gradients of zero, which changes no weight
    trainer.optimizer.zero_grad()
    return trainer
