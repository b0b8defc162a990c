"""Image datasets, each as a train and a test split of uint8 images: embedded, downloaded, or the user's own."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from harness.downloads import RemoteFile, check_file, damage_named, download
from harness.errors import InputError
from harness.files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

CIFAR10 = RemoteFile(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    size=170_052_171,
)
SVHN_TRAIN = RemoteFile(
    url="http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
    sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    size=182_040_794,
)
SVHN_TEST = RemoteFile(
    url="http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
    sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    size=64_275_384,
)
PATCH, TRAIN_STRIDE, TEST_STRIDE = 32, 8, 16  # pixels
TEST_EVERY = 10  # without a split of their own, every tenth image is for test
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class ImageSequence(Protocol):
    """An array [N, H, W, 3] of uint8, or what looks like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Split:
    """Images with their labels [N], or None."""

    images: ImageSequence
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class ImageData:
    """A dataset and how its training images may be augmented."""

    train: Split
    test: Split
    n_classes: int = 0  # 0: without labels
    shift: bool = False
    flip: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return tuple(int(side) for side in self.train.images[0].shape)


def load_images(name: str, dataroot: str | Path, allow_download: bool = False) -> ImageData:
    """The dataset of that name from `dataroot`, a folder or the file itself. Raises InputError."""
    if name not in DATASETS:
        raise InputError(f"dataset {name!r}: unknown; there are {', '.join(DATASETS)}")
    return DATASETS[name](Path(dataroot), allow_download)


# --- the embedded dataset ---------------------------------------------------------------------------------------


def _patches(dataroot: Path, allow_download: bool) -> ImageData:
    """32x32 patches of the two photographs that scikit-learn ships; the right fifth of each is for test."""
    from sklearn.datasets import load_sample_images  # slow to import

    photographs = load_sample_images().images
    edges = [photograph.shape[1] * 4 // 5 for photograph in photographs]
    train = [_cut(photo[:, :edge], TRAIN_STRIDE) for photo, edge in zip(photographs, edges, strict=True)]
    test = [_cut(photo[:, edge:], TEST_STRIDE) for photo, edge in zip(photographs, edges, strict=True)]
    return ImageData(_labelled(train), _labelled(test), n_classes=len(photographs))


def _cut(photograph: np.ndarray, stride: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (PATCH, PATCH), axis=(0, 1))
    return windows[::stride, ::stride].transpose(0, 1, 3, 4, 2).reshape(-1, PATCH, PATCH, 3)


def _labelled(groups: Sequence[np.ndarray]) -> Split:
    """Images whose label is the number of their group."""
    return Split(np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(group) for group in groups]))


# --- downloaded datasets ----------------------------------------------------------------------------------------


def _cifar10(dataroot: Path, allow_download: bool) -> ImageData:
    path = _obtain(CIFAR10, dataroot, allow_download)
    with (
        damage_named(path, "not the archive of CIFAR-10"),
        tarfile.open(path) as archive,
    ):  # read where it is: nothing to unpack, nothing half unpacked
        names = [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)]
        train = [_cifar_batch(archive, name) for name in names]
        test = _cifar_batch(archive, "cifar-10-batches-bin/test_batch.bin")
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return ImageData(Split(images, labels), Split(*test), n_classes=10, shift=True, flip=True)


