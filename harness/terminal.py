"""The one place that speaks to the terminal. Progress bars stay whole: lines are written above them."""

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """A line on stdout, for what a command was asked to tell."""
    tqdm.write(text, file=sys.stdout)


def note(text: str) -> None:
    """A line on stderr."""
    tqdm.write(text, file=sys.stderr)


def warn(text: str) -> None:
    """A warning on stderr: work goes on."""
    note(f"warning: {text}")


def error(text: object) -> None:
    """An error on stderr: work ends."""
    note(f"error: {text}")
