"""One run: some steps of training from scratch, measured on whole held-out clips. A finished run is a row in a table.

Runs of one seed see the same batches and start from the same weights where they have the same. An interrupted run goes
on from its checkpoint; one that stands in the table is not run again, whichever claim it was run for.
"""

import csv
import hashlib
import io
import math
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from config import Config, load_config
from data import first_batch, make_train_loader
from experiments.measures import Scores, measure
from experiments.variants import Subject, build_subject
from harness import terminal
from harness.bad_steps import BadSteps
from harness.checkpoints import (
    check_weights,
    checked,
    load_optimizer,
    load_strictly,
    not_finite,
    random_state,
    read_torch_file,
    restore_random_state,
    save_whole,
)
from harness.devices import fast_bfloat16
from harness.errors import InputError
from harness.files import read_text, write_table, written_whole
from harness.pools import process_pool
from harness.training_state import Taken, is_number, require
from training.optimisation import MovingAverage, rate_factor
from training.precision import make_precision

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.json"
RESULTS = Path(__file__).parent / "data" / "runs.csv"
WORK = Path("experiments/work")  # of runs under way, and the losses of finished ones
SAVE_EVERY = 50  # steps
STATE = {"subject", "optimizer", "average", "losses", "seconds", "random"}  # of a run under way
MAX_BYTES = 2**26  # of a table
CANNOT_TRAIN = "this setting cannot be trained"
CPU = torch.device("cpu")


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
        lists = [f"data_config.{kind}ing_files={self.data / f'{kind}_files.txt'}" for kind in ("train",)]
        lists.append(f"data_config.test_files={self.data / 'test_files.txt'}")
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


# --- running --------------------------------------------------------------------------------------------------


def run_all(runs: Sequence[Run], results: Path = RESULTS, work: Path = WORK, jobs: int = 1) -> None:
    """Run what is not in the table yet, several at a time if asked, each with its share of the threads."""
    done = read_results(results)
    missing = list({run.key: run for run in runs if run.key not in done}.values())
    if len(missing) < len(runs):
        terminal.tell(f"{len(runs) - len(missing)} of {len(runs)} runs are in {results}")
    for number, result in enumerate(_results(missing, work, jobs), 1):
        add_result(results, result)
        terminal.tell(
            f"{number} of {len(missing)}: {result.name}, seed {result.seed}, {result.steps} steps: log-likelihood "
            f"{result.test_ll:.4f}, log-mel distance {result.log_mel:.3f}, STOI {result.stoi:.3f}, "
            f"{result.seconds:.0f} s"
        )


def _results(runs: Sequence[Run], work: Path, jobs: int) -> Iterator[Result]:
    if jobs == 1 or len(runs) < 2:
        yield from (run_one(run, work) for run in runs)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    died = "the process of a run died, as when memory runs out; go on with the same command, and fewer --jobs"
    with process_pool(
        jobs, died, "spawn", torch.set_num_threads, (threads,)
    ) as pool:  # what they did is in checkpoints
        for future in as_completed([pool.submit(run_one, run, work) for run in runs]):
            yield future.result()


def run_one(run: Run, work: Path = WORK) -> Result:
    """Train and measure."""
    config = run.config()
    training = Training(run, config, work / run.folder)
    training.go_on()
    scores = measure(training.evaluated, config)
    return _result(run, config, training, scores)


def _result(run: Run, config: Config, training: "Training", scores: Scores) -> Result:
    last = training.losses[-50:]
    return Result(
        name=run.setting.name,
        corpus=run.data.name,
        seed=run.seed,
        steps=run.steps,
        order=config.waveflow_config.linear_prediction,
        train_loss=sum(last) / len(last),
        seconds=training.seconds,
        cpu_seconds=training.cpu_seconds,
        precision=run.precision,
        settings=run.setting.text,
        **asdict(scores),
    )


