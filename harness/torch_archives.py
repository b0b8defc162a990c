"""Archives of torch.save: the one way to read them, checked as they are read.

Torch writes a zip file of stored entries, one behind the other, then one directory of them. Whoever reads zip files
chooses what to believe where a file contradicts itself, and torch's own reader takes DATA.PKL for data.pkl. So every
byte must lie where torch.save puts it and say the same as the directory; then there is only one reading. Torch is given
what was checked from memory, and the numbers as they pass from the disk, by their checksums: no second copy of them.
"""

import bisect
import io
import itertools
import re
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from harness.files import RefusedFile

SIGNATURE = b"PK\3\4"  # by which torch itself tells its present format from the one before version 1.6
MAX_DIRECTORY_BYTES = 2**26
BLOCK = 2**22  # bytes of what torch leaves unread

# Signature, two versions, flags, method, time, date, CRC, two sizes, three lengths, disk, attributes, offset
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_UTF8, _DESCRIBED = 0x800, 0x8  # flags: names in UTF-8; CRC and sizes follow the content
_FULL, _FULL_16 = 0xFFFFFFFF, 0xFFFF  # the number is in the entry's extra field
_WIDE, _PADDING = 1, 0x4246  # kinds of extra fields: numbers of 64 bits; what aligns the content
_NAME = re.compile(
    r"([^/\0]+)/(data\.pkl|byteorder|version|data/(?:0|[1-9]\d{0,19})|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment)"
)


class Entry(NamedTuple):
    """An entry of the archive: its name below the folder that all share, where its content lies, and its checksum."""

    name: str
    start: int
    size: int
    crc: int

    @property
    def holds_numbers(self) -> bool:
        """True of a tensor's numbers, not of the entries that say how to read them."""
        return self.name.startswith("data/")


class Listed(NamedTuple):
    """A line of the directory."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int


@dataclass
class _Stretch:
    """A part of a file: in memory, or with the checksum of what passed of it."""

    start: int
    stop: int
    content: bytes | None
    entry: Entry | None = None
    passed: int = 0
    crc: int = 0


# --- the directory ----------------------------------------------------------------------------------------


def read_entries(file: BinaryIO, size: int) -> list[Entry]:
    """The entries of an archive, each checked to lie where and as torch.save writes it. Raises RefusedFile."""
    listed, end = _directory(file, size)
    entries, position, folders = [], 0, set()
    for number, line in enumerate(listed):
        after = listed[number + 1].offset if number + 1 < len(listed) else end
        start = _check_local(file, line, position)
        _require(start + line.size + _check_descriptor(file, line, start + line.size) == after)
        name = _NAME.fullmatch(line.name.decode("utf-8", "replace"))
        if name is None:
            raise RefusedFile("holds entries that torch.save does not write")
        folders.add(name[1])
        entries.append(Entry(name[2], start, line.size, line.crc))
        position = after
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names) or len(folders) != 1 or "data.pkl" not in names:
        raise RefusedFile("holds entries twice, or not those that torch.save writes")
    return entries


def _directory(file: BinaryIO, size: int) -> tuple[list[Listed], int]:
    """The lines of the directory in the order of their offsets, and where it begins."""
    tail = _at(file, max(0, size - _END.size), _END.size)
    mark, disk, first_disk, n_here, n, length, start, comment = _END.unpack(tail)
    _require(mark == b"PK\5\6" and disk in (0, _FULL_16) and first_disk in (0, _FULL_16) and comment == 0)
    end = size - _END.size
    locator = _at(file, max(0, end - _LOCATOR_64.size), _LOCATOR_64.size)
    if locator[:4] == b"PK\6\7":
        _, disk, place, n_disks = _LOCATOR_64.unpack(locator)
        end = end - _LOCATOR_64.size - _END_64.size
        wide = _END_64.unpack(_at(file, max(0, end), _END_64.size))
        _require(place == end and disk == 0 and n_disks <= 1 and wide[:2] == (b"PK\6\6", _END_64.size - 12))
        _require(wide[4:6] == (0, 0) and n in (wide[7], _FULL_16) and n_here in (wide[6], _FULL_16))
        _require(length in (wide[8], _FULL) and start in (wide[9], _FULL))
        n_here, n, length, start = wide[6:]
    _require(n_here == n and start + length == end and 0 < length <= MAX_DIRECTORY_BYTES)
    listed, content = [], _at(file, start, length)
    while content:
        line, content = _line(content)
        listed.append(line)
    _require(len(listed) == n and all(a.offset < b.offset for a, b in itertools.pairwise(listed)))
    return listed, start


def _line(content: bytes) -> tuple[Listed, bytes]:
    """The first line of a directory, and the rest."""
    _require(len(content) >= _CENTRAL.size)
    mark, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, offset = _CENTRAL.unpack_from(content)
    n_name, n_extra, n_comment = lengths
    _require(mark == b"PK\1\2" and disk == n_comment == 0 and flags in (_UTF8, _UTF8 | _DESCRIBED, 0, _DESCRIBED))
    if method != 0:
        raise RefusedFile("is compressed, and unpacks to more than its size")
    name, rest = content[_CENTRAL.size : _CENTRAL.size + n_name], content[_CENTRAL.size + n_name :]
    _require(len(rest) >= n_extra)
    wide = iter(struct.unpack(f"<{len(field) // 8}Q", field) if len(field := _wide(rest[:n_extra])) % 8 == 0 else ())
    size, packed, offset = (next(wide, -1) if value == _FULL else value for value in (size, packed, offset))
    _require(packed == size >= 0 and offset >= 0)
    return Listed(name, flags, crc, size, offset), rest[n_extra:]


def _wide(extra: bytes) -> bytes:
    """The 64-bit numbers of an extra field, which may hold padding besides."""
    found = b""
    while extra:
        _require(len(extra) >= 4)
        kind, length = struct.unpack_from("<HH", extra)
        _require(kind in (_WIDE, _PADDING) and len(extra) >= 4 + length)
        found = extra[4 : 4 + length] if kind == _WIDE else found
        extra = extra[4 + length :]
    return found


def _check_local(file: BinaryIO, line: Listed, position: int) -> int:
    """Check what stands before an entry's content, at `position`, against the directory; returns where it starts."""
    _require(line.offset == position)
    mark, _, flags, method, _, _, crc, packed, size, n_name, n_extra = _LOCAL.unpack(_at(file, position, _LOCAL.size))
    _require(mark == SIGNATURE and flags == line.flags and method == 0 and n_name == len(line.name))
    _require(crc in (line.crc, 0) and size in (line.size, 0, _FULL) and packed in (line.size, 0, _FULL))
    names = _at(file, position + _LOCAL.size, n_name + n_extra)
    _require(names[:n_name] == line.name)
    _wide(names[n_name:])
    return position + _LOCAL.size + n_name + n_extra


