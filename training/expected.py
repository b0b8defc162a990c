"""The loss to be expected at each step, of configs that were measured, and where a run stands beside it.

Curves are data, `experiments/data/curve-*.csv`: a first line with the config, corpus and command, then a row for each
window of steps. A run is compared by the mean of its own window.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config import Config, config_from_dict
from harness.errors import InputError
from harness.files import written_whole

CURVES = Path(__file__).parents[1] / "experiments" / "data"
WINDOW = 25  # steps
TRAIN_KEYS = (
    "learning_rate",
    "lr_decay_step",
    "lr_decay_gamma",
    "batch_size",
    "warmup_steps",
    "sigma",
    "trained_parts",
    "crop_context",
)
NEGATIVE_IS_RIGHT = (
    "losses are negative log-likelihoods in nats per sample: below zero is right for audio, and lower is better"
)


@dataclass(frozen=True)
class Corpus:
    """Training clips, by which a corpus is known again wherever its files are."""

    name: str
    clips: int
    samples: int

    @classmethod
    def of(cls, name: str, lengths: Sequence[int]) -> "Corpus":
        """The corpus of clips of these lengths in samples."""
        return cls(name, len(lengths), sum(lengths))

    def is_like(self, other: "Corpus") -> bool:
        """True of the same number of clips, as long to one percent: other versions of a tool may cut them elsewhere."""
        return self.clips == other.clips and abs(self.samples - other.samples) <= 0.01 * self.samples


@dataclass(frozen=True)
class Standing:
    """A window of a run beside the expected one; deviation is that of the mean of a window."""

    iteration: int
    loss: float
    expected: float
    deviation: float

    def __str__(self) -> str:
        away = (self.loss - self.expected) / self.deviation if self.deviation else 0.0
        verdict = "as expected" if abs(away) <= 3 else "better than expected" if away < 0 else "worse than expected"
        return (
            f"iteration {self.iteration}: mean loss of {WINDOW} steps {self.loss:.3f}, expected {self.expected:.3f} "
            f"± {2 * self.deviation:.3f}: {verdict}"
        )


@dataclass(frozen=True)
class Curve:
    """Expected loss of a window of steps, and deviation of its mean, by the window's last iteration."""

    corpus: Corpus
    seeds: int
    points: Mapping[int, tuple[float, float]]

    def standing(self, losses: Mapping[int, float], iteration: int | None = None) -> Standing | None:
        """Window that ends at an iteration, or the newest, if a run has all its losses and the curve a point; or None.

        losses: by iteration.
        """
        for last in sorted(self.points, reverse=True) if iteration is None else [iteration]:
            window = [losses[step] for step in range(last - WINDOW + 1, last + 1) if step in losses]
            if len(window) == WINDOW and all(map(math.isfinite, window)):
                return Standing(last, sum(window) / WINDOW, *self.points[last])
        return None

    def __str__(self) -> str:
        shown = sorted(self.points)[3::4] or sorted(self.points)
        values = ", ".join(
            f"{self.points[step][0]:.2f} at {step}" for step in (shown[0], shown[len(shown) // 2], shown[-1])
        )
        return f"expected loss of this config on this corpus ({self.corpus.name}): {values}"


def signature(config: Config) -> dict[str, Any]:
    """Keys of a config that the losses depend on."""
    model, data = config.waveflow_config.to_dict(), config.data_config.to_dict()
    train = config.train_config.to_dict()
    del model["model_name"], data["training_files"], data["test_files"]
    found = {"waveflow_config": model, "data_config": data, "train_config": {key: train[key] for key in TRAIN_KEYS}}
    return json.loads(json.dumps(found))


def _completed(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """A signature with the keys that are younger than it, at their defaults; None where it has one that is no more."""
    lists = {"training_files": "-", "test_files": "-"}
    try:
        return signature(config_from_dict({**saved, "data_config": {**saved["data_config"], **lists}}))
    except InputError:
        return None


def expected_curve(config: Config, lengths: Sequence[int], folder: Path = CURVES) -> Curve | None:
    """The curve of a config on training clips of these lengths in samples; None where none was measured."""
    return curve_on(config, Corpus.of("", lengths), folder)


def curve_on(config: Config, corpus: Corpus, folder: Path = CURVES) -> Curve | None:
    """The curve of a config on a corpus of any name; None where none was measured."""
    own = signature(config)
    for path in sorted(folder.glob("curve-*.csv")):
        first, *rows = path.read_text(encoding="utf-8").splitlines()
        about = json.loads(first.removeprefix("# "))
        known = Corpus(**about["corpus"])
        if _completed(about["config"]) == own and known.is_like(corpus):
            points = {
                int(row["iteration"]): (float(row["loss"]), float(row["deviation"])) for row in csv.DictReader(rows)
            }
            return Curve(known, about["seeds"], points)
    return None


def write_curve(path: Path, config: Config, corpus: Corpus, runs: Sequence[Sequence[float]], command: str) -> None:
    """Write the curve of the losses of some runs, by step, of one config."""
    about = {"corpus": asdict(corpus), "seeds": len(runs), "command": command, "config": signature(config)}
    with written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        file.write(f"# {json.dumps(about)}\niteration,loss,deviation\n")
        for last in range(WINDOW, min(map(len, runs)) + 1, WINDOW):
            window = [losses[step] for losses in runs for step in range(last - WINDOW, last)]
            mean = sum(window) / len(window)
            variance = sum((loss - mean) ** 2 for loss in window) / max(1, len(window) - 1)
            file.write(f"{last},{mean:.4f},{math.sqrt(variance / WINDOW):.4f}\n")
