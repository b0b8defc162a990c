"""`train.py --report`: one self-contained HTML page about one run or several, made by jobs/report.html.j2.

Nothing is written but the page, no lock is taken, and the page loads nothing: sounds and pictures are inside it.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from checkpoint import Checkpoint
from config import Config
from evaluation.charts import Drawing, Line, draw, steps
from evaluation.run_tables import Evaluation
from harness import terminal
from harness.errors import InputError, one_line, show
from harness.files import written_whole
from harness.folder import VERSION
from jobs.report_runs import Run, flat, read_runs
from jobs.report_sounds import Excerpt, Heard, Made, excerpts_of, last_sample, make, recording
from jobs.synthesis import STDOUT
from model import build_model, count_parameters
from training.expected import NEGATIVE_IS_RIGHT, WINDOW

NAME = "report.html"
TEMPLATE = "report.html.j2"
SMOOTHING = 20  # windows of the smoothed loss in the length of a run
MAX_KEYS = 300  # of a config or a record; what has more is none of ours
MANY_RUNS = 3  # with more, one clip is heard of each, and single steps are not drawn
HISTOGRAM_BINS = 60
CHARTS = (  # column of losses.csv, title, unit, logarithmic
    ("loss", "Loss", "nats/sample", False),
    ("prior", "Prior term", "nats/sample", False),
    ("log_det", "Log-determinant term", "nats/sample", False),
    ("grad_norm", "Gradient norm", "", True),
    ("learning_rate", "Learning rate", "", False),
)


@dataclass(frozen=True)
class Table:
    """A table of texts, the first column the names of its rows; what differs is marked."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Scene:
    """A recording and what the runs made of it."""

    title: str
    recording: Heard | None
    syntheses: Sequence[Heard]


def write_run_report(folders: Sequence[str | Path], output: str | None, device: torch.device) -> None:
    """Write the page about the runs of some folders, and say where and how long it took. Raises InputError.

    output: a file, a folder, or "-" for stdout; by default `NAME` in the first folder.
    """
    began = time.perf_counter()
    runs = read_runs(folders)
    page = render(runs, device).encode("utf-8", "backslashreplace")
    path = _place(folders[0], output)
    if path is None:
        sys.__stdout__.buffer.write(page)
        sys.__stdout__.buffer.flush()
    else:
        with written_whole(path) as temporary:
            temporary.write_bytes(page)
    for run in runs:
        for note in run.notes:
            terminal.warn(f"{run.folder}: {note}")
    seconds = time.perf_counter() - began
    terminal.say(f"report of {len(runs)} run(s): {path or 'stdout'}, {len(page):,} bytes, {seconds:.1f} s")


def _place(first: str | Path, output: str | None) -> Path | None:
    if output == STDOUT:
        return None
    path = Path(first if output is None else output)
    page = path.suffix.lower() in (".html", ".htm")
    if path.is_dir() or not (page or path.exists()):
        return path / NAME
    if not page:
        raise InputError(f"--output {path}: exists, and is no folder; give one, or a name that ends with .html")
    return path


def render(runs: Sequence[Run], device: torch.device) -> str:
    """The page about some runs."""
    heard = _Heard(runs, device)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=" / ".join(run.label for run in runs[:4]) + (" ..." if len(runs) > 4 else ""),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=VERSION,
        negative=NEGATIVE_IS_RIGHT,
        runs=runs,
        summary=_summary(runs, heard.parameters),
        standings=_standings(runs),
        curves=_curves(runs),
        smoothing=_smoothing(runs),
        scenes=heard.scenes(),
        noise=heard.noise(),
        flows=heard.flows(),
        evaluations=[(run.label, run.folder, [_evaluation(found) for found in run.evaluations]) for run in runs],
        config=_config(runs),
        every_key=_every_key(runs),
        environment=_environment(runs),
        files=_files(runs),
    )


# --- curves -----------------------------------------------------------------------------------------------


