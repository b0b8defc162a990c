"""The training loop of the image models: step, log, save; stops when asked, goes on exactly where it stopped."""

import itertools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint as root_checkpoint
from harness.devices import data_parallel
from harness.errors import InputError
from harness.log import NoLog, RunLog
from harness.processes import agree, gather, is_main, mean, rank, share_of_batch, world_size
from harness.stopping import StopRequest, worker_deaths_named
from image_density_experiments import checkpoint as ckpt
from image_density_experiments.data import make_train_loader, to_pixels
from image_density_experiments.datasets import ImageData
from image_density_experiments.evaluation import bits_per_dim, half_precision, one_hot
from image_density_experiments.figures import save_image_rows
from image_density_experiments.model import ImageFlow

KEPT_CHECKPOINTS = 10
STEP_COLUMNS = ("iteration", "epoch", "bits_per_dim", "class_loss", "grad_norm", "learning_rate")  # of losses.csv
# Of epochs.csv: bits per dimension on train (running mean) and test.
EPOCH_COLUMNS = ("iteration", "epoch", "train_bits_per_dim", "test_bits_per_dim", "images_per_second")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train, under the names of the published flags."""

    batch_size: int
    eval_batch_size: int
    epochs: int
    lr: float
    warmup: float  # epochs
    weight_decay: float
    y_weight: float
    max_grad_clip: float  # of each component; 0: not clipped
    max_grad_norm: float  # of all together; 0: not clipped
    n_init_batches: int
    n_workers: int
    seed: int
    augmented: bool
    amp: bool
    sample_every: int  # epochs


class Trainer:
    """One run: the model with everything that a checkpoint must hold to go on exactly.

    start: what `load_checkpoint` returned for weights that the model has already loaded, or None.
    """

    def __init__(
        self, model: ImageFlow, data: ImageData, options: TrainOptions, folder: Path, start: dict[str, Any] | None
    ) -> None:
        self.model, self.data, self.options, self.folder = model, data, options, folder
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adamax(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        self.iteration, self.epoch_bits = 0, 0.0  # the sum over the steps of this epoch
        self.batches_per_epoch = max(1, len(data.train.images) // options.batch_size)
        if start is not None:
            self._restore(start)
        self.loader = self._make_loader(self.iteration, options.n_workers, rank(), world_size())
        if start is None:
            self._initialise()
        # After initialising: replicas cannot. Not every type's step uses all of its gates.
        self.parallel = data_parallel(model.train(), self.device, find_unused=True)

    def _make_loader(self, start_batch: int, n_workers: int, rank: int = 0, world_size: int = 1) -> Any:
        options = self.options
        return make_train_loader(
            self.data,
            self.model.config.n_bits,
            options.batch_size,
            options.seed,
            n_workers,
            options.augmented,
            start_batch,
            rank,
            world_size,
        )

    def _restore(self, start: dict[str, Any]) -> None:
        if "optimizer" not in start:
            return
        order = ckpt.parameter_order(self.model, start["model"])
        root_checkpoint.load_optimizer(self.optimizer, self.model, {**start, "parameter_order": order})
        self.iteration = start.get("iteration", start.get("epoch", 0) * self.batches_per_epoch)
        state = start.get("training_state", {})  # absent from published files
        root_checkpoint.restore_random_state(state, self.device)
        self.epoch_bits = state.get("epoch_bits", 0.0)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Actnorms take their scale and bias from the first batches (Glow, 3.1), on one device."""
        batches = itertools.islice(self._make_loader(0, n_workers=0), self.options.n_init_batches)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.model.train()(images.to(self.device), one_hot(labels, self.model))

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.iteration // self.batches_per_epoch

    @property
    def learning_rate(self) -> float:
        """Of the next step: linear warm-up by whole epochs, then constant."""
        return self.options.lr * min(1.0, (self.epoch + 1) / max(self.options.warmup, 1e-9))

    def step(self, x: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """One update; returns bits per dimension, class loss (0 without) and gradient norm.

        InputError if one is not finite; the weights are then those before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        # Each process draws the noise of the whole batch, so that it does not depend on how many share it.
        noise = share_of_batch(self.model.draw_noise(x.repeat(world_size(), 1, 1, 1))).to(self.device)
        x = x.to(self.device, non_blocking=True)
        with half_precision(self.device, self.options.amp):
            _, bits, y_logits = self.parallel(x, one_hot(labels, self.model), noise)
        bits = bits.mean()
        class_loss = bits.new_zeros(()) if y_logits is None else F.cross_entropy(y_logits, labels.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        (bits + self.options.y_weight * class_loss).backward()
        norm = self._clip_gradients()
        results = mean(torch.stack([bits.detach(), class_loss.detach(), norm])).tolist()
        if not all(map(math.isfinite, results)):
            raise InputError(
                f"step {self.iteration + 1}: bits/dim {results[0]:.4g}, gradient norm {results[2]:.4g}; the "
                "checkpoints before it are intact: go on from one with --saved_model FILE and a lower --lr"
            )
        self.optimizer.step()
        self.iteration += 1
        self.epoch_bits += results[0]
        return tuple(results)

    def _clip_gradients(self) -> Tensor:
        parameters = list(self.model.parameters())
        if self.options.max_grad_clip:
            torch.nn.utils.clip_grad_value_(parameters, self.options.max_grad_clip)
        return torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm or math.inf)

    def save(self) -> Path:
        """Write the checkpoint of this iteration, and keep the newest ones."""
        path = self.folder / f"glow_model_{self.iteration}.pt"
        ckpt.save_checkpoint(
            path,
            self.model,
            iteration=self.iteration,
            optimizer=self.optimizer.state_dict(),
            config=self.model.config.to_dict(),
            options=asdict(self.options),
            training_state={"epoch_bits": self.epoch_bits, **root_checkpoint.random_state(self.device)},
        )
        root_checkpoint.keep_newest(path, KEPT_CHECKPOINTS, file_name=ckpt.FILE_NAME)
        return path


def train_until(last: int, trainer: Trainer, temperatures: list[float], stop: StopRequest) -> None:
    """Train to iteration `last` or to a stop; evaluates, samples and saves at the end of every epoch."""
    steps = RunLog(trainer.folder, trainer.iteration, STEP_COLUMNS, tensorboard=True) if is_main() else NoLog()
    epochs = RunLog(trainer.folder, trainer.iteration, EPOCH_COLUMNS, file="epochs.csv") if is_main() else NoLog()
    hidden = None if is_main() else True  # None: where there is no terminal
    bar = tqdm(total=last, initial=trainer.iteration, unit="step", dynamic_ncols=True, disable=hidden)
    try:
        with stop, worker_deaths_named(ckpt.REMEDIES.worker_died), bar:
            if trainer.iteration < last:
                _loop(last, trainer, temperatures, stop, steps, epochs, bar)
    finally:
        steps.close()
        epochs.close()


def _loop(
    last: int,
    trainer: Trainer,
    temperatures: list[float],
    stop: StopRequest,
    steps: RunLog | NoLog,
    epochs: RunLog | NoLog,
    bar: tqdm,
) -> None:
    began, first = time.perf_counter(), trainer.iteration
    for x, labels in trainer.loader:
        learning_rate, epoch = trainer.learning_rate, trainer.epoch
        bits, class_loss, norm = trainer.step(x, labels)
        steps.steps([(trainer.iteration, epoch + 1, bits, class_loss, norm, learning_rate)])
        bar.set_postfix_str(f"epoch {epoch + 1}, {bits:.4f} bits/dim, lr {learning_rate:.2g}")
        bar.update()
        finished = trainer.iteration >= last or agree(stop)
        if trainer.iteration % trainer.batches_per_epoch == 0:
            speed = trainer.options.batch_size * (trainer.iteration - first) / (time.perf_counter() - began)
            _end_epoch(trainer, temperatures, stop, steps, epochs, speed, sampled=finished)
            began, first = time.perf_counter(), trainer.iteration
        elif finished and is_main():
            tqdm.write(f"saved {trainer.save()}")
        if finished:
            return


def _end_epoch(
    trainer: Trainer,
    temperatures: list[float],
    stop: StopRequest,
    steps: RunLog | NoLog,
    epochs: RunLog | NoLog,
    speed: float,
    sampled: bool,
) -> None:
    """Save, then measure: an evaluation that a signal ends early costs nothing but itself."""
    train_bits = trainer.epoch_bits / trainer.batches_per_epoch
    trainer.epoch_bits = 0.0
    options = trainer.options
    if is_main():
        trainer.save()
    own_bits = stop.unless_stopped(
        lambda: bits_per_dim(
            trainer.model, trainer.data.test, options.eval_batch_size, options.seed, options.amp, rank(), world_size()
        ).tolist()
    )
    test_bits = gather(own_bits)

    def report() -> None:
        average = sum(test_bits) / len(test_bits)
        epochs.steps([(trainer.iteration, trainer.epoch, train_bits, average, round(speed, 1))])
        for name, value in (("train", train_bits), ("test", average)):
            steps.scalar(f"epoch/{name}_bits_per_dim", value, trainer.iteration)
        tqdm.write(
            f"epoch {trainer.epoch}: {train_bits:.4f} bits/dim on train, {average:.4f} on test, {speed:.1f} images/s"
        )
        if sampled or trainer.epoch % options.sample_every == 0:
            path = trainer.folder / "samples" / f"epoch_{trainer.epoch:04d}.png"
            save_samples(path, trainer.model, temperatures, options.seed)

    if test_bits is not None and is_main():
        stop.unless_stopped(report)


def save_samples(path: Path, model: ImageFlow, temperatures: list[float], seed: int, n: int = 12) -> None:
    """A grid of samples, a row per temperature, from the same noise each time; the classes in turn."""
    rows: dict[str, np.ndarray] = {}
    diverged, was_training = 0, model.training
    model.eval()
    for temperature in temperatures:
        with torch.random.fork_rng(devices=[]):  # none of the run's own random numbers
            torch.manual_seed(seed)
            y_onehot = one_hot(torch.arange(n) % model.config.y_classes, model)
            images = model.reverse(y_onehot=y_onehot, temperature=temperature, n=n)
        diverged += int((~torch.isfinite(images)).flatten(1).any(1).sum())
        rows[f"T = {temperature:g}"] = to_pixels(torch.nan_to_num(images), model.config.n_bits)
    model.train(was_training)
    title = f"{model.config.model_type}: samples at several temperatures"
    # Inverse couplings divide by scales that a young model may make tiny for latents it has never seen.
    save_image_rows(path, rows, title + (f" ({diverged} overflowed: grey)" if diverged else ""))
