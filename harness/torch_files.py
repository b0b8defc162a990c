"""Torch files of any origin: tensors and plain containers only, nothing in them is run, memory is bounded.

Three gates before anything is believed. An archive must be what torch.save writes, byte for byte where its parts lie,
with the right checksums (harness/torch_archives.py). Its pickle is read as text first and may name only what a
checkpoint needs: even torch's restricted unpickler would call, say, bytearray(2**40). And a tensor may not claim more
numbers than the file holds for it. Torch is given what was checked: another file of that name would not be read.
"""

import hashlib
import io
import pickletools
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from harness.files import RefusedFile as RefusedFile
from harness.files import open_file
from harness.torch_archives import SIGNATURE, CheckedFile, read_entries

LEGACY_PICKLES = 5  # magic number, protocol, system, content, storage keys; the numbers follow
MAX_PICKLE_BYTES = 2**26  # the names and shapes of a checkpoint take some 100 kB
MAX_ITEMS = 10**6  # of nested containers, those shared counted each time; a checkpoint has some 10,000
MAX_DEPTH = 50

_HARMLESS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch(\.storage)? (\w+Storage|Size)"
    r"|torch b?float\w+|torch u?int\d+|torch bool"
)
_NUMBERS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
_CALLS_BY_OTHER_NAMES = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


def load_tensors(path: str | Path, max_bytes: int) -> Any:
    """Load what torch.save wrote, on the CPU, in the memory of the tensors alone.

    Raises RefusedFile, or OSError if the file cannot be read at all.
    """
    with open_file(path, max_bytes) as file:
        size = file.seek(0, io.SEEK_END)
        try:
            checked = _checked_archive(file, size, str(path)) or _checked_legacy(file, size, str(path))
            with warnings.catch_warnings(action="ignore"):  # about unusual pickles; the refusal says enough
                content = torch.load(checked, map_location="cpu", weights_only=True)
            checked.check_numbers()
        except (RefusedFile, OSError):
            raise
        except Exception as error:  # a damaged or hostile file can fail anywhere inside the parsers
            raise RefusedFile(f"damaged ({type(error).__name__})") from None
    _check_size(content)
    _check_tensors(content, size)
    return content


def _checked_archive(file: BinaryIO, size: int, name: str) -> CheckedFile | None:
    """The archive for torch.load, its pickle and its other small entries checked; None where it is no archive."""
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        return None
    entries = read_entries(file, size)
    small = [entry for entry in entries if not entry.holds_numbers]
    if any(entry.size > MAX_PICKLE_BYTES for entry in small):
        raise RefusedFile("damaged (an endless pickle)")
    checked = CheckedFile(file, size, name, entries)
    for entry in small:
        content = checked.content(entry)
        if entry.name == "data.pkl":
            _check_pickle(io.BytesIO(content))
    checked.seek(0)
    return checked


def _checked_legacy(file: BinaryIO, size: int, name: str) -> CheckedFile:
    """A file of the format before version 1.6 for torch.load, its pickles checked."""
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        _check_pickle(file)
    checked = CheckedFile(file, size, name, in_memory=file.tell())
    for _ in range(LEGACY_PICKLES):
        _check_pickle(checked)  # what is in memory now: the file may have changed in between
    checked.seek(0)
    return checked


# --- pickles ----------------------------------------------------------------------------------------------


def _check_pickle(file: BinaryIO) -> None:
    """Read one pickle without obeying it; RefusedFile if it names anything that a checkpoint has no need of."""
    start = file.tell()
    weights = _Weights()
    for opcode, argument, _ in pickletools.genops(file):
        harmful = opcode.name == "GLOBAL" and not _HARMLESS.fullmatch(argument)
        if harmful or opcode.name in _CALLS_BY_OTHER_NAMES:
            raise RefusedFile("holds other objects than tensors, and could run code")
        if file.tell() - start > MAX_PICKLE_BYTES:
            raise RefusedFile("damaged (an endless pickle)")
        weights.follow(opcode, argument)