def _window(runs: Sequence[Run]) -> int:
    """Steps that a smoothed point is the mean of, the same for all runs."""
    return max([1, *(run.curves.last // SMOOTHING for run in runs if run.curves is not None)])


def _curves(runs: Sequence[Run]) -> list[Drawing]:
    """Each column of the steps, runs over one another; then the test likelihood."""
    drawings = []
    for name, title, unit, log in CHARTS:
        lines = []
        for colour, run in enumerate(runs):
            if run.curves is not None and (series := run.curves.series.get(name)) is not None and len(series.x):
                smooth = (
                    series.mean if name == "learning_rate" else series.smooth(max(1, _window(runs) // run.curves.width))
                )
                band = (series.low, series.high) if len(runs) <= MANY_RUNS else None
                lines.append(Line(run.label, series.x, smooth, colour, band))
        if name == "loss":
            lines = [*_expected_lines(runs), *lines]
        drawings.append(draw(title, unit, lines, log=log))
    of_tests = [
        Line(
            run.label if len(run.likelihoods) == 1 else f"{run.label}, {name}",
            points[:, 0],
            points[:, 1],
            colour,
            dots=True,
        )
        for colour, run in enumerate(runs)
        for name, points in run.likelihoods.items()
        if len(points)
    ]
    drawings.append(draw("Test likelihood, beginnings of clips", "nats/sample", of_tests))
    return [drawing for drawing in drawings if drawing is not None]


def _expected_lines(runs: Sequence[Run]) -> list[Line]:
    """Each expected curve that fits a run, once."""
    found = {(run.expected.corpus.name, *run.expected.points.items()): run.expected for run in runs if run.expected}
    lines = []
    for (name, *_), curve in found.items():
        last = max((run.curves.last for run in runs if run.curves is not None), default=0)
        x = np.array([step for step in sorted(curve.points) if step <= max(last, WINDOW)], float)
        loss, deviation = np.array([curve.points[int(step)] for step in x]).T
        band = loss - 2 * deviation, loss + 2 * deviation
        lines.append(Line(f"expected on {name}", x, loss, None, band))
    return lines


def _standings(runs: Sequence[Run]) -> list[str]:
    """A line for each run with an expected curve."""
    lines = []
    for run in runs:
        if run.expected is None or run.curves is None:
            continue
        standing = run.expected.standing(run.curves.kept)
        lines.append(f"{run.label}: {standing or f'{run.curves.rows} steps, too few to compare'}")
    return lines


def _smoothing(runs: Sequence[Run]) -> str:
    """A line on what is drawn of each step."""
    widest = max([1, *(run.curves.width for run in runs if run.curves is not None)])
    band = "each step" if widest == 1 else f"the least and the greatest of every {widest:,} steps or fewer"
    lines = f"lines are means over {_window(runs):,} steps"
    return f"{lines}, pale behind them {band}" if len(runs) <= MANY_RUNS else lines


# --- what the models make ---------------------------------------------------------------------------------


class _Heard:
    """Sounds and statistics of the runs, made one run after the other."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        self.runs = runs
        self.made: dict[int, Made] = {}
        self.samples: dict[int, Heard] = {}
        self.parameters: dict[int, tuple[int, int]] = {}
        for number, run in enumerate(runs):
            self._make(number, run, device)

    def _make(self, number: int, run: Run, device: torch.device) -> None:
        found = run.checkpoint()
        config = run.config if found is None else found[1]
        if config is None:
            return
        model = build_model(config.waveflow_config, config.data_config)
        self.parameters[number] = count_parameters(model), count_parameters(model, synthesis=True)
        if found is None:
            return
        excerpts = run.attempt("no recordings, so no comparison, z or flows", lambda: excerpts_of(run, config))
        if excerpts:
            made = run.attempt("synthesis", lambda: self._made(run, found, excerpts, device))
            if made is not None:
                self.made[number] = made
        elif (sample := run.attempt("its sample", lambda: last_sample(run))) is not None:
            self.samples[number] = sample

    def _made(
        self, run: Run, found: tuple[Checkpoint, Config], excerpts: Sequence[Excerpt], device: torch.device
    ) -> Made:
        return make(run, found, excerpts, device, shown=2 if len(self.runs) <= MANY_RUNS else 1)

    def scenes(self) -> list[Scene]:
        """Recordings with what each run made of them; then samples of runs whose recordings are gone."""
        together: dict[tuple[str, int], tuple[Excerpt, int, list[Heard]]] = {}
        for number, made in self.made.items():
            rate = self.runs[number].config.data_config.sampling_rate if self.runs[number].config else 22_050
            for excerpt, heard in zip(made.excerpts, made.syntheses, strict=True):
                of_clip = together.setdefault(excerpt.key, (excerpt, rate, []))[2]
                of_clip += [] if heard is None else [heard]
        scenes = [
            Scene(Path(excerpt.path).name, recording(excerpt, rate), heard)
            for excerpt, rate, heard in together.values()
        ]
        if self.samples:
            scenes.append(
                Scene("the runs' own samples, whose recordings are not there", None, list(self.samples.values()))
            )
        return scenes

    def noise(self) -> tuple[Drawing | None, Table] | None:
        """Histogram of z over sigma beside the Gaussian, and its moments."""
        if not self.made:
            return None
        edges = np.linspace(-5, 5, HISTOGRAM_BINS + 1)
        fine = np.linspace(-5, 5, 101)
        lines = [Line("Gaussian", fine, np.exp(-0.5 * fine**2) / np.sqrt(2 * np.pi), None)]
        rows = []
        for number, made in self.made.items():
            run, sigma = self.runs[number], self._sigma(number)
            z = made.z.numpy() / sigma
            counts, _ = np.histogram(z[np.isfinite(z)], edges)
            x, y = steps(edges, counts / max(len(z), 1) / (edges[1] - edges[0]))
            lines.append(Line(run.label, x, y, number, (np.zeros_like(y), y)))
            rows.append([run.label, *(f"{value:.3f}" for value in made.noise[:4]), f"{100 * made.noise.beyond:.2f} %"])
        header = ["", "mean", "deviation", "skewness", "excess kurtosis", "beyond 3 sigma"]
        rows.append(["Gaussian", "0", "sigma", "0", "0", "0.27 %"])
        return draw("z of test clips, over sigma", "density", lines, x_label="z / sigma"), Table(header, rows)

    def _sigma(self, number: int) -> float:
        config = self.runs[number].config
        return 1.0 if config is None else config.train_config.sigma

    def flows(self) -> tuple[Drawing | None, list[tuple[str, Table]]] | None:
        """Log-determinant of each flow with the spread of its log_s, and tables."""
        if not self.made:
            return None
        lines, tables = [], []
        for number, made in self.made.items():
            of_flows = [flow for flow in made.flows if flow.mean is not None]
            x = np.arange(len(of_flows), dtype=float)
            mean, std = (np.array([getattr(flow, name) for flow in of_flows]) for name in ("mean", "std"))
            lines.append(Line(self.runs[number].label, x, mean, number, (mean - std, mean + std), dots=True))
            names = ("log_det", "mean", "std", "low", "high", "output_std")
            rows = [
                [flow.name, *("" if (v := getattr(flow, name)) is None else f"{v:.3f}" for name in names)]
                for flow in made.flows
            ]
            header = [
                "",
                "log-determinant, nats/sample",
                "mean log_s",
                "deviation",
                "least",
                "greatest",
                "deviation of output",
            ]
            tables.append((self.runs[number].label, Table(header, rows)))
        return draw("log_s of each flow: mean, one deviation", "nats", lines, x_label="flow", whole_x=True), tables


# --- tables -----------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run], parameters: Mapping[int, tuple[int, int]]) -> Table:
    header = [
        "run",
        "steps",
        "loss, last 100",
        "test LL, newest",
        "parameters",
        "of synthesis",
        "newest checkpoint",
        "steps not finite",
    ]
    rows = []
    for number, run in enumerate(runs):
        curves = run.curves
        newest = [f"{points[-1, 1]:.4f}" for points in run.likelihoods.values() if len(points)]
        rows.append([
            run.label,
            _progress(run),
            "" if curves is None else f"{curves.newest:.4f}",
            ", ".join(newest),
            *(f"{count:,}" for count in parameters.get(number, ())),
            *([""] * (0 if number in parameters else 2)),
            run.checkpoints[0].name if run.checkpoints else "",
            "" if curves is None else f"{curves.not_finite:,}",
        ])  # fmt: skip
    return Table(header, rows)


def _progress(run: Run) -> str:
    """Steps done, of those that the last start was for."""
    done = f"{run.curves.last:,}" if run.curves is not None else ""
    planned = run.records[-1].get("iterations") if run.records else None
    if isinstance(planned, list) and len(planned) == 2 and type(planned[1]) is int:
        return f"{done} of {planned[1]:,}"
    return done


def _evaluation(found: Evaluation) -> tuple[str, Table]:
    names = list(next(iter(found.systems.values())))
    rows = [
        [
            system,
            *(
                f"{mean.value:.4f} ± {mean.half:.4f}" if mean.half == mean.half else f"{mean.value:.4f}"
                for mean in of.values()
            ),
        ]
        for system, of in found.systems.items()
    ]
    return f"{found.file}, {found.clips} clips", Table(["", *names], rows)


def _config(runs: Sequence[Run]) -> Table:
    """Keys in which runs differ; of one run, those that are not at their defaults."""
    if len(runs) == 1:
        defaults = flat({
            name: {key: of.default for key, of in field.annotation.model_fields.items() if not of.is_required()}
            for name, field in Config.model_fields.items()
        })  # fmt: skip
        columns: Iterable[Mapping[str, Any]] = (defaults, runs[0].values)
        header = ["", "default", runs[0].label]
    else:
        columns, header = [run.values for run in runs], ["", *(run.label for run in runs)]
    rows = _side_by_side(columns)
    return Table(
        header, [row for row in rows if len(set(row[1:])) > 1 and any(row[-1:] if len(runs) == 1 else row[1:])]
    )


def _every_key(runs: Sequence[Run]) -> Table:
    return Table(["", *(run.label for run in runs)], _side_by_side([run.values for run in runs]))


def _side_by_side(columns: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    columns = list(columns)
    keys = list(dict.fromkeys(key for values in columns for key in values))[:MAX_KEYS]
    return [[one_line(key, 120), *(_shown(values[key]) if key in values else "" for values in columns)] for key in keys]


def _shown(value: Any) -> str:
    try:
        text = value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
    except RecursionError:
        text = show(value)
    return one_line(text, 300)


def _environment(runs: Sequence[Run]) -> Table:
    """The last start of each run; of one run, its last five."""
    starts = [(run.label, run.records[-1]) for run in runs if run.records]
    if len(runs) == 1:
        starts = [(f"start {number}", record) for number, record in enumerate(runs[0].records, 1)][-5:]
    columns = [{key: value for key, value in record.items() if key != "config"} for _, record in starts]
    return Table(["", *(name for name, _ in starts)], _side_by_side(columns) if columns else [])


def _files(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        for path in run.checkpoints[:3]:
            size = run.attempt(path.name, lambda path=path: f"{path.stat().st_size:,}")
            rows.append([run.label, path.name, size or "", f"{len(run.checkpoints)}"])
    return Table(["run", "checkpoint", "bytes", "checkpoints in all"], rows)
