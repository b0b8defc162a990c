"""An image model's training run: what it logs, shows and measures besides the steps of harness/loop.py."""

import math
from collections.abc import Sequence

from harness import terminal
from harness.log import NoLog, RunLog
from harness.loop import Loop, Step
from harness.processes import gather, is_main
from harness.stopping import StopRequest
from image_density_experiments.checkpoint import REMEDIES
from image_density_experiments.evaluation import bits_per_dim
from image_density_experiments.sampling import save_samples
from image_density_experiments.trainer import Trainer

STEP_COLUMNS = ("iteration", "epoch", "bits_per_dim", "class_loss", "grad_norm", "learning_rate")
EPOCH_COLUMNS = ("iteration", "epoch", "train_bits_per_dim", "test_bits_per_dim", "images_per_second")
STEP_FILE, EPOCH_FILE = "losses.csv", "epochs.csv"


def train_until(last: int, trainer: Trainer, temperatures: Sequence[float], stop: StopRequest) -> bool:
    """Train to iteration `last` or to a stop; evaluates, samples and saves at the end of every epoch.

    Returns whether the last checkpoint could be saved.
    """
    return ImageLoop(last, trainer, temperatures, stop).run()


class ImageLoop(Loop):
    """The loop in epochs, with bits per dimension of the test images and samples at the end of each."""

    remedies = REMEDIES

    def __init__(self, last: int, trainer: Trainer, temperatures: Sequence[float], stop: StopRequest) -> None:
        place = trainer.folder, trainer.iteration
        log = RunLog(*place, STEP_COLUMNS, tensorboard=True, file=STEP_FILE) if is_main() else NoLog()
        super().__init__(trainer, last, trainer.batches_per_epoch, log, stop)
        self.epochs = RunLog(*place, EPOCH_COLUMNS, file=EPOCH_FILE) if is_main() else NoLog()
        self.temperatures = temperatures
        self.epochs_done = trainer.epoch  # and reported
        self.steps, self.seconds = 0, 0.0  # of this epoch

    def is_due(self, iteration: int) -> bool:
        """Tell whether an epoch ends here, or a checkpoint was asked for."""
        every = self.trained.options.save_every
        return super().is_due(iteration) or (every is not None and iteration % every == 0)

    def begin(self) -> None:
        """Say what an epoch costs, before it begins."""
        trainer = self.trained
        if trainer.iteration >= self.last:
            return
        seconds, n_steps = trainer.seconds_per_step(), trainer.batches_per_epoch
        # Evaluating goes forward only, about a third of a step.
        evaluation = seconds / 3 * len(trainer.data.test.images) / trainer.options.batch_size
        if is_main():
            terminal.tell(
                f"an epoch is {n_steps} steps of {trainer.options.batch_size} images: about "
                f"{terminal.duration(n_steps * seconds)}, and {terminal.duration(evaluation)} for the test images"
            )

    def close(self) -> None:
        """Close both tables."""
        super().close()
        self.epochs.close()

    def row(self, step: Step) -> Sequence[float]:
        """A row of STEP_COLUMNS."""
        return step.iteration, self.trained.epoch_of(step.iteration), *step.results, step.learning_rate

    def taken(self, steps: Sequence[Step], seconds: float) -> None:
        """Bits per dimension and time of the epoch."""
        for step in steps:
            self.trained.count(step.results[0], step.results[-1])
        self.steps, self.seconds = self.steps + len(steps), self.seconds + seconds

    def short(self, step: Step, steps_per_second: float) -> str:
        """Epoch, bits per dimension, learning rate."""
        epoch = self.trained.epoch_of(step.iteration)
        return f"epoch {epoch}, {step.results[0]:.4f} bits/dim, lr {step.learning_rate:.2g}"

    def line(self, steps: Sequence[Step], steps_per_second: float) -> str:
        """Averages of bits per dimension and gradient norm; epoch, learning rate and speed."""
        columns = zip(*(step.results for step in steps), strict=True)
        bits, _, norm = (sum(values) / len(steps) for values in columns)
        iteration, rate = steps[-1].iteration, steps[-1].learning_rate
        return (
            f"iteration {iteration}, epoch {self.trained.epoch_of(iteration)}: {bits:.4f} bits/dim, gradient norm "
            f"{norm:.3g}, lr {rate:.3g}, {self._speed(steps_per_second):.1f} images/s"
        )

    def _speed(self, steps_per_second: float) -> float:
        return steps_per_second * self.trained.options.batch_size

    def milestone(self, finished: bool) -> None:
        """Save, then measure an epoch that ended: an evaluation that a signal ends early costs nothing but itself."""
        trainer = self.trained
        if trainer.epoch == self.epochs_done:  # stopped within one
            self.saver.save()
            return
        train_bits = trainer.end_epoch()
        speed = self._speed(self.steps / self.seconds) if self.seconds else math.nan
        self.epochs_done, self.steps, self.seconds = trainer.epoch, 0, 0.0
        self.saver.save()
        options = trainer.options
        own_bits = self.stop.unless_stopped(
            lambda: bits_per_dim(
                trainer.model, trainer.data.test, options.evaluated_at_once, options.seed, options.amp, shared=True
            ).tolist()
        )
        test_bits = gather(own_bits)
        if test_bits is None or not is_main():
            return
        self._report(train_bits, sum(test_bits) / len(test_bits), speed)
        if finished or trainer.epoch % options.sample_every == 0:
            self.stop.unless_stopped(self._write_samples)

    def _report(self, train_bits: float, test_bits: float, speed: float) -> None:
        trainer = self.trained
        self.epochs.steps([(trainer.iteration, trainer.epoch, train_bits, test_bits, round(speed, 1))])
        bits = {"epoch/train_bits_per_dim": train_bits, "epoch/test_bits_per_dim": test_bits}
        self.log.scalars(bits, trainer.iteration)
        terminal.say(
            f"epoch {trainer.epoch}: {train_bits:.4f} bits/dim on train, {test_bits:.4f} on test, {speed:.1f} images/s"
        )

    def _write_samples(self) -> None:
        trainer = self.trained
        path = trainer.folder / "samples" / f"epoch_{trainer.epoch:04d}.png"
        try:
            save_samples(path, trainer.model, self.temperatures, trainer.options.seed)
        except OSError as error:
            terminal.say(f"warning: the samples were not written ({error.strerror or error})")
