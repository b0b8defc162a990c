"""Checkpoint files of any model: saved whole, loaded without running code, listed, and pruned.

A file is a dict with the weights and what else a run needs to go on. Errors end with remedies, which callers give.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harness import terminal
from harness.errors import InputError, show
from harness.files import written_whole
from harness.safetensors_files import load_safetensors
from harness.stopping import safe_point
from harness.torch_files import RefusedFile, digest, load_tensors
from harness.training_state import Taken, check_random_state, checked_optimizer, own_moments

MAX_BYTES = 2**33  # with optimizer state, some 700 million parameters; more is not meant
DIGEST = "digest"  # of a file's entries

Content = TypeVar("Content")

# --- files ------------------------------------------------------------------------------------------------


def save_whole(path: str | Path, content: Mapping[str, Any]) -> None:
    """Save as torch.save does, leaving either the old file or the complete new one; OSError where the disk refuses.

    With an entry `digest` over all others, by which a reader knows them again.
    """
    content = {**content, DIGEST: digest(content)}
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides the reason, a full disk say, behind its own words
                raise error.__context__ from None
            raise


def read_torch_file(path: str | Path, instead_of_folder: str = "expected a file in it") -> Any:
    """Load tensors and plain containers as torch.load does; no code in the file is ever run. Raises InputError.

    A digest that is in the file, since `save_whole` wrote it, must be that of the rest, and is left out.
    instead_of_folder: what to do where the path is that of a folder.
    """
    try:
        content = load_tensors(path, MAX_BYTES)
        if isinstance(content, dict) and DIGEST in content:
            _check_digest(content)
        return content
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"checkpoint {path}: is a folder; {instead_of_folder}") from None
    except (RefusedFile, OSError) as error:
        raise InputError(f"checkpoint {path}: refused, {getattr(error, 'strerror', None) or error}") from None


def _check_digest(content: dict[str, Any]) -> None:
    saved = content.pop(DIGEST)
    try:
        right = isinstance(saved, str) and saved == digest(content)
    except (RefusedFile, MemoryError):
        raise
    except Exception:  # of things that nobody saved; whatever it stumbles over, they are not what was
        right = False
    if not right:
        raise RefusedFile("damaged (its contents are not those of its digest)")


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights, and texts about them, of a safetensors file. Raises InputError."""
    try:
        return load_safetensors(path, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: no such file") from None
    except (RefusedFile, OSError) as error:
        raise InputError(f"checkpoint {path}: refused, {getattr(error, 'strerror', None) or error}") from None


def list_checkpoints(folder: str | Path, file_name: re.Pattern[str]) -> list[Path]:
    """Checkpoints of a run, highest iteration first; empty where there are none.

    file_name matches their names, its first group the iteration.
    """
    folder = Path(folder)
    found = [path for path in folder.iterdir() if file_name.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: iteration_of(path, file_name), reverse=True)


def iteration_of(path: Path, file_name: re.Pattern[str]) -> int:
    """Iteration in the name of a checkpoint."""
    return int(file_name.fullmatch(path.name)[1])


def check_iteration(path: Path, file_name: re.Pattern[str], iteration: int) -> None:
    """InputError where a run's checkpoint says another iteration than its name, by which its place among them goes."""
    if (named := iteration_of(path, file_name)) != iteration:
        raise InputError(f"checkpoint {path}: says iteration {iteration}, its name {named}; use another one")


def newest_whole(
    folder: str | Path,
    file_name: re.Pattern[str],
    read: Callable[[Path], Content],
    warn: Callable[[str], None] = terminal.warn,
) -> Content | None:
    """Result of `read` for the newest checkpoint that it can read; None where there is none.

    Each file is read once, from the newest on; one for which `read` raises InputError, for whatever reason, is warned
    of. InputError where there are some, but none that can be used.
    """
    found, first = list_checkpoints(folder, file_name), ""
    for path in found:
        try:
            return read(path)
        except InputError as error:
            safe_point()  # an interrupt can look like a damaged file
            first = first or str(error)
            warn(f"{error}{'; trying the one before' if path is not found[-1] else ''}")
    if found:
        raise InputError(f"{folder}: none of its {len(found)} checkpoint(s) can be used; {first}")
    return None


def keep_newest(newest: Path, n: int, file_name: re.Pattern[str], spared: Collection[Path] = ()) -> list[Path]:
    """Remove the checkpoints before `newest` but for the n newest, itself counted, and those `spared`; 0 keeps all.

    Returns what was removed. Those beyond it, of a run that was taken up again at an earlier point, stay.
    """
    last = iteration_of(newest, file_name)
    found = [path for path in list_checkpoints(newest.parent, file_name) if path.is_file()]  # not a folder of that name
    earlier = [path for path in found if iteration_of(path, file_name) <= last]
    kept = {path.resolve() for path in spared}
    surplus = [path for path in earlier[n:] if path.resolve() not in kept] if n else []
    for path in surplus:
        path.unlink(missing_ok=True)
    return surplus


# --- contents ---------------------------------------------------------------------------------------------


def load_strictly(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str = "the weights",
    shown: Callable[[str], str] = lambda name: name,
) -> None:
    """Load weights as `load_state_dict` does, but change nothing and raise a one-line InputError where they differ.

    shown: how the message is to call a key.
    """
    check_weights(model, weights, source, shown)
    model.load_state_dict(weights)


def check_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str = "the weights",
    shown: Callable[[str], str] = lambda name: name,
) -> None:
    """InputError where weights are not those of such a model: other names, shapes or kinds of numbers."""
    if problems := differences(model.state_dict(), weights, shown):
        raise InputError(f"{source}: of another model than the config describes; {problems}")


