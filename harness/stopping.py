"""The end of work: after a signal or a time, by an error of one line, with a status for the shell."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

from harness import terminal
from harness.errors import InputError, reason

INTERRUPTED = 130  # the status that shells give to a process which ended by SIGINT
WISHES = tuple(  # to stop: of a person, of a batch queue, of a terminal or a connection that is gone
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_HANG_UP = getattr(signal, "SIGHUP", None)
SAME_INTERRUPT = 0.25  # seconds: torchrun hands a terminal's Ctrl-C on to processes that have had it already

Result = TypeVar("Result")


def exit_status(
    job: Callable[[], int | None], report: Callable[[Exception], None] | None = None, quiet: bool = False
) -> int:
    """Do a job and return its status for the shell: what it returns, 130 after Ctrl-C, and 1 after an InputError, an
    OSError or a lack of memory, which become one line on stderr, or what `report` makes of them. quiet: only warnings,
    errors and results are said.
    """
    report = report or terminal.error
    with terminal.ready(quiet), _threads_of_libraries(), _Interrupt() as interrupt:
        status, ended = 0, False
        try:
            try:
                interrupt.held = False
                safe_point()
                status = job() or 0
            except Exception as error:
                if not _interrupted():  # else it is what some library made of that
                    report(_in_one_line(error))
                    status = 1
            interrupt.held = True
        except KeyboardInterrupt:
            ended = True
        if ended or _interrupted():
            terminal.note("interrupted")
            return INTERRUPTED
        return status


def _in_one_line(error: Exception) -> InputError:
    """What went wrong by no fault of ours; raises the error itself where it is one."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError):
        return InputError(reason(error))
    # torch has no class of its own for the memory of the CPU
    lack = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
    if lack and isinstance(error, (MemoryError, RuntimeError)):
        said = " ".join(str(error).split())[:120]
        return InputError(f"out of memory{f' ({said})' if said else ''}; choose smaller sizes")
    raise error


def leave(status: int) -> NoReturn:
    """Exit with a status for the shell; Ctrl-C while Python puts its things away ends that without a traceback."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(status))
    sys.exit(status)


@contextmanager
def _threads_of_libraries() -> Iterator[None]:
    """Leave the OSErrors of other threads, such as TensorBoard's, to those who hear of them in the main one; and a
    Ctrl-C that reached the callback of a library, which nothing can leave, to the next who asks.
    """
    before, callbacks = threading.excepthook, sys.unraisablehook

    def hook(what: "threading.ExceptHookArgs") -> None:
        if not issubclass(what.exc_type, OSError):
            before(what)

    def unraisable(what: "sys.UnraisableHookArgs") -> None:
        if not (what.exc_type is KeyboardInterrupt and _interrupted()):
            callbacks(what)

    threading.excepthook, sys.unraisablehook = hook, unraisable
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before, callbacks


class _Stopped(Exception):
    pass


class _Interrupt:
    """Ctrl-C while a command works and no StopRequest is there: KeyboardInterrupt, once.

    A library may turn it into an error of its own, or lose it: so safe points and StopRequests ask whether it came.
    Another one changes nothing, so that the first is dealt with, or, SAME_INTERRUPT later, ends the process at once.
    """

    def __init__(self) -> None:
        self.at = math.inf  # time of the first
        self.held = True  # no exception now: before and after the job, and by `uninterrupted`
        self._process = os.getpid()

    def __enter__(self) -> "_Interrupt":
        global _interrupt
        # Only where nobody else takes it: not within another command, in a thread, or where a shell has it ignored.
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
            self._before, _interrupt = signal.signal(signal.SIGINT, self._note), self
        return self

    def __exit__(self, *_: object) -> None:
        global _interrupt
        if _interrupt is self:
            signal.signal(signal.SIGINT, self._before)
            _interrupt = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            signal.default_int_handler(number, frame)
        if self.at == math.inf:
            self.at = time.monotonic()
            if not self.held:
                raise KeyboardInterrupt
        elif time.monotonic() - self.at >= SAME_INTERRUPT:
            _end_now()


def _interrupted() -> bool:
    return _interrupt is not None and _interrupt.at < math.inf


_interrupt: _Interrupt | None = None  # of the command under way
_stoppable: "StopRequest | None" = None  # whose `unless_stopped` is under way


def safe_point() -> None:
    """A place between two parts of a longer work, where a signal that came meanwhile may end it.

    Under a StopRequest it ends what is done by its `unless_stopped`, and nothing else; elsewhere an interrupt that got
    lost is KeyboardInterrupt here. What must be put back belongs in a `finally`.
    """
    if _stoppable is not None and _stoppable.signal is not None:
        raise _Stopped
    if _interrupted():
        raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context of code that no exception may enter, as what numba compiled: Ctrl-C is dealt with after it.

    A second one ends the process all the same.
    """
    if _interrupt is None or _interrupt.held or threading.current_thread() is not threading.main_thread():
        yield
        return
    _interrupt.held = True
    try:
        yield
    finally:
        _interrupt.held = False
    safe_point()


