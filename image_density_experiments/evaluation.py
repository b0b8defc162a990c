"""Measures of a trained image model: bits per dimension, reconstructions, images between images, strangeness."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import InputError
from harness.files import write_table
from harness.memory import require_memory
from harness.processes import rank, world_size
from harness.stopping import safe_point
from image_density_experiments.data import quantise, test_batches
from image_density_experiments.datasets import Split
from image_density_experiments.model import ImageFlow


@contextmanager
def half_precision(model: ImageFlow, wanted: bool) -> Iterator[None]:
    """bfloat16 for the model's estimators; its range needs no loss scaling."""
    before, model.half = model.half, torch.bfloat16 if wanted else None
    try:
        yield
    finally:
        model.half = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in evaluation mode; however it ends, the model is then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def one_hot(labels: Tensor, model: ImageFlow) -> Tensor | None:
    """Labels [B] as [B, y_classes] on the model's device if it is conditioned on classes, else None."""
    if not model.config.y_condition:
        return None
    return F.one_hot(labels, model.config.y_classes).to(next(model.parameters()))


def check_batch(model: ImageFlow, n: float, device: torch.device) -> None:
    """InputError where a pass forward of n images takes more memory than the device has left."""
    needed = 4 * n * (model.config.numbers_per_image(None) + 2 * model.config.n_dims)
    require_memory(needed, f"{model.config.describe()}, {n:.0f} images at once", "lower the batch's size", device)


@torch.no_grad()
def bits_per_dim(
    model: ImageFlow,
    split: Split,
    batch_size: int,
    seed: int = 0,
    amp: bool = False,
    shared: bool = False,
) -> np.ndarray:
    """Bits per dimension of each image of the split [N], with the same dequantisation noise every time.

    The model comes back as it was. shared: only of this process's share of the images, for `gather`.
    """
    first, every = (rank(), world_size()) if shared else (0, 1)
    device = next(model.parameters()).device
    check_batch(model, min(batch_size, len(split.images)) / every, device)
    generator = torch.Generator().manual_seed(seed)
    results, n_seen = [torch.empty(0)], 0
    with evaluating(model):
        for x, labels in test_batches(split, model.config.n_bits, batch_size):
            safe_point()
            noise = torch.rand(x.shape, generator=generator) / 2**model.config.n_bits
            part = slice((first - n_seen) % every, None, every)
            x, labels, noise, n_seen = x[part], labels[part], noise[part], n_seen + len(x)
            if not len(x):
                continue
            with half_precision(model, amp):
                _, bits, _ = model(x.to(device), one_hot(labels, model), noise=noise.to(device))
            results.append(bits.float().cpu())
    return torch.cat(results).numpy()


def write_bits(path: Path, bits: dict[str, tuple[np.ndarray, Split]]) -> None:
    """One CSV row per image: dataset, image by its name or number, bits per dimension."""
    rows = (
        (name, split.name(index), f"{value:.6f}")
        for name, (values, split) in bits.items()
        for index, value in enumerate(values)
    )
    write_table(path, [("dataset", "image", "bits_per_dim"), *rows])


class Reconstruction(NamedTuple):
    """Images [n, C, H, W], what the inverse makes of their latents, the largest error, and pixels restored exactly."""

    originals: Tensor
    images: Tensor
    max_error: float
    exact: float


@torch.no_grad()
def reconstruct(model: ImageFlow, split: Split, n: int) -> Reconstruction:
    """Encode and decode n images spread over the split, each value dequantised to the middle of its step."""
    x = spread_images(model, split, n)
    middle = x + 0.5 / 2**model.config.n_bits
    decoded = model.decode(model.encode(middle)[0])
    steps = 2**model.config.n_bits
    exact = (torch.floor((decoded + 0.5) * steps) == torch.round((x + 0.5) * steps)).float().mean()
    return Reconstruction(x, decoded, (decoded - middle).abs().max().item(), exact.item())


@torch.no_grad()
def interpolate(model: ImageFlow, split: Split, n_pairs: int, n_steps: int) -> Tensor:
    """Straight lines between the latents of pairs of images, decoded: [n_pairs, n_steps, C, H, W].

    The images are spread over the split and none is in two pairs, so that a small split has fewer of them.
    """
    n_pairs = min(n_pairs, len(split.images) // 2)
    if n_pairs < 1:
        raise InputError(f"{len(split.images)} test images: a line between two needs at least 2")
    x = spread_images(model, split, 2 * n_pairs)
    latents, _ = model.encode(x + 0.5 / 2**model.config.n_bits)
    shares = torch.linspace(0, 1, n_steps).to(x).view(1, -1, 1, 1, 1)
    lines = [torch.lerp(latent[:n_pairs, None], latent[n_pairs:, None], shares).flatten(0, 1) for latent in latents]
    return model.decode(lines).unflatten(0, (n_pairs, n_steps))


def spread_images(model: ImageFlow, split: Split, n: int) -> Tensor:
    """n images, or all if there are fewer, at even distances over a split, as the model takes them, on its device."""
    indices = np.linspace(0, len(split.images) - 1, min(n, len(split.images))).round().astype(int)
    images = np.stack([np.asarray(split.images[index]) for index in indices])
    return quantise(images, model.config.n_bits).to(next(model.parameters()))


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Chance that an image from outside has more bits per dimension than one from inside: 0.5 is a guess, 1 perfect.

    Bits that are not finite are more than any other.
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    is_outside, bits = np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])
    return float(roc_auc_score(is_outside, np.where(np.isfinite(bits), bits, np.finfo(np.float64).max)))
