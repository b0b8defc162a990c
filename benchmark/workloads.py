"""What `benchmark.py` measures of training: the plain step that ours is compared with, ours, and the loader."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audio import write_wav
from config import Config, TrainConfig
from data import make_train_loader
from fast.estimators import Execution
from model import FlowVocoder
from modules import FlowLoss
from training.precision import make_precision

SEGMENT = 16_000  # samples of a training crop
LOADER_CLIPS, LOADER_SECONDS, LOADER_BATCHES = 200, 6.5, 400  # clips as long as LJSpeech's on average


# --- steps ------------------------------------------------------------------------------------------------


def _crops(model: FlowVocoder, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    device, hop = next(model.parameters()).device, model.config.hop_length
    frames = round(SEGMENT / hop) + 1
    audio = torch.randn(options.batch, hop * (frames - 1), device=device)
    return audio, torch.randn(options.batch, model.config.cin_channels, frames, device=device)


def baseline_step(model: FlowVocoder, options: argparse.Namespace, _precision: str) -> tuple[Callable, int, float]:
    """A plain eager step in float32: the model as `modules.py` has it, convolution by convolution."""
    audio, mel = _crops(model, options)
    loss_fn, optimizer = FlowLoss(), _adam(model)

    def run() -> None:
        model.execution = Execution(plain=True)
        optimizer.zero_grad()
        loss_fn(model(audio, mel)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return run, audio.numel(), 3.0


def training_step(
    model: FlowVocoder, options: argparse.Namespace, precision: str, checkpoint_activations: bool = False
) -> tuple[Callable, int, float]:
    """The step of `trainer.py`: backward is two products for each one of the forward pass."""
    audio, mel = _crops(model, options)
    loss_fn, optimizer = FlowLoss(), _adam(model, fused=True)
    stepper = make_precision(TrainConfig(fp16_run=precision != "float32"), model, optimizer)
    execution = Execution(compile=options.compile, checkpoint_activations=checkpoint_activations)

    def run() -> None:
        model.execution = execution
        with stepper.autocast():
            outputs = model(audio, mel)
        stepper.step(loss_fn(outputs))

    return run, audio.numel(), 3.0


def checkpointed_step(model: FlowVocoder, options: argparse.Namespace, precision: str) -> tuple[Callable, int, float]:
    """The same with `checkpoint_activations`; what is computed again is not counted as work."""
    return training_step(model, options, precision, checkpoint_activations=True)


def _adam(model: FlowVocoder, **options: bool) -> torch.optim.Adam:
    """With its moments in memory, as in a run under way: a step along gradients of zero changes no weight."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, **options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


# --- the loader -------------------------------------------------------------------------------------------


def loader_speed(config: Config, batches: int = LOADER_BATCHES, clips: int = LOADER_CLIPS) -> float:
    """Audio samples per second, crops with their mels, from two workers on a made-up corpus in a temporary folder."""
    data, train = config.data_config, config.train_config
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.wav" for number in range(clips)]
        for file in files:
            noise = 0.1 * random.standard_normal(round(LOADER_SECONDS * data.sampling_rate), dtype=np.float32)
            write_wav(file, torch.from_numpy(noise), data.sampling_rate)
        (Path(folder) / "list.txt").write_text("\n".join(map(str, files)))
        config = config.replace(
            data_config=data.replace(training_files=str(Path(folder) / "list.txt")),
            train_config=train.replace(num_workers=2),
        )
        loader = iter(make_train_loader(config))
        for _ in range(min(batches, 20)):
            next(loader)  # the workers have started
        began = time.perf_counter()
        samples = sum(next(loader)[0].numel() for _ in range(batches))
        return samples / (time.perf_counter() - began)
