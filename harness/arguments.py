"""Types of numbers on a command line: what argparse converts and refuses, each in one line."""

import argparse
import math
from collections.abc import Callable


def whole_number(minimum: int) -> Callable[[str], int]:
    """An argparse type: whole numbers of at least `minimum`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {minimum}")
        return value

    convert.__name__ = "whole number"  # argparse says "invalid whole number value"
    return convert


def number(minimum: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: finite numbers of at least `minimum`, or above it."""

    def convert(text: str) -> float:
        value = float(text)
        if not minimum <= value < math.inf or (above and value == minimum):
            expected = f"a number above {minimum:g}" if above else f"a number of at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    convert.__name__ = "number"
    return convert