class StopRequest:
    """A wish to end a run before its last step: after SIGINT, SIGTERM, SIGHUP, or `hours`; asked before steps.

    A signal is only noted: nothing is raised into code that does not expect it. A second SIGINT, of a person who does
    not want to wait, ends the process at once, as SIGKILL would. Several different ones, and a SIGINT that comes by
    two ways at the same time, are one wish. SIGHUP is left alone where it is ignored, as under nohup.
    """

    def __init__(self, hours: float | None = None) -> None:
        self.signal: int | None = None
        self._hours, self._deadline = hours, math.inf if hours is None else time.monotonic() + 3600 * hours
        self._interrupted_at, self._settled = math.inf, False
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return self.signal is not None or time.monotonic() >= self._deadline

    def exit_status(self, saved: bool, finished: bool, resume: str) -> int:
        """Say how the run ended, and return the status for the shell: 128 + signal after one, 1 if its last checkpoint
        could not be `saved`; 0 after all of it, and after `hours`, so that a chain of batch jobs goes on.

        resume: how to go on, as in "go on with ...".
        """
        if not saved:
            terminal.error(f"the last checkpoint could not be saved; free some space, {resume}")
            return 1
        if self.signal is not None:
            terminal.say(f"stopped by {signal.Signals(self.signal).name}; {resume}")
            return 128 + self.signal
        if not finished:
            terminal.say(f"stopped after {self._hours:g} hours; {resume}")
        return 0

    def __enter__(self) -> "StopRequest":
        heeded = [one for one in WISHES if one != _HANG_UP or signal.getsignal(one) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heeded}
        if _interrupted():  # and lost in what was done before
            self.signal, self._interrupted_at, _interrupt.at = signal.SIGINT, _interrupt.at, math.inf
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def settle(self, number: int | None) -> None:
        """Take this signal, or none, for the one that came; others that come from now on change nothing."""
        self._settled, self.signal = True, number

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._settled:
            return
        if os.getpid() != self._process:  # a data loading process that has not yet said that it leaves signals alone
            return
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at >= SAME_INTERRUPT:
                _end_now()
            self._interrupted_at = min(self._interrupted_at, time.monotonic())
        self.signal = self.signal or number

    def unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """Do what may be left half done, such as an evaluation, and return its result.

        A signal before it, or before the last of its safe points, ends it there: None.
        """
        global _stoppable
        before, _stoppable = _stoppable, self
        try:
            safe_point()
            return work()
        except _Stopped:
            return None
        finally:
            _stoppable = before


class SharedStop(StopRequest):
    """A StopRequest that the processes of a pool see too.

    `shared` goes to them with the arguments of the pool's initializer, and makes the same of it there, which they ask
    and do not enter.
    """

    def __init__(self, shared: Any = None) -> None:
        self.shared = multiprocessing.RawValue("i", 0)  # no lock that a process dies with
        super().__init__()
        if shared is not None:  # not before: a wish that came already would be cleared
            self.shared = shared

    @property
    def signal(self) -> int | None:
        """The signal that came."""
        return self.shared.value or None

    @signal.setter
    def signal(self, number: int | None) -> None:
        self.shared.value = number or 0


def _end_now() -> None:
    """End this process and those that load its data, from within a signal handler: nothing else of ours runs."""
    for child in multiprocessing.active_children():
        with suppress(OSError):
            os.kill(child.pid, signal.SIGKILL)
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def leave_signals_to_the_main_process(worker: int) -> None:
    """`worker_init_fn` of data loaders. Ctrl-C and batch queues signal every process of a job; the main one, which
    has yet to write its checkpoint, decides when its workers stop: by SIGTERM too, so the sender is looked at.
    """
    for number in WISHES:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where workers end at any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_at_the_parents_word, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_at_the_parents_word() -> None:
    main = multiprocessing.parent_process().pid  # with "forkserver", the system's parent is the server
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)


@contextmanager
def worker_deaths_named(remedy: str) -> Iterator[None]:
    """Turn torch's report of a dead data loading process into an InputError of one line, which ends with `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise InputError(f"a data loading process died ({reason}), as when memory runs out; {remedy}") from None
