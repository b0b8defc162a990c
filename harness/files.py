"""Files that appear whole or not at all, tables that outlive a full disk."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")  # the number is that of the process


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, the file takes its place in one step.

    The data reach the disk before the name does, so a crash leaves either the old file or the new one. Whatever
    goes wrong inside the block, the temporary file is removed and `path` is as it was. The folder is made if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # a link somebody left under this name would be followed
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
        if (match := _TEMPORARY.fullmatch(path.name)) and not _is_alive(int(match[1]))
    ]
    for path in debris:
        path.unlink(missing_ok=True)
    return debris


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


class Appended:
    """A text file that grows by whole writes; what a full disk refuses is kept and written with what comes next."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed with the run)
        self._pending = b""

    def write(self, text: str) -> None:
        """Append; an OSError says that the disk refused, and nothing is lost."""
        self._pending += text.encode()
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self) -> None:
        """Close without another attempt."""
        self._file.close()
