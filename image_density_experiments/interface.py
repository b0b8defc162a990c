"""A trained image model for its users: likelihood, samples, latents, of uint8 images.

from image_density_experiments.interface import ImageDensity
density = ImageDensity.from_pretrained("output/nanoflow")  # a run's folder, or a checkpoint
bits, images = density.bits_per_dim(photos), density.sample(16, temperature=0.7)
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from harness.devices import choose_device
from harness.errors import InputError
from image_density_experiments.data import quantise
from image_density_experiments.evaluation import bits_per_dim
from image_density_experiments.model import ImageFlow
from image_density_experiments.runs import class_names, make_model, model_config, starting_point
from image_density_experiments.sampling import Samples, draw, shown
from image_density_experiments.splits import Split

BATCH = 64  # images at once


class ImageDensity:
    """A model with what its users need; images are uint8 [N, H, W, C] of `shape`, grey ones also [N, H, W].

    classes: names of the classes of a conditional model, in the order of their numbers; else empty.
    """

    def __init__(self, model: ImageFlow, classes: Sequence[str] = ()) -> None:
        self.model = model.eval()
        self.classes = tuple(classes) if model.config.y_condition else ()

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | None = None, **config: Any) -> Self:
        """The model of a checkpoint, or of the newest one of a run's folder; on a GPU if there is one.

        config: fields of ImageModelConfig, for files of the published code, which lack them. Raises InputError.
        """
        start = starting_point(Path(path))
        model = make_model(start, model_config(start, config)).to(choose_device(device))
        return cls(model, class_names(start, model))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return tuple(self.model.config.image_shape)

    def bits_per_dim(self, images: Any, labels: Any = None, seed: int = 0) -> np.ndarray:
        """Bits per dimension of each image [N], for a conditional model given its class; the noise is the seed's."""
        split = Split(self._checked(images), None if labels is None else self._numbers(labels))
        if self.model.config.y_condition and (labels is None or len(split.labels) != len(split.images)):
            raise InputError(f"the model is conditioned on classes: expected labels of {len(split.images)} images")
        return bits_per_dim(self.model, split, BATCH, seed)

    def log_likelihood(self, images: Any, labels: Any = None, seed: int = 0) -> np.ndarray:
        """Logarithm of the probability of each quantised image [N], in nats (a lower bound, by one noise sample)."""
        return -math.log(2) * self.model.config.n_dims * self.bits_per_dim(images, labels, seed)

    def sample(
        self, n: int = 1, temperature: float = 1.0, seed: int = 0, labels: Any = None, with_counts: bool = False
    ) -> np.ndarray | tuple[np.ndarray, Samples]:
        """n images, uint8; what leaves the range of pixels is drawn again. labels: one class, or one for each image.

        with_counts: also the `Samples`, which say how many draws were rejected.
        """
        if n < 1 or not 0 <= temperature < math.inf:
            raise InputError(f"{n} images at temperature {temperature}: expected at least 1, at 0 or more")
        numbers = None if labels is None else torch.from_numpy(np.broadcast_to(self._numbers(labels), (n,)).copy())
        samples = draw(self.model, n, temperature, seed, numbers)
        images = shown(samples.images, self.model.config.n_bits).pixels
        return (images, samples) if with_counts else images

    @torch.no_grad()
    def encode(self, images: Any) -> list[Tensor]:
        """Latents of images, the top one last, each [N, C', H', W']: of the middle of every quantisation step."""
        x = quantise(self._checked(images), self.model.config.n_bits).to(next(self.model.parameters()))
        return self.model.encode(x + 0.5 / 2**self.model.config.n_bits)[0]

    def decode(self, latents: Sequence[Tensor]) -> np.ndarray:
        """Images of latents, uint8; `encode`'s inverse."""
        return shown(self.model.decode(latents), self.model.config.n_bits).pixels

    def _checked(self, images: Any) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim == 3 and self.shape[2] == 1 and images.shape[1:] == self.shape[:2]:
            images = images[..., None]
        images = images[None] if images.shape == self.shape else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.shape or not len(images):
            height, width, channels = self.shape
            raise InputError(
                f"images {list(images.shape)} of {images.dtype}: expected uint8 [N, {height}, {width}, {channels}]"
            )
        return images

    def _numbers(self, labels: Any) -> np.ndarray:
        """Classes by name or number as numbers [n]."""
        numbers = [
            self.classes.index(label) if label in self.classes else label for label in np.atleast_1d(labels).tolist()
        ]
        known = len(self.classes)
        if not all(isinstance(number, int) and 0 <= number < known for number in numbers):
            raise InputError(
                f"labels {numbers[:5]}: expected classes 0 to {known - 1}, or {', '.join(self.classes[:20])}"
            )
        return np.array(numbers, dtype=np.int64)