def differences(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], shown: Callable[[str], str] = lambda name: name
) -> str:
    """Words on why weights cannot take the place of a model's own, as in `check_weights`; empty where they can."""
    missing = [shown(name) for name in own if name not in weights]
    unknown = [shown(name) for name in weights if name not in own]
    shapes = [
        f"{shown(name)} is {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    kinds = [
        f"{shown(name)} is {weights[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in weights and not _same_kind(weights[name], own[name])
    ]
    found = (("missing", missing), ("not in this model", unknown), ("other shape", shapes), ("other numbers", kinds))
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in found
        if names
    )


def are_named_tensors(found: Any) -> bool:
    """Tell whether something is a dict of tensors by name, as weights are."""
    return isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )


def plain(value: Any, what: str) -> Any:
    """Nested settings as JSON gives them back; InputError, which names them, where they hold anything else."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} is damaged ({error}); use another file") from None


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first of the weights that holds NaN or infinity."""
    return next((n for n, value in weights.items() if value.is_floating_point() and not value.isfinite().all()), None)


def _same_kind(saved: Tensor, own: Tensor) -> bool:
    """Tell whether saved numbers can take the place of a model's: of its type, or real ones within its range."""
    if not own.is_floating_point() or not saved.is_floating_point():
        return saved.dtype == own.dtype
    return saved.dtype == own.dtype or bool((saved.abs() <= torch.finfo(own.dtype).max).all())


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    saved: Any,
    order: Sequence[str],
    remedy: str,
    taken: Taken,
) -> None:
    """Restore the optimizer of `model` from its saved state, whose parameters 0, 1, ... have the names in `order`.

    How the optimizer computes (fused or not) stays as it was built; only the hyperparameters and copies of the moments
    are taken. taken: the steps that they can be of.
    InputError, which ends with `remedy`, where the state is damaged or of another model.
    """
    parameters = dict(model.named_parameters())
    group, moments = checked(
        lambda: checked_optimizer(saved, order, parameters, type(optimizer).__name__, taken),
        "optimizer state does not fit this model",
        remedy,
    )
    [own] = optimizer.state_dict()["param_groups"]
    state = {
        number: own_moments(moments[name], parameter)
        for number, (name, parameter) in enumerate(parameters.items())
        if name in moments
    }
    kept = {name: value for name, value in group.items() if name in own}
    optimizer.load_state_dict({"state": state, "param_groups": [{**own, **kept}]})


def checked(check: Callable[[], Content], complaint: str, remedy: str) -> Content:
    """Result of a check of harness/training_state.py; what it finds becomes an InputError."""
    try:
        return check()
    except ValueError as error:
        raise InputError(f"the checkpoint's {complaint} ({error}); {remedy}") from None


def load_plain(target: Any, saved: Any, remedy: str) -> None:
    """`target.load_state_dict(saved)` for schedules and loss scalers, whose state is plain numbers.

    Such objects take over whatever they are given, so every entry must be of the kind that theirs is: else InputError,
    which ends with `remedy`.
    """
    try:
        own = target.state_dict()
        known = {name: saved[name] for name in own if name in saved}
        _check_like(known, {name: own[name] for name in known})
        target.load_state_dict({**own, **known})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"the checkpoint's training state is damaged ({error}); {remedy}") from None


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
            raise TypeError(f"{name} is {show(value)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**63


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that a run on `device` may draw from."""
    state = {"random_state": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_random_state"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device, remedy: str) -> None:
    """Go on with the random numbers that `random_state` recorded; a state of the other kind of device is left alone.

    InputError, which ends with `remedy`, where it is damaged.
    """
    checked(lambda: check_random_state(state), "random state is damaged", remedy)
    if "random_state" in state:
        torch.set_rng_state(state["random_state"])
    if device.type == "cuda" and "cuda_random_state" in state:
        try:
            torch.cuda.set_rng_state(state["cuda_random_state"], device)
        except RuntimeError as error:  # an offset that no generator has
            raise InputError(f"the checkpoint's random state is damaged ({str(error)[:80]}); {remedy}") from None
