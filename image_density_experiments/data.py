"""Images as they walk to the model: quantised, augmented, in batches.

Random choices come from `random_stream`, by seed, epoch and index, so batches depend neither on the number of workers
nor on where a run was resumed.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from harness.batches import BatchLoader, ShuffledBatches, check_batch_size, random_stream
from image_density_experiments.checkpoint import REMEDIES
from image_density_experiments.splits import ImageData, Split

MAX_SHIFT = 0.1  # of the image's side
_AUGMENT = 2  # a purpose of random numbers; 0 is the order of batches


def quantise(image: np.ndarray, n_bits: int) -> Tensor:
    """uint8 [..., H, W, C] -> float32 [..., C, H, W] in [-0.5, 0.5), in steps of 2^-n_bits."""
    values = torch.from_numpy(np.moveaxis(np.asarray(image), -1, -3).copy())
    return (values >> (8 - n_bits)).float() / 2**n_bits - 0.5


def to_pixels(x: Tensor, n_bits: int) -> np.ndarray:
    """Turn what a model gives, [..., C, H, W] centred, into uint8 [..., H, W, C]; undoes `quantise` at 8 bits."""
    levels = 2**n_bits
    values = torch.floor((x.detach().cpu().float() + 0.5) * levels).clamp(0, levels - 1)
    return np.moveaxis((values * (255 / (levels - 1))).round().to(torch.uint8).numpy(), -3, -1)


def augment(image: np.ndarray, random: np.random.Generator, shift: bool, flip: bool) -> np.ndarray:
    """Shift by up to a tenth of each side, black where nothing is left, and mirror every other image."""
    if shift:
        steps = [round(random.uniform(-MAX_SHIFT, MAX_SHIFT) * side) for side in image.shape[:2]]
        image = _shifted(image, *steps)
    if flip and random.integers(2):
        image = image[:, ::-1]
    return image


def _shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = image.shape[:2]
    result = np.zeros_like(image)
    result[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return result


class QuantisedImages(Dataset):
    """Items (x [C, H, W] from `quantise`, label) by keys (epoch, index); label 0 where there are none.

    With `seed`, training images, augmented as the dataset allows; without, images as they are.
    """

    def __init__(
        self, split: Split, n_bits: int, seed: int | None = None, shift: bool = False, flip: bool = False
    ) -> None:
        self.split, self.n_bits, self.seed, self.shift, self.flip = split, n_bits, seed, shift, flip

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image = self.split.images[index]
        if self.seed is not None:
            random = random_stream(_AUGMENT, self.seed, epoch, index)
            image = augment(image, random, self.shift, self.flip)
        label = 0 if self.split.labels is None else int(self.split.labels[index])
        return quantise(image, self.n_bits), label


def training_images(data: ImageData, n_bits: int, seed: int, augmented: bool) -> QuantisedImages:
    """The images to train on, changed anew in every epoch as their dataset allows, if `augmented`."""
    return QuantisedImages(data.train, n_bits, seed, data.shift and augmented, data.flip and augmented)


def make_train_loader(
    images: QuantisedImages,
    batch_size: int,
    n_workers: int,
    start_batch: int = 0,
    share: tuple[int, int] = (0, 1),
    device: torch.device | None = None,
) -> BatchLoader:
    """Endless shuffled training batches (x [B, C, H, W], labels [B]) from batch number `start_batch` on.

    share: rank and number of the processes, of which each gets its part of the same batches. device: where they go.
    """
    rank, world_size = share
    check_batch_size(batch_size, len(images), world_size, "--batch_size", "training images")
    batches = ShuffledBatches(len(images), batch_size, images.seed, start_batch, rank, world_size)
    return BatchLoader(images, n_workers, REMEDIES.worker_died, device=device, batch_sampler=batches)


def test_batches(split: Split, n_bits: int, batch_size: int, n_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a split in order, as (x [B, C, H, W], labels [B])."""
    dataset = QuantisedImages(split, n_bits)
    keys = [(0, index) for index in range(len(dataset))]
    return iter(BatchLoader(dataset, n_workers, REMEDIES.worker_died, sampler=keys, batch_size=batch_size))
