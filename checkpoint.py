"""Checkpoints: saved whole, loaded without running code, averaged, and mapped to and from the published layout.

A file `waveflow_<iteration>` holds a dict with the published entries `model` (under the published key names),
`iteration`, `optimizer`, `scheduler` and `learning_rate`; this project adds `config`, `training_state`, and with
`ema_decay` the moving average of the weights as `ema`.
The optimizer numbers its parameters in the order of the keys of `model`.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from harness.errors import InputError
from harness.files import written_whole
from harness.torch_files import RefusedFile, load_tensors

MEL_KEYS = {"sampling_rate", "filter_length", "hop_length", "win_length", "mel_fmin", "mel_fmax", "use_dbmel"}
FILE_NAME = re.compile(r"waveflow_(\d{1,18})")
MAX_BYTES = 2**33  # with optimizer state, some 700 million parameters; more is not meant
HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay")

# --- key names --------------------------------------------------------------------------------------------

_FROM_PUBLISHED = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^module\.", ""),
        (r"^upsample_conv\.(\d+)\.", lambda match: f"upsampler.convs.{int(match[1]) // 2}."),  # odd: the LeakyReLUs
        (r"^(?:estimator|flow\.coupling)\.net\.", "estimators.0."),
        (r"^flows\.(\d+)\.coupling\.net\.", r"estimators.\1."),
        (r"^flow\.coupling\.proj(?:_log_s_t)?\.", "transforms.0."),
        (r"^flows\.(\d+)\.(?:coupling\.)?proj(?:_log_s_t)?\.", r"transforms.\1."),
        (r"^flows\.(\d+)\.multgate$", r"gates.\1"),
        (r"\.front_conv\.0\.conv\.", ".front_conv."),
        (r"\.res_blocks\.(\d+)\.", r".layers.\1."),
        (r"\.filter_gate_conv\.conv\.", ".gate_conv."),
        (r"\.filter_gate_conv_c\.", ".cond_conv."),
        (r"\.filter_gate_conv_h\.", ".embed_conv."),
    )
]
_PUBLISHED_PARTS = {
    "gate_conv": "filter_gate_conv.conv",
    "cond_conv": "filter_gate_conv_c",
    "embed_conv": "filter_gate_conv_h",
    "res_skip_conv": "res_skip_conv",
}
# Where each variant keeps its estimators and what each flow owns; {} is the flow.
_PUBLISHED_PLACES = {
    "waveflow": ("flows.{}.coupling.net.", "flows.{}.coupling."),
    "waveflow_official": ("flows.{}.coupling.net.", "flows.{}.coupling."),
    "nanoflow_naive": ("flow.coupling.net.", "flow.coupling."),
    "nanoflow_decomp": ("estimator.net.", "flows.{}."),
    "nanoflow": ("estimator.net.", "flows.{}."),
}


def from_published(name: str) -> str:
    """Our name of a published key; a name that is already ours is returned as it is."""
    for pattern, ours in _FROM_PUBLISHED:
        name = pattern.sub(ours, name)
    return name


def to_published(name: str, coupling_type: str, transform: str) -> str:
    """The published name of one of our keys, which depends on what the variant shares."""
    estimator_place, flow_place = _PUBLISHED_PLACES[coupling_type]
    part, *rest = name.split(".")
    if part == "upsampler":  # upsampler.convs.{i}.{weight}
        return f"upsample_conv.{2 * int(rest[1])}.{rest[2]}"
    if part == "gates":
        return f"flows.{rest[0]}.multgate"
    if part == "transforms":
        projection = "proj_log_s_t." if transform == "affine" else "proj."
        return flow_place.format(rest[0]) + projection + ".".join(rest[1:])
    if part == "estimators" and rest[1] == "front_conv":
        return f"{estimator_place.format(rest[0])}front_conv.0.conv.{rest[2]}"
    if part == "estimators":  # estimators.{i}.layers.{l}.{conv}.{weight}
        return f"{estimator_place.format(rest[0])}res_blocks.{rest[2]}.{_PUBLISHED_PARTS[rest[3]]}.{rest[4]}"
    return name


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "the weights") -> None:
    """Copy weights into the vocoder from either layout, strictly.

    InputError names the source and the differences, under the names that files have.
    """

    def shown(name: str) -> str:
        try:
            return to_published(name, model.config.coupling_type, model.config.transform)
        except (IndexError, KeyError):
            return name  # of nothing that a vocoder has

    load_strictly(model, _our_weights(state_dict), source, shown)


def load_strictly(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str = "the weights",
    shown: Callable[[str], str] = lambda name: name,
) -> None:
    """`load_state_dict` that changes nothing and raises a one-line InputError where keys or shapes differ.

    shown: how the message is to call a key.
    """
    own = model.state_dict()
    missing = [shown(name) for name in own if name not in weights]
    unknown = [shown(name) for name in weights if name not in own]
    shapes = [
        f"{shown(name)} is {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("not in this model", unknown), ("other shape", shapes))
        if names
    ]
    if problems:
        raise InputError(f"{source}: of another model than the config describes; {'; '.join(problems)}")
    model.load_state_dict(weights)


def _our_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {from_published(name): value for name, value in state_dict.items() if not _is_stray(name)}


def _is_stray(name: str) -> bool:
    return name.removeprefix("module.") == "h_cache"  # a cached tensor that the published code saves


# --- reading ----------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project or of the published code, on the CPU.

    Returns the file's dict with `model` under our names (for `load_state_dict`, strict) and `iteration`; the other
    entries where the file has them. Raises InputError on a file that is missing, damaged or not a checkpoint.
    """
    checkpoint = read_torch_file(path)
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise InputError(f"checkpoint {path}: holds no 'model' weights; expected a file written by train.py")
    iteration = checkpoint.get("iteration", 0)
    if type(iteration) is not int or not 0 <= iteration < 2**31:
        raise InputError(f"checkpoint {path}: 'iteration' is not a whole number, or out of range")
    for name, value in weights.items():
        if value.is_floating_point() and not _is_stray(name) and not torch.isfinite(value).all():
            raise InputError(f"checkpoint {path}: {name} is not finite, its run had diverged; use an earlier one")
    average = {"ema": _checked_average(checkpoint["ema"], weights, path)} if "ema" in checkpoint else {}
    return {
        "iteration": 0,
        **checkpoint,
        **average,
        "model": _our_weights(weights),
        "parameter_order": _parameter_order(checkpoint),
    }


