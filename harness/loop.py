"""The training loop of any model: step, read back, judge, log, save, listen.

The results of steps stay on the device until a few of them are read back at once, since every reading waits for it;
then they are judged, logged and shown. The loop stops when asked, with a checkpoint from which it goes on exactly.
Among several processes each does its share of every step; the main one writes.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from harness import terminal
from harness.bad_steps import BadSteps
from harness.errors import InputError, Remedies, reason
from harness.log import NoLog, RunLog
from harness.processes import agree, is_main
from harness.stopping import StopRequest, worker_deaths_named

READ_BACK_EVERY = {"cpu": 1, "cuda": 10}  # steps; reading a result back waits for the accelerator
LINE_SECONDS = terminal.LINE_SECONDS
ESTIMATE_SECONDS = 10.0  # of steps after the first, which takes longer, before the rest is estimated


class Trained(Protocol):
    """A model that the loop can train, with everything that a checkpoint must hold to go on exactly."""

    device: torch.device
    loader: Iterable[Sequence[Any]]  # endless batches, from that of the next step on
    iteration: int  # steps done
    bad_steps: BadSteps

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""

    def step(self, *batch: Any) -> Sequence[Tensor]:
        """One update, or none where it would not be finite; counts up `iteration`.

        Returns numbers on the device, for which it does not wait: the loss first, the gradient norm last.
        """

    def spoilt(self) -> str | None:
        """Name of the first of the weights that is not finite, if any is."""

    def save(self) -> Path:
        """Write the checkpoint of this iteration; OSError where the disk refuses."""

    def prune(self, newest: Path) -> None:
        """Remove the checkpoints that need not be kept."""


class Step(NamedTuple):
    """A step read back from the device: its number from 1, its results as `Trained.step` gives them, its rate."""

    iteration: int
    results: tuple[float, ...]
    learning_rate: float


class Loop(ABC):
    """One run of the loop, up to iteration `last`; the subclass says what it logs, shows and measures.

    every: iterations from one milestone to the next.
    """

    remedies: Remedies

    def __init__(self, trained: Trained, last: int, every: int, log: RunLog | NoLog, stop: StopRequest) -> None:
        self.trained, self.last, self.every, self.log, self.stop = trained, last, every, log, stop
        self.saver = Saver(trained)
        self.progress = Progress(self, trained.iteration)
        self._pending: list[tuple[Sequence[Tensor], float]] = []
        self._began = time.perf_counter()  # of what is pending

    # --- what the subclass says ---------------------------------------------------------------------------

    @abstractmethod
    def row(self, step: Step) -> Sequence[float]:
        """A row of the log."""

    @abstractmethod
    def short(self, step: Step, steps_per_second: float) -> str:
        """The text behind the bar."""

    @abstractmethod
    def line(self, steps: Sequence[Step], steps_per_second: float) -> str:
        """One line on several steps, their results averaged."""

    @abstractmethod
    def milestone(self, finished: bool) -> None:
        """Save; then evaluate and sample by `stop.unless_stopped`, which a signal ends at the next safe point."""

    def is_due(self, iteration: int) -> bool:
        """Tell whether there is a milestone after this iteration."""
        return iteration % self.every == 0

    def next_due(self) -> int:
        """Iteration of the next milestone, which the end of the run is too."""
        ahead = range(self.trained.iteration + 1, self.last)
        return next((iteration for iteration in ahead if self.is_due(iteration)), self.last)

    def begin(self) -> None:  # noqa: B027 (by default nothing)
        """Do what comes before the first step."""

    def taken(self, steps: Sequence[Step], seconds: float) -> None:  # noqa: B027 (by default nothing)
        """Take note of steps that were judged, and of the time that they took."""

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the end or to a stop; returns whether the last checkpoint could be saved.

        Within the `stop`'s context, which is entered before what a run begins with.
        """
        try:
            with worker_deaths_named(self.remedies.worker_died):
                self.begin()
                if self.trained.iteration < self.last and not agree(self.stop, at_first=True):
                    self._steps()
                return not self.saver.failed
        finally:
            self.close()

    def close(self) -> None:
        """Close what was opened for the run."""
        self.progress.bar.close()
        self.log.close()

    def _steps(self) -> None:
        trained, due = self.trained, False
        self._began = time.perf_counter()
        for batch in trained.loader:
            learning_rate = trained.learning_rate
            self._pending.append((trained.step(*batch), learning_rate))
            if len(self._pending) >= READ_BACK_EVERY[trained.device.type]:
                self._read_back()
            finished = trained.iteration >= self.last or (not self._pending and agree(self.stop))
            due = due or self.is_due(trained.iteration)
            if finished or due:
                self._read_back()
                # Weights whose last step was not finite may be the reason: an older checkpoint is the better one.
                if finished or trained.bad_steps.in_a_row == 0:
                    due = False
                    self.progress.say()
                    self._check_weights()
                    self.milestone(finished)
                self._began = time.perf_counter()  # the pause is none of the speed
            if finished:
                agree(self.stop, finally_=True)  # a signal to one of them may have ended the evaluation of all
                return

    def _check_weights(self) -> None:
        """InputError, instead of a checkpoint that would hide the good ones, where a step has spoilt the weights.

        Its loss and gradient were finite; those of all later ones are not.
        """
        if spoilt := self.trained.spoilt():
            raise InputError(
                f"iteration {self.trained.iteration}: {spoilt} is not finite, the run has diverged and this checkpoint "
                f"was not written; {self.trained.bad_steps.remedy()}"
            )

    def _read_back(self) -> None:
        """Log, judge and show what is pending; InputError after too many steps in a row that were not finite."""
        if not self._pending:
            return
        values = torch.stack([torch.stack([value.float() for value in results]) for results, _ in self._pending])
        first = self.trained.iteration - len(self._pending) + 1
        steps = [
            Step(iteration, tuple(results), rate)
            for iteration, (results, (_, rate)) in enumerate(zip(values.tolist(), self._pending, strict=True), first)
        ]
        self._pending.clear()
        self.log.steps([self.row(step) for step in steps])
        for step in steps:
            self.trained.bad_steps.judge(step.iteration, step.results[0], step.results[-1])
        seconds = time.perf_counter() - self._began
        self.taken(steps, seconds)
        self.progress.show(steps, seconds)
        self._began = time.perf_counter()


