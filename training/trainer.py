"""The training loop: step, log, save, listen; stops when asked, goes on exactly where it stopped.

Among several processes each does its share of every step, and of every evaluation; the main one writes.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint as ckpt
from audio import write_wav
from config import REMEDIES, Config
from data import ClipDataset, load_synthesis_entry, make_train_loader
from evaluation import ClipLikelihood, clip_likelihoods, summarise
from fast.estimators import Execution
from harness.bad_steps import BadSteps
from harness.devices import data_parallel, gradients_stay
from harness.errors import InputError
from harness.log import NoLog, RunLog
from harness.processes import agree, gather, is_main, mean, rank, world_size
from harness.stopping import StopRequest, worker_deaths_named
from model import build_model
from modules import FlowLoss
from training.optimisation import MovingAverage, Schedule
from training.precision import make_precision
from training.progress import Progress


class Trainer:
    """One training run: the model with everything that a checkpoint must hold to go on exactly.

    start: what `load_checkpoint` returned, or None for fresh weights; with `warm`, only its weights are taken.
    spared: checkpoints that `keep_checkpoints` must not remove.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        folder: Path,
        start: dict[str, Any] | None,
        warm: bool,
        spared: Collection[Path] = (),
    ) -> None:
        self.config, self.device, self.folder, self.spared = config, device, folder, spared
        train = config.train_config
        torch.manual_seed(train.seed)
        self.model = build_model(config.waveflow_config).to(device)
        self.model.execution = Execution(compile=train.compile, checkpoint_activations=train.checkpoint_activations)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=train.learning_rate, fused=True)
        self.schedule = Schedule(self.optimizer, train)
        self.precision = make_precision(train, self.model, self.optimizer)
        self.loss = FlowLoss(train.sigma)
        self.iteration, self._bad_steps_before = 0, 0
        if start is not None:
            ckpt.load_weights(self.model, start["model"], f"checkpoint {start.get('name', '')}".rstrip())
        self.average = MovingAverage(self.model, train.ema_decay)
        if start is not None and not warm:
            self._restore(start)
        self.parallel = data_parallel(self.model, device)
        self.parts = self._parts_of_a_batch()
        self.loader = make_train_loader(config, self.iteration, rank(), world_size())
        self.bad_steps = BadSteps(train.max_bad_steps, self._files_of, tqdm.write, self._bad_steps_before)

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

    def _restore(self, start: dict[str, Any]) -> None:
        if "optimizer" not in start or "scheduler" not in start:
            raise InputError(
                "the checkpoint holds weights only, no optimizer state to resume from; start from it with --warm_start"
            )
        self.iteration = start["iteration"]
        ckpt.load_optimizer(self.optimizer, self.model, start)
        ckpt.load_plain(self.schedule, start["scheduler"])
        if "ema" in start:
            self.average.load(start["ema"])
        state = start.get("training_state", {})  # absent from published files
        if not isinstance(state, dict) or type(state.get("bad_steps", 0)) is not int:
            raise InputError("the checkpoint's training state is damaged; --warm_start takes its weights only")
        ckpt.load_plain(self.precision, state.get("precision", {}))
        ckpt.restore_random_state(state, self.device)
        self._bad_steps_before = state.get("bad_steps", 0)

    def step(self, audio: Tensor, mel: Tensor) -> tuple[Tensor, ...]:
        """One update; returns loss, prior and log-determinant terms (nats/sample) and gradient norm, on the device.

        audio [B, T] and mel [B, M, F] are this process's share of the batch, the results those of the whole.
        """
        audio, mel = audio.to(self.device, non_blocking=True), mel.to(self.device, non_blocking=True)
        terms = 0
        with compile_errors_named():
            for number, part in enumerate(zip(audio.chunk(self.parts), mel.chunk(self.parts), strict=True), 1):
                terms = terms + self._backward(*part, first=number == 1, last=number == self.parts)
        loss, log_det = mean(terms)
        norm = self.precision.update(loss)
        self.schedule.move(1)
        self.iteration += 1
        self.average.update(self.iteration)
        return loss, -loss - log_det, log_det, norm

    def _backward(self, audio: Tensor, mel: Tensor, first: bool, last: bool) -> Tensor:
        """Gradients of a part of a batch; returns what it adds to the loss and the log-determinant term."""
        with nullcontext() if last else gradients_stay(self.parallel):
            with self.precision.autocast():
                z, log_det = self.parallel(audio, mel)
            loss = self.loss((z, log_det)) / self.parts
            self.precision.backward(loss, first, last)
        return torch.stack([loss.detach(), log_det.detach().sum() / z.numel() / self.parts])

    def save(self) -> Path:
        """Write the checkpoint of this iteration."""
        path = self.folder / f"waveflow_{self.iteration}"
        ckpt.save_checkpoint(
            path,
            self.model,
            iteration=self.iteration,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.schedule.state_dict(),
            learning_rate=self.learning_rate,
            config=self.config.to_dict(),
            training_state={
                "precision": self.precision.state_dict(),
                "bad_steps": self.bad_steps.in_a_row,
                **ckpt.random_state(self.device),
            },
            **({"ema": self.average.weights} if self.average.decay else {}),
        )
        return path

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self.optimizer.param_groups[0]["lr"]


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