class Training:
    """Training of a run, from its checkpoint if it has one."""

    def __init__(self, run: Run, config: Config, folder: Path) -> None:
        self.run, self.config, self.folder = run, config, folder
        self.subject = build_subject(config, run.setting.variant)
        train = config.train_config
        self.optimizer = torch.optim.Adam(self.subject.parameters(), lr=train.learning_rate, fused=True)
        self.precision = make_precision(train, self.subject, self.optimizer)
        self.losses: list[float] = []
        self.seconds, self.cpu_seconds = 0.0, 0.0
        state = read_torch_file(self._path) if self._path.exists() else None
        if state is None:
            self.subject.model.initialise(*first_batch(make_train_loader(config)), train.crop_context)
        self.average = MovingAverage(self.subject, train.ema_decay) if train.ema_decay else None
        if state is not None:
            self._restore(state)

    @property
    def _path(self) -> Path:
        return self.folder / "state.pt"

    @property
    def evaluated(self) -> Subject:
        """The moving average, where there is one."""
        return (self.subject if self.average is None else self.average.module).eval()

    def go_on(self) -> None:
        """Train to the last step, saving now and then; the losses of all steps are in `losses.csv` then."""
        bad = BadSteps(self.config.train_config.max_bad_steps, lambda step: [], CANNOT_TRAIN, 0)
        loader, done = make_train_loader(self.config, len(self.losses)), len(self.losses)
        self.subject.train()
        began, cpu_began = time.perf_counter(), time.process_time()
        for step, batch in zip(range(done, self.run.steps), loader, strict=False):
            loss, norm = self._step(step, *batch)
            self.losses.append(loss)
            bad.judge(step + 1, loss, norm)
            if len(self.losses) % SAVE_EVERY == 0 or len(self.losses) == self.run.steps:
                now, cpu_now = time.perf_counter(), time.process_time()
                self.seconds += now - began
                self.cpu_seconds += cpu_now - cpu_began
                began, cpu_began = now, cpu_now
                self._save()
        with written_whole(self.folder / "losses.csv") as temporary:
            rows = (f"{step},{loss:.5f}\n" for step, loss in enumerate(self.losses, 1))
            temporary.write_text("iteration,loss\n" + "".join(rows), encoding="utf-8")

    def _step(self, step: int, audio: torch.Tensor, mel: torch.Tensor) -> tuple[float, float]:
        train = self.config.train_config
        factor = rate_factor(train, step)
        if self.run.setting.cosine:
            factor *= 0.5 + 0.5 * math.cos(math.pi * step / self.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * factor
        with self.precision.autocast():
            outputs = self.subject.noise_of(audio, mel, train.crop_context)
        loss = -self.subject.log_likelihood(outputs).sum() / outputs[0].numel()
        norm = self.precision.step(loss)
        if self.average is not None:
            self.average.update(self.subject, step + 1)
        return loss.item(), norm.item()

    def _save(self) -> None:
        if spoilt := not_finite(self.subject.state_dict()):  # the state before is the better one
            raise InputError(f"step {len(self.losses)}: {spoilt} is not finite; {CANNOT_TRAIN}")
        average = None if self.average is None else self.average.weights()
        content = {
            "subject": self.subject.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "losses": self.losses,
            "seconds": [self.seconds, self.cpu_seconds],
            "random": random_state(CPU),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        save_whole(self._path, content)

    def _restore(self, state: Any) -> None:
        remedy = f"remove {self._path}, and the run begins anew"
        checked(lambda: self._check(state), "content is not that of this run", remedy)
        try:
            load_strictly(self.subject, state["subject"])
            if self.average is not None:
                check_weights(self.average.module, {**self.average.module.state_dict(), **state["average"]})
                self.average.load(state["average"])
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from None
        names = [name for name, _ in self.subject.named_parameters()]
        taken = Taken(most=len(state["losses"]))
        load_optimizer(self.optimizer, self.subject, state["optimizer"], names, remedy, taken)
        restore_random_state(state["random"], CPU, remedy)
        self.losses, (self.seconds, self.cpu_seconds) = state["losses"], state["seconds"]

    def _check(self, state: Any) -> None:
        """ValueError where what `_save` writes is not there, or of another kind."""
        require(isinstance(state, dict) and state.keys() >= STATE, "it", state)
        for name in ("subject", "average") if self.average is not None else ("subject",):
            require(isinstance(state[name], dict) and all(map(_is_weight, state[name].items())), name, "damaged")
        losses, seconds = state["losses"], state["seconds"]
        require(isinstance(losses, list) and all(type(loss) is float for loss in losses), "losses", losses)
        require(0 < len(losses) <= self.run.steps, "the number of losses", len(losses))
        require(isinstance(seconds, list) and [is_number(n, 0) for n in seconds] == [True, True], "seconds", seconds)
        require(isinstance(state["random"], dict), "random", state["random"])


def _is_weight(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, torch.Tensor) and bool(torch.isfinite(value).all())
