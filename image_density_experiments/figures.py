"""Pictures of a run as PNG files: grids of images, histograms of bits per dimension."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

BREAK = 2.0  # a gap wider than this many times the narrower of two groups breaks the axis
BINS = 40


def image_grid(rows: Sequence[np.ndarray], margin: int = 2) -> np.ndarray:
    """Rows of uint8 images [n, H, W, 1 or 3] on white, as one picture [H', W', 3]."""
    n_columns = max(len(row) for row in rows)
    height, width = rows[0].shape[1:3]
    shape = (len(rows) * (height + margin) + margin, n_columns * (width + margin) + margin, 3)
    grid = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = margin + i * (height + margin), margin + j * (width + margin)
            grid[top : top + height, left : left + width] = image
    return grid


def save_image_rows(path: Path, rows: dict[str, np.ndarray], title: str) -> None:
    """Named rows of uint8 images [n, H, W, 1 or 3] as a PNG, each pixel enlarged, the names at the left."""
    from matplotlib.figure import Figure  # slow to import

    grid = image_grid(list(rows.values()))
    scale = max(1, round(1600 / grid.shape[1]))
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    height = next(iter(rows.values())).shape[1] + 2
    left, top = 1.3, 0.4  # inches, for the names and the title
    inches_wide, inches_high = grid.shape[1] / 150, grid.shape[0] / 150
    figure = Figure(figsize=(inches_wide + left + 0.1, inches_high + top + 0.1))
    size = figure.get_size_inches()
    axes = figure.add_axes((left / size[0], 0.1 / size[1], inches_wide / size[0], inches_high / size[1]))
    axes.imshow(grid, interpolation="none", aspect="auto")
    axes.set_yticks([(index + 0.5) * height * scale for index in range(len(rows))], list(rows), parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=10, parse_math=False)
    _save(path, figure)


def save_histogram(path: Path, bits: dict[str, np.ndarray], title: str) -> None:
    """Shares of images over their bits per dimension [N], of several datasets over one another.

    Where they lie far apart the axis is broken, so that each shows its shape; values that are not finite are counted.
    """
    from matplotlib.figure import Figure  # slow to import

    finite = {name: values[np.isfinite(values)] for name, values in bits.items()}
    stretches = _stretches([values for values in finite.values() if len(values)])
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, max(1, len(stretches)), sharey=True, squeeze=False)[0]
    for axes, (first, last) in zip(panels, stretches, strict=False):
        for index, (_, values) in enumerate(finite.items()):
            inside = values[(values >= first) & (values <= last)]
            if len(inside):
                weights = np.full(len(inside), 1 / len(values))
                axes.hist(inside, _edges(inside, first, last), weights=weights, alpha=0.6, color=f"C{index}")
        axes.tick_params(axis="x", labelrotation=30 if len(stretches) > 1 else 0)
    panels[0].set_ylabel("share of the images")
    _mark_breaks(panels)
    figure.supxlabel("bits/dim", fontsize=10)
    _add_legend(figure, bits, finite, title)
    _save(path, figure)


def _edges(values: np.ndarray, first: float, last: float) -> np.ndarray:
    """Bins of a stretch of the axis, or finer ones for values that would all fall into a few of those."""
    low, high = float(values.min()), float(values.max())
    narrow = 0 < high - low < 5 * (last - first) / BINS
    return np.linspace(low, high, 13) if narrow else np.linspace(first, last, BINS + 1)


def _stretches(groups: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """The parts of the axis that hold something: one, or one per group where groups lie far from one another."""
    ranges = sorted((float(values.min()), float(values.max())) for values in groups)
    joined: list[tuple[float, float]] = []
    for first, last in ranges:
        if joined and first - joined[-1][1] <= BREAK * min(last - first, joined[-1][1] - joined[-1][0]):
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    margins = [max(0.03 * (last - first), 0.01) for first, last in joined]
    return [(first - margin, last + margin) for (first, last), margin in zip(joined, margins, strict=True)]


def _mark_breaks(panels: Sequence["Axes"]) -> None:
    """Slanted strokes where the axis is broken."""
    strokes = {"marker": [(-0.5, -1), (0.5, 1)], "markersize": 9, "color": "k", "linestyle": "none", "clip_on": False}
    for left, right in itertools.pairwise(panels):
        left.spines.right.set_visible(False)
        right.spines.left.set_visible(False)
        right.tick_params(axis="y", length=0)
        left.plot([1, 1], [0, 1], transform=left.transAxes, **strokes)
        right.plot([0, 0], [0, 1], transform=right.transAxes, **strokes)


def _add_legend(figure: "Figure", bits: dict[str, np.ndarray], finite: dict[str, np.ndarray], title: str) -> None:
    from matplotlib.patches import Patch

    labels = []
    for name, values in finite.items():
        n_lost = len(bits[name]) - len(values)
        mean = f"mean {values.mean():.3f}" if len(values) else "none finite"
        labels.append(f"{name}: {len(bits[name])} images, {mean}" + (f", {n_lost} not finite" if n_lost else ""))
    handles = [Patch(color=f"C{index}", alpha=0.6, label=label) for index, label in enumerate(labels)]
    legend = figure.legend(handles=handles, loc="outside upper center", title=title, fontsize=9, frameon=False)
    _as_they_are([*legend.get_texts(), legend.get_title()])


def save_curves(path: Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Bits per dimension over the iteration, smoothed by a running mean over a tenth of what is there so far."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        iterations, bits = np.array(points).T
        starts = np.arange(len(bits)) - np.arange(len(bits)) // 10
        means = [bits[start : end + 1].mean() for end, start in enumerate(starts)]
        axes.plot(iterations, means, label=name)
    axes.set(xlabel="iteration", ylabel="bits/dim on train")
    _as_they_are(axes.legend().get_texts())
    axes.grid(alpha=0.3)
    _save(path, figure)


def _as_they_are(texts: Iterable["Text"]) -> None:
    """Names are no formulas, whatever dollars they have."""
    for text in texts:
        text.set_parse_math(False)


def _save(path: Path, figure: "Figure") -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
