"""One training step of a vocoder, and everything that a checkpoint must hold to go on exactly.

Among several processes each does its share of every step; the main one writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint as ckpt
from config import REMEDIES, Config
from data import first_batch, make_train_loader
from fast.estimators import Execution
from harness.bad_steps import BadSteps
from harness.checkpoints import load_plain, not_finite, random_state, restore_random_state
from harness.devices import data_parallel, gradients_stay, prepare_training, steps_of_one_shape
from harness.errors import InputError
from harness.processes import mean, rank, world_size
from model import FlowVocoder, build_model
from modules import FlowLoss
from synthesis.mel_checks import MelStatistics
from training.mel_statistics import training_mel_statistics
from training.memory import check_memory
from training.optimisation import MovingAverage, make_schedule, schedule_state
from training.precision import make_precision
from training.resuming import PARTS, checked_state, load_optimizer


class Trainer:
    """One training run: the model, its optimizer, its place in the schedule and in the data.

    start: where it goes on, or None for fresh weights; with `warm`, only its weights are taken. Its sources are not
    removed by `keep_checkpoints`.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        folder: Path,
        start: ckpt.Checkpoint | None,
        warm: bool,
    ) -> None:
        self.config, self.device, self.folder = config, device, folder
        self.spared = () if start is None else start.sources
        train = config.train_config
        check_memory(config, device)
        prepare_training(device)
        torch.manual_seed(train.seed)
        self.model = build_model(config.waveflow_config, config.data_config).to(device)
        self.model.execution = Execution(compile=train.compile, checkpoint_activations=train.checkpoint_activations)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=train.learning_rate, fused=True)
        self.precision = make_precision(train, self.model, self.optimizer)
        self.loss = FlowLoss(train.sigma)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(PARTS[train.trained_parts]))
        self.iteration, scheduled, bad_before = 0, 0, 0
        if start is not None:
            load = ckpt.load_fitting_weights if warm else ckpt.load_weights
            load(self.model, start.weights, f"checkpoint {start.name}")
        self.loader = make_train_loader(
            config, 0 if start is None or warm else start.iteration, rank(), world_size(), device
        )
        if start is None and config.waveflow_config.linear_prediction:
            batch = (tensor.to(device) for tensor in first_batch(self.loader))
            self.model.initialise(*batch, train.crop_context)
        self.average = MovingAverage(self.model, train.ema_decay) if train.ema_decay else None
        if start is not None and not warm:
            scheduled, bad_before = self._restore(start)
        self.schedule = make_schedule(self.optimizer, train, scheduled)
        self.parallel = data_parallel(self.model, device)
        self.parts = self._parts_of_a_batch()
        self.mel_statistics = self._mel_statistics(None if warm else start)
        self.bad_steps = BadSteps(train.max_bad_steps, self._files_of, REMEDIES.bad_steps, bad_before)

    def _mel_statistics(self, start: ckpt.Checkpoint | None) -> dict[str, Any] | None:
        """Statistics of the training mels: of a run that goes on, its own."""
        known = None if start is None else MelStatistics.read(start.mel_statistics)
        known = known or training_mel_statistics(self.config)
        return None if known is None else known.to_dict()

    def _parts_of_a_batch(self) -> int:
        train = self.config.train_config
        if train.batch_size % (train.accumulation_steps * world_size()):
            among = f" on each of {world_size()} processes" if world_size() > 1 else ""
            raise InputError(
                f"train_config.batch_size {train.batch_size} cannot be split into accumulation_steps "
                f"{train.accumulation_steps} equal parts{among}; choose a multiple"
            )
        if train.compile and isinstance(self.parallel, torch.nn.DataParallel):
            raise InputError(
                "train_config.compile does not work on several GPUs in one process; start one process for each with "
                "torchrun, or name one GPU with --device cuda:0"
            )
        return train.accumulation_steps

    def _files_of(self, step: int) -> list[str]:
        return [self.loader.dataset.files[index] for _, index in self.loader.batch_sampler.batch(step)]

    def _restore(self, start: ckpt.Checkpoint) -> tuple[int, int]:
        """Go on where a checkpoint was written; returns its place in the schedule, and the bad steps just before it."""
        resumed = checked_state(start)
        self.iteration = start.iteration
        load_optimizer(self.optimizer, self.model, start)
        if self.average is not None and start.average is not None:
            self.average.load(start.average)
        load_plain(self.precision, resumed.precision, REMEDIES.weights_only)
        restore_random_state(resumed.state, self.device, REMEDIES.weights_only)
        return resumed.scheduled, resumed.bad_steps

    # --- the step -----------------------------------------------------------------------------------------

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

    @property
    def evaluated(self) -> FlowVocoder:
        """The model to evaluate and to sample from: the moving average, where there is one."""
        return self.model if self.average is None else self.average.module

    # --- checkpoints --------------------------------------------------------------------------------------

    def spoilt(self) -> str | None:
        """Name of the first of the weights, or of their averages, that is not finite, if any is."""
        return not_finite(self.model.state_dict()) or (self.average and not_finite(self.average.weights()))

    def save(self) -> Path:
        """Write the checkpoint of this iteration."""
        path = self.folder / f"waveflow_{self.iteration}"
        ckpt.save_checkpoint(
            path,
            self.model,
            iteration=self.iteration,
            optimizer=self.optimizer.state_dict(),
            scheduler=schedule_state(self.schedule, self.config.train_config),
            learning_rate=self.learning_rate,
            config=self.config.to_dict(),
            mel_statistics=self.mel_statistics,
            training_state={
                "precision": self.precision.state_dict(),
                "bad_steps": self.bad_steps.in_a_row,
                **random_state(self.device),
            },
            **({} if self.average is None else {"ema": self.average.weights()}),
        )
        return path

    def prune(self, newest: Path) -> None:
        """Remove all checkpoints up to `newest` but the `keep_checkpoints` newest and those spared."""
        ckpt.keep_newest(newest, self.config.train_config.keep_checkpoints, self.spared)


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