def _check_descriptor(file: BinaryIO, line: Listed, position: int) -> int:
    """Check what stands behind an entry's content; returns its length."""
    if not line.flags & _DESCRIBED:
        return 0
    found = _at(file, position, 24)
    for form in ("<4sIII", "<4sIQQ"):
        if line.size <= _FULL or form.endswith("QQ"):
            expected = struct.pack(form, b"PK\7\x08", line.crc, line.size, line.size)
            if found.startswith(expected):
                return len(expected)
    raise RefusedFile("damaged (its directory contradicts it)")


def _at(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes of the file; those beyond its end fail every check."""
    file.seek(start)
    return file.read(length).ljust(length, b"\0")


def _require(valid: bool) -> None:
    if not valid:
        raise RefusedFile("damaged (its directory is not one that torch.save writes)")


# --- the content ------------------------------------------------------------------------------------------


class CheckedFile(io.RawIOBase):
    """A file for torch.load: all but the numbers comes from memory, as it was checked.

    entries: of an archive; the numbers' checksums are taken while they are read, and judged by `check_numbers`.
    Without, of the format before version 1.6: its first `in_memory` bytes, those before the numbers, are kept.
    """

    def __init__(
        self, file: BinaryIO, size: int, name: str, entries: list[Entry] | None = None, in_memory: int = 0
    ) -> None:
        super().__init__()
        self.name = name  # as other files have one
        self._file, self._size, self._position = file, size, 0
        numbers = [entry for entry in entries or () if entry.holds_numbers and entry.size]
        self._stretches: list[_Stretch] = []
        position = 0
        for entry in numbers:
            self._keep(position, entry.start)
            self._stretches.append(_Stretch(entry.start, entry.start + entry.size, None, entry))
            position = entry.start + entry.size
        self._keep(position, in_memory if entries is None else size)
        if entries is None and in_memory < size:
            self._stretches.append(_Stretch(in_memory, size, None))
        self._stops = [stretch.stop for stretch in self._stretches]

    def _keep(self, start: int, stop: int) -> None:
        if start < stop:
            self._stretches.append(_Stretch(start, stop, _at(self._file, start, stop - start)))

    def content(self, entry: Entry) -> bytes:
        """Content of an entry that holds no numbers; RefusedFile where its checksum is another."""
        self.seek(entry.start)
        found = self.read(entry.size)
        if zlib.crc32(found) != entry.crc:
            raise RefusedFile("damaged (a checksum differs)")
        return found

    def check_numbers(self) -> None:
        """RefusedFile where the checksum of a tensor's numbers, read or not, is another than that in the archive."""
        for stretch in self._stretches:
            if stretch.entry is None:
                continue
            self._position = stretch.start + stretch.passed
            while stretch.passed < stretch.entry.size and self.read(min(BLOCK, stretch.stop - self._position)):
                pass
            if stretch.passed < stretch.entry.size or stretch.crc != stretch.entry.crc:
                raise RefusedFile("damaged (a checksum differs)")

    # --- what torch.load calls

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as in any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the place on; returns how many bytes there were."""
        view, done = memoryview(buffer).cast("B"), 0
        for stretch in itertools.islice(self._stretches, bisect.bisect_right(self._stops, self._position), None):
            if done == len(view):
                break
            n = min(len(view) - done, stretch.stop - self._position)
            part = view[done : done + n]
            if stretch.content is not None:
                first = self._position - stretch.start
                part[:] = stretch.content[first : first + n]
            else:
                self._file.seek(self._position)
                n = self._file.readinto(part)
                self._note(stretch, part[:n])
            done, self._position = done + n, self._position + n
            if n < len(part):
                break
        return done

    def _note(self, stretch: _Stretch, part: memoryview) -> None:
        """The checksum of a stretch that is read in order; from its start, it begins anew."""
        if self._position == stretch.start:
            stretch.passed = stretch.crc = 0
        if self._position == stretch.start + stretch.passed:
            stretch.crc, stretch.passed = zlib.crc32(part, stretch.crc), stretch.passed + len(part)
