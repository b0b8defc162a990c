"""The training step of a vocoder, whatever its model and loss are, and the state that it changes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from config import Config
from fast.estimators import Execution
from harness.batches import BatchLoader
from harness.checkpoints import not_finite
from harness.devices import data_parallel, gradients_stay, steps_of_one_shape
from harness.errors import InputError
from harness.processes import mean, world_size
from training.optimisation import MovingAverage, constant, make_schedule
from training.precision import make_precision


class Learner:
    """A model with its loss, optimizer, precision, schedule and moving average, which learns step by step.

    model: gives z [B, 1, h, W] and log|det| [B] of audio, mel and the context of crops. loss: nats/sample of these.
    A subclass brings the loader, and calls `begin` when the weights are those to begin with.
    """

    loader: BatchLoader  # of the training clips, from the batch of the next step on

    def __init__(
        self,
        config: Config,
        device: torch.device,
        model: nn.Module,
        loss: Callable[[tuple[Tensor, Tensor]], Tensor],
    ) -> None:
        self.config, self.device, self.model, self.loss = config, device, model, loss
        train = config.train_config
        model.execution = Execution(compile=train.compile, checkpoint_activations=train.checkpoint_activations)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=train.learning_rate, fused=True)
        self.precision = make_precision(train, model, self.optimizer)
        self.iteration = 0
        self.average: MovingAverage | None = None

    def begin(
        self,
        scheduled: int = 0,
        average: Mapping[str, Tensor] | None = None,
        annealing: Callable[[int], float] = constant,
    ) -> None:
        """Make ready for the next step, by model and optimizer as they are now.

        scheduled: place in the schedule; average: that of earlier steps; annealing: as `make_schedule` takes it.
        """
        train = self.config.train_config
        if train.ema_decay:
            self.average = MovingAverage(self.model, train.ema_decay)
            if average is not None:
                self.average.load(average)
        self.schedule = make_schedule(self.optimizer, train, scheduled, annealing)
        self.parallel = data_parallel(self.model, self.device)
        self.parts = self._parts_of_a_batch()

    def _parts_of_a_batch(self) -> int:
        train = self.config.train_config
        if train.batch_size % (train.accumulation_steps * world_size()):
            among = f" on each of {world_size()} processes" if world_size() > 1 else ""
            raise InputError(
                f"train_config.batch_size {train.batch_size} cannot be split into accumulation_steps "
                f"{train.accumulation_steps} equal parts{among}; choose a multiple"
            )
        if train.compile and isinstance(self.parallel, nn.DataParallel):
            raise InputError(
                "train_config.compile does not work on several GPUs in one process; start one process for each with "
                "torchrun, or name one GPU with --device cuda:0"
            )
        return train.accumulation_steps

    def step(self, audio: Tensor, mel: Tensor) -> tuple[Tensor, ...]:
        """One update; returns loss, prior and log-determinant terms (nats/sample) and gradient norm, on the device.

        audio [B, T] and mel [B, M, F] are this process's share of the batch, the results those of the whole. A step
        that is not finite is skipped: it counts as an iteration, and the weights stay.
        """
        audio, mel = audio.to(self.device, non_blocking=True), mel.to(self.device, non_blocking=True)
        terms = 0
        with compile_errors_named(), steps_of_one_shape(self.device):
            for number, part in enumerate(zip(audio.chunk(self.parts), mel.chunk(self.parts), strict=True), 1):
                terms = terms + self._backward(*part, first=number == 1, last=number == self.parts)
        loss, log_det = mean(terms)
        norm = self.precision.update(loss)
        self.schedule.step()
        self.iteration += 1
        if self.average is not None:
            self.average.update(self.model, self.iteration)
        return loss, -loss - log_det, log_det, norm

    def _backward(self, audio: Tensor, mel: Tensor, first: bool, last: bool) -> Tensor:
        """Gradients of a part of a batch; returns what it adds to the loss and the log-determinant term."""
        with nullcontext() if last else gradients_stay(self.parallel):
            with self.precision.autocast():
                z, log_det = self.parallel(audio, mel, self.config.train_config.crop_context)
            loss = self.loss((z, log_det)) / self.parts
            self.precision.backward(loss, first, last)
        return torch.stack([loss.detach(), log_det.detach().sum() / z.numel() / self.parts])

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def files_of(self, step: int) -> list[str]:
        """Training clips of a step's batch, by its number from 0."""
        return [self.loader.dataset.files[index] for _, index in self.loader.batch_sampler.batch(step)]

    def spoilt(self) -> str | None:
        """Name of the first of the weights, or of their averages, that is not finite, if any is."""
        return not_finite(self.model.state_dict()) or (self.average and not_finite(self.average.weights()))

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and to sample from: the moving average, where there is one."""
        return self.model if self.average is None else self.average.module


@contextmanager
def compile_errors_named() -> Iterator[None]:
    """Turn what torch.compile says where it cannot work into an InputError of one line."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.split(".")[0:2] not in (["torch", "_dynamo"], ["torch", "_inductor"]):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"train_config.compile: torch.compile failed ({reason}); it needs a C++ compiler (g++) on CPUs and Triton "
            "on GPUs: install it, or leave compile out"
        ) from None
