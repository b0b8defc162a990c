"""Learning rate of each step, and a moving average of the weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import REMEDIES, TrainConfig
from harness.errors import InputError

# --- learning rate ----------------------------------------------------------------------------------------


def rate_factor(config: TrainConfig, steps: int) -> float:
    """Factor of `learning_rate` for the step after `steps`.

    lr_decay_gamma every lr_decay_step steps, and a linear rise over the first warmup_steps.
    """
    return config.lr_decay_gamma ** (steps // config.lr_decay_step) * min(
        1.0, (steps + 1) / max(1, config.warmup_steps)
    )


def constant(_: int) -> float:
    """A factor that changes nothing."""
    return 1.0


def make_schedule(
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    steps: int = 0,
    annealing: Callable[[int], float] = constant,
) -> LambdaLR:
    """The schedule of `rate_factor` after so many steps; annealing: a further factor for the step after so many.

    It is a function of the config and the number of steps, so a resumed run follows the config it is given.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.learning_rate
    return LambdaLR(optimizer, lambda done: rate_factor(config, done) * annealing(done), last_epoch=steps - 1)


def schedule_state(schedule: LambdaLR, config: TrainConfig) -> dict[str, Any]:
    """The entries of torch's StepLR, which the published code saves."""
    return {
        "step_size": config.lr_decay_step,
        "gamma": config.lr_decay_gamma,
        "base_lrs": [config.learning_rate],
        "last_epoch": schedule.last_epoch,
        "_step_count": schedule.last_epoch + 1,
        "_last_lr": schedule.get_last_lr(),
    }


# --- moving average ---------------------------------------------------------------------------------------


class MovingAverage(AveragedModel):
    """A copy of a model, `module`, whose weights are an exponential moving average of the model's.

    The decay starts small and reaches its value after some ten times 1/(1 - decay) steps, so that the first weights
    are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model's weights after step number `step`, from 1.

        `update_parameters` of the base does the same with a count of its own, for which it makes the host wait.
        """
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        average(list(self.module.parameters()), list(model.parameters()), None)

    def weights(self) -> dict[str, Tensor]:
        """The averages by the names of the model's parameters."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from saved averages; InputError where they are those of another model."""
        own = self.weights()
        for name, average in own.items():
            if name not in weights or weights[name].shape != average.shape:
                raise InputError(
                    f"the checkpoint's moving average is of another model ({name}); {REMEDIES.weights_only}"
                )
        for name, average in own.items():
            average.copy_(weights[name])