def _checked_average(average: Any, weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The moving average under our names: tensors like the weights, and finite."""
    for name, value in weights.items():
        own = average.get(name) if isinstance(average, Mapping) else None
        if not isinstance(own, Tensor) or own.shape != value.shape or not torch.isfinite(own).all():
            raise InputError(f"checkpoint {path}: its moving average 'ema' is damaged at {name}; use another one")
    return _our_weights(average)


def check_config(checkpoint: Mapping[str, Any], config: Config, name: str) -> None:
    """InputError where a checkpoint was trained under another model or another mel than `config` describes.

    Shapes alone do not tell: the same weights make another model with another height, cycle or permutation.
    Published files hold no config and pass.
    """
    saved, own = checkpoint.get("config"), config.to_dict()
    for section, keys in (
        ("waveflow_config", own["waveflow_config"].keys() - {"model_name"}),
        ("data_config", MEL_KEYS),
    ):
        values = saved.get(section) if isinstance(saved, Mapping) else None
        for key in sorted(keys & values.keys()) if isinstance(values, Mapping) else ():
            before, now = (list(v) if isinstance(v, tuple) else v for v in (values[key], own[section][key]))
            if before != now:
                raise InputError(
                    f"checkpoint {name} was trained with {section}.{key} {before}, the config says {now}; "
                    "make them equal"
                )


def read_torch_file(path: str | Path) -> Any:
    """torch.load of tensors and plain containers only; no code in the file is ever run. Raises InputError."""
    try:
        return load_tensors(path, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: no such file") from None
    except IsADirectoryError:
        raise InputError(
            f"checkpoint {path}: is a folder; expected a file in it, or -a N to average N of them"
        ) from None
    except (RefusedFile, OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"checkpoint {path}: refused, {error}") from None


def _parameter_order(checkpoint: Mapping[str, Any]) -> list[str]:
    """Our names of the parameters that `optimizer` numbers 0, 1, ...: the order of the keys of `model`."""
    return [from_published(name) for name in checkpoint["model"] if not _is_stray(name)]


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Restore the optimizer of `model` from what `load_checkpoint` returned, matching its parameters by name.

    How the optimizer computes (fused or not) stays as it was built; only the hyperparameters and moments are taken.
    """
    saved = checkpoint["optimizer"]
    try:
        place = {name: index for index, name in enumerate(checkpoint["parameter_order"])}
        order = [place[name] for name, _ in model.named_parameters()]
        state = {new: saved["state"][old] for new, old in enumerate(order) if old in saved["state"]}
        for index, parameter in enumerate(model.parameters()):
            _check_moments(state.get(index, {}), parameter)
        [group], [own] = saved["param_groups"], optimizer.state_dict()["param_groups"]
        _check_like(group, {name: own[name] for name in HYPERPARAMETERS if name in own})
        kept = {name: group[name] for name in HYPERPARAMETERS if name in group}
        optimizer.load_state_dict({"state": state, "param_groups": [{**own, **kept}]})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the checkpoint's optimizer state does not fit this model ({error}); --warm_start takes its weights only"
        ) from None


