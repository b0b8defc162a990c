"""Pictures of a run as PNG files: grids of images, histograms of bits per dimension."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grid(rows: Sequence[np.ndarray], margin: int = 2) -> np.ndarray:
    """Rows of uint8 images [n, H, W, C] on white, as one picture [H', W', C]."""
    n_columns = max(len(row) for row in rows)
    height, width, channels = rows[0].shape[1:]
    shape = (len(rows) * (height + margin) + margin, n_columns * (width + margin) + margin, channels)
    grid = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = margin + i * (height + margin), margin + j * (width + margin)
            grid[top : top + height, left : left + width] = image
    return grid


def save_image_rows(path: Path, rows: dict[str, np.ndarray], title: str) -> None:
    """Named rows of uint8 images [n, H, W, 3] as a PNG, each pixel enlarged, the names at the left."""
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
    axes.set_yticks([(index + 0.5) * height * scale for index in range(len(rows))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=10)
    _save(path, figure)


def save_histogram(path: Path, bits: dict[str, np.ndarray], title: str) -> None:
    """Densities of the bits per dimension [N] of several datasets over one another."""
    from matplotlib.figure import Figure  # slow to import

    values = np.concatenate(list(bits.values()))
    edges = np.linspace(values.min(), values.max(), 61)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, of_dataset in bits.items():
        axes.hist(of_dataset, edges, density=True, alpha=0.6, label=f"{name}, mean {of_dataset.mean():.3f}")
    axes.set(xlabel="bits/dim", ylabel="density", title=title)
    axes.legend()
    _save(path, figure)


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
    axes.legend()
    axes.grid(alpha=0.3)
    _save(path, figure)


def _save(path: Path, figure: "Figure") -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