def _cifar_batch(archive: tarfile.TarFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of records of one label byte and 3 x 1024 bytes of colour planes."""
    records = np.frombuffer(archive.extractfile(name).read(), dtype=np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)


def _svhn(dataroot: Path, allow_download: bool) -> ImageData:
    if dataroot.is_file():
        raise InputError(f"{dataroot}: SVHN is two files; give the folder that holds {SVHN_TRAIN.name} and the other")
    train, test = (_svhn_split(_obtain(file, dataroot, allow_download)) for file in (SVHN_TRAIN, SVHN_TEST))
    return ImageData(train, test, n_classes=10, shift=True)


def _svhn_split(path: Path) -> Split:
    from scipy.io import loadmat  # slow to import

    with damage_named(path, "not a file of SVHN"):
        content = loadmat(path)
        labels = content["y"].reshape(-1).astype(np.int64) % 10  # the digit 0 has the label 10
        images = np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2))
        if images.shape != (len(labels), 32, 32, 3) or images.dtype != np.uint8:
            raise ValueError(f"{list(images.shape)} of {images.dtype} with {len(labels)} labels")
    return Split(images, labels)


def _obtain(file: RemoteFile, dataroot: Path, allow_download: bool) -> Path:
    """The checked local copy of a remote file."""
    path = dataroot if dataroot.is_file() else dataroot / file.name
    if not path.is_file():
        if not allow_download:
            raise InputError(
                f"{path}: not there; fetch it with --download ({file.size / 1e6:.0f} MB), or say with --dataroot "
                "where it is"
            )
        download(file, dataroot, remedy=f"put it into {dataroot}")
    check_file(path, file)
    return path


def _imagenet(size: int, dataroot: Path, allow_download: bool) -> ImageData:
    """Downsampled ImageNet (Chrabaszcz et al., 2017): train_data_batch_1..10.npz and val_data.npz."""
    train = sorted(dataroot.glob("train_data_batch_*.npz"), key=lambda path: int(path.stem.rpartition("_")[-1]))
    validation = dataroot / "val_data.npz"
    if not train or not validation.is_file():
        raise InputError(
            f"{dataroot}: no train_data_batch_1.npz ... and val_data.npz of downsampled ImageNet there; image-net.org "
            "gives them out after registration, so --download cannot"
        )
    return ImageData(_imagenet_split(train, size), _imagenet_split([validation], size), n_classes=1000)


def _imagenet_split(files: Sequence[Path], size: int) -> Split:
    parts = [_unpacked_npz(path, size) for path in files]
    return Split(JoinedImages([images for images, _ in parts]), np.concatenate([labels for _, labels in parts]))


def _unpacked_npz(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images as a memory map [N, size, size, 3], and labels [N]; the map is written beside the file on first use."""
    unpacked = path.with_suffix(".images.npy")
    complaint = f"not a file of ImageNet at {size}x{size}"
    with damage_named(path, complaint), np.load(path, allow_pickle=False) as content:
        labels = np.asarray(content["labels"]).astype(np.int64).reshape(-1) - 1
        if not unpacked.is_file():
            with written_whole(unpacked) as temporary, open(temporary, "wb") as file:
                np.save(file, content["data"].reshape(-1, 3, size, size))
    with damage_named(unpacked, "cannot be read; remove it, it is made anew"):
        images = np.load(unpacked, mmap_mode="r", allow_pickle=False)
    if images.shape != (len(labels), 3, size, size) or images.dtype != np.uint8:
        raise InputError(f"{unpacked}: shape {list(images.shape)} of {images.dtype}; remove it, it is made anew")
    return images.transpose(0, 2, 3, 1), labels


class JoinedImages:
    """Several arrays of images as one, without copying them together."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - self.ends[part]]  # counted from the end of its part


# --- own images -------------------------------------------------------------------------------------------------


def _own_images(dataroot: Path, allow_download: bool) -> ImageData:
    """A folder of images, with train/ and test/ in it or not, or one array file (N, H, W, 3)."""
    if not dataroot.exists():
        raise InputError(f"{dataroot}: not there; --dataset folder needs --dataroot, a folder of images or an array")
    if dataroot.is_dir() and (dataroot / "train").is_dir() and (dataroot / "test").is_dir():
        train, test = (FolderImages(_image_files(dataroot / name)) for name in ("train", "test"))
        if train[0].shape != test[0].shape:
            raise InputError(f"{test.files[0]}: {_size(test[0])}, but the training images are {_size(train[0])}")
        return ImageData(Split(train), Split(test))
    if dataroot.is_dir():
        files = _image_files(dataroot)
        held_out = set(files[TEST_EVERY - 1 :: TEST_EVERY] or files[-1:])
        test, train = sorted(held_out), [path for path in files if path not in held_out]
        if not train:
            raise InputError(f"{dataroot}: holds a single image; at least two are needed, one of them for test")
        images = FolderImages(files)  # all of one size
        return ImageData(Split(FolderImages(train, images.shape)), Split(FolderImages(test, images.shape)))
    images = _image_array(dataroot)
    is_test = np.arange(len(images)) % TEST_EVERY == TEST_EVERY - 1
    is_test[-1] |= not is_test.any()
    return ImageData(*(Split(SelectedImages(images, np.flatnonzero(which))) for which in (~is_test, is_test)))


def _image_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"{folder}: holds no images; expected {', '.join(IMAGE_SUFFIXES)}")
    return files


class FolderImages:
    """Image files of one size, each read when it is asked for; a damaged one is an InputError that names it."""

    def __init__(self, files: Sequence[Path], shape: tuple[int, ...] | None = None) -> None:
        self.files = list(files)
        self.shape = shape or self._common_shape()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        with _opened(self.files[index]) as image:
            return np.asarray(image.convert("RGB"))

    def _common_shape(self) -> tuple[int, int, int]:
        shapes = []
        for path in self.files:
            with _opened(path) as image:  # reads the header only
                shapes.append((image.height, image.width, 3))
            if shapes[-1] != shapes[0]:
                raise InputError(
                    f"{path}: {image.width}x{image.height} pixels, but {self.files[0].name} has "
                    f"{shapes[0][1]}x{shapes[0][0]}; all images must have one size"
                )
        return shapes[0]


@contextmanager
def _opened(path: Path) -> Iterator["Image"]:
    """A PIL image; whatever is wrong with its file becomes one line."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"{path}: cannot be read as an image ({reason}); mend or remove it") from None


def _image_array(path: Path) -> np.ndarray:
    """The array of a .npy file, or of the first entry of a .npz."""
    with damage_named(path, "cannot be read as an array; expected .npy or .npz"):
        content = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        images = content if path.suffix == ".npy" else content[content.files[0]]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) < 2:
        raise InputError(f"{path}: {list(images.shape)} of {images.dtype}; expected uint8 (N, H, W, 3), N at least 2")
    return images


class SelectedImages:
    """Some of the images of an array, without copying them."""

    def __init__(self, images: np.ndarray, indices: np.ndarray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[self.indices[index]]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]} pixels"


DATASETS: dict[str, Callable[[Path, bool], ImageData]] = {
    "patches": _patches,
    "cifar10": _cifar10,
    "svhn": _svhn,
    "imagenet32": lambda dataroot, allow_download: _imagenet(32, dataroot, allow_download),
    "imagenet64": lambda dataroot, allow_download: _imagenet(64, dataroot, allow_download),
    "folder": _own_images,
}
