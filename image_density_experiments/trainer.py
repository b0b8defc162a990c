"""One training step of an image model, and everything that a checkpoint must hold to go on exactly."""

import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.bad_steps import BadSteps, step_if_finite
from harness.batches import BatchLoader
from harness.checkpoints import keep_newest, not_finite, random_state
from harness.devices import data_parallel, prepare_training, steps_of_one_shape
from harness.memory import require_memory
from harness.processes import mean, rank, share_of_batch, world_size
from image_density_experiments import checkpoint as ckpt
from image_density_experiments.data import make_train_loader, training_images
from image_density_experiments.datasets import ImageData
from image_density_experiments.evaluation import half_precision, one_hot
from image_density_experiments.model import ImageFlow, ImageModelConfig
from image_density_experiments.options import TrainOptions

KEPT_CHECKPOINTS = 10
MAX_BAD_STEPS = 10  # in a row, with a loss or gradient that is not finite
BYTES_PER_WEIGHT = 16  # itself, its gradient and Adamax' two moments


def check_memory(config: ImageModelConfig, options: TrainOptions, memory: str, device: torch.device) -> None:
    """InputError where a training step, or the batches that initialise, take more memory than the device has left."""
    on_all = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
    n = options.batch_size / (on_all if world_size() == 1 else world_size())
    step = n * (2 if options.amp else 4) * config.numbers_per_image(memory)
    first = options.n_init_batches * options.batch_size * 4 * (config.numbers_per_image(None) + 2 * config.n_dims)
    weights = BYTES_PER_WEIGHT * config.weights_at_least
    for needed, what, which in (
        (step + weights, f"a step of {options.batch_size} images", "batch_size"),
        (first + weights, f"{options.n_init_batches} x {options.batch_size} images to initialise", "n_init_batches"),
    ):
        remedy = f"lower {which}, hidden_channels, K or the images' size, or recompute activations"
        require_memory(needed, f"{config.describe()}, {what}", remedy, device)


