"""The one schema of what training needs besides weights: optimizer, schedule, loss scaling, random numbers, counts.

Whatever holds such state takes over what it is given, so each entry's kind, shape and range is checked before, and
that they agree: a negative second moment or an eps of 0 makes NaN, an empty state or a schedule at its start go on as
if nothing had been learned. Errors are ValueErrors of a few words.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.errors import show

MAX_STEPS = 2**31
# Moments by the optimizer's class; True: a sum of squares or a maximum, which is never negative.
MOMENTS = {"Adam": {"exp_avg": False, "exp_avg_sq": True}, "Adamax": {"exp_avg": False, "exp_inf": True}}
# Bounds of hyperparameters. Below its own, eps is 0 in float32; betas nearer to 1 make steps of any length.
_RANGES = {"lr": (0, 1e6), "initial_lr": (0, 1e6), "eps": (1e-12, 1.0), "weight_decay": (0, 1e6)}
_HIGHEST_BETAS = (0.999, 0.99999)
HYPERPARAMETERS = (*_RANGES, "betas")
MAX_UPDATE = 1e4  # learning rates that the moments may move a weight by; those that training leaves, fewer than 100


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


@dataclass(frozen=True)
class Taken:
    """Steps that can have been taken before an optimizer's state was saved.

    least, most: how many at least and at most. together: what parameters that were always trained together have in
    common, by name; their counts are alike, and of those of a run that trained only some parts, `parts`, a whole kind
    may lack moments.
    """

    least: int = 0
    most: int = MAX_STEPS
    parts: bool = False
    together: Callable[[str], Hashable] = lambda name: None


def checked_optimizer(
    saved: Any, order: Sequence[str], parameters: Mapping[str, Tensor], kind: str, taken: Taken
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Hyperparameters, and moments by the parameter's name, of a saved `state_dict`.

    order: names of the parameters that it numbers 0, 1, ...; kind: the optimizer's class. The moments are the file's
    own tensors, of whatever strides and storages: what is to be written to is a copy, `own_moments`.
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
    hyperparameters = _checked_group(groups[0])
    moments = {numbers[number]: _checked_moments(value, parameters[numbers[number]], kind, numbers[number])
               for number, value in state.items()}  # fmt: skip
    for name, values in moments.items():
        _check_update(values, kind, hyperparameters["eps"], name)
    _check_counts({name: moments[name]["step"].item() if name in moments else None for name in parameters}, taken)
    return hyperparameters, moments


def _checked_moments(state: Any, parameter: Tensor, kind: str, name: str) -> dict[str, Tensor]:
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
    return {**{key: state[key] for key in expected}, "step": torch.tensor(float(step))}


def _check_update(moments: Mapping[str, Tensor], kind: str, eps: float, name: str) -> None:
    """ValueError where the moments are not of the same gradients: a mean far beyond the mean square makes weights
    infinite in one step.
    """
    first, second = (moments[key].detach().double() for key in MOMENTS[kind])
    size = second.sqrt() if kind == "Adam" else second
    update = (first.abs() / (size + eps)).max().item() if first.numel() else 0.0
    require(update <= MAX_UPDATE, f"the update of {name} by its moments", update)


def _check_counts(steps: Mapping[str, float | None], taken: Taken) -> None:
    """ValueError unless the counts of parameters can be those of the steps taken; None: a parameter has no moments."""
    counts = [count for count in steps.values() if count is not None]
    if len(counts) < len(steps) and not taken.parts and (counts or taken.least):
        raise ValueError(f"it holds moments of {len(counts)} of {len(steps)} parameters")
    if not counts:
        require(not taken.least, "the number of parameters with moments", 0)
    kinds: dict[Hashable, set[float | None]] = {}
    for name, count in steps.items():
        kinds.setdefault(taken.together(name), set()).add(count)
        if len(kinds[taken.together(name)]) > 1:
            raise ValueError(f"step of {name} is {show(count)}, of others trained with it another")
    if counts and max(counts) > taken.most:
        raise ValueError(f"step is {max(counts):g}, where at most {taken.most} were taken")


def _checked_group(group: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("lr", "betas", "eps"):
        require(name in group, name, None)
    for name, bounds in _RANGES.items():
        require(name not in group or is_number(group[name], *bounds), name, group.get(name))
    betas = group["betas"]
    valid = isinstance(betas, (list, tuple)) and len(betas) == 2 and all(map(_is_beta, betas, _HIGHEST_BETAS))
    require(valid, "betas", betas)
    return {name: group[name] for name in HYPERPARAMETERS if name in group}


def _is_beta(value: Any, highest: float) -> bool:
    return is_number(value, 0, highest)


def own_moments(moments: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Copies of a parameter's checked moments that lie in memory as it does, each in its own.

    An optimizer's kernels write as many numbers as a tensor has from where it begins: into the file's tensors, which
    may repeat one number or share a storage, they would write beyond it or over one another.
    """
    own = {name: torch.empty_like(parameter, requires_grad=False).copy_(value.detach())
           for name, value in moments.items() if name != "step"}  # fmt: skip
    return {**own, "step": moments["step"].clone()}


# --- the rest ---------------------------------------------------------------------------------------------


def checked_schedule(state: Any, iteration: int) -> int:
    """Steps after which StepLR's `state_dict` was taken, at an iteration.

    They are fewer than its number where a published run was resumed, which took no step of the schedule then.
    """
    require(isinstance(state, Mapping), "the schedule", state)
    steps = state.get("last_epoch")
    require(is_count(steps), "last_epoch", steps)
    require(steps <= iteration, f"at iteration {iteration} last_epoch", steps)
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
