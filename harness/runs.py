"""What a long run needs besides its mathematics: a lock, a record, a way to stop, a judge of bad steps.

Knows nothing of vocoders or images; both train.py use it.
"""

import json
import math
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from harness.errors import InputError
from harness.files import Appended, remove_debris, written_whole

VERSION = "0.1.0"  # of this project, for the record of a run
LOCK_NAME, RECORD_NAME, CONFIG_NAME = "run.lock", "run_record.jsonl", "config.json"
MAX_NAMES = 16  # of files in one message

Result = TypeVar("Result")

# --- the run folder ---------------------------------------------------------------------------------------


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Hold the folder for one training run, and clear away what a killed one left half-written.

    The lock belongs to this process and dies with it, SIGKILL included; worker processes do not inherit it.
    InputError, naming the holder, where another run has it, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another output directory or mend its permissions"
        ) from None
    with file:
        _take(file, folder)
        remove_debris(folder)
        yield


def _take(file: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks; there the second run is not noticed
        return
    try:
        # lockf and not flock: a lock of the latter kind lives on in the data workers that outlive a killed run
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "unknown"
        raise InputError(
            f"{folder}: another run is writing there ({holder}); stop it, or choose another output directory"
        ) from None
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}", file=file, flush=True)


def record_start(folder: Path, config: dict[str, Any], **facts: Any) -> None:
    """Write down what this start runs: `config.json`, every key spelt out, and one more line in `run_record.jsonl`."""
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
    with written_whole(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    table = Appended(folder / RECORD_NAME)
    try:
        table.write(json.dumps(record) + "\n")
    finally:
        table.close()


def git_commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, with "-dirty" if tracked files differ from it; None outside of one."""
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


def make_deterministic() -> None:
    """Only algorithms that give the same result twice, on the same machine; costs some speed on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it first starts
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def exit_status(job: Callable[[], int | None], report: Callable[[Exception], None] | None = None) -> int:
    """Do a job and return its status for the shell: what it returns, 130 after Ctrl-C, and 1 after an InputError, an
    OSError or a lack of memory, which become one line on stderr, or what `report` makes of them.
    """
    report = report or _report
    try:
        return job() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        report(error)
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for the memory of the CPU
        lack = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not lack:
            raise
        report(InputError(f"out of memory ({' '.join(str(error).split())[:120]}); choose smaller sizes"))
    return 1


def _report(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)


# --- stopping ---------------------------------------------------------------------------------------------


class _StopNow(Exception):
    pass


class StopRequest:
    """When a run is to end before its last step: after SIGINT, SIGTERM, or `hours`; asked between steps.

    A second SIGINT stops at once, and `unless_stopped` ends its work at the first signal.
    """

    def __init__(self, hours: float | None = None) -> None:
        self.signal: int | None = None
        self._deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
        self._interruptible = False

    def __bool__(self) -> bool:
        return self.signal is not None or time.monotonic() >= self._deadline

    def exit_status(self, saved: bool, finished: bool) -> int:
        """Say how the run ended, and return the status for the shell: 128 + signal after one, 1 if its last checkpoint
        could not be `saved`; 0 after all of it, and after --max_hours, so that a chain of batch jobs goes on.
        """
        if not saved:
            print("error: the last checkpoint could not be saved; free some space, go on with --resume latest",
                  file=sys.stderr)  # fmt: skip
            return 1
        if self.signal is not None:
            print(f"stopped by {signal.Signals(self.signal).name}; go on with --resume latest")
            return 128 + self.signal
        if not finished:
            print("stopped after --max_hours; go on with --resume latest")
        return 0

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self._interruptible:
            self._interruptible = False
            raise _StopNow

    def unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """Do what may be left half done, such as an evaluation, and return its result.

        A signal, before or during it, ends it at once: None.
        """
        try:
            self._interruptible = True
            try:
                return work() if self.signal is None else None
            finally:
                self._interruptible = False
        except _StopNow:
            return None


def leave_signals_to_the_main_process(worker: int) -> None:
    """`worker_init_fn` of data loaders. Ctrl-C and batch queues signal every process of a job; the main one, which
    has yet to write its checkpoint, decides when its workers stop: by SIGTERM too, so the sender is looked at.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where workers end at any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_at_the_parents_word, daemon=True).start()


def _end_at_the_parents_word() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def worker_deaths_named() -> Iterator[None]:
    """Turn torch's report of a dead data loading process into an InputError of one line."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise InputError(
            f"a data loading process died ({reason}), as when memory runs out; the checkpoints are intact: go on with "
            "--resume latest, with fewer workers (num_workers) if it happens again"
        ) from None


# --- steps that are not finite ----------------------------------------------------------------------------


class BadSteps:
    """Judges the results of steps: reports each whose loss or gradient was not finite, and ends a run of them.

    files: the names of the training files of a step's batch, by the step's number from 0; the data order is a
    function of it, so they are looked up only when needed. in_a_row: bad steps just before the first one judged.
    """

    def __init__(
        self, limit: int, files: Callable[[int], Sequence[str]], say: Callable[[str], None], in_a_row: int = 0
    ) -> None:
        self.limit, self.files, self.say, self.in_a_row = limit, files, say, in_a_row

    def judge(self, iteration: int, loss: float, norm: float) -> bool:
        """Whether the step that ended at `iteration` was good; InputError when `limit` in a row were not."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.say(
            f"warning: iteration {iteration}: loss {loss:.4g}, gradient norm {norm:.4g}; step skipped, the weights "
            f"stay. Its files: {_shown(self.files(iteration - 1))}"
        )
        if self.in_a_row >= self.limit:
            steps = range(max(0, iteration - self.in_a_row), iteration)
            names = dict.fromkeys(name for step in steps for name in self.files(step))
            raise InputError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to iteration "
                f"{iteration}; the checkpoints before them are intact: look at the files with --check_data, or go on "
                f"from a checkpoint with a lower learning rate. Files: {_shown(list(names))}"
            )
        return False


def _shown(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