def train_until(last: int, trainer: Trainer, test_clips: ClipDataset, stop: StopRequest) -> bool:
    """Train to iteration `last` or to a stop, with a checkpoint, an evaluation and a sample every
    `iters_per_checkpoint`. Returns whether the last checkpoint could be saved.
    """
    with_tensorboard = trainer.config.train_config.with_tensorboard
    log = RunLog(trainer.folder, trainer.iteration, with_tensorboard) if is_main() else NoLog()
    progress = Progress(trainer, log, last)
    saver = Saver(trainer)
    try:
        with stop, worker_deaths_named(REMEDIES.worker_died):
            if trainer.iteration == 0:
                _report_likelihood(trainer, test_clips, log, stop)
            if trainer.iteration < last:
                _loop(last, trainer, test_clips, log, progress, saver, stop)
            return not saver.failed
    finally:
        progress.bar.close()
        log.close()


def _loop(
    last: int,
    trainer: Trainer,
    test_clips: ClipDataset,
    log: RunLog | NoLog,
    progress: Progress,
    saver: "Saver",
    stop: StopRequest,
) -> None:
    due, every = False, trainer.config.train_config.iters_per_checkpoint
    for audio, mel in trainer.loader:
        learning_rate = trainer.learning_rate
        progress.add(*trainer.step(audio, mel), learning_rate)
        finished = trainer.iteration >= last or (not progress.pending and agree(stop))
        due = due or trainer.iteration % every == 0
        if finished or due:
            progress.read_back()
            progress.say()
            # Weights whose last step was not finite may be the reason: an older checkpoint is the better one.
            if finished or trainer.bad_steps.in_a_row == 0:
                due = False
                saver.save()
                _report_likelihood(trainer, test_clips, log, stop)
                _write_sample(trainer, test_clips, log, stop)
            progress.restart_clock()
        if finished:
            return


class Saver:
    """Writes checkpoints and removes those beyond `keep_checkpoints`. A full disk is reported, and is no reason to
    end a run: the older checkpoints are intact, and the next attempt may find space.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.failed = trainer, False

    def save(self) -> None:
        """Write the checkpoint of this iteration, if this is the main process; `failed` says whether it was refused."""
        trainer = self.trainer
        if not is_main():
            return
        try:
            path = trainer.save()
            self.failed = False
            tqdm.write(f"saved {path}")
            if trainer.bad_steps.in_a_row == 0:
                ckpt.keep_newest(path, trainer.config.train_config.keep_checkpoints, trainer.spared)
        except OSError as error:
            self.failed = True
            tqdm.write(
                f"warning: the checkpoint of iteration {trainer.iteration} was not saved ({error.strerror or error}); "
                "the older ones are intact"
            )


def _report_likelihood(trainer: Trainer, test_clips: ClipDataset, log: RunLog | NoLog, stop: StopRequest) -> None:
    """The likelihood of the test clips, of which `test_clips` is this process's share; nothing after a signal."""

    def evaluate_share() -> list[ClipLikelihood]:
        with trainer.average.in_place():
            return clip_likelihoods(trainer.model, test_clips, trainer.config.train_config.sigma, trainer.device)

    clips = gather(stop.unless_stopped(evaluate_share))
    if clips is None:
        return
    result = summarise(clips)
    log.likelihood(result, trainer.iteration)
    seconds = trainer.config.data_config.segment_length / trainer.config.data_config.sampling_rate
    tqdm.write(f"iteration {trainer.iteration}, first {seconds:.2f} s of each test clip: {result}")


def _write_sample(trainer: Trainer, test_clips: ClipDataset, log: RunLog | NoLog, stop: StopRequest) -> None:
    """Copy-synthesis of the first test clip by the main process, so that progress can be heard."""

    def write() -> None:
        try:
            with trainer.average.in_place():
                _synthesize_first(trainer, test_clips, log)
        except OSError as error:
            tqdm.write(f"warning: the sample was not written ({error.strerror or error})")

    if is_main():
        stop.unless_stopped(write)


def _synthesize_first(trainer: Trainer, test_clips: ClipDataset, log: RunLog | NoLog) -> None:
    data = trainer.config.data_config
    mel, _ = load_synthesis_entry(test_clips.files[0], data, test_clips.mel)
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # none of the run's own random numbers
        torch.manual_seed(trainer.config.train_config.seed)
        audio = trainer.model.reverse_fast(mel.unsqueeze(0).to(trainer.device))[0].cpu()
    if not torch.isfinite(audio).all():
        tqdm.write("the sample is not finite and was not written; the model may need more training")
        return
    write_wav(trainer.folder / "samples" / f"waveflow_{trainer.iteration}.wav", audio, data.sampling_rate)
    mels = {"recording": mel, "synthesis": test_clips.mel(audio.clamp(-1, 1))}
    log.sample(audio, data.sampling_rate, mels, trainer.iteration)
