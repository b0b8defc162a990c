"""Charts: round ticks, curves where they belong, whatever the numbers."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.charts import HEIGHT, LEFT, RIGHT, WIDTH, Line, draw, log_ticks, text, ticks
from evaluation.pictures import decibels, palette_png


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-0.013, 0.021, [-0.01, 0, 0.01, 0.02]), (1e6, 3e6, [1e6, 1.5e6, 2e6, 2.5e6, 3e6])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_ticks_of_any_range_are_few_and_within():
    generator = np.random.default_rng(0)
    for _ in range(300):
        low = float(generator.normal() * 10 ** generator.uniform(-9, 9))
        high = low + 10 ** float(generator.uniform(-9, 9)) + abs(low) * 1e-3
        found, slack = ticks(low, high, 5), 1e-6 * (high - low)
        assert 1 <= len(found) <= 7 and all(low - slack <= tick <= high + slack for tick in found)
        assert len(set(map(text, found))) == len(found)


def test_logarithmic_ticks():
    assert log_ticks(-1, 1) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert log_ticks(math.log10(3), math.log10(4.1)) == pytest.approx([3, 3.5, 4])
    assert len(log_ticks(-20, 20)) <= 8


def test_short_numbers():
    assert [text(value) for value in (0.0, 1500, 2e6, 0.0005, -4.5, 1e12)] == [
        "0",
        "1.5k",
        "2M",
        "0.0005",
        "-4.5",
        "1e+12",
    ]


def points(path):
    return [tuple(map(float, pair.split(","))) for pair in re.findall(r"[-\d.]+,[-\d.]+", path)]


def test_a_line_goes_from_edge_to_edge_and_low_is_below():
    x = np.arange(1.0, 101)
    drawing = draw("t", "u", [Line("a", x, -x, 0)])
    [stroke] = drawing.strokes
    found = points(stroke.path)
    assert found[0][0] == LEFT and found[-1][0] == WIDTH - RIGHT and len(found) == 100
    assert found[0][1] < found[-1][1] < HEIGHT  # y grows downwards on a screen
    assert [tick.text for tick in drawing.x_ticks] == ["20", "40", "60", "80", "100"]


def test_what_cannot_be_drawn_is_left_out():
    bad = np.array([math.nan, math.inf, 0.0, -1.0])
    assert draw("t", "", [Line("a", np.arange(4.0), np.full(4, math.nan), 0)]) is None
    assert draw("t", "", []) is None
    assert draw("t", "", [Line("a", np.arange(4.0), bad, 0)], log=True) is None
    drawing = draw("t", "", [Line("a", np.arange(4.0), bad, 0), Line("b", np.ones(1), np.ones(1), 11, dots=True)])
    assert [len(points(stroke.path)) for stroke in drawing.strokes] == [2, 1]
    assert drawing.strokes[1].kind == "c1 again" and len(drawing.strokes[1].dots) == 1


def test_a_few_wild_values_do_not_flatten_the_rest():
    y = np.full(1000, 1.0) + np.linspace(0, 1, 1000)
    y[0] = 1e6
    drawing = draw("t", "", [Line("a", np.arange(1000.0), y, 0)])
    heights = [y for _, y in points(drawing.strokes[0].path)][1:]
    assert max(heights) - min(heights) > 0.6 * HEIGHT


def test_a_tone_is_a_line_in_the_spectrogram(tmp_path):
    rate = 22_050
    tone = torch.sin(2 * math.pi * 2000 * torch.arange(rate) / rate)
    levels = decibels(tone, rate, 8000, hop=256)
    assert abs(levels.mean(1).argmax().item() * rate / 1024 - 2000) < 22
    (tmp_path / "p.png").write_bytes(palette_png(levels, levels.max().item() - 80, levels.max().item(), "magma"))
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int).sum(2)
    assert picture.shape == tuple(levels.shape)
    assert abs((len(levels) - 1 - picture.mean(1).argmax()) * rate / 1024 - 2000) < 22  # the lowest row is 0 Hz
