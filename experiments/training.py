"""Training of a run: steps of `training/learner.py` in the loop of `harness/loop.py`, and a checkpoint now and then."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data import first_batch, make_train_loader
from experiments.runs import Run
from experiments.variants import Subject, build_subject
from harness.bad_steps import BadSteps
from harness.checkpoints import (
    check_weights,
    checked,
    load_optimizer,
    load_strictly,
    random_state,
    read_torch_file,
    restore_random_state,
    save_whole,
)
from harness.errors import InputError, Remedies
from harness.files import write_table
from harness.log import NoLog
from harness.loop import Loop, Step
from harness.stopping import StopRequest
from harness.training_state import Taken, is_count, is_number, require
from training.learner import Learner
from training.memory import check_memory

SAVE_EVERY = 50  # steps
GO_ON = "go on with the same command"
REMEDIES = Remedies(
    resume=GO_ON,
    weights_only="remove its folder, and the run begins anew",
    bad_steps="this setting cannot be trained",
    worker_died=GO_ON,
)
STATE = {"subject", "optimizer", "average", "losses", "seconds", "random"}  # of a run under way
CPU = torch.device("cpu")


def train(run: Run, folder: Path, stop: StopRequest) -> tuple["RunTrainer", bool]:
    """Train a run to its last step or to a stop; the second is whether the last checkpoint could be saved."""
    trainer = RunTrainer(run, folder)
    return trainer, RunLoop(trainer, stop).run()


class RunTrainer(Learner):
    """A run's subject, which learns as a vocoder does; from the run's checkpoint, if it has one."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        config = run.config()
        check_memory(config, CPU)
        subject = build_subject(config, run.setting.variant)
        super().__init__(config, CPU, subject, subject.loss)
        self.losses: list[float] = []
        self.seconds, self.cpu_seconds = 0.0, 0.0
        average, bad_before = None, 0
        if self._path.exists():
            average, bad_before = self._restore(read_torch_file(self._path))
        self.loader = make_train_loader(config, self.iteration)
        if not self.iteration:
            subject.model.initialise(*first_batch(self.loader), config.train_config.crop_context)
        self.begin(self.iteration, average, self._annealing)
        limit = config.train_config.max_bad_steps
        self.bad_steps = BadSteps(limit, self.files_of, lambda: REMEDIES.bad_steps, bad_before)

    def _annealing(self, done: int) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * done / self.run.steps) if self.run.setting.cosine else 1.0

    @property
    def finished(self) -> bool:
        """Tell whether the last step is done."""
        return self.iteration >= self.run.steps

    @property
    def evaluated(self) -> Subject:
        """The moving average, where there is one, ready to be measured."""
        return super().evaluated.eval()

    # --- time ---------------------------------------------------------------------------------------------

    def start_clocks(self) -> None:
        """Count time from now on."""
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def _read_clocks(self) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds += now - self._began
        self.cpu_seconds += cpu_now - self._cpu_began
        self._began, self._cpu_began = now, cpu_now

    # --- checkpoints --------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> Path:
        """Write the checkpoint of this step, and beside it the losses so far."""
        self._read_clocks()
        content = {
            "subject": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.weights(),
            "losses": self.losses,
            "seconds": [self.seconds, self.cpu_seconds],
            "bad_steps": self.bad_steps.in_a_row,
            "random": random_state(CPU),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        save_whole(self._path, content)
        rows = ((step, f"{loss:.5f}") for step, loss in enumerate(self.losses, 1))
        write_table(self.folder / "losses.csv", [("iteration", "loss"), *rows])
        return self._path

    def prune(self, newest: Path) -> None:
        """Nothing: there is one checkpoint, written over."""

    def _restore(self, state: Any) -> tuple[dict[str, torch.Tensor] | None, int]:
        """Go on from a checkpoint; returns its moving average, and the bad steps just before it."""
        remedy = f"remove {self._path}, and the run begins anew"
        checked(lambda: self._check(state), "content is not that of this run", remedy)
        names = [name for name, _ in self.model.named_parameters()]
        try:
            load_strictly(self.model, state["subject"])
            if self.config.train_config.ema_decay:
                buffers = {name: value for name, value in self.model.state_dict().items() if name not in names}
                check_weights(self.model, {**buffers, **state["average"]})
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from None
        load_optimizer(self.optimizer, self.model, state["optimizer"], names, remedy, Taken(most=len(state["losses"])))
        restore_random_state(state["random"], CPU, remedy)
        self.losses, (self.seconds, self.cpu_seconds) = state["losses"], state["seconds"]
        self.iteration = len(self.losses)
        return state["average"], state.get("bad_steps", 0)

    def _check(self, state: Any) -> None:
        """ValueError where what `save` writes is not there, or of another kind."""
        require(isinstance(state, dict) and state.keys() >= STATE, "it", state)
        for name in ("subject", "average") if self.config.train_config.ema_decay else ("subject",):
            require(isinstance(state[name], dict) and all(map(_is_weight, state[name].items())), name, "damaged")
        losses, seconds, bad = state["losses"], state["seconds"], state.get("bad_steps", 0)  # not in earlier files
        require(isinstance(losses, list) and all(type(loss) is float for loss in losses), "losses", losses)
        require(0 < len(losses) <= self.run.steps, "the number of losses", len(losses))
        require(isinstance(seconds, list) and [is_number(n, 0) for n in seconds] == [True, True], "seconds", seconds)
        require(is_count(bad) and bad <= len(losses), "bad_steps", bad)
        require(isinstance(state["random"], dict), "random", state["random"])


def _is_weight(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, torch.Tensor) and bool(torch.isfinite(value).all())


class RunLoop(Loop):
    """The loop of a run, which is measured when it has ended, and not before."""

    remedies = REMEDIES

    def __init__(self, trainer: RunTrainer, stop: StopRequest) -> None:
        super().__init__(trainer, trainer.run.steps, SAVE_EVERY, NoLog(), stop)
        self.name = f"{trainer.run.setting.name}, seed {trainer.run.seed}"

    def begin(self) -> None:
        """Start the clocks."""
        self.trained.start_clocks()

    def row(self, step: Step) -> Sequence[float]:
        """Step and loss."""
        return step.iteration, step.results[0]

    def taken(self, steps: Sequence[Step], seconds: float) -> None:
        """Keep the losses, which are part of the checkpoint."""
        self.trained.losses += [step.results[0] for step in steps]

    def short(self, step: Step, steps_per_second: float) -> str:
        """Run, loss, learning rate."""
        return f"{self.name}: loss {step.results[0]:.4f}, lr {step.learning_rate:.2g}"

    def line(self, steps: Sequence[Step], steps_per_second: float) -> str:
        """Averages of loss and gradient norm; learning rate and speed."""
        loss, norm = (sum(step.results[place] for step in steps) / len(steps) for place in (0, -1))
        return (
            f"{self.name}, step {steps[-1].iteration} of {self.last}: loss {loss:.4f}, gradient norm {norm:.3g}, lr "
            f"{steps[-1].learning_rate:.3g}, {steps_per_second:.3g} steps/s"
        )

    def milestone(self, finished: bool) -> None:
        """Save."""
        self.saver.save()
