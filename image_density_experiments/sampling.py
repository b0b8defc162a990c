"""Samples of a model: drawn again where they leave the range of pixels, shown with what is left of that named.

An inverse coupling divides by a scale that a young model may make tiny for a latent it has never seen: single samples
then leave the range by powers of ten, in float64 too. They are rejected, counted, and drawn again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.files import in_a_name, written_whole
from harness.memory import require_memory
from harness.stopping import safe_point
from image_density_experiments.data import to_pixels
from image_density_experiments.evaluation import evaluating, one_hot
from image_density_experiments.figures import save_image_rows
from image_density_experiments.model import ImageFlow

TOLERANCE = 0.5  # how far beyond black or white a value may lie, in units of their distance; it is clipped
ATTEMPTS = 20  # draws of an image before it is given up
SHOWN = 12  # samples of a row
AT_ONCE = 64  # images; what is drawn does not depend on the memory at hand


class Samples(NamedTuple):
    """Images [n, C, H, W] as the model gives them, how many were drawn, and how often a draw left the range."""

    images: Tensor
    n_drawn: int
    n_rejected: int

    def __str__(self) -> str:
        if not self.n_rejected:
            return f"{len(self.images)} samples, none of which left the range of pixels"
        kept = int(leaves_range(self.images).sum())
        text = f"{self.n_rejected} of {self.n_drawn} draws left the range of pixels and were drawn again"
        return text + (f"; {kept} of {len(self.images)} samples still do" if kept else "")


def leaves_range(images: Tensor) -> Tensor:
    """Mark the images [n, C, H, W] with a value that is not finite, or beyond TOLERANCE of black or white: [n]."""
    return ~(images.abs() <= 0.5 + TOLERANCE).flatten(1).all(1)  # not, as comparisons with nan are false


@torch.no_grad()
def draw(model: ImageFlow, n: int, temperature: float, seed: int, labels: Tensor | None = None) -> Samples:
    """n samples, the same for the same seed; the global random state and the model's mode stay as they were.

    labels [n]: classes for a model that is conditioned on them, by default all of them in turn.
    """
    require_memory(8.0 * n * model.config.n_dims, f"{n} samples", "draw fewer at a time")
    if labels is None:
        labels = torch.arange(n) % model.config.y_classes
    parts, n_drawn, n_rejected = [], 0, 0
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for some in labels.split(AT_ONCE):
            images, wrong = _drawn(model, some, temperature), torch.empty(0)
            n_drawn += len(some)
            for _ in range(ATTEMPTS):
                wrong = leaves_range(images).nonzero()[:, 0]
                n_rejected += len(wrong)
                if not len(wrong):
                    break
                images[wrong] = _drawn(model, some[wrong.cpu()], temperature)
                n_drawn += len(wrong)
            parts.append(images.cpu())
    return Samples(torch.cat(parts), n_drawn, n_rejected)


def _drawn(model: ImageFlow, labels: Tensor, temperature: float) -> Tensor:
    safe_point()
    return model.reverse(y_onehot=one_hot(labels, model), temperature=temperature, n=len(labels))


class Shown(NamedTuple):
    """Images as uint8 [..., H, W, C], and how many of them hold values that are not finite: those are grey."""

    pixels: np.ndarray
    n_not_finite: int

    @property
    def remark(self) -> str:
        """Words for a title: none if there is nothing to say."""
        return f" ({self.n_not_finite} not finite: grey)" if self.n_not_finite else ""


def shown(images: Tensor, n_bits: int) -> Shown:
    """Images [..., C, H, W] as they are shown, wherever they come from; values that are not finite are mid-grey."""
    finite = torch.isfinite(images)
    n_not_finite = int((~finite).flatten(-3).any(-1).sum())
    return Shown(to_pixels(torch.where(finite, images, 0.0), n_bits), n_not_finite)


# --- files ------------------------------------------------------------------------------------------------------


def save_samples(path: Path, model: ImageFlow, temperatures: Sequence[float], seed: int, n: int = SHOWN) -> None:
    """A grid of samples, a row per temperature, from the same noise each time; the classes in turn."""
    drawn = {temperature: draw(model, n, temperature, seed) for temperature in temperatures}
    images = {temperature: shown(samples.images, model.config.n_bits) for temperature, samples in drawn.items()}
    title = f"{model.config.model_type}: samples at several temperatures"
    if n_rejected := sum(samples.n_rejected for samples in drawn.values()):
        title += f", {n_rejected} drawn again"
    if n_grey := sum(each.n_not_finite for each in images.values()):
        title += f" ({n_grey} not finite: grey)"
    save_image_rows(path, {f"T = {in_a_name(temperature)}": each.pixels for temperature, each in images.items()}, title)


def grid_rows(
    images: Mapping[float, np.ndarray], labels: Tensor | None, class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Named rows of a picture of samples [n, H, W, C] by temperature.

    One per temperature; of a single temperature one per class, or as many as it takes. labels [n], if there are any.
    """
    if len(images) > 1:
        return {f"T = {in_a_name(temperature)}": pixels[:SHOWN] for temperature, pixels in images.items()}
    [pixels] = images.values()
    if labels is not None:
        present = labels.unique()[:SHOWN].tolist()
        return {class_names[label]: pixels[(labels == label).numpy()][:SHOWN] for label in present}
    starts = range(0, min(len(pixels), SHOWN**2), SHOWN)
    return {f"{start + 1} ...": pixels[start : start + SHOWN] for start in starts}


def save_samples_as(kind: str, folder: Path, temperature: float, pixels: np.ndarray, labels: Tensor) -> Path:
    """Samples [n, H, W, C] as single "png" files, or as one "npz" with `arr_0` and `labels`; returns where."""
    path = folder / f"samples_T{in_a_name(temperature)}"
    if kind == "npz":
        path = path.with_name(f"{path.name}.npz")
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=pixels, labels=labels.numpy())
        return path
    from PIL import Image

    path.mkdir(exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path / f"{index:06d}.png")
    for old in path.glob("[0-9]" * 6 + ".png"):  # of a larger set
        if int(old.stem) >= len(pixels):
            old.unlink()
    return path