class _Weights:
    """How many items each thing on a pickle's stack holds, those shared counted each time.

    A tuple of two times the same tuple, and so on, makes a short pickle of 2^60 items, which nobody could hash.
    """

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do to the weights what the opcode does to the things."""
        name = opcode.name
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._combine(opcode)

    def _combine(self, opcode: pickletools.OpcodeInfo) -> None:
        before = opcode.stack_before
        if pickletools.markobject in before:
            height = self.marks.pop() - before.index(pickletools.markobject)
        else:
            height = len(self.stack) - len(before)
        if height < 0:
            raise RefusedFile("damaged (a pickle that takes what is not there)")
        weight = 1 + sum(self.stack[height:])
        if weight > MAX_ITEMS:
            raise RefusedFile("holds containers within containers beyond all measure")
        self.stack[height:] = [weight] * len(opcode.stack_after)


# --- contents ---------------------------------------------------------------------------------------------


def _check_size(content: Any) -> None:
    """Refuse lists shared beyond measure, which grow after a pickle knows them, before anyone walks into them."""
    waiting: list[tuple[Any, int]] = [(content, 0)]
    n_items = 0
    while waiting:
        item, depth = waiting.pop()
        n_items += 1
        if n_items > MAX_ITEMS or depth > MAX_DEPTH:
            raise RefusedFile("holds containers within containers beyond all measure")
        if isinstance(item, (Mapping, list, tuple)):
            parts = item.values() if isinstance(item, Mapping) else item
            waiting.extend((part, depth + 1) for part in parts)


def _check_tensors(content: Any, size: int) -> None:
    """Refuse views larger than their storage (a stride of 0 repeats a number 2^40 times), and what is no plain array:
    sparse, conjugated by a mark instead of by its numbers, or of numbers that hardly anything can be done with.
    """
    claimed = 0
    for tensor in tensors_in(content):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
            raise RefusedFile("holds tensors that are not plain arrays")
        if tensor.dtype not in _NUMBERS:
            raise RefusedFile(f"holds numbers of the kind {tensor.dtype}, which no checkpoint has")
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


def digest(content: Any) -> str:
    """SHA-256 over nested dicts, lists and tuples: names, numbers, and the types, shapes and bits of tensors.

    It is the same after saving and loading. RefusedFile where a container holds itself or the like, TypeError where
    there is anything else.
    """
    result = hashlib.sha256()
    n_items = 0
    waiting: list[tuple[Any, int]] = [(content, 0)]
    while waiting:
        item, depth = waiting.pop()
        n_items += 1
        if n_items > MAX_ITEMS or depth > MAX_DEPTH:
            raise RefusedFile("holds containers within containers beyond all measure")
        if isinstance(item, Tensor):
            _add_tensor(result, item)
        elif isinstance(item, (Mapping, list, tuple)):
            kind = "dict" if isinstance(item, Mapping) else "list" if isinstance(item, list) else "tuple"
            _add(result, f"{kind} {len(item)}")
            inside = [part for pair in item.items() for part in pair] if isinstance(item, Mapping) else item
            waiting.extend((part, depth + 1) for part in reversed(inside))
        elif isinstance(item, float):
            _add(result, f"float {float(item).hex()}")
        elif item is None or isinstance(item, (bool, int, str)):
            _add(result, f"{type(item).__name__} {item if isinstance(item, str) else _hexadecimal(item)}")
        else:
            raise TypeError(f"a {type(item).__name__} cannot be saved")
    return result.hexdigest()


def _hexadecimal(item: int | None) -> str:
    return "None" if item is None else hex(item)


def _add(result: "hashlib._Hash", text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    result.update(struct.pack("<Q", len(content)) + content)


def _add_tensor(result: "hashlib._Hash", tensor: Tensor) -> None:
    _add(result, f"tensor {tensor.dtype} {list(tensor.shape)}")
    if tensor.numel():
        # A copy even where it says it is contiguous: one number may have any stride, by which it is not seen as bytes.
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        result.update(flat.view(torch.uint8).numpy())
