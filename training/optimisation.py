"""What surrounds the optimizer: the learning rate of each step, and a moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import TrainConfig
from harness.errors import InputError


class Schedule:
    """learning_rate, times lr_decay_gamma every lr_decay_step steps, and rising linearly over the first warmup_steps.

    The rate is a function of the config and the number of steps, so a resumed run follows the config it is given.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self.optimizer, self.config = optimizer, config
        self._go_to(0)

    def rate(self, step: int) -> float:
        """Of step number `step`, from 0."""
        config = self.config
        decayed = config.learning_rate * config.lr_decay_gamma ** (step // config.lr_decay_step)
        return decayed * min(1.0, (step + 1) / max(1, config.warmup_steps))

    def move(self, steps: int) -> None:
        """Go on by so many steps, or back where it is negative: those were skipped."""
        self._go_to(self.steps + steps)

    def _go_to(self, step: int) -> None:
        self.steps = step
        for group in self.optimizer.param_groups:
            group["lr"], group["initial_lr"] = self.rate(step), self.config.learning_rate

    def state_dict(self) -> dict[str, Any]:
        """The entries of torch's StepLR, which the published code saves."""
        config = self.config
        return {
            "step_size": config.lr_decay_step,
            "gamma": config.lr_decay_gamma,
            "base_lrs": [config.learning_rate],
            "last_epoch": self.steps,
            "_step_count": self.steps + 1,
            "_last_lr": [self.rate(self.steps)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the number of steps from what StepLR or `state_dict` gave; the rest is the config's."""
        steps = state["last_epoch"]
        if type(steps) is not int or steps < 0:
            raise ValueError(f"last_epoch is {steps!r}")
        self._go_to(steps)


class MovingAverage:
    """An exponential moving average of a model's weights; with decay 0 it does nothing.

    The decay starts small and reaches its value after some ten times 1/(1 - decay) steps, so that the first weights
    are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.own = dict(model.named_parameters()) if decay else {}
        self.weights = {name: parameter.detach().clone() for name, parameter in self.own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, from 1."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(list(self.weights.values()), list(self.own.values()), None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the average for its weights."""
        plain = {name: self.own[name].detach().clone() for name in self.weights}
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(plain)

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            self.own[name].copy_(value)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from a saved average; InputError where it is not one of this model."""
        if not self.decay:
            return
        for name, average in self.weights.items():
            if name not in weights or weights[name].shape != average.shape:
                raise InputError(
                    f"the checkpoint's moving average is of another model ({name}); --warm_start takes its weights only"
                )
        for name, average in self.weights.items():
            average.copy_(weights[name])
