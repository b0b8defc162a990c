"""Files: opened only if they are what they should be, written whole or not at all, appended to across a full disk."""

import csv
import errno
import io
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import InputError

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")  # the number is that of the process
BLOCK = 2**20  # bytes of a table read at once
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # a named pipe would be waited for until somebody writes
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class RefusedFile(ValueError):
    """The file is not what it should be; the message says why, in a few words."""


# --- reading ----------------------------------------------------------------------------------------------


def open_file(path: str | Path, max_bytes: int) -> BinaryIO:
    """Open a regular file for reading; the sizes of others, such as pipes and devices, say nothing.

    RefusedFile where it is another kind of thing or larger than max_bytes; OSError where it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_WAITING | _BINARY)
    except ValueError:  # a null byte, or half of a surrogate pair
        raise RefusedFile("that is no name of a file") from None
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise RefusedFile(f"{kind_of(status.st_mode)}, expected a file")
        if status.st_size > max_bytes:
            raise RefusedFile(f"{status.st_size} bytes, at most {max_bytes} are accepted")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """Content of a regular file of at most max_bytes, whatever it grows to meanwhile; errors as `open_file`."""
    with open_file(path, max_bytes) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise RefusedFile(f"it grows; at most {max_bytes} bytes are accepted")
    return content


def read_text(path: str | Path, max_bytes: int, errors: str = "strict") -> str:
    """Content of such a file as text, line ends made "\\n".

    RefusedFile also where it is not UTF-8, unless `errors` says what to do then, as for bytes.decode.
    """
    try:
        text = read_bytes(path, max_bytes).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise RefusedFile(f"not text in UTF-8: {error.reason} at byte {error.start}") from None
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def line_blocks(file: BinaryIO, max_line: int) -> Iterator[tuple[list[bytes], int]]:
    """Lines of an open file by blocks, those of spaces left out, and how many in each were longer than max_line bytes.

    A last line without its end is one that is being written, and is left out.
    """
    rest = b""
    while block := file.read(BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        whole = [line for line in lines if len(line) <= max_line]
        overlong = len(lines) - len(whole)
        if len(rest) > max_line:
            rest = bytes(max_line + 1)  # its end is too long as well
        yield [line for line in whole if line and not line.isspace()], overlong


def kind_of(mode: int) -> str:
    """Name of a kind of thing in the file system, by its `st_mode`."""
    return _KINDS.get(stat.S_IFMT(mode), "another thing")


# --- writing ----------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, the file takes its place in one step.

    The data reach the disk before the name does, so a crash leaves either the old file or the new one. Whatever
    goes wrong inside the block, the temporary file is removed and `path` is as it was; an OSError says which file it
    is of. The folder is made if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link somebody left under this name would be followed
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise
    _sync_folder(path.parent)


def write_table(path: str | Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole or not at all; of names that are not UTF-8, bytes become escapes, as in messages."""
    escaped = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with written_whole(path) as temporary, open(temporary, "w", **escaped) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def check_apart(outputs: Iterable[str | Path], inputs: Iterable[str | Path], remedy: str) -> None:
    """InputError where a file about to be written is one of the inputs, by whatever name; with the remedy."""
    there = {identity: path for path in outputs if (identity := _identity(path))}
    for path in inputs if there else ():
        if (output := there.get(_identity(path))) is not None:
            raise InputError(f"{output}: is {path}, which is read, and would be written over; {remedy}")


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a name that no file can have
        return None
    return status.st_dev, status.st_ino


def in_a_name(number: float) -> str:
    """A number in the name of a file: short, and another one for every other number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def write_keeping(path: Path, text: str) -> Path | None:
    """Write a text file whole; another one in its place is kept beside it as `NAME.1` or so, whose path is returned."""
    if path.is_file():
        with suppress(RefusedFile):
            if read_bytes(path, len(text.encode()) + 1) == text.encode():
                return None
    kept = _put_aside(path) if os.path.lexists(path) else None
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return kept


def _put_aside(path: Path) -> Path:
    """Give what is there a second name, where the file system can; else another one."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    kept = next(name for name in numbered if not os.path.lexists(name))
    try:
        os.link(path, kept, follow_symlinks=False)
    except FileExistsError:  # another process has just taken that name
        return _put_aside(path)
    except (OSError, NotImplementedError):  # a folder, or a file system without links
        os.replace(path, kept)
    return kept


def _sync_folder(folder: Path) -> None:
    # The rename itself is on disk only once the folder is; Windows has no such call.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Recognise the name of a file which `written_whole` is writing, or was writing when it was killed."""
    return bool(_TEMPORARY.fullmatch(path.name))


def remove_debris(folder: Path) -> list[Path]:
    """Remove what killed processes left of files they were writing, here and in subfolders; returns what it was."""
    debris = [
        path
        for path in folder.rglob(".*.tmp")
        if (match := _TEMPORARY.fullmatch(path.name)) and not _is_alive(int(match[1])) and not _is_folder(path)
    ]
    for path in debris:
        path.unlink(missing_ok=True)
    return debris


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_alive(process: int) -> bool:
    # Another job, say an evaluation, may be writing here at this moment; our own temporaries are not written yet.
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file that a run writes in place, made if needed; `flags` as for os.open.

    InputError where a link, or another thing than a file, was put there: what it leads to is not ours to change.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | _NO_LINKS | _NO_WAITING | _BINARY, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise InputError(f"{path}: a link, which is not followed; remove it") from None
        if error.errno == errno.ENXIO:  # a named pipe or a socket without a reader
            raise InputError(f"{path}: {kind_of(os.lstat(path).st_mode)}, expected a file; remove it") from None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    what = "one of several links to a file" if stat.S_ISREG(status.st_mode) else kind_of(status.st_mode)
    raise InputError(f"{path}: {what}, expected a file of its own; remove it")


class Appended:
    """A text file that grows by whole writes; what a full disk refuses is kept and written with what comes next.

    A link in its place is refused: InputError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(open_own(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)  # noqa: SIM115 (closed with the run)
        self._pending = b""

    def write(self, text: str) -> None:
        """Append; an OSError says that the disk refused, and nothing is lost."""
        self._pending += text.encode("utf-8", "backslashreplace")
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Close without another attempt."""
        self._file.close()
