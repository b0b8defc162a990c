"""Check of all that a checkpoint must hold for a run to go on from it, before anything of it is used."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from checkpoint import Checkpoint
from config import REMEDIES
from harness.checkpoints import checked
from harness.errors import InputError
from harness.training_state import (
    check_random_state,
    checked_optimizer,
    checked_scaler,
    checked_schedule,
    is_count,
    require,
)


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
            lambda: checked_optimizer(start.optimizer, start.parameter_order, start.weights, "Adam", start.taken),
            "optimizer state does not fit this model",
            REMEDIES.weights_only,
        )
    except InputError as error:
        raise InputError(f"checkpoint {start.path}: {str(error).removeprefix('the checkpoint ')}") from None
