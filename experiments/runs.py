"""One run: some steps of training from scratch, measured on whole held-out clips. A finished run is a row in a table.

Runs of one seed see the same batches and start from the same weights where they have the same.
"""

import csv
import hashlib
import io
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from config import Config, load_config
from harness.devices import fast_bfloat16
from harness.errors import InputError
from harness.files import read_text, write_table

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.json"
RESULTS = Path(__file__).parent / "data" / "runs.csv"
WORK = Path("experiments/work")  # of runs under way, and the losses of finished ones
MAX_BYTES = 2**26  # of a table


# --- what is run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Change of the demo: overrides of the demo's config, a variant of the model, the schedule."""

    name: str
    overrides: tuple[str, ...] = ()
    variant: str = ""
    cosine: bool = True  # the rate of the config falls to zero by a cosine over the run

    @property
    def text(self) -> str:
        """Everything that a result depends on, but corpus, seed and steps."""
        return " ".join([*sorted(self.overrides), f"variant={self.variant}", f"cosine={int(self.cosine)}"])


@dataclass(frozen=True)
class Run:
    """A setting with its seed and number of steps, on the corpus of a folder (as `python data.py` makes them)."""

    setting: Setting
    data: Path
    seed: int
    steps: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Its place in the table."""
        return self.setting.text, self.data.name, self.seed, self.steps

    @property
    def folder(self) -> str:
        """Name of its folder among the runs under way."""
        digest = hashlib.sha256(f"{self.setting.text} {self.precision}".encode()).hexdigest()[:8]
        name = re.sub(r"\W+", "-", self.setting.name)
        return f"{name}-{self.data.name}-{self.steps}-seed{self.seed}-{digest}"

    @property
    def precision(self) -> str:
        """Precision of training on this machine."""
        return "bfloat16" if self.config().train_config.fp16_run else "float32"

    def config(self) -> Config:
        """Its config: that of the demo on this corpus, with the overrides; half precision where this CPU has products.

        Precision is the machine's and no part of the setting: at the same weights it changes a loss by 0.001.
        """
        lists = [
            f"data_config.training_files={self.data / 'train_files.txt'}",
            f"data_config.test_files={self.data / 'test_files.txt'}",
        ]
        own = [*lists, f"train_config.seed={self.seed}", "train_config.num_workers=0"]
        half = f"train_config.fp16_run={str(fast_bfloat16()).lower()}"
        return load_config(DEMO, [half, *self.setting.overrides, *own])


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    name: str
    corpus: str
    seed: int
    steps: int
    test_ll: float  # nats per sample, mean over whole held-out clips
    log_mel: float  # log-mel distance in nats, at the best temperature
    log_mel_temp: float
    stoi: float  # at its own best temperature
    stoi_temp: float
    parameters: int  # in training
    synthesis_parameters: int
    multiply_adds: float  # per audio sample
    order: int  # of linear prediction
    train_loss: float  # mean of the last 50 steps
    seconds: float  # of training, by the clock
    cpu_seconds: float  # of training, of the processor
    ll_clips: int
    synthesis_clips: int
    precision: str  # of training: bfloat16 or float32
    settings: str

    @property
    def key(self) -> tuple[str, str, int, int]:
        """`Run.key` of its run."""
        return self.settings, self.corpus, self.seed, self.steps


# --- the table ------------------------------------------------------------------------------------------------


def read_results(path: Path = RESULTS) -> dict[tuple[str, str, int, int], Result]:
    """Rows of a table by their keys; none where there is no file yet. InputError where it is another's."""
    if not path.exists():
        return {}
    kinds = {field.name: field.type for field in fields(Result)}
    try:
        rows = read_rows(path)
        results = [Result(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a table of runs ({error}); name another with --results") from None
    return {result.key: result for result in results}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table by the names of its columns; ValueError where it is none."""
    try:
        return list(csv.DictReader(io.StringIO(read_text(path, MAX_BYTES))))
    except csv.Error as error:
        raise ValueError(str(error)) from None


def add_result(path: Path, result: Result) -> None:
    """Write a row beneath the others; the table is there whole at any moment."""
    rows = [*read_results(path).values(), result]
    columns = [field.name for field in fields(Result)]
    write_table(path, [columns, *(map(_shown, asdict(row).values()) for row in rows)])


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
