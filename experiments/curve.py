"""The expected loss by step of the demo's config on a corpus, as `train.py` shows it beside a run: data, not a claim.

From runs of its own, or from the `losses.csv` that a run of `train.py` left.
"""

from collections.abc import Sequence
from pathlib import Path

from config import Config, load_config
from data import make_train_loader
from experiments.runs import DEMO, ROOT, Run, Setting, read_rows
from experiments.training import GO_ON, train
from harness import terminal
from harness.errors import InputError
from harness.stopping import StopRequest
from training.expected import CURVES, Corpus, write_curve

SETTING = Setting("demo", ("train_config.fp16_run=false",), cosine=False)  # configs/demo.json as it is


def run_curve(data: Path, seeds: int, steps: int, work: Path) -> int:
    """Train the demo's config on the corpus of a folder with seeds 1 to `seeds`, and write its curve.

    Returns the exit status, which is that of a stop where there was one.
    """
    losses = []
    with StopRequest() as stop:
        for seed in range(1, seeds + 1):
            run = Run(SETTING, data, seed, steps)
            trainer, saved = train(run, work / run.folder, stop)
            if not trainer.finished:
                return stop.exit_status(saved, finished=False, resume=GO_ON)
            losses.append(trainer.losses)
    _write(data, run.config(), losses, f"python -m experiments curve --data DIR --seeds {seeds} --steps {steps}")
    return 0


def curve_of_logs(data: Path, logs: Sequence[Path]) -> None:
    """Write the curve of runs of `train.py -c configs/demo.json` on the corpus of a folder, from their `losses.csv`."""
    config = Run(SETTING, data, 0, 0).config()
    losses = [_losses_of(path) for path in logs]
    _write(data, config, losses, "python train.py -c configs/demo.json")


def _losses_of(path: Path) -> list[float]:
    try:
        rows = [(int(row["iteration"]), float(row["loss"])) for row in read_rows(path)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the losses.csv of a run ({error})") from None
    if [iteration for iteration, _ in rows] != list(range(1, len(rows) + 1)):
        raise InputError(f"{path}: not every iteration from 1 on is there; use the log of a whole run")
    return [loss for _, loss in rows]


def _write(data: Path, config: Config, losses: Sequence[Sequence[float]], command: str) -> None:
    corpus = Corpus.of(
        data.name if data.name != "data" else data.parent.name, make_train_loader(config).dataset.lengths
    )
    path = CURVES / f"curve-{corpus.name}.csv"
    write_curve(path, config, corpus, losses, command)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    terminal.say(f"expected losses of {load_config(DEMO).waveflow_config.model_name} on {corpus.name}: {shown}")
