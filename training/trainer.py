"""Training of a vocoder: where it begins, and everything that a checkpoint must hold to go on exactly.

Among several processes each does its share of every step; the main one writes.
"""

from pathlib import Path
from typing import Any

import torch

import checkpoint as ckpt
from config import REMEDIES, Config
from data import first_batch, make_train_loader
from harness.bad_steps import BadSteps
from harness.checkpoints import load_plain, random_state, restore_random_state
from harness.devices import prepare_training
from harness.processes import rank, world_size
from model import build_model
from modules import FlowLoss
from synthesis.mel_checks import MelStatistics
from training.learner import Learner
from training.mel_statistics import training_mel_statistics
from training.memory import check_memory
from training.optimisation import schedule_state
from training.resuming import PARTS, checked_state, load_optimizer

NOTHING_SAVED = (
    "no checkpoint was written yet: look at the files with --check_data, or start over with a lower "
    "train_config.learning_rate"
)


class Trainer(Learner):
    """One training run: a model that learns, its place in the data, and its files.

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
        self.folder = folder
        self.spared = () if start is None else start.sources
        self._begins_anew = start is None
        train = config.train_config
        check_memory(config, device)
        prepare_training(device)
        torch.manual_seed(train.seed)
        model = build_model(config.waveflow_config, config.data_config).to(device)
        super().__init__(config, device, model, FlowLoss(train.sigma))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(PARTS[train.trained_parts]))
        resumed = start is not None and not warm
        if start is not None:
            load = ckpt.load_fitting_weights if warm else ckpt.load_weights
            load(model, start.weights, f"checkpoint {start.name}")
        self.loader = make_train_loader(config, start.iteration if resumed else 0, rank(), world_size(), device)
        if start is None and config.waveflow_config.linear_prediction:
            batch = (tensor.to(device) for tensor in first_batch(self.loader))
            model.initialise(*batch, train.crop_context)
        scheduled, bad_before = self._restore(start) if resumed else (0, 0)
        self.begin(scheduled, start.average if resumed else None)
        self.mel_statistics = self._mel_statistics(None if warm else start)
        self.bad_steps = BadSteps(train.max_bad_steps, self.files_of, self._remedy, bad_before)

    def _remedy(self) -> str:
        """What can be done about many bad steps: by whether there is a checkpoint to go back to."""
        nothing = self._begins_anew and not ckpt.list_checkpoints(self.folder)
        return NOTHING_SAVED if nothing else REMEDIES.bad_steps

    def _mel_statistics(self, start: ckpt.Checkpoint | None) -> dict[str, Any] | None:
        """Statistics of the training mels: of a run that goes on, its own."""
        known = None if start is None else MelStatistics.read(start.mel_statistics)
        known = known or training_mel_statistics(self.config)
        return None if known is None else known.to_dict()

    def _restore(self, start: ckpt.Checkpoint) -> tuple[int, int]:
        """Go on where a checkpoint was written; returns its place in the schedule, and the bad steps just before it."""
        resumed = checked_state(start)
        self.iteration = start.iteration
        load_optimizer(self.optimizer, self.model, start)
        load_plain(self.precision, resumed.precision, REMEDIES.weights_only)
        restore_random_state(resumed.state, self.device, REMEDIES.weights_only)
        return resumed.scheduled, resumed.bad_steps

    # --- checkpoints --------------------------------------------------------------------------------------

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
