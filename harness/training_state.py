"""The one schema of what training needs besides weights: optimizer, schedule, loss scaling, random numbers, counts.

Whatever holds such state takes over what it is given, so each entry's kind, shape and range is checked before: a
negative second moment makes NaN, an empty state or a schedule at its start go on as if nothing had been learned.
Errors are ValueErrors of a few words.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.errors import show

MAX_STEPS = 2**31
# Moments by the optimizer's class; True: a sum of squares or a maximum, which is never negative.
MOMENTS = {"Adam": {"exp_avg": False, "exp_avg_sq": True}, "Adamax": {"exp_avg": False, "exp_inf": True}}
_FROM_ZERO = {"lr": 1e6, "initial_lr": 1e6, "eps": 1.0, "weight_decay": 1e6}  # and their largest values
HYPERPARAMETERS = (*_FROM_ZERO, "betas")


def require(valid: bool, name: str, value: Any) -> None:
    """ValueError that names an entry and shows its value, unless it is valid."""
    if not valid:
        raise ValueError(f"{name} is {show(value)}")


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number of steps."""
    return type(value) is int and 0 <= value < MAX_STEPS


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Tell whether a value is a finite number within bounds."""
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)


# --- optimizers -------------------------------------------------------------------------------------------


def checked_optimizer(
    saved: Any, order: Sequence[str], parameters: Mapping[str, Tensor], kind: str, stepped: bool | None = True
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Hyperparameters, and moments by the parameter's name, of a saved `state_dict`.

    order: names of the parameters that it numbers 0, 1, ...; kind: the optimizer's class; stepped: whether any step
    can have been taken, so that there must be moments; None: of some parameters.
    """
    require(isinstance(saved, Mapping), "it", type(saved).__name__)
    state, groups = saved.get("state"), saved.get("param_groups")
    require(isinstance(state, Mapping), "state", state)
    require(isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], Mapping), "param_groups", groups)
    place = {name: number for number, name in enumerate(order)}
    numbers = {place[name]: name for name in parameters if name in place}
    if len(numbers) < len(parameters):
        raise ValueError("it knows other parameters")
    strays = [number for number in state if type(number) is not int or number not in numbers]
    require(not strays, "a parameter's number", strays[:1])
    if len(state) < len(numbers) and stepped is not None and (state or stepped):
        raise ValueError(f"it holds moments of {len(state)} of {len(numbers)} parameters")
    moments = {numbers[number]: _checked_moments(value, parameters[numbers[number]], kind, numbers[number])
               for number, value in state.items()}  # fmt: skip
    return _checked_group(groups[0]), moments


def _checked_moments(state: Any, parameter: Tensor, kind: str, name: str) -> Mapping[str, Any]:
    require(isinstance(state, Mapping), f"the state of {name}", state)
    expected = MOMENTS[kind]
    keys = {key for key in state if key not in ("step", "max_exp_avg_sq")}
    require(keys == set(expected) and "step" in state, f"the state of {name}", sorted(map(str, state)))
    step = state["step"]
    if isinstance(step, Tensor):
        require(step.numel() == 1 and not step.is_complex(), f"step of {name}", list(step.shape))
        step = step.item()
    require(is_number(step, 0, MAX_STEPS) and float(step).is_integer(), f"step of {name}", step)
    for key in keys:
        value = state[key]
        valid = isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
        require(valid, f"{key} of {name}", getattr(value, "shape", value))
        low, high = (value.min().item(), value.max().item()) if value.numel() else (0.0, 0.0)
        limit = torch.finfo(parameter.dtype).max
        require(-limit <= low and high <= limit, f"{key} of {name}", "not finite")  # false for nan
        require(low >= 0 or not expected[key], f"{key} of {name}", low)
    return {key: value for key, value in state.items() if key in expected or key == "step"}


def _checked_group(group: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("lr", "betas", "eps"):
        require(name in group, name, None)
    for name, highest in _FROM_ZERO.items():
        require(name not in group or is_number(group[name], 0, highest), name, group.get(name))
    betas = group["betas"]
    valid = isinstance(betas, (list, tuple)) and len(betas) == 2 and all(is_number(b, 0) and b < 1 for b in betas)
    require(valid, "betas", betas)
    return {name: group[name] for name in HYPERPARAMETERS if name in group}


# --- the rest ---------------------------------------------------------------------------------------------


def checked_schedule(state: Any) -> int:
    """Steps after which StepLR's `state_dict` was taken."""
    require(isinstance(state, Mapping), "the schedule", state)
    steps = state.get("last_epoch")
    require(is_count(steps), "last_epoch", steps)
    require(is_count(state.get("step_size")) and state["step_size"] > 0, "step_size", state.get("step_size"))
    require(is_number(state.get("gamma"), 0, 1e6), "gamma", state.get("gamma"))
    for name in ("base_lrs", "_last_lr"):
        rates = state.get(name, [0] if name == "_last_lr" else None)
        valid = isinstance(rates, (list, tuple)) and len(rates) == 1 and is_number(rates[0], 0, 1e6)
        require(valid, name, rates)
    count = state.get("_step_count", steps + 1)
    require(is_count(count) and count == steps + 1, f"last_epoch {steps} with _step_count", count)
    return steps


SCALER_RANGES = {"scale": (2.0**-149, 2.0**127), "growth_factor": (1, 1e6), "backoff_factor": (1e-6, 1),
                 "growth_interval": (1, MAX_STEPS), "_growth_tracker": (0, MAX_STEPS)}  # fmt: skip


def checked_scaler(state: Any) -> dict[str, Any]:
    """State of a GradScaler; empty where none was used."""
    require(isinstance(state, Mapping), "precision", state)
    for name, value in state.items():
        if name in SCALER_RANGES:
            require(is_number(value, *SCALER_RANGES[name]), str(name), value)
    return dict(state)


def check_random_state(state: Mapping[str, Any]) -> None:
    """ValueError unless the states of random generators are some."""
    for name, size in (("random_state", len(torch.get_rng_state())), ("cuda_random_state", 16)):
        if name in state:
            value = state[name]
            valid = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape == (size,)
            require(valid, name, getattr(value, "shape", value))
    if "random_state" in state:
        try:
            torch.Generator().set_state(state["random_state"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"random_state: {str(error)[:80]}") from None
