"""Histograms show every set, however far apart or differently wide they are."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from image_density_experiments import figures
from image_density_experiments.figures import image_grid, save_histogram

RANDOM = np.random.default_rng(0)
SETS = {  # name: two sets, panels
    "far": (RANDOM.normal(3, 0.1, 500), RANDOM.normal(900, 5, 300), 2),
    "far and of one size": (RANDOM.normal(3, 0.1, 500), RANDOM.normal(9, 0.1, 300), 2),
    "a narrow one below a wide one": (RANDOM.normal(5.8, 0.1, 20), RANDOM.normal(40, 4, 60), 2),
    "near": (RANDOM.normal(3, 0.5, 500), RANDOM.normal(4, 0.5, 30), 1),
    "the same": (np.linspace(3, 4, 9), np.linspace(3, 4, 9), 1),
    "a narrow one within a wide one": (RANDOM.normal(5, 0.01, 100), RANDOM.uniform(1, 90, 100), 1),
    "single images": (np.array([3.0]), np.array([9.0]), 2),
    "not finite": (np.array([3.0, 3.1, np.nan]), np.array([np.inf, 3.2, 3.05]), 1),
    "none finite": (np.array([3.0, 3.1]), np.array([np.nan, np.inf]), 1),
}


@pytest.mark.parametrize("name", SETS)
def test_each_set_shows_its_shape(tmp_path, monkeypatch, name):
    one, other, n_panels = SETS[name]
    kept = []
    monkeypatch.setattr(figures, "_save", lambda path, figure: (kept.append(figure), figure.savefig(path)))
    save_histogram(tmp_path / "h.png", {"folder A": one, "folder B": other}, "title")
    [figure] = kept
    assert isinstance(figure, Figure) and len(figure.axes) == n_panels
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0].startswith("folder A: ") and labels[1].startswith("folder B: ")
    for colour, values in (("C0", one), ("C1", other)):
        finite = values[np.isfinite(values)]
        bars = [bar for axes in figure.axes for bar in axes.patches if bar.get_height() and _has_colour(bar, colour)]
        total = sum(bar.get_height() for bar in bars)
        assert total == pytest.approx(1 if len(finite) else 0)  # every image is in the picture
        if len(np.unique(finite)) > 4:
            assert len(bars) > 4  # and not all of them in a bar or two
    if not np.isfinite(other).all():
        assert "not finite" in labels[1]


def _has_colour(bar, colour):
    from matplotlib.colors import to_rgb

    return bar.get_facecolor()[:3] == to_rgb(colour)


@pytest.mark.parametrize("channels", [1, 3])
def test_grids_are_rgb_with_rows_of_any_length(channels):
    rows = [np.full((n, 4, 5, channels), 7, np.uint8) for n in (3, 1)]
    grid = image_grid(rows)
    assert grid.shape == (2 * 6 + 2, 3 * 7 + 2, 3) and (grid == 7).all(-1).sum() == 4 * 20


@pytest.mark.parametrize("name", ["a$b$c", "$", "$\\frac{a$", "5$ to 10$^", "a\\$b$x_{$"])
def test_names_are_no_formulas(tmp_path, name):
    figures.save_image_rows(tmp_path / "rows.png", {name: np.zeros((2, 4, 4, 3), np.uint8)}, name)
    save_histogram(tmp_path / "histogram.png", {name: np.array([3.0, 3.1])}, name)
    figures.save_curves(tmp_path / "curves.png", {name: [(1, 2.0), (2, 3.0)]})
    assert len(list(tmp_path.iterdir())) == 3
