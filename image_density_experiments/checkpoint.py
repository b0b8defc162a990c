"""Checkpoints of the image models, and the published layout's key names.

A file `glow_model_<iteration>.pt` holds a dict with `model` (the weights under the published names, and what the
published files lack: the permutations' `indices` and the actnorms' `initialised`), `config`, and for resuming
`iteration`, `optimizer` and `training_state`. A published file is the state dict alone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import checkpoints
from harness.errors import InputError, Remedies, one_line, show
from harness.training_state import MAX_STEPS, Taken, is_count, is_number, require

FILE_NAME = re.compile(r"glow_model_(\d+)\.pt")
REMEDIES = Remedies(
    resume="go on with --saved_model FOLDER if it holds a checkpoint: those there are intact; else start it again",
    weights_only="save its 'model' entry alone in a file, and start from that with --saved_model FILE",
    bad_steps="the checkpoints are intact: go on from one with --saved_model FILE, a lower --lr or a --max_grad_norm",
    worker_died="go on with --saved_model FOLDER if it holds a checkpoint: those there are intact; with fewer "
    "--n_workers if it recurs",
)
NOTHING_SAVED = "no checkpoint was written yet: start over with --fresh, a lower --lr or a --max_grad_norm"
_IGNORED = "prior_h"  # a buffer of zeros in the published files
_TOP = {"top_prior": "learn_top_fn", "class_prior": "project_ycond", "classifier": "project_class"}

# --- key names --------------------------------------------------------------------------------------------------


def to_published(name: str, config: Any) -> str:
    """The published name of one of our keys. `config` is an ImageModelConfig: the places depend on what is shared.

    The published code counts the squeeze, the K steps and the split of every level as consecutive `flow.layers`.
    """
    part, *rest = name.split(".")
    if part in _TOP:
        return ".".join([_TOP[part], *rest])
    level, group = int(rest[0]), rest[1]  # levels.{level}.{group}. ...
    first = level * (config.K + 2) + 1  # the layer of the level's first step
    if group == "split":  # levels.{l}.split.prior. ...
        return ".".join([f"flow.layers.{first + config.K}.conv", *rest[3:]])
    step, tail = int(rest[2]), rest[3:]
    if group == "steps":
        return _published_step(first + step, tail, config.flow_permutation)
    if group == "estimators":  # levels.{l}.estimators.{i}.layers.{j}. ...
        return ".".join([_published_layer(level, first + step, int(tail[1]), config), *tail[2:]])
    return ".".join([_published_projection(level, first + step, config), *tail])


def _published_step(layer: int, tail: list[str], permutation: str) -> str:
    if tail[0] == "gates":
        return f"flow.layers.{layer}.multgate"
    if tail == ["indication", "map"]:
        return f"flow.embedding.{layer}"
    if tail[0] == "indication":  # indication.actnorm. ...
        return ".".join([f"flow.layers.{layer}.actnorm_embed", *tail[2:]])
    if tail[0] == "permutation":
        return ".".join([f"flow.layers.{layer}.{permutation}", *tail[1:]])
    return ".".join([f"flow.layers.{layer}", *tail])  # actnorm. ...


def _published_layer(level: int, layer: int, index: int, config: Any) -> str:
    if config.model_type == "glow":
        return f"flow.layers.{layer}.block.{2 * index}"  # the odd ones are ReLUs
    return f"flow.estimator.{level if config.design.shared_estimator else layer}.conv{index + 1}"


def _published_projection(level: int, layer: int, config: Any) -> str:
    if config.model_type == "glow":
        return f"flow.layers.{layer}.block.{2 * len(config.design.depth.layers)}"
    if config.design.shared_projection:
        return f"flow.estimator.{level}.conv_proj"
    return f"flow.layers.{layer}.conv_proj"


# --- weights ----------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy weights into an ImageFlow from either layout; strict, with the differences named in the InputError.

    A published file says nothing of actnorm initialisation, so its actnorms count as initialised; nor does it hold
    its shuffles, without which it is another model: they are asked for.
    """
    weights = {our_name: value for our_name, value in _our_names(model, state_dict) if our_name != _IGNORED}
    own = model.state_dict()
    for name in own.keys() - weights.keys():
        if name.endswith(".initialised"):
            weights[name] = own[name].new_ones(())
        elif name.endswith(".indices") and model.config.flow_permutation == "reverse":
            weights[name] = own[name]
        elif name.endswith(".indices"):
            raise InputError(
                "the weights hold no shuffles (published files lack them), and with others they are another model; "
                f"add each permutation to the state dict, as in {to_published(name, model.config)!r}"
            )
    for name, value in weights.items():
        if name.endswith(".indices") and name in own:
            _check_permutation(name, value, own[name])
    checkpoints.load_strictly(model, weights)


def _check_permutation(name: str, value: Tensor, own: Tensor) -> None:
    if value.dtype != own.dtype or value.shape != own.shape or not value.sort().values.equal(own.sort().values):
        raise InputError(f"the weights: {name} is no order of channels; the file is damaged, use another one")


def _our_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    ours = {to_published(name, model.config): name for name in model.state_dict()}
    plain = [(name.removeprefix("module."), value) for name, value in state_dict.items()]
    return [(ours.get(name, name), value) for name, value in plain]


