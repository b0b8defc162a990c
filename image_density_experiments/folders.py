"""Folders of pictures as people lay them out: with a test folder or without, a subfolder per class or none.

Left out are hidden files and folders, and files that equal another one byte for byte: a copy on the other side of the
split would be a test image that was trained on.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import InputError, reason
from harness.files import RefusedFile, open_file
from image_density_experiments.pictures import MAX_PICTURE_BYTES, SUFFIXES

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that is there is for test
TEST_EVERY = 10  # without a split of their own, every tenth image is for test


@dataclass(frozen=True)
class FileSplit:
    """Files of a split with the numbers of their classes [N], where the folder tells classes apart."""

    files: tuple[Path, ...]
    labels: np.ndarray | None


@dataclass(frozen=True)
class Layout:
    """Contents of a folder; `classes` are names in the order of the labels."""

    train: FileSplit
    test: FileSplit
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def lay_out(root: Path) -> Layout:
    """The train and test files of a folder. Raises InputError where there are not both."""
    folders, notes = _split_folders(root)
    listed = [image_files(folder) for folder in folders]
    kept, n_copies = _without_copies(listed)
    if n_copies:
        notes.append(f"{n_copies} files that equal another one are left out")
    if not kept[-1]:
        raise InputError(f"{folders[-1]}: every image equals one for training; give it images of its own")
    parents = [
        [path.relative_to(folder).parts[:-1] for path in files] for folder, files in zip(folders, kept, strict=True)
    ]
    classes = _classes(parents[0])
    labels = [_labels(names, classes) for names in parents]
    if classes and any(numbers is None for numbers in labels):
        notes.append(f"{folders[-1].name}/ has not the class folders of {folders[0].name}/: no labels")
        classes, labels = (), [None, None]
    splits = [FileSplit(tuple(files), numbers) for files, numbers in zip(kept, labels, strict=True)]
    return Layout(*(_held_out(root, splits[0]) if len(splits) == 1 else splits), classes, tuple(notes))


def image_files(folder: Path) -> list[Path]:
    """All visible picture files below a folder, in the order of their paths. Raises InputError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and _is_visible(path, folder))
    if not files:
        others = Counter(path.suffix for path in folder.rglob("*") if path.suffix and path.is_file())
        found = f"; it holds {others.most_common(1)[0][0]} files" if others else ""
        raise InputError(f"{folder}: holds no images{found}; expected {', '.join(SUFFIXES)}")
    return files


def _is_visible(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts) and path.is_file()


def _split_folders(root: Path) -> tuple[list[Path], list[str]]:
    """The folders for training and for test, or the root alone; and what is left out beside them."""
    by_name = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = next((by_name[name] for name in TRAIN_NAMES if name in by_name), None)
    tests = [by_name[name] for name in TEST_NAMES if name in by_name]
    if train is None or not tests:
        return [root], []
    notes = [f"{path.name}/ is left out: the test images are those of {tests[0].name}/" for path in tests[1:]]
    return [train, tests[0]], notes


def _without_copies(groups: Sequence[Sequence[Path]]) -> tuple[list[list[Path]], int]:
    """The groups without files that equal an earlier one, and how many those were. Only equal sizes are compared."""
    sizes = {path: path.stat().st_size for group in groups for path in group}
    n_of_size = Counter(sizes.values())
    seen: set[bytes | Path] = set()
    kept: list[list[Path]] = []
    for group in groups:
        kept.append([])
        for path in group:
            key = _digest(path) if n_of_size[sizes[path]] > 1 else path
            if key not in seen:
                kept[-1].append(path)
            seen.add(key)
    return kept, len(sizes) - sum(map(len, kept))


def _digest(path: Path) -> bytes:
    try:
        with open_file(path, MAX_PICTURE_BYTES) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (RefusedFile, OSError) as error:
        raise InputError(f"{path}: cannot be read as an image ({reason(error)}); mend or remove it") from None


Parents = list[tuple[str, ...]]  # of each file, the folders it lies in below the split's


def _classes(parents: Parents) -> tuple[str, ...]:
    """Names of the class folders, if every file lies in one and there are several; else none."""
    depth = _shared_depth(parents)
    if any(len(names) <= depth for names in parents):
        return ()
    return tuple(sorted({names[depth] for names in parents}))


def _shared_depth(parents: Parents) -> int:
    """How many folders all files have in common: CelebA as unpacked is a folder in a folder."""
    levels = list(zip(*parents, strict=False))
    return next((depth for depth, names in enumerate(levels) if len(set(names)) > 1), len(levels))


def _labels(parents: Parents, classes: Sequence[str]) -> np.ndarray | None:
    """Numbers of the classes [N]; None without classes, or if a file lies in none of them."""
    number = {name: index for index, name in enumerate(classes)}
    for depth in range(_shared_depth(parents) + 1 if classes else 0):
        found = [number.get(names[depth]) if len(names) > depth else None for names in parents]
        if None not in found:
            return np.array(found, dtype=np.int64)
    return None


def _held_out(root: Path, everything: FileSplit) -> list[FileSplit]:
    """Nine of ten files for training, every tenth for test."""
    is_test = every_tenth(len(everything.files))
    if is_test.all():
        raise InputError(f"{root}: holds a single image; at least two are needed, one of them for test")
    return [
        FileSplit(
            tuple(path for path, chosen in zip(everything.files, which, strict=True) if chosen),
            None if everything.labels is None else everything.labels[which],
        )
        for which in (~is_test, is_test)
    ]


def every_tenth(n: int) -> np.ndarray:
    """Mask of the test images among n: [n], at least the last one."""
    is_test = np.arange(n) % TEST_EVERY == TEST_EVERY - 1
    is_test[-1] |= not is_test.any()
    return is_test