def _check_moments(state: Mapping[str, Any], parameter: Tensor) -> None:
    for name, value in state.items():
        if name == "step":
            valid = 0 <= float(value) < 2**31
        else:
            valid = value.shape == parameter.shape and bool(torch.isfinite(value).all())
        if not valid:
            raise ValueError(f"{name} does not belong to a parameter of shape {list(parameter.shape)}")


def load_plain(target: Any, saved: Any) -> None:
    """`target.load_state_dict(saved)` for schedules and loss scalers, whose state is plain numbers.

    Such objects take over whatever they are given, so every entry must be of the kind that theirs is.
    """
    try:
        own = target.state_dict()
        known = {name: saved[name] for name in own if name in saved}
        _check_like(known, {name: own[name] for name in known})
        target.load_state_dict({**own, **known})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"the checkpoint's training state is damaged ({error}); --warm_start takes its weights only"
        ) from None


def _check_like(values: Mapping[str, Any], examples: Mapping[str, Any]) -> None:
    """Every example's key with a value of the same kind: a number, a list of as many numbers, or the same constant."""
    for name, example in examples.items():
        value = values[name]
        if isinstance(example, Mapping):
            _check_like(value, example)
            valid = True
        elif isinstance(example, (list, tuple)):
            valid = isinstance(value, (list, tuple)) and len(value) == len(example) and all(map(_is_number, value))
        elif _is_number(example):
            valid = _is_number(value)
        else:
            valid = value is None or isinstance(value, (bool, str))
        if not valid:
            raise TypeError(f"{name} is {str(value)[:40]!r}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**63


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a run on `device` may draw from."""
    state = {"random_state": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_random_state"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on with the random numbers that `random_state` recorded; a state of the other kind of device is left alone."""
    try:
        if "random_state" in state:
            torch.set_rng_state(state["random_state"])
        if device.type == "cuda" and "cuda_random_state" in state:
            torch.cuda.set_rng_state(state["cuda_random_state"], device)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"the checkpoint's random state is damaged ({str(error)[:80]}); --warm_start takes its weights only"
        ) from None


