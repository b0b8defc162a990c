"""Distances of samples from images as sets: Fréchet (FID) and kernel (KID) distances of their features.

Features come from a network that the user has, or from the flow's own top latents; nothing is downloaded. Distances are
comparable only where the features, the test images and the number of samples are the same.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.downloads import damage_named
from harness.errors import InputError
from harness.files import RefusedFile, open_file
from image_density_experiments.data import quantise
from image_density_experiments.model import ImageFlow
from image_density_experiments.splits import ImageSequence

OWN_LATENTS = "latents"
BATCH = 64
MAX_NETWORK_BYTES = 2**33
SUBSETS, SUBSET = 100, 1000  # of the kernel distance, as published: how many, and of how many images at most

Features = Callable[[np.ndarray], Tensor]  # uint8 [B, H, W, C] -> [B, D]


class Distance(NamedTuple):
    """The two distances, KID with its standard deviation over subsets, and the number of features."""

    fid: float
    kid: float
    kid_std: float
    n_features: int


def make_features(source: str, model: ImageFlow) -> tuple[Features, str]:
    """Features by a TorchScript file, or by the model if `source` is "latents"; and what they are, in words.

    A network takes float32 RGB images [B, 3, H, W] of 0 ... 255 and gives [B, D], or maps [B, D, h, w], which are
    averaged. Such a file is a program, which is run. Raises InputError.
    """
    if source == OWN_LATENTS:
        return lambda images: _top_latents(model, images), "the flow's own top latents"
    complaint = "cannot be loaded as a TorchScript network (torch.jit.save writes one)"
    with damage_named(source, complaint), open_file(source, MAX_NETWORK_BYTES) as file:
        network = _loaded(file).to(next(model.parameters()).device).eval()
    return lambda images: _by_network(network, images, source), f"the features of {Path(source).name}"


def _loaded(file: BinaryIO) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(file, map_location="cpu")
    except RuntimeError:  # in pages of the library's own words
        raise RefusedFile("no such archive, or a damaged one") from None


@torch.no_grad()
def _top_latents(model: ImageFlow, images: np.ndarray) -> Tensor:
    """Of the middle of each quantisation step."""
    x = quantise(images, model.config.n_bits).to(next(model.parameters()))
    return model.encode(x + 0.5 / 2**model.config.n_bits)[0][-1].flatten(1)


@torch.no_grad()
def _by_network(network: torch.nn.Module, images: np.ndarray, source: str) -> Tensor:
    device = next((value.device for value in network.parameters()), torch.device("cpu"))
    x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float().to(device)
    with damage_named(source, f"does not take images of shape {[len(x), 3, *x.shape[2:]]}"):
        features = network(x if x.size(1) == 3 else x.expand(-1, 3, -1, -1))
        features = features[0] if isinstance(features, tuple) else features
        features = features.mean(dim=(2, 3)) if features.ndim == 4 else features
        if features.ndim != 2 or len(features) != len(x):
            raise ValueError(f"it gives {list(features.shape)}, expected [{len(x)}, D]")
    return features


def features_of(images: ImageSequence, features: Features) -> np.ndarray:
    """Features [N, D] of all images of a sequence, in float64. Raises InputError if one is not finite."""
    parts = [features(batch).double().cpu().numpy() for batch in _batches(images)]
    result = np.concatenate(parts)
    if not np.isfinite(result).all():
        n_bad = int((~np.isfinite(result)).any(1).sum())
        raise InputError(f"{n_bad} of {len(result)} images have features that are not finite; there is no distance")
    return result


def _batches(images: ImageSequence) -> Iterator[np.ndarray]:
    for start in range(0, len(images), BATCH):
        yield np.stack([np.asarray(images[index]) for index in range(start, min(start + BATCH, len(images)))])


def distance(real: np.ndarray, made: np.ndarray, seed: int = 0) -> Distance:
    """FID and KID between features [N, D] and [M, D] of at least two images each."""
    for name, features in (("test images", real), ("samples", made)):
        if len(features) < 2:
            raise InputError(f"{len(features)} {name}: a distance needs at least 2, and thousands to mean something")
    return Distance(frechet_distance(real, made), *kernel_distance(real, made, seed), real.shape[1])


def frechet_distance(real: np.ndarray, made: np.ndarray) -> float:
    """Between Gaussians of the means and covariances of [N, D] and [M, D] (Heusel et al., 2017)."""
    difference = real.mean(0) - made.mean(0)
    one, other = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (real, made))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # The trace of (one other)^(1/2) by a symmetric matrix with the same eigenvalues: no complex roots.
    mixed = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(min=0)).sum()
    return float(difference @ difference + np.trace(one) + np.trace(other) - 2 * mixed)


def kernel_distance(real: np.ndarray, made: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3, mean and std over subsets (Binkowski et al., 2018)."""
    random, size = np.random.default_rng(seed), min(SUBSET, len(real), len(made))
    results = [
        _squared_mmd(*(features[random.choice(len(features), size, replace=False)] for features in (real, made)))
        for _ in range(SUBSETS)
    ]
    return float(np.mean(results)), float(np.std(results))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    n, n_features = x.shape
    within = [((a @ a.T / n_features + 1) ** 3) for a in (x, y)]
    across = (x @ y.T / n_features + 1) ** 3
    return float(sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in within) - 2 * across.mean())
