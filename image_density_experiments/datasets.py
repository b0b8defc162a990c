"""Image datasets, each as a train and a test split of uint8 images: embedded, downloaded, or the user's own."""

import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from harness.arrays import map_array, read_archive
from harness.downloads import RemoteFile, check_file, damage_named, download
from harness.errors import InputError
from harness.files import read_bytes, written_whole
from image_density_experiments.folders import every_tenth
from image_density_experiments.own_images import load_own_images
from image_density_experiments.pickles import read_arrays
from image_density_experiments.pictures import ImageForm
from image_density_experiments.splits import ImageData as ImageData
from image_density_experiments.splits import JoinedImages, Split

CIFAR10 = RemoteFile(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    size=170_052_171,
)
CIFAR10_PYTHON = RemoteFile(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    size=170_498_071,
)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")
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
IMAGENET_CLASSES = 1000
MAX_BATCH_BYTES = 2**26  # of CIFAR-10; they have 31 MB
PATCH, TRAIN_STRIDE, TEST_STRIDE = 32, 8, 16  # pixels


def load_images(
    name: str, dataroot: str | Path, allow_download: bool = False, form: ImageForm | None = None
) -> ImageData:
    """The dataset of that name from `dataroot`, a folder or the file itself. Raises InputError.

    form: how own pictures become images; the other datasets are what they are.
    """
    if name == OWN:
        return load_own_images(Path(dataroot), form or ImageForm())
    if name not in DATASETS:
        raise InputError(f"dataset {name!r}: unknown; there are {', '.join(ALL)}")
    data = DATASETS[name](Path(dataroot), allow_download)
    if form is not None and (form.size is not None or form.channels not in (None, data.image_shape[2])):
        raise InputError(
            f"dataset {name}: images of {data.image_shape}; --image_size and --channels are for own images"
        )
    return data


# --- embedded datasets -------------------------------------------------------------------------------------------


def _patches(dataroot: Path, allow_download: bool) -> ImageData:
    """32x32 patches of the two photographs that scikit-learn ships; the right fifth of each is for test."""
    from sklearn.datasets import load_sample_images  # slow to import

    photographs = load_sample_images().images
    edges = [photograph.shape[1] * 4 // 5 for photograph in photographs]
    train = [_cut(photo[:, :edge], TRAIN_STRIDE) for photo, edge in zip(photographs, edges, strict=True)]
    test = [_cut(photo[:, edge:], TEST_STRIDE) for photo, edge in zip(photographs, edges, strict=True)]
    return ImageData(_labelled(train), _labelled(test), n_classes=2, class_names=("temple", "flower"))


def _cut(photograph: np.ndarray, stride: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (PATCH, PATCH), axis=(0, 1))
    return windows[::stride, ::stride].transpose(0, 1, 3, 4, 2).reshape(-1, PATCH, PATCH, 3)


def _labelled(groups: Sequence[np.ndarray]) -> Split:
    """Images whose label is the number of their group."""
    return Split(np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(group) for group in groups]))


def _digits(dataroot: Path, allow_download: bool) -> ImageData:
    """The 1,797 handwritten digits of 8x8 that scikit-learn ships, grey, in 16 steps; every tenth is for test."""
    from sklearn.datasets import load_digits  # slow to import

    content = load_digits()
    images = (content.images * 16).clip(0, 255).astype(np.uint8)[..., None]  # 0 ... 16; 4 bits lose only the last
    is_test = every_tenth(len(images))
    train, test = (Split(images[which], content.target[which].astype(np.int64)) for which in (~is_test, is_test))
    return ImageData(train, test, n_classes=10, class_names=DIGITS)


# --- downloaded datasets ----------------------------------------------------------------------------------------


