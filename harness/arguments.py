"""Parts that all command lines have: a parser whose complaints are printable, what each of them understands, and types
of numbers, each within a range."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch

from harness.errors import MAX_SHOWN, one_line
from harness.folder import VERSION

MAX_COMPLAINT = 300  # characters


class Parser(argparse.ArgumentParser):
    """An argument parser that repeats what it was given shortened and escaped."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Flags and what is left, as of any parser; before Python 3.13 `--flag=--` would pass for no value at all."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, got '--'")
        return super().parse_known_args(words, namespace)

    def refuse_unheeded(self, options: argparse.Namespace, job: str, goes_with: Mapping[str, Sequence[str]]) -> None:
        """End the program where a flag was given that the job does not heed; goes_with: jobs that do, by attribute."""
        for action in self._actions:
            jobs = goes_with.get(action.dest, (job,))
            if job not in jobs and getattr(options, action.dest) != action.default:
                flag = max(action.option_strings, key=len)
                self.error(f"{flag} goes with {either(jobs)}, and means nothing to {job}; leave it out")

    def error(self, message: str) -> NoReturn:
        """Print one line, and end the program with status 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message, MAX_COMPLAINT)} (-h lists all flags)\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that states every default; a description keeps its lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help, action.default
        stated = text is None or "default" in text or "%" in text
        if (
            stated
            or action.nargs == 0
            or any(value is nothing for nothing in (None, False, argparse.SUPPRESS))
            or value == []
        ):
            return text
        return f"{text} (default {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value})"


def either(words: Sequence[str]) -> str:
    """Words as a choice, `a, b or c`."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def add_general(parser: argparse.ArgumentParser, top: bool = True) -> None:
    """Add what every command understands; top: not of one command among several, where the whole line has it too."""
    general = parser.add_argument_group("general")
    quiet = False if top else argparse.SUPPRESS  # what was given before the command's name stays
    words = "say only warnings, errors and results (default: progress too)"
    general.add_argument("--quiet", action="store_true", default=quiet, help=words)
    if top:
        version = f"%(prog)s {VERSION}, torch {torch.__version__}"
        general.add_argument("--version", action="version", version=version, help="versions of this project and torch")


def whole_number(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: whole numbers from `minimum` to `maximum`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{_shown(text)}: expected at least {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{_shown(text)}: expected at most {maximum}")
        return value

    convert.__name__ = "whole number"  # argparse says "invalid whole number value"
    return convert


def number(minimum: float, above: bool = False, maximum: float = 1e6, below: bool = False) -> Callable[[str], float]:
    """An argparse type: finite numbers from `minimum`, or above it, to `maximum`, or below it."""

    def convert(text: str) -> float:
        value = float(text)
        if not minimum <= value < math.inf or (above and value == minimum):
            expected = f"a number above {minimum:g}" if above else f"a number of at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"{_shown(text)}: expected {expected}")
        if value > maximum or (below and value == maximum):
            expected = f"a number below {maximum:g}" if below else f"at most {maximum:g}"
            raise argparse.ArgumentTypeError(f"{_shown(text)}: expected {expected}")
        return value

    convert.__name__ = "number"
    return convert


def _shown(text: str) -> str:
    return one_line(text, MAX_SHOWN)
