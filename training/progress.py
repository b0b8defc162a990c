"""What a training run says and logs of its steps, and its judgement of them."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from harness.log import NoLog, RunLog
from harness.processes import is_main

if TYPE_CHECKING:
    from training.trainer import Trainer

READ_BACK_EVERY = {"cpu": 1, "cuda": 10}  # steps; reading a result back waits for the accelerator
LINE_SECONDS = 30.0  # from one line to the next where there is no terminal to draw a bar on


class Progress:
    """The results of steps, read back from the device a few at a time, then judged, logged and shown."""

    def __init__(self, trainer: "Trainer", log: RunLog | NoLog, last: int) -> None:
        self.trainer, self.log = trainer, log
        hidden = None if is_main() else True  # None: where there is no terminal
        self.bar = tqdm(total=last, initial=trainer.iteration, unit="step", dynamic_ncols=True, disable=hidden)
        self.pending: list[tuple[Any, ...]] = []
        self._unsaid: list[Sequence[float]] = []
        self._seconds = 0.0  # that the unsaid took
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last reading out of the speed."""
        self.began = time.perf_counter()

    def add(self, *results: Any) -> None:
        """Loss, prior, log-determinant, gradient norm as tensors on the device, and the learning rate."""
        self.pending.append(results)
        if len(self.pending) >= READ_BACK_EVERY[self.trainer.device.type]:
            self.read_back()

    def read_back(self) -> None:
        """Log and judge what is pending; InputError after `max_bad_steps` in a row that were not finite."""
        if not self.pending:
            return
        results = torch.stack([torch.stack([value.float() for value in row[:4]]) for row in self.pending]).tolist()
        first = self.trainer.iteration - len(self.pending) + 1
        rows = [(first + i, *result, row[4]) for i, (result, row) in enumerate(zip(results, self.pending, strict=True))]
        self.pending.clear()
        self.log.steps(rows)
        good = [self.trainer.bad_steps.judge(iteration, loss, norm) for iteration, loss, _, _, norm, _ in rows]
        # A skipped step counts as an iteration, whose number decides the place in the data, and not in the schedule,
        # which until now ran ahead of itself.
        self.trainer.schedule.move(-good.count(False))
        self._show(rows)
        self.restart_clock()

    def _show(self, rows: Sequence[Sequence[float]]) -> None:
        seconds = time.perf_counter() - self.began
        speed = self._samples(rows) / seconds
        self.log.scalar("train/samples_per_second", speed, self.trainer.iteration)
        self.bar.set_postfix_str(f"loss {rows[-1][1]:.4f}, lr {rows[-1][5]:.2g}, {speed / 1000:.1f}k samples/s")
        self.bar.update(len(rows))
        self._unsaid.extend(rows)
        self._seconds += seconds
        if self._seconds >= LINE_SECONDS:
            self.say()

    def say(self) -> None:
        """Where there is no terminal for a bar: one line on the steps since the last one, their terms averaged."""
        if self.bar.disable and self._unsaid:
            loss, prior, log_det, norm = (
                sum(row[column] for row in self._unsaid) / len(self._unsaid) for column in range(1, 5)
            )
            iteration, rate = self._unsaid[-1][0], self._unsaid[-1][5]
            tqdm.write(
                f"iteration {iteration}: loss {loss:.4f} (prior {prior:.4f}, log-determinant {log_det:.4f}), gradient "
                f"norm {norm:.3g}, lr {rate:.3g}, {self._samples(self._unsaid) / self._seconds / 1000:.1f}k samples/s"
            )
        self._unsaid, self._seconds = [], 0.0

    def _samples(self, rows: Sequence[Any]) -> int:
        config = self.trainer.config
        return len(rows) * config.train_config.batch_size * config.data_config.segment_length
