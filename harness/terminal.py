"""The one place that speaks to the terminal, and never fails: what it says is not the work.

A full disk behind stdout, a pipe that nobody reads any more, a terminal that is gone, closed descriptors, letters that
an ASCII terminal lacks: the line is lost or written differently, and the work goes on. Progress bars stay whole: lines
are written above them; where there is no terminal, in a log file say, they are lines now and then. What could be
mistaken for an order to the terminal is escaped, and colours are for terminals only, and not where NO_COLOR is set.
"""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import ObjectWrapper, disp_len

from harness import errors

LINE_SECONDS = 30.0  # from one line about progress to the next where there is no terminal to draw a bar on
_YELLOW, _RED = "\x1b[33m", "\x1b[31m"
_QUIET = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning, RuntimeWarning)

# tqdm's own lock is shared with every process forked off this one: killed while it holds it, one would silence all.
tqdm.set_lock(threading.RLock())

_hushed = False  # whether only warnings, errors and results are wanted


def hush(quiet: bool) -> None:
    """Say only warnings, errors and results from now on, to the end of the command; or all again."""
    global _hushed
    _hushed = quiet


def say(text: object) -> None:
    """A line on stdout, for a result that a command was asked for; or several."""
    _write(sys.stdout, errors.lines(text))


def tell(text: object) -> None:
    """A line on stdout about the work under way, unless only results are wanted."""
    if not _hushed:
        say(text)


def note(text: object) -> None:
    """A line on stderr."""
    _write(sys.stderr, errors.one_line(text))


def warn(text: object) -> None:
    """A warning on stderr: work goes on."""
    _write(sys.stderr, _coloured("warning:", _YELLOW, errors.one_line(f"warning: {text}")))


def error(text: object) -> None:
    """An error on stderr: work ends."""
    _write(sys.stderr, _coloured("error:", _RED, errors.one_line(f"error: {text}")))


def bar(*arguments: Any, **options: Any) -> tqdm:
    """A progress bar on stderr, as tqdm makes it; where that is no terminal, a line every LINE_SECONDS.

    disable=None: nothing where there is no terminal.
    """
    if sys.stderr is None or _hushed:
        options["disable"] = True
    if _is_terminal(sys.stderr):
        return _Bar(*arguments, file=_Unfailing(sys.stderr), **options)
    seconds = LINE_SECONDS
    options = {"delay": seconds, "mininterval": seconds, "maxinterval": seconds, **options}
    return _Lines(*arguments, file=_WithoutBlanks(sys.stderr), **options)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _is_terminal(stream: TextIO | None) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # ValueError: it is closed
        return stream is not None and stream.isatty()
    return False


def _coloured(word: str, colour: str, line: str) -> str:
    """The line with its first word in colour, where that is wanted (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not _is_terminal(sys.stderr):
        return line
    return f"{colour}{word}\x1b[0m{line.removeprefix(word)}"


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            tqdm.write(text, file=_Unfailing(stream))


class _Bar(tqdm):
    """A bar that is drawn on its own stream only; tqdm's flushes others first, which may fail."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """A function that writes a line over the one before."""
        width = 0

        def draw(line: str) -> None:
            nonlocal width
            file.write(f"\r{line}{' ' * (width - disp_len(line))}")
            width = disp_len(line)

        return draw


class _Lines(_Bar):
    """A bar of lines, each written once, for a file."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """A function that writes a line below the one before."""

        return lambda line: file.write(f"{line}\n")


class _Unfailing(ObjectWrapper):
    """A stream whose failures are nobody's; what it cannot encode is escaped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            encoding = getattr(self._wrapped, "encoding", None) or "utf-8"
            self._wrapped.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._wrapped.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._wrapped.flush()

    def __eq__(self, other: object) -> bool:
        return self._wrapped == getattr(other, "_wrapped", other)

    __hash__ = None


class _WithoutBlanks(_Unfailing):
    """A stream that leaves out the ends of lines that tqdm writes to leave a bar, or to clear its place."""

    def write(self, text: str) -> int:
        return super().write(text) if text.strip() else len(text)

    def __eq__(self, other: object) -> bool:
        return self is other  # to tqdm it is where nothing else is written: it would say the bar again after each line

    __hash__ = None


# --- around a command -------------------------------------------------------------------------------------


@contextlib.contextmanager
def ready(quiet: bool = False) -> Iterator[None]:
    """Context of a whole command: its output can fail without consequence, and libraries' warnings are lines as ours.
    quiet: only warnings, errors and results are said.

    Descriptors 0 to 2 that are closed are opened to nothing, or the next file to be opened, a checkpoint say, would
    get what libraries write to stderr.
    """
    _fill_closed_descriptors()
    hush(quiet)
    said: set[str] = set()

    def show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
        text = errors.one_line(str(message).strip().partition("\n")[0], 300)
        if not issubclass(category, _QUIET) and text not in said:
            said.add(text)
            warn(text)

    before, warnings.showwarning = warnings.showwarning, show_warning
    last_resort, logging.lastResort = logging.lastResort, _Said(logging.WARNING)
    try:
        yield
    finally:
        warnings.showwarning, logging.lastResort = before, last_resort
        hush(False)
        settle()


class _Said(logging.Handler):
    """A logging handler, for libraries that nobody listens to otherwise."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(errors.one_line(record.getMessage(), 300))


def _fill_closed_descriptors() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


@contextlib.contextmanager
def libraries_hushed() -> Iterator[None]:
    """Context in which nothing reaches stderr's descriptor: for libraries in C that speak to it, in a single thread."""
    with contextlib.ExitStack() as stack:
        try:
            before = os.dup(2)
            stack.callback(os.close, before)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, nowhere)
            os.dup2(nowhere, 2)
            stack.callback(os.dup2, before, 2)
        except OSError:  # no stderr, or no descriptor left: then it is as it is
            pass
        yield


def settle() -> None:
    """Let go of what could not be written, or the interpreter would end with a complaint and a status of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                stream.flush()
