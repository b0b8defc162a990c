"""The training loop: step, log, save, listen; stops when asked, goes on exactly where it stopped."""

import copy
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint as ckpt
from audio import write_wav
from config import Config, InputError
from data import ClipDataset, load_synthesis_entry, make_train_loader
from distributed import data_parallel
from evaluation import clip_likelihoods, summarise
from model import build_model
from modules import FlowLoss
from precision import make_precision
from report import RunLog
from runs import BadSteps, StopRequest, worker_deaths_named

READ_BACK_EVERY = {"cpu": 1, "cuda": 10}  # steps; reading a result back waits for the accelerator


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
        self.model.checkpoint_activations = train.checkpoint_activations
        self.parallel = data_parallel(self.model, device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=train.learning_rate, fused=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, train.lr_decay_step, train.lr_decay_gamma)
        self.precision = make_precision(train, self.model, self.optimizer)
        self.loss = FlowLoss(train.sigma)
        self.iteration, self._bad_steps_before = 0, 0
        if start is not None:
            ckpt.load_weights(self.model, start["model"])
            if not warm:
                self._restore(start)
        self.loader = make_train_loader(config, start_batch=self.iteration)
        self.bad_steps = BadSteps(train.max_bad_steps, self._files_of, tqdm.write, self._bad_steps_before)
        self._schedule = self._schedule_now()

    def _files_of(self, step: int) -> list[str]:
        return [self.loader.dataset.files[index] for _, index in self.loader.batch_sampler.batch(step)]

    def _restore(self, start: dict[str, Any]) -> None:
        if "optimizer" not in start or "scheduler" not in start:
            raise InputError(
                "the checkpoint holds weights only, no optimizer state to resume from; start from it with --warm_start"
            )
        self.iteration = start["iteration"]
        ckpt.load_optimizer(self.optimizer, self.model, start)
        ckpt.load_plain(self.scheduler, start["scheduler"])
        self._follow_config()
        state = start.get("training_state", {})  # absent from published files
        if not isinstance(state, dict) or type(state.get("bad_steps", 0)) is not int:
            raise InputError("the checkpoint's training state is damaged; --warm_start takes its weights only")
        ckpt.load_plain(self.precision, state.get("precision", {}))
        ckpt.restore_random_state(state, self.device)
        self._bad_steps_before = state.get("bad_steps", 0)

    def _follow_config(self) -> None:
        """Where the config's schedule is not the one restored, the config's holds from here on."""
        train, schedule = self.config.train_config, self.scheduler
        planned = [train.learning_rate], train.lr_decay_step, train.lr_decay_gamma
        if (list(schedule.base_lrs), schedule.step_size, schedule.gamma) == planned:
            return
        schedule.base_lrs, schedule.step_size, schedule.gamma = planned
        rate = train.learning_rate * train.lr_decay_gamma ** (schedule.last_epoch // train.lr_decay_step)
        schedule._last_lr = [rate]
        for group in self.optimizer.param_groups:
            group["lr"], group["initial_lr"] = rate, train.learning_rate

    def step(self, audio: Tensor, mel: Tensor) -> tuple[Tensor, ...]:
        """One update; returns loss, prior and log-determinant terms (nats/sample) and gradient norm, on the device."""
        audio, mel = audio.to(self.device, non_blocking=True), mel.to(self.device, non_blocking=True)
        with self.precision.autocast():
            z, log_det = self.parallel(audio, mel)
        loss = self.loss((z, log_det))
        norm = self.precision.step(loss)
        self.scheduler.step()
        self.iteration += 1
        log_det = log_det.detach().sum() / z.numel()
        return loss.detach(), -loss.detach() - log_det, log_det, norm

    def save(self) -> Path:
        """Write the checkpoint of this iteration."""
        path = self.folder / f"waveflow_{self.iteration}"
        ckpt.save_checkpoint(
            path,
            self.model,
            iteration=self.iteration,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            learning_rate=self.learning_rate,
            config=self.config.to_dict(),
            training_state={
                "precision": self.precision.state_dict(),
                "bad_steps": self.bad_steps.in_a_row,
                **ckpt.random_state(self.device),
            },
        )
        return path

    def settle_schedule(self, steps: int, skipped: int) -> None:
        """Take the skipped ones of the last `steps` steps out of the learning rate schedule.

        They still count as iterations, whose number decides the place in the data. Which steps were skipped is
        known only when results are read back, so until then the schedule runs ahead of itself by at most that.
        """
        if skipped:
            state, rates = self._schedule
            self.scheduler.load_state_dict(state)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for _ in range(steps - skipped):
                self.scheduler.step()
        self._schedule = self._schedule_now()

    def _schedule_now(self) -> tuple[dict[str, Any], list[float]]:
        return copy.copy(self.scheduler.state_dict()), [group["lr"] for group in self.optimizer.param_groups]

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self.optimizer.param_groups[0]["lr"]


def train_until(last: int, trainer: Trainer, test_clips: ClipDataset, stop: StopRequest) -> bool:
    """Train to iteration `last` or to a stop, with a checkpoint, an evaluation and a sample every
    `iters_per_checkpoint`. Returns whether the last checkpoint could be saved.
    """
    log = RunLog(trainer.folder, trainer.iteration, trainer.config.train_config.with_tensorboard)
    progress = Progress(trainer, log, last)
    saver = Saver(trainer)
    try:
        with stop, worker_deaths_named():
            if trainer.iteration == 0:
                stop.unless_stopped(lambda: _report_likelihood(trainer, test_clips, log))
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
    log: RunLog,
    progress: "Progress",
    saver: "Saver",
    stop: StopRequest,
) -> None:
    due, every = False, trainer.config.train_config.iters_per_checkpoint
    for audio, mel in trainer.loader:
        learning_rate = trainer.learning_rate
        progress.add(*trainer.step(audio, mel), learning_rate)
        finished = trainer.iteration >= last or bool(stop)
        due = due or trainer.iteration % every == 0
        if finished or due:
            progress.read_back()
            # Weights whose last step was not finite may be the reason: an older checkpoint is the better one.
            if finished or trainer.bad_steps.in_a_row == 0:
                due = False
                saver.save()
                stop.unless_stopped(lambda: _show_progress(trainer, test_clips, log))
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
        """Write the checkpoint of this iteration; `failed` says whether that was refused."""
        trainer = self.trainer
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