class Trainer:
    """One run: the model, its optimizer, its place in the data.

    start: the checkpoint whose weights the model has already loaded, or None. entries: what else its checkpoints say.
    """

    def __init__(
        self,
        model: ImageFlow,
        data: ImageData,
        options: TrainOptions,
        folder: Path,
        start: ckpt.Checkpoint | None,
        entries: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.data, self.options, self.folder = model, data, options, folder
        self.entries = entries or {}
        self.device = next(model.parameters()).device
        prepare_training(self.device)
        self.optimizer = torch.optim.Adamax(
            model.parameters(),
            lr=options.lr,
            weight_decay=options.weight_decay,
            capturable=self.device.type == "cuda",  # counts there, so that a step can be taken back there
        )
        self.iteration, self._bits, self._good_steps = 0, 0.0, 0  # of this epoch: the sum over its good steps
        self.batches_per_epoch = max(1, len(data.train.images) // options.batch_size)
        bad_before = 0 if start is None else self._restore(start)
        self._begins_anew = start is None
        self.bad_steps = BadSteps(MAX_BAD_STEPS, self._images_of, self._remedy, bad_before)
        self.loader = self._make_loader(self.iteration, options.n_workers, (rank(), world_size()))
        if start is None:
            self._initialise()
        # After initialising: replicas cannot. Not every type's step uses all of its gates.
        self.parallel = data_parallel(model.train(), self.device, find_unused=True)

    def _make_loader(self, start_batch: int, n_workers: int, share: tuple[int, int] = (0, 1)) -> BatchLoader:
        options = self.options
        images = training_images(self.data, self.model.config.n_bits, options.seed, options.augmented)
        return make_train_loader(images, options.batch_size, n_workers, start_batch, share, self.device)

    def _images_of(self, step: int) -> list[str]:
        files = getattr(self.data.train.images, "files", None)
        indices = [index for _, index in self.loader.batch_sampler.batch(step)]
        return [f"image {index}" if files is None else str(files[index]) for index in indices]

    def _remedy(self) -> str:
        """What can be done about many bad steps: by whether there is a checkpoint to go back to."""
        nothing = self._begins_anew and not ckpt.list_checkpoints(self.folder)
        return ckpt.NOTHING_SAVED if nothing else ckpt.REMEDIES.bad_steps

    def _restore(self, start: ckpt.Checkpoint) -> int:
        """Go on where a checkpoint was written; returns the bad steps just before it."""
        if start.optimizer is None:
            return 0
        ckpt.load_optimizer(self.optimizer, self.model, start)
        by_epochs = (start.epoch or 0) * self.batches_per_epoch
        self.iteration = by_epochs if start.iteration is None else start.iteration
        state = ckpt.checked_state(start)
        ckpt.restore_random_state(state, self.device)
        self._bits = state.get("epoch_bits", 0.0)
        self._good_steps = state.get("epoch_steps", self.iteration % self.batches_per_epoch)
        return state.get("bad_steps", 0)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Actnorms take their scale and bias from the first batches (Glow, 3.1), on one device."""
        batches = itertools.islice(self._make_loader(0, n_workers=0), self.options.n_init_batches)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.model.train()(images.to(self.device), one_hot(labels, self.model))

    # --- the step -------------------------------------------------------------------------------------------------

    def step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """One update; returns bits per dimension, class loss (0 without) and gradient norm, on the device.

        x [B, C, H, W] and labels [B] are this process's share of the batch, the results those of the whole. A step
        that is not finite is skipped: it counts as an iteration, and the weights stay.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        # Each process draws the noise of the whole batch, so that it does not depend on how many share it.
        noise = share_of_batch(self.model.draw_noise(x.new_empty(world_size() * len(x), *x.shape[1:])))
        x, labels, noise = (self._on_device(tensor) for tensor in (x, labels, noise))
        with steps_of_one_shape(self.device):
            bits, class_loss = self._backward(x, labels, noise)
        norm = self._clip_gradients()
        bits, class_loss, norm = mean(torch.stack([bits, class_loss, norm]))
        step_if_finite(self.optimizer, bits + class_loss, norm)
        self.iteration += 1
        return bits, class_loss, norm

    def _backward(self, x: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a batch; returns its bits per dimension and class loss."""
        with half_precision(self.model, self.options.amp):
            _, bits, y_logits = self.parallel(x, one_hot(labels, self.model), noise)
        bits = bits.mean()
        class_loss = bits.new_zeros(()) if y_logits is None else F.cross_entropy(y_logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        (bits + self.options.y_weight * class_loss).backward()
        return bits.detach(), class_loss.detach()

    def seconds_per_step(self) -> float:
        """Time of a step without its update, measured; nothing of the run changes, and no random number is drawn."""
        n = max(1, self.options.batch_size // world_size())
        x = torch.zeros(n, *self._channels_first(), device=self.device)
        noise, labels = torch.full_like(x, 0.5 / 2**self.model.config.n_bits), torch.zeros(n, dtype=torch.int64)
        labels = labels.to(self.device)
        seconds = math.inf
        for _ in range(2):  # the first one warms up
            self._wait()
            began = time.perf_counter()
            with steps_of_one_shape(self.device):
                self._backward(x, labels, noise)
            self.optimizer.zero_grad(set_to_none=True)
            self._wait()
            seconds = min(seconds, time.perf_counter() - began)
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _channels_first(self) -> tuple[int, int, int]:
        height, width, channels = self.model.config.image_shape
        return channels, height, width

    def _on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU on the device; from pinned memory, so that the host does not wait."""
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _clip_gradients(self) -> Tensor:
        parameters = list(self.model.parameters())
        if self.options.max_grad_clip:
            torch.nn.utils.clip_grad_value_(parameters, self.options.max_grad_clip)
        return torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm or math.inf)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step: linear warm-up by whole epochs, then constant."""
        return self.options.lr * min(1.0, (self.epoch + 1) / max(self.options.warmup, 1e-9))

    # --- epochs ---------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.iteration // self.batches_per_epoch

    def epoch_of(self, iteration: int) -> int:
        """The epoch, from 1, of the step that ended at `iteration`."""
        return (iteration - 1) // self.batches_per_epoch + 1

    def count(self, bits: float, norm: float) -> None:
        """Take a step's bits per dimension into the mean of the epoch, if it was not skipped."""
        if math.isfinite(bits) and math.isfinite(norm):
            self._bits, self._good_steps = self._bits + bits, self._good_steps + 1

    def end_epoch(self) -> float:
        """Mean bits per dimension of the epoch's steps, nan where none was good; the next epoch begins."""
        result = self._bits / self._good_steps if self._good_steps else math.nan
        self._bits, self._good_steps = 0.0, 0
        return result

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def spoilt(self) -> str | None:
        """Name of the first of the weights that is not finite, if any is."""
        return not_finite(self.model.state_dict())

    def save(self) -> Path:
        """Write the checkpoint of this iteration."""
        path = self.folder / f"glow_model_{self.iteration}.pt"
        ckpt.save_checkpoint(
            path,
            self.model,
            iteration=self.iteration,
            optimizer=self.optimizer.state_dict(),
            config=self.model.config.to_dict(),
            options=self.options.to_dict(),
            **self.entries,
            training_state={
                "epoch_bits": self._bits,
                "epoch_steps": self._good_steps,
                "bad_steps": self.bad_steps.in_a_row,
                **random_state(self.device),
            },
        )
        return path

    def prune(self, newest: Path) -> None:
        """Remove all checkpoints up to `newest` but the newest ones."""
        keep_newest(newest, KEPT_CHECKPOINTS, ckpt.FILE_NAME)
