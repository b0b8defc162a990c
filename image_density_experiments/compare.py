"""Runs side by side: `python -m image_density_experiments.compare RUN [RUN ...]`, or this file as a script.

Prints parameters and bits per dimension of each run's newest checkpoint, and draws the training curves.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # as a script: begin again as a module, for the reasons in train.py
    places = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "image_density_experiments.compare", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": os.pathsep.join(places)})
elif __name__ == "__main__":
    import harness.start  # noqa: F401

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from harness import terminal
from harness.errors import InputError, reason, show
from harness.files import RefusedFile, open_file
from harness.settings import parse_section
from harness.stopping import exit_status, leave
from image_density_experiments.checkpoint import list_checkpoints, newest_checkpoint
from image_density_experiments.entries import told
from image_density_experiments.figures import save_curves
from image_density_experiments.loop import EPOCH_FILE, STEP_FILE
from image_density_experiments.model import ImageFlow, ImageModelConfig, count_parameters

MAX_TABLE_BYTES = 2**28  # of a row per step


class Run(NamedTuple):
    """Facts that the folder of a run gives."""

    name: str
    model_type: str
    size: str
    parameters: int
    iteration: int
    train: float  # bits/dim, mean of the last epoch
    test: float
    curve: list[tuple[int, float]]  # training bits/dim by iteration


def read_run(folder: Path) -> Run:
    """Raises InputError where the folder holds no run with an epoch done."""
    checkpoints = list_checkpoints(folder)
    epochs = list(_rows(folder / EPOCH_FILE))
    if not checkpoints or not epochs:
        raise InputError(f"{folder}: holds no run with a whole epoch; train it first")
    start = told(newest_checkpoint(folder, told))
    config = parse_section(ImageModelConfig, start.config, f"checkpoint {start.path}: config.")
    steps, last = folder / STEP_FILE, epochs[-1]
    curve = [(_whole(row, "iteration", steps), _number(row, "bits_per_dim", steps)) for row in _rows(steps)]
    bits = [_number(last, column, folder / EPOCH_FILE) for column in ("train_bits_per_dim", "test_bits_per_dim")]
    iteration = _whole(last, "iteration", folder / EPOCH_FILE)
    with torch.device("meta"):  # counted, not computed with
        model = ImageFlow(config)
    return Run(
        name=folder.name,
        model_type=config.model_type,
        size=f"hidden {config.hidden_channels}, K {config.K}, L {config.L}",
        parameters=count_parameters(model),
        iteration=iteration,
        train=bits[0],
        test=bits[1],
        curve=curve,
    )


def _number(row: dict[str, str], column: str, path: Path) -> float:
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: {column} is {show(row.get(column))}, expected a number; mend it") from None


def _whole(row: dict[str, str], column: str, path: Path) -> int:
    value = _number(row, column, path)
    if not value.is_integer() or not 0 <= value < 2**53:
        raise InputError(f"{path}: {column} is {show(row[column])}, expected a whole number; mend it")
    return int(value)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if not path.exists():
        return
    try:
        with open_file(path, MAX_TABLE_BYTES) as file:
            yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
    except (RefusedFile, OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({reason(error)}); mend or remove it") from None


def print_table(runs: Sequence[Run]) -> None:
    """One line per run."""
    terminal.say(
        f"{'run':<16}{'model_type':<20}{'size':<26}{'parameters':>12}{'iteration':>11}{'train':>9}{'test':>9}  bits/dim"
    )
    for run in runs:
        terminal.say(
            f"{run.name:<16}{run.model_type:<20}{run.size:<26}{run.parameters:>12,}{run.iteration:>11}"
            f"{run.train:>9.4f}{run.test:>9.4f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs of a command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--curves", type=Path, metavar="PNG", help="draw the training curves here")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _compare(options.runs, options.curves))


def _compare(folders: Sequence[Path], curves: Path | None) -> None:
    runs = [read_run(folder) for folder in folders]
    print_table(runs)
    if curves:
        save_curves(curves, {f"{run.name}, {run.parameters:,} parameters": run.curve for run in runs})
        terminal.say(f"curves: {curves}")


if __name__ == "__main__":
    leave(main())