class Progress:
    """The results of steps, read back from the device a few at a time, then judged, logged and shown."""

    def __init__(self, trainer: Trainer, log: RunLog, last: int) -> None:
        self.trainer, self.log = trainer, log
        self.bar = tqdm(total=last, initial=trainer.iteration, unit="step", dynamic_ncols=True, disable=None)
        self.pending: list[tuple[Any, ...]] = []
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
        self.trainer.settle_schedule(steps=len(good), skipped=good.count(False))
        self._show(rows)
        self.restart_clock()

    def _show(self, rows: Sequence[tuple[float, ...]]) -> None:
        config = self.trainer.config
        samples = len(rows) * config.train_config.batch_size * config.data_config.segment_length
        speed = samples / (time.perf_counter() - self.began)
        self.log.scalar("train/samples_per_second", speed, self.trainer.iteration)
        self.bar.set_postfix_str(f"loss {rows[-1][1]:.4f}, lr {rows[-1][5]:.2g}, {speed / 1000:.1f}k samples/s")
        self.bar.update(len(rows))


def _show_progress(trainer: Trainer, test_clips: ClipDataset, log: RunLog) -> None:
    try:
        _report_likelihood(trainer, test_clips, log)
        _write_sample(trainer, test_clips, log)
    except OSError as error:
        tqdm.write(f"warning: the sample was not written ({error.strerror or error})")


def _report_likelihood(trainer: Trainer, test_clips: ClipDataset, log: RunLog) -> None:
    clips = clip_likelihoods(trainer.model, test_clips, trainer.config.train_config.sigma, trainer.device)
    result = summarise(clips)
    log.likelihood(result, trainer.iteration)
    seconds = trainer.config.data_config.segment_length / trainer.config.data_config.sampling_rate
    tqdm.write(f"iteration {trainer.iteration}, first {seconds:.2f} s of each test clip: {result}")


def _write_sample(trainer: Trainer, test_clips: ClipDataset, log: RunLog) -> None:
    """Copy-synthesis of the first test clip, so that progress can be heard; the same noise each time."""
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
