"""The error that is the user's to mend, how values and names look in it, and what a command can advise."""

import reprlib
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 2_000  # characters of one line
MAX_SHOWN = 60  # characters of a value or key in it


def one_line(text: object, limit: int = MAX_MESSAGE) -> str:
    """The text with line ends and all that a terminal would obey or could not print escaped, its middle left out where
    it is too long.
    """
    return _printable(_shortened(str(text), limit))


def lines(text: object, limit: int = 100 * MAX_MESSAGE) -> str:
    """`one_line` for a text of several lines."""
    return "\n".join(map(_printable, _shortened(str(text), limit).split("\n")))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def show(value: Any) -> str:
    """The value as Python writes it, cut to a length that fits a message; quick however large or nested it is."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, MAX_SHOWN + 2, MAX_SHOWN + 2
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 16


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line: what was got, expected, what to do."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))
        self.full = str(message)  # of an error of another process, with the traceback that torch puts before it


def reason(error: Exception) -> str:
    """The reason in one line: of an OSError which file and what of it, without its number; of others the first line."""
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names}: {error.strerror}" if names else error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """Advice to the user of a command, in words of its own flags and keys; each ends a message."""

    resume: str  # go on with a run that ended early
    weights_only: str  # leave the rest of a checkpoint that does not fit aside
    bad_steps: str  # the loss or its gradient is not finite, step after step
    worker_died: str  # a data loading process died, probably for lack of memory