class Progress:
    """Display of a run between milestones: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, loop: Loop, iteration: int) -> None:
        self.loop = loop
        hidden = None if is_main() else True  # None: where there is no terminal
        self.bar = terminal.bar(total=loop.last, initial=iteration, unit="step", dynamic_ncols=True, disable=hidden)
        self._unsaid: list[Step] = []
        self._seconds = 0.0  # that the unsaid took
        self._timed, self._timed_seconds, self._warm = 0, 0.0, False  # steps that the estimate is made of
        self._estimated = not is_main()

    def show(self, steps: Sequence[Step], seconds: float) -> None:
        """Move the bar by the steps that were read back; say a line if it is time."""
        self.bar.set_postfix_str(self.loop.short(steps[-1], len(steps) / seconds))
        self.bar.update(len(steps))
        self._unsaid.extend(steps)
        self._seconds += seconds
        if not self._estimated:
            self._estimate(len(steps), seconds)
        if self._seconds >= LINE_SECONDS:
            self.say()

    def _estimate(self, steps: int, seconds: float) -> None:
        """Tell once how long the run will take, when enough steps have shown it."""
        if not self._warm:
            self._warm = True
            return
        self._timed, self._timed_seconds = self._timed + steps, self._timed_seconds + seconds
        if self._timed_seconds < ESTIMATE_SECONDS:
            return
        self._estimated, each = True, self._timed_seconds / self._timed
        done, due = self.loop.trained.iteration, self.loop.next_due()
        if done < self.loop.last:
            terminal.tell(
                f"{1 / each:.3g} steps/s: iteration {self.loop.last} in about "
                f"{terminal.duration(each * (self.loop.last - done))}, checkpoint {due} in about "
                f"{terminal.duration(each * (due - done))}, without what is evaluated at checkpoints"
            )

    def say(self) -> None:
        """Say a line on the steps since the last one, where there is no terminal for a bar."""
        if self.bar.disable and self._unsaid:
            terminal.tell(self.loop.line(self._unsaid, len(self._unsaid) / self._seconds))
        self._unsaid, self._seconds = [], 0.0


class Saver:
    """Writes checkpoints and has those removed that need not be kept.

    A full disk is reported, and is no reason to end a run: the older checkpoints are intact, and the next attempt may
    find space. `failed` says whether the last one was refused.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained, self.failed = trained, False

    def save(self) -> None:
        """Write the checkpoint of this iteration, if this is the main process."""
        if not is_main():
            return
        try:
            path = self.trained.save()
        except OSError as error:
            self.failed = True
            terminal.say(  # on stdout, among the reports of the run, and also where only warnings are wanted
                f"warning: the checkpoint of iteration {self.trained.iteration} was not saved "
                f"({error.strerror or error}); the older ones are intact"
            )
            return
        self.failed = False
        terminal.tell(f"saved {path}")
        if self.trained.bad_steps.in_a_row == 0:
            try:
                self.trained.prune(path)
            except OSError as error:
                terminal.say(f"warning: an older checkpoint was not removed ({reason(error)})")