def parameter_order(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Our names of the parameters that an optimizer saved beside `state_dict` numbers 0, 1, ..."""
    parameters = {name for name, _ in model.named_parameters()}
    return [name for name, _ in _our_names(model, state_dict) if name in parameters]


# --- files ------------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, model: nn.Module, **entries: Any) -> None:
    """Write the weights under the published names, with further entries, whole or not at all."""
    weights = {to_published(name, model.config): value for name, value in model.state_dict().items()}
    checkpoints.save_whole(path, {"model": weights, **entries})


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, or a state dict as the published code saves it, on the CPU.

    Returns a dict with `model`, a state dict for `load_weights`, and the file's other entries. Raises InputError.
    """
    content = checkpoints.read_torch_file(path)
    checkpoint = content if isinstance(content, dict) and "model" in content else {"model": content}
    weights = checkpoint["model"]
    if not isinstance(weights, Mapping) or not weights:
        raise InputError(f"checkpoint {path}: holds no weights; expected a file written by train.py, or a state dict")
    if not checkpoints.are_named_tensors(weights):
        raise InputError(f"checkpoint {path}: its weights are not named tensors; expected a state dict")
    if spoilt := checkpoints.not_finite(weights):
        raise InputError(f"checkpoint {path}: {spoilt} is not finite, its run had diverged; use an earlier one")
    for name in ("iteration", "epoch"):
        if name in checkpoint and not is_count(checkpoint[name]):
            raise InputError(f"checkpoint {path}: {name!r} is {show(checkpoint[name])}, expected a whole number")
    return checkpoint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Contents of a file; what it lacks is None or empty."""

    path: Path
    weights: Mapping[str, Tensor]  # under the published names, for `load_weights`
    config: Mapping[str, Any] | None = None  # of the model
    options: Mapping[str, Any] = field(default_factory=dict)  # of its training
    data: Mapping[str, Any] = field(default_factory=dict)  # its images, and what they were
    iteration: int | None = None
    epoch: int | None = None  # of published files, which count no iterations
    optimizer: Any = None
    training_state: Any = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path}, iteration {'unknown' if self.iteration is None else self.iteration}"


def read_checkpoint(path: Path) -> Checkpoint:
    """The contents that `load_checkpoint` returns, told apart. Raises InputError."""
    return told_apart(path, load_checkpoint(path))


def told_apart(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    """A file's entries as a Checkpoint; what else is among them is left out. Raises InputError."""
    for name in ("config", "options", "data"):
        if not isinstance(content.get(name, {}), dict):
            raise InputError(f"checkpoint {path}: its {name} is damaged")
    known = {part.name: content[part.name] for part in fields(Checkpoint) if part.name in content}
    if empty := [name for name, entry in known.items() if entry is None]:
        raise InputError(f"checkpoint {path}: its {empty[0]} is damaged")
    return Checkpoint(**{**known, "path": path, "weights": content["model"]})


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, start: Checkpoint) -> None:
    """Restore the optimizer of `model` from a checkpoint; InputError where it does not fit."""
    order, state = parameter_order(model, start.weights), start.training_state
    skipped = state.get("bad_steps", 0) if isinstance(state, Mapping) else 0
    none = type(skipped) is int and skipped >= _last_step(start)
    taken = Taken(least=0 if none else 1)
    checkpoints.load_optimizer(optimizer, model, start.optimizer, order, REMEDIES.weights_only, taken)


def _last_step(start: Checkpoint) -> int:
    return MAX_STEPS if start.iteration is None else start.iteration


def checked_state(start: Checkpoint) -> Mapping[str, Any]:
    """The saved `training_state`, empty in published files; InputError where it is damaged."""
    return checkpoints.checked(lambda: _checked_state(start), "training state is damaged", REMEDIES.weights_only)


def _checked_state(start: Checkpoint) -> Mapping[str, Any]:
    state, iteration = start.training_state, _last_step(start)
    require(isinstance(state, Mapping), "it", state)
    for name in ("bad_steps", "epoch_steps"):
        value = state.get(name, 0)
        require(is_count(value) and value <= iteration, name, value)
    require(is_number(state.get("epoch_bits", 0.0)), "epoch_bits", state.get("epoch_bits"))
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on with the random numbers of a saved `training_state`; InputError where it is damaged."""
    checkpoints.restore_random_state(state, device, REMEDIES.weights_only)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return checkpoints.list_checkpoints(folder, FILE_NAME)


def newest_checkpoint(folder: Path, usable: Callable[[Checkpoint], Any] = lambda start: None) -> Checkpoint:
    """The newest checkpoint of a run that can be read, and for which `usable` raises no InputError."""

    def read_usable(path: Path) -> Checkpoint:
        start, named = read_checkpoint(path), one_line(f"checkpoint {path}: ")
        if start.iteration is not None:
            checkpoints.check_iteration(path, FILE_NAME, start.iteration)
        try:
            usable(start)
        except InputError as error:
            raise InputError(f"{named}{str(error).removeprefix('the checkpoint ').removeprefix(named)}") from None
        return start

    read = checkpoints.newest_whole(folder, FILE_NAME, read_usable)
    if read is None:
        raise InputError(f"{folder}: holds no checkpoint glow_model_<iteration>.pt; train first, or name a file")
    return read
