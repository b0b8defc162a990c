"""The folder of a run: held by one process at a time, recorded, refused where it holds something else, cleared."""

import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from harness.errors import InputError
from harness.files import Appended, is_temporary, open_own, remove_debris, written_whole

VERSION = "0.1.0"  # of this project, for the record of a run
LOCK_NAME, RECORD_NAME, CONFIG_NAME = "run.lock", "run_record.jsonl", "config.json"


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Hold the folder for one training run, and clear away what a killed one left half-written.

    The lock belongs to this process and dies with it, SIGKILL included; worker processes do not inherit it.
    InputError, naming the holder, where another run has it, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(open_own(folder / LOCK_NAME, os.O_RDWR | os.O_APPEND), "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another output directory or mend its permissions"
        ) from None
    with file:
        _take(file, folder)
        remove_debris(folder)
        yield


def _take(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks; there the second run is not noticed
        return
    try:
        # lockf and not flock: a lock of the latter kind lives on in the data workers that outlive a killed run
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "unknown"  # InputError escapes what else it may hold
        raise InputError(
            f"{folder}: another run is writing there ({holder}); stop it, or choose another output directory"
        ) from None
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}", file=file, flush=True)


def record_start(folder: Path, config: dict[str, Any], **facts: Any) -> None:
    """Write down what this start runs: `config.json`, every key spelt out, and one more line in `run_record.jsonl`."""
    with written_whole(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    record = {
        "started": _now(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "directory": os.getcwd(),
        "version": VERSION,
        "git_commit": git_commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        **facts,
        "config": config,
    }
    _append(folder, record)


def record_more(folder: Path, **facts: Any) -> None:
    """Write down what turned out during a run, or was made with it later: one more line in its `run_record.jsonl`.

    A folder without that file is no run's, and stays as it is.
    """
    if (folder / RECORD_NAME).is_file():
        _append(folder, {"written": _now(), **facts})


def _append(folder: Path, record: dict[str, Any]) -> None:
    table = Appended(folder / RECORD_NAME)
    try:
        table.write(json.dumps(record) + "\n")
    finally:
        table.close()


def git_commit(root: Path) -> str | None:
    """Commit of the checkout at `root`, with "-dirty" if tracked files differ from it; None outside of one."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # the project was unpacked inside something else
        return _git(root, "rev-parse", "HEAD") + ("-dirty" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return result.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def require_empty(folder: Path, remedy: str) -> None:
    """Refuse a folder that a new run could not have for itself; nothing but an old lock or debris may be in it.

    InputError, which ends with `remedy`, where it holds anything else, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder; {remedy}")
    if _contents(folder):
        raise InputError(f"{folder}: not empty; {remedy}")


def require_only(folder: Path, patterns: Sequence[str]) -> None:
    """Refuse to clear a folder in which not everything matches the `patterns` of a run's own files: InputError."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder; name another")
    own = {path.name for path in _matching(folder, patterns)}
    if foreign := sorted(set(_contents(folder)) - own):
        raise InputError(f"{folder} also holds {foreign[0]!r}, which is not of a run; remove it yourself")


def clear(folder: Path, patterns: Sequence[str]) -> None:
    """Remove what a run wrote: every file, link and folder that matches one of the `patterns`."""
    for path in _matching(folder, patterns):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _contents(folder: Path) -> list[str]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [path.name for path in found if path.name != LOCK_NAME and not is_temporary(path)]


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]