def _cifar10(dataroot: Path, allow_download: bool) -> ImageData:
    """From the binary or the Python archive, or what they unpack to, whichever is there."""
    read = _cifar_reader(dataroot, allow_download)
    train = [read(f"data_batch_{number}") for number in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    splits = Split(images, labels), Split(*read("test_batch"))
    return ImageData(*splits, n_classes=10, shift=True, flip=True, class_names=CIFAR10_CLASSES)


def _cifar_reader(dataroot: Path, allow_download: bool) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """A function from the name of a batch to its images and labels."""
    for folder in (dataroot, dataroot / "cifar-10-batches-py", dataroot / "cifar-10-batches-bin"):
        if (folder / "test_batch").is_file():
            return lambda name: _cifar_pickle(_batch(folder / name), folder / name)
        if (folder / "test_batch.bin").is_file():
            return lambda name: _cifar_records(_batch(folder / f"{name}.bin"), folder / f"{name}.bin")
    in_python = dataroot.name == CIFAR10_PYTHON.name or (
        (dataroot / CIFAR10_PYTHON.name).is_file() and not (dataroot / CIFAR10.name).is_file()
    )
    path = _obtain(CIFAR10_PYTHON if in_python else CIFAR10, dataroot, allow_download)

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        member = f"cifar-10-batches-py/{name}" if in_python else f"cifar-10-batches-bin/{name}.bin"
        with damage_named(path, "not the archive of CIFAR-10"), tarfile.open(path) as archive:
            content = archive.extractfile(member).read()  # read where it is: nothing half unpacked
        return (_cifar_pickle if in_python else _cifar_records)(content, path)

    return read


def _batch(path: Path) -> bytes:
    with damage_named(path, "not a batch of CIFAR-10"):
        return read_bytes(path, MAX_BATCH_BYTES)


def _cifar_records(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of records of one label byte and 3 x 1024 bytes of colour planes."""
    with damage_named(path, "not a batch of CIFAR-10"):
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 3073)
    return _from_planes(records[:, 1:]), records[:, 0].astype(np.int64)


def _cifar_pickle(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of a batch of the Python version, none of whose code is run."""
    with damage_named(path, f"not a batch of CIFAR-10; {CIFAR10.name} holds the same without pickles"):
        batch = read_arrays(content)
        images, labels = _from_planes(batch["data"]), np.array(batch["labels"], dtype=np.int64)
        if labels.shape != (len(images),):
            raise ValueError(f"{len(images)} images with {len(labels)} labels")
    return images, labels


def _from_planes(planes: np.ndarray) -> np.ndarray:
    """[N, 3072] -> [N, 32, 32, 3]."""
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _svhn(dataroot: Path, allow_download: bool) -> ImageData:
    if dataroot.is_file():
        raise InputError(f"{dataroot}: SVHN is two files; give the folder that holds {SVHN_TRAIN.name} and the other")
    train, test = (_svhn_split(_obtain(file, dataroot, allow_download)) for file in (SVHN_TRAIN, SVHN_TEST))
    return ImageData(train, test, n_classes=10, shift=True, class_names=DIGITS)


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
    numbers = {path: re.fullmatch(r"train_data_batch_([0-9]{1,4})\.npz", path.name) for path in dataroot.glob("*.npz")}
    train = sorted((path for path in numbers if numbers[path]), key=lambda path: int(numbers[path][1]))
    validation = dataroot / "val_data.npz"
    if not train or not validation.is_file():
        raise InputError(
            f"{dataroot}: no train_data_batch_1.npz ... and val_data.npz of downsampled ImageNet there; image-net.org "
            "gives them out after registration, so --download cannot"
        )
    return ImageData(_imagenet_split(train, size), _imagenet_split([validation], size), n_classes=IMAGENET_CLASSES)


def _imagenet_split(files: Sequence[Path], size: int) -> Split:
    parts = [_unpacked_npz(path, size) for path in files]
    return Split(JoinedImages([images for images, _ in parts]), np.concatenate([labels for _, labels in parts]))


def _unpacked_npz(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images as a memory map [N, size, size, 3], and labels [N]; the map is written beside the file on first use."""
    unpacked = path.with_suffix(".images.npy")
    complaint = f"not a file of ImageNet at {size}x{size}"
    with damage_named(path, complaint):
        content = read_archive(path)
        labels = _imagenet_labels(content["labels"])
        if not unpacked.is_file():
            with written_whole(unpacked) as temporary, open(temporary, "wb") as file:
                np.save(file, content["data"].reshape(-1, 3, size, size))
        del content
    with damage_named(unpacked, "cannot be read; remove it, it is made anew"):
        images = map_array(unpacked)
    if images.shape != (len(labels), 3, size, size) or images.dtype != np.uint8:
        raise InputError(f"{unpacked}: shape {list(images.shape)} of {images.dtype}; remove it, it is made anew")
    return images.transpose(0, 2, 3, 1), labels


def _imagenet_labels(values: np.ndarray) -> np.ndarray:
    """Numbers of the classes [N] from 0; in the files they count from 1."""
    labels = values.reshape(-1)
    if labels.dtype.kind not in "iu" or not labels.size or labels.min() < 1 or labels.max() > IMAGENET_CLASSES:
        raise ValueError(f"labels of {labels.dtype}, expected 1 to {IMAGENET_CLASSES}")
    return labels.astype(np.int64) - 1


DATASETS: dict[str, Callable[[Path, bool], ImageData]] = {
    "patches": _patches,
    "cifar10": _cifar10,
    "svhn": _svhn,
    "imagenet32": lambda dataroot, allow_download: _imagenet(32, dataroot, allow_download),
    "imagenet64": lambda dataroot, allow_download: _imagenet(64, dataroot, allow_download),
    "digits": _digits,
}
OWN = "folder"
ALL = (*DATASETS, OWN)
