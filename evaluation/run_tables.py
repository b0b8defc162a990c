"""Tables that a run leaves, read in bounded memory however long or damaged they are: curves by iteration, likelihoods.

A long table becomes bins of iterations with the least, the mean and the greatest of each column; nothing is skipped.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.metrics import Mean, interval
from harness.files import RefusedFile, line_blocks, open_file, read_text

MAX_BYTES = 2**32  # of losses.csv, some 40 million steps
MAX_SMALL_BYTES = 2**26  # of the other tables
MAX_LINE = 2**16  # bytes of a row
MAX_BINS = 512  # even
LARGEST = 1e30  # beyond, a number counts as not finite
KEPT = 10_000  # first steps whose losses stay as they are, to be held against an expected curve
NEWEST = 100  # steps whose mean loss stands for the present
MAX_POINTS = 2_000  # of likelihoods by iteration
MAX_LISTS, MAX_FIGURES = 20, 30  # test lists, columns and systems of an evaluation; more is none of ours


@dataclass(frozen=True)
class Series:
    """A column by iteration: the middle x of each bin that has a finite value, its least, mean and greatest."""

    x: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    count: np.ndarray

    def smooth(self, bins: int) -> np.ndarray:
        """Means over so many bins around each, weighted by their values; fewer at the ends."""
        around, totals = bins // 2, np.concatenate([[0.0], np.cumsum(self.mean * self.count)])
        counts = np.concatenate([[0.0], np.cumsum(self.count)])
        place = np.arange(len(self.x))
        first, last = np.maximum(place - around, 0), np.minimum(place + around + 1, len(self.x))
        return (totals[last] - totals[first]) / (counts[last] - counts[first])


@dataclass(frozen=True)
class Curves:
    """Columns of a table of steps in bins of `width` iterations, and what was noticed on the way."""

    series: Mapping[str, Series]
    width: int
    rows: int
    last: int  # iteration
    unreadable: int  # rows
    not_finite: int  # steps whose first column is not
    kept: Mapping[int, float]  # first column of the first steps, by iteration
    newest: float  # mean of the first column over the last steps


def read_curves(path: Path, columns: Sequence[str]) -> Curves:
    """The columns of a CSV file with a row per step that begins with `iteration`; columns it lacks are left out.

    A last row without its end is one that is being written, and is left out. Raises OSError, and RefusedFile where the
    file is no such table.
    """
    with open_file(path, MAX_BYTES) as file:
        header = file.readline(MAX_LINE).decode("utf-8", "replace").strip().split(",")
        wanted = [name for name in columns if name in header]
        if "iteration" not in header or not wanted:
            raise RefusedFile(f"its first line is {','.join(header)[:80]!r}, expected iteration,{','.join(columns)}")
        table = _Table(len(wanted))
        places = [header.index("iteration"), *map(header.index, wanted)]
        for lines, overlong in line_blocks(file, MAX_LINE):
            values, unreadable = _parsed([line.decode("utf-8", "replace") for line in lines], places)
            table.add(values)
            table.unreadable += unreadable + overlong
    return table.curves(wanted)


def _parsed(lines: Sequence[str], places: Sequence[int]) -> tuple[np.ndarray, int]:
    """Iteration and values [N, 1 + C] of the rows that can be read, and how many cannot."""
    if not lines:
        return np.empty((0, len(places))), 0
    try:
        values = np.loadtxt(lines, delimiter=",", usecols=places, ndmin=2, comments=None)
    except ValueError:
        rows = [row for line in lines if (row := _row(line, places)) is not None]
        values = np.array(rows).reshape(-1, len(places))
    number = values[:, 0]
    known = (number >= 1) & (number < 2**31) & (number == np.floor(number))
    return values[known], len(lines) - int(known.sum())


def _row(line: str, places: Sequence[int]) -> list[float] | None:
    fields = line.split(",")
    try:
        return [float(fields[place]) for place in places]
    except (IndexError, ValueError):
        return None


class _Table:
    """Bins that double in width as a table grows."""

    def __init__(self, columns: int) -> None:
        shape = (MAX_BINS, columns)
        self.width, self.rows, self.last, self.unreadable, self.not_finite = 1, 0, 0, 0, 0
        self.count, self.total = np.zeros(shape), np.zeros(shape)
        self.low, self.high = np.full(shape, np.inf), np.full(shape, -np.inf)
        self.kept: dict[int, float] = {}
        self.newest = np.empty(0)

    def add(self, rows: np.ndarray) -> None:
        """Count rows [N, 1 + C], the iteration first."""
        if not len(rows):
            return
        iterations, values = rows[:, 0].astype(np.int64), rows[:, 1:]
        self.rows, self.last = self.rows + len(rows), max(self.last, int(iterations.max()))
        while (self.last - 1) // self.width >= MAX_BINS:
            self._widen()
        bins, known = (iterations - 1) // self.width, np.abs(values) < LARGEST
        np.add.at(self.count, bins, known)
        np.add.at(self.total, bins, np.where(known, values, 0.0))
        np.minimum.at(self.low, bins, np.where(known, values, np.inf))
        np.maximum.at(self.high, bins, np.where(known, values, -np.inf))
        self.not_finite += int((~known[:, 0]).sum())
        early = iterations <= KEPT
        self.kept.update(zip(iterations[early].tolist(), values[early, 0].tolist(), strict=True))
        self.newest = np.concatenate([self.newest, values[-NEWEST:, 0]])[-NEWEST:]

    def _widen(self) -> None:
        self.width *= 2
        merges = {
            "count": (np.add, 0),
            "total": (np.add, 0),
            "low": (np.minimum, np.inf),
            "high": (np.maximum, -np.inf),
        }
        for name, (merge, nothing) in merges.items():
            before = getattr(self, name)
            after = np.full_like(before, nothing)
            after[: MAX_BINS // 2] = merge(before[0::2], before[1::2])
            setattr(self, name, after)

    def curves(self, names: Sequence[str]) -> Curves:
        """Curves of what was counted."""
        middle = np.arange(MAX_BINS) * self.width + (self.width + 1) / 2
        series = {}
        for column, name in enumerate(names):
            some = self.count[:, column] > 0
            count = self.count[some, column]
            low, high = self.low[some, column], self.high[some, column]
            series[name] = Series(middle[some], low, self.total[some, column] / count, high, count)
        known = self.newest[np.abs(self.newest) < LARGEST]
        return Curves(
            series=series,
            width=self.width,
            rows=self.rows,
            last=self.last,
            unreadable=self.unreadable,
            not_finite=self.not_finite,
            kept=self.kept,
            newest=float(known.mean()) if len(known) else math.nan,
        )


# --- likelihoods and metrics ------------------------------------------------------------------------------


def read_likelihood_curves(path: Path) -> dict[str, np.ndarray]:
    """Iteration and log-likelihood [N, 2] of each test list, `MAX_POINTS` at most. Raises OSError, RefusedFile."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(path, ("iteration", "list", "log_likelihood")):
        if (values := _numbers(row, ("iteration", "log_likelihood"))) is not None:
            points.setdefault(row["list"], []).append(tuple(values))
    return {name: np.array(of)[:: -(-len(of) // MAX_POINTS)] for name, of in list(points.items())[:MAX_LISTS]}


@dataclass(frozen=True)
class Evaluation:
    """Means over clips that one CSV of an evaluation holds: of each system, figures by name."""

    file: str
    clips: int
    systems: Mapping[str, Mapping[str, Mean]]


def read_evaluation(path: Path) -> Evaluation:
    """Means of a file of `--evaluate`, with or without metrics. Raises OSError, and RefusedFile where it is another."""
    rows = list(_rows(path, ("clip",)))
    others = ("system", "clip", "samples")
    names = [name for name in (rows[0] if rows else {}) if name and name not in others][:MAX_FIGURES]
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if (values := _numbers(row, names)) is not None:
            figures = found.setdefault(row.get("system") or path.stem, {name: [] for name in names})
            for name, value in zip(names, values, strict=True):
                figures[name].append(value)
    if not found or not names:
        raise RefusedFile("no clip in it has figures")
    systems = {
        system: {name: interval(values) for name, values in of.items()}
        for system, of in list(found.items())[:MAX_FIGURES]
    }
    return Evaluation(path.name, max(len(of[names[0]]) for of in found.values()), systems)


def read_mean_likelihood(path: Path) -> tuple[float, int]:
    """Mean log-likelihood over the clips of such a file, and how many they are. Raises OSError, and RefusedFile where
    that of any clip is missing or not finite.
    """
    found = [_numbers(row, ("log_likelihood",)) for row in _rows(path, ("clip",))]
    values = np.array([value for row in found for value in row or (math.nan,)])
    if not len(values) or not (np.abs(values) < LARGEST).all():
        raise RefusedFile("not every clip in it has a log-likelihood")
    return float(values.mean()), len(values)


def _rows(path: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a small CSV file by column; RefusedFile where the needed ones are not there."""
    table = csv.DictReader(io.StringIO(read_text(path, MAX_SMALL_BYTES, errors="replace").replace("\0", "")))
    try:
        if missing := [name for name in needed if name not in (table.fieldnames or ())]:
            raise RefusedFile(f"it has no column {missing[0]}")
        yield from (row for row in table if all(row[name] for name in needed))
    except csv.Error as error:
        raise RefusedFile(f"not a table ({error})") from None


def _numbers(row: Mapping[str, str], names: Sequence[str]) -> list[float] | None:
    try:
        return [float(row.get(name, "")) for name in names]
    except (TypeError, ValueError):
        return None