# --- writing ----------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, model: nn.Module, **entries: Any) -> None:
    """Write the weights of a vocoder under the published names, with further entries, whole or not at all.

    An entry `ema` is weights too, under our names.
    """
    config = model.config

    def published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {to_published(name, config.coupling_type, config.transform): value for name, value in weights.items()}

    if "ema" in entries:
        entries["ema"] = published(entries["ema"])
    save_whole(path, {"model": published(model.state_dict()), **entries})


def save_whole(path: str | Path, content: Any) -> None:
    """torch.save that leaves either the old file or the complete new one; OSError where the disk refuses."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides the reason, a full disk say, behind its own words
                raise error.__context__ from None
            raise


def keep_newest(
    newest: Path, n: int, spared: Collection[Path] = (), file_name: re.Pattern[str] = FILE_NAME
) -> list[Path]:
    """Remove the checkpoints before `newest` but for the n newest, itself counted, and those `spared`; 0 keeps all.

    Returns what was removed. Those beyond it, of a run that was taken up again at an earlier point, stay.
    """
    iteration = _iteration(newest, file_name)
    earlier = [path for path in list_checkpoints(newest.parent, file_name) if _iteration(path, file_name) <= iteration]
    kept = {path.resolve() for path in spared}
    surplus = [path for path in earlier[n:] if path.resolve() not in kept] if n else []
    for path in surplus:
        path.unlink(missing_ok=True)
    return surplus


# --- averaging --------------------------------------------------------------------------------------------


def list_checkpoints(directory: str | Path, file_name: re.Pattern[str] = FILE_NAME) -> list[Path]:
    """The checkpoints of a run, highest iteration first; empty where there are none.

    file_name matches their names, its first group the iteration.
    """
    directory = Path(directory)
    found = [path for path in directory.iterdir() if file_name.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: _iteration(path, file_name), reverse=True)


def _iteration(path: Path, file_name: re.Pattern[str]) -> int:
    return int(file_name.fullmatch(path.name)[1])


def newest_checkpoints(directory: str | Path, n: int) -> list[Path]:
    """The n checkpoints of a run with the highest iterations, newest first. Raises InputError if there are fewer."""
    if not Path(directory).is_dir():
        raise InputError(f"checkpoint_path {directory}: expected the folder that holds the checkpoints to average")
    found = list_checkpoints(directory)
    if len(found) < n:
        raise InputError(f"{directory} holds {len(found)} checkpoint(s); -a {n} needs {n}")
    return found[:n]


def average_checkpoints(paths: Sequence[str | Path], epsilon: float | None = None) -> dict[str, Any]:
    """The average of several checkpoints of one run, as `load_checkpoint` would return it, without optimizer state.

    epsilon None: the plain mean. Else exponential weights epsilon * (1 - epsilon)^i, i = 0 the newest, normalised
    to sum to one (the published code leaves that out, which shrinks every weight).
    """
    if not paths:
        raise InputError("no checkpoints to average")
    if epsilon is not None and not 0 < epsilon < 1:
        raise InputError(f"epsilon {epsilon}: expected a number between 0 and 1")
    iterations = {Path(path): load_checkpoint(path)["iteration"] for path in paths}
    newest_first = sorted(iterations, key=iterations.get, reverse=True)
    shares = [1.0 if epsilon is None else (1 - epsilon) ** i for i in range(len(newest_first))]
    total = sum(shares)

    average: dict[str, Tensor] = {}
    for path, share in zip(newest_first, shares, strict=True):
        weights = load_checkpoint(path)["model"]
        if average and {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in average.items()}:
            raise InputError(f"checkpoint {path} is of another model than {newest_first[0]}; they cannot be averaged")
        for name, value in weights.items():
            average[name] = average.get(name, 0) + value.double() * (share / total)
    newest = load_checkpoint(newest_first[0])
    kept = {key: newest[key] for key in ("iteration", "learning_rate", "config") if key in newest}
    weights = {name: value.to(newest["model"][name].dtype) for name, value in average.items()}
    return {**kept, "model": weights, "averaged": [path.name for path in newest_first]}
