"""Curves and pictures as SVG: what stands where. The template jobs/report.html.j2 draws it, in the page's colours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT = 560, 300  # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 8, 42  # of what is around its axes
COLOURS = 10  # of lines; more begin again, dashed

Scale = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Line:
    """A curve by x; band: its low and high edge; colour: its number, None for what is no run's."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int | None = None
    band: tuple[np.ndarray, np.ndarray] | None = None
    dots: bool = False


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in units of the drawing."""

    place: float
    text: str


@dataclass(frozen=True)
class Stroke:
    """A line as it is drawn: the paths of its curve and of its band, places of its dots."""

    name: str
    kind: str  # classes of style
    path: str
    band: str = ""
    dots: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Drawing:
    """Axes with strokes or a picture in them."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    strokes: Sequence[Stroke] = ()
    picture: str = ""  # a data URI
    note: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    inside: tuple[int, int, int, int] = field(default=(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM))


def draw(
    title: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    x_label: str = "iteration",
    log: bool = False,
    note: str = "",
    whole_x: bool = False,
) -> Drawing | None:
    """Lines over one another; the y axis holds their central 98 percent. None where there is nothing to draw.

    log: a logarithmic y axis, for numbers above 0; whole_x: x are whole numbers, with a tick for each of a few.
    """
    lines = [line for line in (_finite(line, log) for line in lines) if len(line.x)]
    if not lines:
        return None
    every_x = np.concatenate([line.x for line in lines])
    x_low, x_high = _widened(float(every_x.min()), float(every_x.max()), 0.05 if whole_x else 0.0)
    y_low, y_high = _y_range(lines, log)
    across = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    up = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    warp = np.log10 if log else np.asarray
    x_values = ticks(x_low, x_high, 6, least=1.0 if whole_x else 0.0)
    y_values = log_ticks(y_low, y_high) if log else ticks(y_low, y_high, 5)
    return Drawing(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(float(across(np.array(value))), text(value)) for value in x_values],
        y_ticks=[Tick(float(up(warp(value))), text(value)) for value in y_values],
        strokes=[_stroke(line, across, lambda y: up(warp(y))) for line in lines],
        note=note,
    )


def picture(title: str, uri: str, seconds: float, top: float, height: int = 180) -> Drawing:
    """A picture over time, up to `top` Hz."""
    bottom = height - BOTTOM + 8
    across, up = _scale(0, seconds, LEFT, WIDTH - RIGHT), _scale(0, top / 1000, bottom, TOP)
    return Drawing(
        title=title,
        x_label="s",
        y_label="kHz",
        x_ticks=[Tick(float(across(np.array(value))), text(value)) for value in ticks(0, seconds, 6)],
        y_ticks=[Tick(float(up(np.array(value))), text(value)) for value in ticks(0, top / 1000, 4)],
        picture=uri,
        height=height,
        inside=(LEFT, TOP, WIDTH - LEFT - RIGHT, bottom - TOP),
    )


def steps(edges: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the outline of a histogram: edges [N + 1], heights [N]."""
    return np.repeat(edges, 2)[1:-1], np.repeat(heights, 2)


def _finite(line: Line, log: bool) -> Line:
    known = np.isfinite(line.x) & np.isfinite(line.y) & ((line.y > 0) | (not log))
    band = None
    if line.band is not None:
        low, high = (edge[known] for edge in line.band)
        band = (np.maximum(low, line.y[known] * 1e-3), high) if log else (low, high)
    return Line(line.name, line.x[known], line.y[known], line.colour, band, line.dots)


def _y_range(lines: Sequence[Line], log: bool) -> tuple[float, float]:
    """Lowest and highest of most that is drawn: a few wild values at the start would flatten all the rest."""
    edges = [np.percentile(line.y, [1, 99]) for line in lines]
    for line in lines:
        if line.band is not None:
            edges += [np.percentile(line.band[0], [5, 50]), np.percentile(line.band[1], [50, 95])]
    low, high = float(min(edge.min() for edge in edges)), float(max(edge.max() for edge in edges))
    return _widened(math.log10(low), math.log10(high), 0.06) if log else _widened(low, high, 0.06)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):
        around = abs(low) * 0.1 or 1.0
        return low - around, high + around
    return low - share * (high - low), high + share * (high - low)


def _scale(low: float, high: float, first: float, last: float) -> Scale:
    return lambda values: first + (values - low) / (high - low) * (last - first)


def _stroke(line: Line, across: Scale, up: Scale) -> Stroke:
    x, y = across(line.x), np.clip(up(line.y), -HEIGHT, 2 * HEIGHT)
    kind = "reference" if line.colour is None else f"c{line.colour % COLOURS}"
    if line.colour is not None and line.colour >= COLOURS:
        kind += " again"
    band = ""
    if line.band is not None:
        low, high = (np.clip(up(edge), -HEIGHT, 2 * HEIGHT) for edge in line.band)
        band = _path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])) + "Z"
    dots = [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, y, strict=True)] if line.dots else ()
    return Stroke(line.name, kind, _path(x, y), band, dots)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


# --- ticks ------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int, least: float = 0.0) -> list[float]:
    """Round numbers between two, about so many, no nearer to each other than `least`."""
    rough = max((high - low) / about, least, 1e-300)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") + 0.0 for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high: powers of ten, with their double and fivefold where these are few."""
    every = max(1, math.ceil((high - low) / 6))
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 3 else (1,)
    values = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
    inside = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    return inside if len(inside) >= 2 else [value for value in ticks(10**low, 10**high, 5) if value > 0]


def text(value: float) -> str:
    """A number as an axis has it, thousands and millions short."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e9 and value % (size / 1000) == 0:
            return f"{value / size:g}{letter}"
    return f"{value:.6g}"
