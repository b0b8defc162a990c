"""Torch files of any origin: tensors and plain containers only, nothing in them is run, memory is bounded.

Three gates before anything is believed. The file must be stored, not compressed, so that it cannot unpack to more
than its size. Its pickle is read as text first and may name only what a checkpoint needs: even torch's restricted
unpickler would call, say, bytearray(2**40). And a tensor may not claim more numbers than the file holds for it.
"""

import io
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

ZIP_SIGNATURE = b"PK\3\4"  # by which torch itself tells its present format from the one before version 1.6
LEGACY_PICKLES = 5  # magic number, protocol, system, content, storage keys; the numbers follow
MAX_PICKLE_BYTES = 2**26  # the names and shapes of a checkpoint take some 100 kB

_HARMLESS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch(\.storage)? (\w+Storage|Size)"
    r"|torch b?float\w+|torch u?int\d+|torch bool"
)
_CALLS_BY_OTHER_NAMES = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


class RefusedFile(ValueError):
    """The file is not what it should be; the message says why, in a few words."""


def load_tensors(path: str | Path, max_bytes: int | None = None) -> Any:
    """Load what torch.save wrote, on the CPU. Raises RefusedFile, or OSError if the file cannot be read at all."""
    size = os.path.getsize(path)
    if max_bytes is not None and size > max_bytes:
        raise RefusedFile(f"{size} bytes, at most {max_bytes} are accepted")
    with open(path, "rb") as file:
        try:
            _check_pickles(file, size)
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):  # about unusual pickles; the refusal says enough
                content = torch.load(file, map_location="cpu", weights_only=True)
        except (RefusedFile, OSError):
            raise
        except Exception as error:  # a damaged or hostile file can fail anywhere inside the parsers
            raise RefusedFile(f"damaged ({type(error).__name__})") from None
    _check_tensors(content, size)
    return content


def _check_pickles(file: BinaryIO, size: int) -> None:
    if file.read(len(ZIP_SIGNATURE)) != ZIP_SIGNATURE:
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _check_pickle(file)
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise RefusedFile("unpacks to more than its size")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise RefusedFile("damaged (an endless pickle)")
                _check_pickle(io.BytesIO(archive.read(entry)))


def _check_pickle(file: BinaryIO) -> None:
    """Read one pickle without obeying it; RefusedFile if it names anything that a checkpoint has no need of."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        harmful = opcode.name == "GLOBAL" and not _HARMLESS.fullmatch(argument)
        if harmful or opcode.name in _CALLS_BY_OTHER_NAMES:
            raise RefusedFile("holds other objects than tensors, and could run code")
        if file.tell() - start > MAX_PICKLE_BYTES:
            raise RefusedFile("damaged (an endless pickle)")


def _check_tensors(content: Any, size: int) -> None:
    """Refuse views larger than their storage (a stride of 0 repeats a number 2^40 times), and sparse ones."""
    claimed = 0
    for tensor in tensors_in(content):
        if tensor.layout != torch.strided or tensor.is_meta:
            raise RefusedFile("holds tensors that are not plain arrays")
        claimed += tensor.numel() * tensor.element_size()
    if claimed > 2 * size:  # twice: weights may be shared under two names
        raise RefusedFile("unpacks to more than its size")


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Every tensor of nested dicts, lists and tuples; of a container met twice (or in itself) only once."""
    seen, waiting = set(), [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, Mapping) else item)
