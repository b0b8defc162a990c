"""Arrays of numpy's files, .npy and .npz: their headers are believed only as far as the file and a limit go.

An .npy is mapped, so that only what is looked at takes memory. An .npz of a few megabytes may promise gigabytes: the
sizes that its directory declares are added up before anything is unpacked, and no entry unpacks to more than that.
"""

import errno
import io
import math
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from harness.errors import show
from harness.files import RefusedFile, open_file
from harness.memory import available_bytes

MAX_FILE_BYTES = 2**40  # of what is mapped
MAX_UNPACKED_BYTES = 2**31  # of all arrays of an archive together
MAX_DIRECTORY_BYTES = 2**22  # some 60,000 entries
MAX_HEADER_BYTES = 2**10  # of numbers, numpy writes 128; longer ones take their parser seconds
_END = struct.Struct("<4s4H2LH")  # of a zip file without a comment: entries here and in all, directory's size and start
NUMBERS = "buifc"  # kinds of numpy's types
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Header:
    """Promise of an array: its shape, its type, the order of its axes; and where its numbers begin, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool
    start: int

    @property
    def n_bytes(self) -> int:
        """Size of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def map_array(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> np.ndarray:
    """The array of an .npy file, mapped into memory, not read. RefusedFile, or OSError where it cannot be opened."""
    with open_file(path, MAX_FILE_BYTES) as file:
        header = _header(file, file.seek(0, io.SEEK_END), max_bytes)
        order = "F" if header.by_columns else "C"
        if not header.n_bytes:
            return np.zeros(header.shape, header.dtype, order)
        return np.memmap(file, header.dtype, "r", header.start, header.shape, order)


def read_header(path: str | Path) -> Header:
    """The header of an .npy file, checked against the file's size; errors as `map_array`."""
    with open_file(path, MAX_FILE_BYTES) as file:
        return _header(file, file.seek(0, io.SEEK_END), MAX_FILE_BYTES)


def read_archive(path: str | Path, max_bytes: int = MAX_UNPACKED_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, in memory.

    RefusedFile where they are damaged, of more than max_bytes together, or of more than there is memory for; OSError.
    """
    with open_file(path, max_bytes) as file, _directory(file) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > max_bytes:
            raise RefusedFile(
                f"unpacks to {total} bytes, at most {max_bytes} are accepted; save an .npy, which is mapped"
            )
        if total > (available := available_bytes()):
            raise RefusedFile(f"unpacks to {total} bytes, {available:.0f} are free; save an .npy, which is mapped")
        if len({entry.filename for entry in entries}) < len(entries):
            raise RefusedFile("holds two arrays of one name")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise RefusedFile("packed otherwise than numpy does")
        return {entry.filename.removesuffix(".npy"): _unpacked(archive, entry) for entry in entries}


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with _damage_refused(), archive.open(entry) as member:
        beginning = member.read(MAX_HEADER_BYTES)
        header = _header(io.BytesIO(beginning), entry.file_size, entry.file_size)
        if header.start + header.n_bytes != entry.file_size:
            raise RefusedFile("damaged (an array of another size than its header says)")
        content = bytearray(header.n_bytes)
        place = len(beginning) - header.start
        content[:place] = beginning[header.start :]
        with memoryview(content) as view:
            while n := member.readinto(view[place:]):
                place += n
        if place < header.n_bytes or member.read(1):  # the end of an entry is where its checksum is compared
            raise RefusedFile("damaged (an array that ends early)")
        return np.ndarray(header.shape, header.dtype, content, order="F" if header.by_columns else "C")


def _directory(file: BinaryIO) -> zipfile.ZipFile:
    """The archive, its directory read; RefusedFile before that takes more memory than a directory should."""
    limited = _Limited(file, MAX_DIRECTORY_BYTES)
    with _damage_refused():
        archive = zipfile.ZipFile(limited)
        size = file.seek(-_END.size, io.SEEK_END)
        *_, here, n_entries, length, start, _comment = _END.unpack(file.read(_END.size))
    limited.left = math.inf
    if not here == n_entries == len(archive.infolist()) or start + length != size:
        raise RefusedFile("damaged (its directory is of another size than its end says)")
    return archive


class _Limited:
    """A file of which only so many bytes can be read."""

    def __init__(self, file: BinaryIO, left: float) -> None:
        self.file, self.left = file, left
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, n: int = -1) -> bytes:
        """Read as from any file; RefusedFile beyond what is left."""
        if self.left == math.inf:
            return self.file.read(n)
        content = self.file.read(self.left + 1 if n < 0 else min(n, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise RefusedFile("damaged (an endless directory)")
        return content


def _header(file: BinaryIO, size: int, max_bytes: int) -> Header:
    """The header at the beginning of a file of that size. RefusedFile where it promises more than is there."""
    file.seek(0)
    beginning = io.BytesIO(file.read(MAX_HEADER_BYTES))
    with _damage_refused():
        read = _READ_HEADER[np.lib.format.read_magic(beginning)]
        shape, by_columns, dtype = read(beginning)
        header = Header(tuple(int(n) for n in shape), dtype, by_columns, beginning.tell())
    if dtype.hasobject or dtype.kind not in NUMBERS or dtype.itemsize < 1:
        raise RefusedFile(f"holds {dtype.name}, expected numbers")
    if any(n < 0 for n in header.shape) or header.n_bytes > size - header.start:
        raise RefusedFile(f"damaged (its header promises {show(list(shape))} of {dtype.name}, there is less)")
    if header.n_bytes > max_bytes:
        raise RefusedFile(f"{header.n_bytes} bytes, at most {max_bytes} are accepted")
    return header


@contextmanager
def _damage_refused() -> Iterator[None]:
    """Turn what the parsers make of arbitrary bytes, which may be any exception, into a RefusedFile."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of headers that Python 2 wrote
            yield
    except RefusedFile:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is what seeking to nowhere gives
            raise
        reason = " ".join(str(error).split())[:80]
        raise RefusedFile(f"damaged ({reason or type(error).__name__})") from None
