"""The user's own images as a dataset: a folder of picture files, or one file of arrays."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.arrays import map_array, read_archive
from harness.downloads import damage_named
from harness.errors import InputError
from image_density_experiments.folders import FileSplit, every_tenth, lay_out
from image_density_experiments.pictures import (
    ImageForm,
    array_to_pixels,
    read_header,
    read_picture,
)
from image_density_experiments.splits import MAX_CLASSES, ImageData, SelectedImages, Split

SCANNED = 200  # headers read to tell grey from coloured pictures, where sizes need not agree
IMAGE_NAMES, LABEL_NAMES = ("images", "data", "x", "arr_0"), ("labels", "y", "arr_1")  # in a .npz
SPLIT_NAMES = ("x_train", "y_train", "x_test", "y_test")  # of a .npz with a split of its own
ARRAYS = "(N, H, W) or (N, H, W, C) or (N, C, H, W) of uint8, uint16 or bool with C 1, 3 or 4, N at least 2"


def load_own_images(dataroot: Path, form: ImageForm) -> ImageData:
    """The images of a folder, see `folders.lay_out`, or of a .npy or .npz file. Raises InputError."""
    if not os.path.exists(dataroot):  # false, too, of names that no file can have
        raise InputError(f"{dataroot}: not there; --dataset folder needs --dataroot, a folder of images or an array")
    return _from_folder(dataroot, form) if dataroot.is_dir() else _from_arrays(dataroot, form)


# --- picture files ----------------------------------------------------------------------------------------------


def _from_folder(root: Path, form: ImageForm) -> ImageData:
    layout = lay_out(root)
    files = [*layout.train.files, *layout.test.files]
    shape, grey = _common_shape(files, form)
    inferred = form.channels is None and grey
    form = replace(form, channels=form.channels or (1 if grey else 3))

    def split(part: FileSplit) -> Split:
        images = FolderImages(part.files, form, (*shape, form.channels), must_be_grey=inferred)
        return Split(images, part.labels, [path.relative_to(root).as_posix() for path in part.files])

    return ImageData(
        split(layout.train),
        split(layout.test),
        n_classes=len(layout.classes),
        class_names=layout.classes,
        notes=layout.notes,
    )


def _common_shape(files: Sequence[Path], form: ImageForm) -> tuple[tuple[int, int], bool]:
    """Height and width of all pictures, and whether all of them are grey."""
    if form.size is not None:
        some = files[:: max(1, len(files) // SCANNED)]
        grey = form.channels == 1 or (form.channels is None and all(read_header(path).grey for path in some))
        return (form.size, form.size), grey
    first, grey = read_header(files[0]), True
    for path in files:
        header = read_header(path)
        grey &= header.grey
        if header[:2] != first[:2]:
            raise InputError(
                f"{path}: {header.width}x{header.height} pixels, but {files[0].name} has "
                f"{first.width}x{first.height}; all images must have one size: --image_size S makes them SxS"
            )
    return first[:2], grey


class FolderImages:
    """Picture files of one shape, each read when it is asked for; what is wrong with one is an InputError.

    must_be_grey: the pictures were taken for grey ones after a look at some of them.
    """

    def __init__(
        self, files: Sequence[Path], form: ImageForm, shape: tuple[int, int, int], must_be_grey: bool = False
    ) -> None:
        self.files, self.form, self.shape, self.must_be_grey = list(files), form, shape, must_be_grey

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.files[index]
        if self.must_be_grey and not read_header(path).grey:
            raise InputError(f"{path}: has colours, others are grey; choose with --channels 3, or 1 for grey")
        pixels = read_picture(path, self.form)
        if pixels.shape != self.shape:  # its header said otherwise
            raise InputError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, expected {self.shape[1::-1]}")
        return pixels


# --- arrays -----------------------------------------------------------------------------------------------------


def _from_arrays(path: Path, form: ImageForm) -> ImageData:
    with damage_named(path, "cannot be read as an array; expected .npy or .npz"):
        arrays = read_archive(path) if path.suffix == ".npz" else {"images": map_array(path)}
    if "x_train" in arrays and "x_test" in arrays:
        splits = [_array_split(path, arrays, [name], form, [f"y{name[1:]}"]) for name in ("x_train", "x_test")]
    else:
        both = _array_split(path, arrays, IMAGE_NAMES, form, LABEL_NAMES)
        is_test = every_tenth(len(both.images))
        splits = [_chosen(both, np.flatnonzero(which)) for which in (~is_test, is_test)]
    if splits[0].images[0].shape != splits[1].images[0].shape:
        raise InputError(f"{path}: x_train and x_test hold images of different shapes; --image_size S makes them SxS")
    known = [split.labels for split in splits if split.labels is not None]
    n_classes = int(max(labels.max() for labels in known)) + 1 if len(known) == len(splits) else 0
    return ImageData(*splits, n_classes=n_classes, class_names=tuple(map(str, range(n_classes))))


def _array_split(
    path: Path, arrays: Mapping[str, np.ndarray], images: Sequence[str], form: ImageForm, labels: Sequence[str]
) -> Split:
    """The first entry that goes by one of the names, of several-dimensional ones the first of all; and its labels."""
    named = [arrays[name] for name in images if name in arrays and arrays[name].ndim >= 3]
    found = [*named, *(values for values in arrays.values() if values.ndim >= 3), *arrays.values()]
    if not found:
        raise InputError(f"{path}: holds no array; expected {ARRAYS}")
    numbers = next((arrays[name] for name in labels if name in arrays and arrays[name].ndim <= 2), None)
    pictures = _images_last(path, found[0])
    if numbers is not None:
        numbers = _checked_labels(path, numbers, len(pictures))
    return Split(ArrayImages(pictures, form), numbers)


def _images_last(path: Path, images: np.ndarray) -> np.ndarray:
    """The images as [N, H, W, C], whichever of the known layouts they have."""
    if images.ndim == 3:
        images = images[..., None]
    channels_last = images.ndim == 4 and images.shape[-1] in (1, 3, 4)
    channels_first = images.ndim == 4 and images.shape[1] in (1, 3, 4) and not channels_last
    if images.dtype.kind == "f" or images.dtype.itemsize > 2:
        remedy = "; scale it to 0 ... 255 and save it .astype(np.uint8)"
    else:
        remedy = ""
    known = images.dtype in (np.uint8, np.uint16, bool)
    if not known or not (channels_last or channels_first) or len(images) < 2:
        raise InputError(f"{path}: {list(images.shape)} of {images.dtype}; expected {ARRAYS}{remedy}")
    return np.moveaxis(images, 1, -1) if channels_first else images


def _checked_labels(path: Path, labels: np.ndarray, n: int) -> np.ndarray:
    labels = labels.reshape(-1)
    if len(labels) != n or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise InputError(
            f"{path}: {len(labels)} labels of {labels.dtype} for {n} images; expected whole numbers from 0, below "
            f"{MAX_CLASSES}"
        )
    return labels.astype(np.int64)


class ArrayImages:
    """Images [N, H, W, C] of an array, each made what the model takes when it is asked for."""

    def __init__(self, images: np.ndarray, form: ImageForm) -> None:
        self.images, self.form = images, form

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return array_to_pixels(self.images[index], self.form)


def _chosen(split: Split, indices: np.ndarray) -> Split:
    labels = None if split.labels is None else split.labels[indices]
    return Split(SelectedImages(split.images, indices), labels, [str(index) for index in indices])
