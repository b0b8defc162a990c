"""Datasets as the models see them: a train and a test split of uint8 images, in memory or read when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MAX_CLASSES = 2**16  # of a dataset


class ImageSequence(Protocol):
    """An array [N, H, W, C] of uint8, or what looks like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Split:
    """Images with their labels [N] and their names, where they have some."""

    images: ImageSequence
    labels: np.ndarray | None = None
    names: Sequence[str] | None = None

    def name(self, index: int) -> str:
        """The name of an image, by default its number."""
        return str(index) if self.names is None else self.names[index]


@dataclass(frozen=True)
class ImageData:
    """A dataset and how its training images may be augmented."""

    train: Split
    test: Split
    n_classes: int = 0  # 0: without labels
    shift: bool = False
    flip: bool = False
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was left out or decided, for people

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(int(side) for side in self.train.images[0].shape)


class JoinedImages:
    """Several sequences of images as one, without copying them together."""

    def __init__(self, parts: Sequence[ImageSequence]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - self.ends[part]]  # counted from the end of its part


class SelectedImages:
    """Some of the images of a sequence, without copying them."""

    def __init__(self, images: ImageSequence, indices: np.ndarray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[int(self.indices[index])]


def whole(data: ImageData) -> Split:
    """All images of a dataset, those for training first."""
    names = None
    if data.train.names is not None and data.test.names is not None:
        names = [*data.train.names, *data.test.names]
    return Split(JoinedImages([data.train.images, data.test.images]), None, names)
