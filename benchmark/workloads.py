"""What `benchmark.py` measures of training: the plain step that ours is compared with, ours, and the loader."""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audio import write_wav
from config import Config, TrainConfig
from data import make_train_loader
from fast.estimators import Estimator
from model import FlowVocoder, row_orders
from modules import SQRT_HALF, FlowLoss, WeightNorm, permute_rows, shift_down, squeeze
from training.precision import make_precision

SEGMENT = 16_000  # samples of a training crop
LOADER_CLIPS, LOADER_SECONDS, LOADER_BATCHES = 200, 6.5, 400  # clips as long as LJSpeech's on average


# --- the baseline -----------------------------------------------------------------------------------------


def plain_forward(model: FlowVocoder, audio: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
    """The likelihood as plainly as it can be written: what `FlowVocoder.forward` is measured against.

    Weight norm, the flow embedding's product and the conditioning's product are computed in every call of an
    estimator, in the memory layout that PyTorch takes by default. Returns z [B, 1, h, W] and log|det| [B].
    """
    x = squeeze(audio.unsqueeze(1), model.config.n_height)
    log_det = x.new_zeros(len(x))
    conditioning = model.condition(mel, audio.size(1))
    for flow, (permutation, order) in enumerate(row_orders(model.config)):
        x = permute_rows(x, permutation)
        features = _plain_estimate(model, flow, shift_down(x), permute_rows(conditioning, order))
        transform = model.transforms[flow % len(model.transforms)]
        x, flow_log_det = transform(x, transform.project(features))
        log_det = log_det + flow_log_det.flatten(1).sum(1)
    return x, log_det


def _plain_estimate(model: FlowVocoder, flow: int, x: Tensor, conditioning: Tensor) -> Tensor:
    estimator: Estimator = model.estimators[flow % len(model.estimators)]
    hidden, features = _conv(estimator.front_conv, x), 0
    for index, layer in enumerate(estimator.layers):
        dilation_h, dilation_w = layer.dilation
        past = F.pad(hidden, (0, 0, 2 * dilation_h, 0))
        both = _conv(layer.gate_conv, past, padding=(0, dilation_w), dilation=layer.dilation)
        both = both + _conv(layer.cond_conv, conditioning)
        if layer.embed_conv is not None:
            both = both + _conv(layer.embed_conv, model.flow_embedding.table()[flow].view(1, -1, 1, 1))
        filters, gates = both.chunk(2, dim=1)
        residual, skip = _conv(layer.res_skip_conv, torch.tanh(filters) * torch.sigmoid(gates)).chunk(2, dim=1)
        features = features + skip
        if model.gates is None:
            hidden = (hidden + residual) * SQRT_HALF
        else:
            hidden = hidden + residual * model.gates[flow][index].view(-1, 1, 1)
    return features


def _conv(conv: WeightNorm, x: Tensor, padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1)) -> Tensor:
    return F.conv2d(x, conv.weight(), conv.bias, padding=padding, dilation=dilation)


# --- steps ------------------------------------------------------------------------------------------------


def _crops(model: FlowVocoder, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    device, hop = next(model.parameters()).device, model.config.hop_length
    frames = round(SEGMENT / hop) + 1
    audio = torch.randn(options.batch, hop * (frames - 1), device=device)
    return audio, torch.randn(options.batch, model.config.cin_channels, frames, device=device)


def baseline_step(model: FlowVocoder, options: argparse.Namespace, _precision: str) -> tuple[Callable, int, float]:
    """A plain eager step in float32."""
    audio, mel = _crops(model, options)
    loss_fn, optimizer = FlowLoss(), _adam(model)

    def run() -> None:
        optimizer.zero_grad()
        loss_fn(plain_forward(model, audio, mel)).backward()
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

    def run() -> None:
        model.checkpoint_activations = checkpoint_activations
        for estimator in model.estimators:
            estimator.compiled = options.compile
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
        config = replace(
            config,
            data_config=replace(data, training_files=str(Path(folder) / "list.txt")),
            train_config=replace(train, num_workers=2),
        )
        loader = iter(make_train_loader(config))
        for _ in range(min(batches, 20)):
            next(loader)  # the workers have started
        began = time.perf_counter()
        samples = sum(next(loader)[0].numel() for _ in range(batches))
        return samples / (time.perf_counter() - began)
