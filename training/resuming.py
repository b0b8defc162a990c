"""State of a run in a checkpoint: all of it is checked before anything of it is used, and restored."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from checkpoint import Checkpoint
from config import REMEDIES
from harness import checkpoints
from harness.checkpoints import checked
from harness.errors import InputError
from harness.training_state import (
    Taken,
    check_random_state,
    checked_optimizer,
    checked_scaler,
    checked_schedule,
    is_count,
    require,
)

# Parts of a model that training may be restricted to, by the beginnings of names.
PARTS = {"all": "", "gates-embedding-projections": ("gates.", "flow_embedding.", "transforms.")}


class Resumed(NamedTuple):
    """Plain state of a run: its place in the schedule, bad steps just before, loss scaling, and all that was saved."""

    scheduled: int
    bad_steps: int
    precision: dict[str, Any]
    state: Mapping[str, Any]


def checked_state(start: Checkpoint) -> Resumed:
    """State in a checkpoint besides weights and optimizer; InputError where it is damaged or not there."""
    if start.optimizer is None or start.scheduler is None:
        raise InputError(
            f"the checkpoint holds weights only, no optimizer state to resume from; {REMEDIES.weights_only}"
        )
    return checked(lambda: _checked_state(start), "training state is damaged", REMEDIES.weights_only)


def _checked_state(start: Checkpoint) -> Resumed:
    state = start.training_state  # absent from published files
    require(isinstance(state, Mapping), "it", state)
    skipped = state.get("bad_steps", 0)
    require(is_count(skipped) and skipped <= start.iteration, "bad_steps", skipped)
    scheduled = checked_schedule(start.scheduler, start.iteration)
    return Resumed(scheduled, skipped, checked_scaler(state.get("precision", {})), state)


def check_resumable(start: Checkpoint) -> None:
    """InputError where a run cannot go on from the checkpoint; nothing is changed."""
    try:
        resumed = checked_state(start)
        checked(lambda: check_random_state(resumed.state), "random state is damaged", REMEDIES.weights_only)
        checked(
            lambda: checked_optimizer(start.optimizer, start.parameter_order, start.weights, "Adam", taken(start)),
            "optimizer state does not fit this model",
            REMEDIES.weights_only,
        )
    except InputError as error:
        raise InputError(f"checkpoint {start.path}: {str(error).removeprefix('the checkpoint ')}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, start: Checkpoint) -> None:
    """Restore the optimizer of `model`, matching its parameters by name; InputError where it is another's."""
    order, remedy = start.parameter_order, REMEDIES.weights_only
    checkpoints.load_optimizer(optimizer, model, start.optimizer, order, remedy, taken(start))


def taken(start: Checkpoint) -> Taken:
    """Steps that a checkpoint's optimizer can have taken: none where all were skipped, since none was finite.

    One more than its iteration where it is, or began as, a published file: that code counts from 0.
    """
    settings = start.config.get("train_config") if start.config else None
    parts = isinstance(settings, Mapping) and settings.get("trained_parts", "all") != "all"
    skipped = start.training_state.get("bad_steps", 0) if isinstance(start.training_state, Mapping) else 0
    none = type(skipped) is int and skipped >= start.iteration
    return Taken(0 if none else 1, start.iteration + 1, parts, _is_of_the_parts)


def _is_of_the_parts(name: str) -> bool:
    """Tell the parts that can be trained alone, and then have moments of more steps than the rest, or alone."""
    return name.startswith(PARTS["gates-embedding-projections"])
