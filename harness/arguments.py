"""Parts that all command lines have: what each of them understands, and types of numbers that argparse converts and
refuses, each in one line."""

import argparse
import math
from collections.abc import Callable

import torch

from harness.folder import VERSION


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
            raise argparse.ArgumentTypeError(f"{text}: expected at least {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text}: expected at most {maximum}")
        return value

    convert.__name__ = "whole number"  # argparse says "invalid whole number value"
    return convert


def number(minimum: float, above: bool = False, maximum: float = 1e6) -> Callable[[str], float]:
    """An argparse type: finite numbers from `minimum`, or above it, to `maximum`."""

    def convert(text: str) -> float:
        value = float(text)
        if not minimum <= value < math.inf or (above and value == minimum):
            expected = f"a number above {minimum:g}" if above else f"a number of at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text}: expected at most {maximum:g}")
        return value

    convert.__name__ = "number"
    return convert
