"""Types of numbers on a command line: what argparse converts and refuses, each in one line."""

import argparse
import math
from collections.abc import Callable


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
