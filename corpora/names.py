"""Names of clips, made of paths that others chose: they lead nowhere else, and any list can hold them."""

import re
from collections.abc import Sequence
from pathlib import Path

from harness.errors import InputError

MAX_LETTERS, MAX_BYTES = 150, 220  # of a name; something goes behind it still


def plain_name(parts: Sequence[str]) -> str:
    """A clip's name from the parts of a path, of letters, digits and `_ . + -` only; the end of a long one is lost."""
    plain = re.sub(r"[^\w.+-]", "_", "_".join(parts)).strip("._") or "clip"
    return plain[:MAX_LETTERS].encode()[:MAX_BYTES].decode(errors="ignore")


def is_utf8(path: str | Path) -> bool:
    """Tell whether a path is text, as lists and the libraries that read sounds want it."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def check_listable(path: str | Path) -> None:
    """InputError where a line of a list would not be read as this path again, or as no path below this folder."""
    text = str(path)
    if not is_utf8(text):
        raise InputError(f"{text}: not UTF-8, which a list of clips is; choose another name")
    if text != text.lstrip() or text.startswith(("{", "\ufeff")) or any(mark in text for mark in "\n\r\t\0|"):
        raise InputError(
            f"{text!r}: a list of clips cannot hold a path with a line end, a tab, a bar, or a space or brace before "
            "it; choose another name"
        )
