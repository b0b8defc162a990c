"""Checkpoints of vocoders: published names, where to start, averages.

A file `waveflow_<iteration>` holds a dict with the published entries `model` (under the published key names),
`iteration`, `optimizer`, `scheduler` and `learning_rate`; this project adds `config`, `training_state`, and with
`ema_decay` the moving average of the weights as `ema`. Weights to be passed on are safetensors files: the same names,
with the config and facts about the training as texts.
The optimizer numbers its parameters in the order of the keys of `model`.
"""

if __name__ == "__main__":
    import harness.start  # noqa: F401

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from formats.names import RELEASED, is_stray, our_weights, to_published
from formats.names import from_published as from_published
from formats.names import is_released as is_released
from harness import checkpoints, terminal
from harness.checkpoints import random_state as random_state
from harness.checkpoints import read_torch_file, save_whole
from harness.errors import InputError, show
from harness.files import in_a_name
from harness.safetensors_files import SUFFIX, save_safetensors
from model import build_model

MEL_KEYS = {"sampling_rate", "filter_length", "hop_length", "win_length", "mel_fmin", "mel_fmax", "use_dbmel"}
LEARNED_ANEW = {"upsample_strides": ".upsampler.convs.", "cin_channels": ".cond_conv."}  # keys, and whose shapes differ
FILE_NAME = re.compile(r"waveflow_(\d{1,18})")

# --- weights into a model -----------------------------------------------------------------------------------


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "the weights") -> None:
    """Copy weights into the vocoder from either layout, strictly.

    InputError names the source and the differences, under the names that files have.
    """
    coupling_type, transform = model.config.coupling_type, model.config.transform
    shown = lambda name: to_published(name, coupling_type, transform)  # noqa: E731
    if coupling_type == "waveflow" and is_released(state_dict):
        raise InputError(f"{source}: {RELEASED}; set waveflow_config.coupling_type to waveflow_official")
    checkpoints.load_strictly(model, our_weights(state_dict), source, shown)


def load_fitting_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy weights as `load_weights` does, but leave layers that take in the mel alone where their shapes differ.

    A warning says how many.
    """
    weights, own = our_weights(state_dict), model.state_dict()
    other = {name.rpartition(".")[0] for name in own if name in weights and weights[name].shape != own[name].shape}
    other = {layer for layer in other if any(part in f".{layer}." for part in LEARNED_ANEW.values())}
    if other:
        terminal.warn(f"{source}: {len(other)} layers that take in the mel have other shapes and begin anew")
    kept = {name: own[name] if name.rpartition(".")[0] in other else value for name, value in weights.items()}
    load_weights(model, kept, source)


# --- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Contents of a file, its weights under our names; what it lacks is None or empty."""

    path: Path
    name: str  # by which its results are called
    iteration: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None = None  # the moving average of the weights
    parameter_order: Sequence[str] = ()  # names of the parameters that the optimizer numbers 0, 1, ...
    optimizer: Any = None
    scheduler: Any = None
    learning_rate: float | None = None
    config: Mapping[str, Any] | None = None
    training_state: Any = field(default_factory=dict)
    mel_statistics: Any = None  # of the training clips
    facts: Mapping[str, str] = field(default_factory=dict)  # what a safetensors file tells of itself
    sources: Collection[Path] = ()  # files named or asked for, which pruning spares


def load_checkpoint(path: str | Path, of_run: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this project or of the published code, on the CPU.

    Returns the file's dict with `model` (and `ema`) under our names (for `load_state_dict`, strict) and `iteration`;
    the other entries where the file has them. of_run: as for `read_checkpoint`. Raises InputError on a file that is
    missing, damaged or not a checkpoint.
    """
    if Path(path).suffix == SUFFIX:
        content = _content_of(*checkpoints.read_safetensors(path), path)
    else:
        content = read_torch_file(path, "expected a file in it, or an average of some of them")
    if _is_bare(content):
        content = {"model": content}
    weights = _checked_weights(content, path)
    iteration = content.get("iteration", 0)
    if type(iteration) is not int or not 0 <= iteration < 2**31:
        raise InputError(f"checkpoint {path}: 'iteration' is not a whole number, or out of range")
    if of_run and "iteration" in content:
        checkpoints.check_iteration(Path(path), FILE_NAME, iteration)
    average = {"ema": _checked_average(content["ema"], weights, path)} if "ema" in content else {}
    return {**content, **average, "iteration": iteration, "model": our_weights(weights)}


def _content_of(weights: Mapping[str, Tensor], texts: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    try:
        facts = {key: json.loads(texts[key]) for key in ("config", "iteration", "mel_statistics") if key in texts}
    except (ValueError, RecursionError) as error:
        raise InputError(f"checkpoint {path}: its metadata is damaged ({error})") from None
    told = {key: text for key, text in texts.items() if key not in facts}
    return {"model": weights, "facts": told, **facts}


def _is_bare(content: Any) -> bool:
    """Recognise the weights of a vocoder without anything around them."""
    bare = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    return bare and any(isinstance(name, str) and from_published(name).startswith("upsampler.") for name in content)


def _checked_weights(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The weights under the names that the file has, without entries that are none."""
    found = content.get("model") if isinstance(content, dict) else None
    if not checkpoints.are_named_tensors(found):
        raise InputError(f"checkpoint {path}: holds no 'model' weights; expected a file written by train.py")
    weights = {name: value for name, value in found.items() if not is_stray(name)}
    if spoilt := checkpoints.not_finite(weights):
        raise InputError(f"checkpoint {path}: {spoilt} is not finite, its run had diverged; use an earlier one")
    return weights


def _checked_average(average: Any, weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The moving average under our names: finite tensors that could take the place of the weights, and no others."""
    named = checkpoints.are_named_tensors(average)
    problems = checkpoints.differences(weights, average) if named else "expected named tensors"
    if not problems and (spoilt := checkpoints.not_finite(average)):
        problems = f"{spoilt} is not finite"
    if problems:
        raise InputError(f"checkpoint {path}: its moving average 'ema' is damaged ({problems}); use another one")
    return our_weights(average)


def read_checkpoint(path: str | Path, of_run: bool = False) -> Checkpoint:
    """`load_checkpoint` as a Checkpoint.

    of_run: taken by its name, `waveflow_<iteration>`, which its iteration must be where it says one.
    """
    content = load_checkpoint(path, of_run)
    known = ("optimizer", "scheduler", "learning_rate", "training_state", "mel_statistics")
    config = content.get("config")
    return Checkpoint(
        path=Path(path),
        name=Path(path).name,
        iteration=content["iteration"],
        weights=content["model"],
        average=content.get("ema"),
        parameter_order=tuple(content["model"]),
        config=checkpoints.plain(config, f"checkpoint {path}: its config") if isinstance(config, Mapping) else None,
        facts=content["facts"] if Path(path).suffix == SUFFIX else {},  # texts there, in another file anything
        **{name: content[name] for name in known if name in content},
    )


def check_config(checkpoint: Checkpoint, config: Config, warm: bool = False) -> None:
    """InputError where a checkpoint was trained under another model or another mel than `config` describes.

    Shapes alone do not tell: the same weights make another model with another height, cycle or permutation.
    Published files hold no config and pass. With `warm` another mel is warned of: what it was is learned anew.
    """
    saved, own = checkpoint.config or {}, config.to_dict()
    for section, keys in (
        ("waveflow_config", own["waveflow_config"].keys() - {"model_name"}),
        ("data_config", MEL_KEYS),
    ):
        values = saved.get(section)
        for key in sorted(keys & values.keys()) if isinstance(values, Mapping) else ():
            before, now = (list(v) if isinstance(v, tuple) else v for v in (values[key], own[section][key]))
            if before == now:
                continue
            difference = (
                f"checkpoint {checkpoint.path} was trained with {section}.{key} {show(before)}, the config says "
                f"{show(now)}"
            )
            if not warm or (section == "waveflow_config" and key not in LEARNED_ANEW):
                raise InputError(f"{difference}; make them equal")
            terminal.warn(f"{difference}: its weights are only a beginning")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, highest iteration first; empty where there are none."""
    return checkpoints.list_checkpoints(folder, FILE_NAME)


# --- writing ----------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, model: nn.Module, **entries: Any) -> None:
    """Write the weights of a vocoder under the published names, with further entries, whole or not at all.

    An entry `ema` is weights too, under our names.
    """
    if "ema" in entries:
        entries["ema"] = _published(model, entries["ema"])
    save_whole(path, {"model": _published(model, model.state_dict()), **entries})


def _published(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kind = model.config
    return {to_published(name, kind.coupling_type, kind.transform): value for name, value in weights.items()}


def export_weights(
    path: str | Path, model: nn.Module, config: Config, iteration: int, facts: Mapping[str, str]
) -> None:
    """Write the weights of a vocoder as safetensors, under the published names, with its config and facts about it."""
    texts = {**facts, "config": json.dumps(config.to_dict()), "iteration": json.dumps(iteration)}
    save_safetensors(path, _published(model, model.state_dict()), texts)


def keep_newest(newest: Path, n: int, spared: Collection[Path] = ()) -> list[Path]:
    """Remove the checkpoints before `newest` but for the n newest, itself counted, and those `spared`; 0 keeps all."""
    return checkpoints.keep_newest(newest, n, FILE_NAME, spared)


# --- averaging --------------------------------------------------------------------------------------------


def newest_checkpoints(directory: str | Path, n: int) -> list[Path]:
    """The n checkpoints of a run with the highest iterations, newest first. Raises InputError if there are fewer."""
    if not Path(directory).is_dir():
        raise InputError(f"checkpoint_path {directory}: expected the folder that holds the checkpoints to average")
    found = [path for path in list_checkpoints(directory) if path.is_file()]
    if len(found) < n:
        raise InputError(f"{directory} holds {len(found)} checkpoint(s), {n} are to be averaged; average fewer")
    return found[:n]


def average_checkpoints(paths: Sequence[str | Path], epsilon: float | None = None) -> dict[str, Any]:
    """The average of several checkpoints of one run, as `load_checkpoint` would return it, without optimizer state.

    epsilon None: the plain mean. Else exponential weights epsilon * (1 - epsilon)^i, i = 0 the newest, normalised
    to sum to one (the published code leaves that out, which shrinks every weight).
    """
    if not paths:
        raise InputError("no checkpoints to average")
    newest_first = _newest_first([Path(path) for path in paths])
    return _entries(average_of(newest_first, epsilon), newest_first)


def _newest_first(paths: Sequence[Path]) -> list[Path]:
    """By the iterations in their names, or as they are where not all have one."""
    if not all(FILE_NAME.fullmatch(path.name) for path in paths):
        return list(paths)
    return sorted(paths, key=lambda path: checkpoints.iteration_of(path, FILE_NAME), reverse=True)


def _entries(average: Checkpoint, newest_first: Sequence[Path]) -> dict[str, Any]:
    """What the file of an average holds besides weights that are its own."""
    entries = {name: getattr(average, name) for name in ("learning_rate", "config", "mel_statistics")}
    kept = {name: value for name, value in entries.items() if value is not None}
    averaged = [path.name for path in newest_first]
    return {"iteration": average.iteration, **kept, "model": average.weights, "averaged": averaged}


def average_of(newest_first: Sequence[Path], epsilon: float | None = None) -> Checkpoint:
    """The newest of several checkpoints with the average of the weights of all, as `average_checkpoints` weighs them.

    Each file is read once. InputError where they are of several models, or epsilon weighs files in another order than
    that of their iterations.
    """
    if epsilon is not None and not 0 < epsilon < 1:
        raise InputError(f"epsilon {epsilon}: expected a number between 0 and 1")
    shares = [1.0 if epsilon is None else (1 - epsilon) ** i for i in range(len(newest_first))]
    by_name = all(FILE_NAME.fullmatch(path.name) for path in newest_first)
    newest = last = read_checkpoint(newest_first[0], by_name)
    sums = {name: value.double() * (shares[0] / sum(shares)) for name, value in newest.weights.items()}
    for path, share in zip(newest_first[1:], shares[1:], strict=True):
        before, last = last.iteration, read_checkpoint(path, by_name)
        if {k: v.shape for k, v in last.weights.items()} != {k: v.shape for k, v in sums.items()}:
            raise InputError(f"checkpoint {path} is of another model than {newest.path}; they cannot be averaged")
        if epsilon is not None and last.iteration > before:
            raise InputError(f"checkpoint {path}: of iteration {last.iteration}, after one of {before}; newest first")
        for name, value in last.weights.items():
            sums[name] += value.double() * (share / sum(shares))
    weights = {name: value.to(newest.weights[name].dtype) for name, value in sums.items()}
    return replace(newest, weights=weights, average=None)  # the moving average is of the newest alone


# --- where to start ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Start:
    """A job's choice of where to start."""

    resume: bool = False  # from the newest whole checkpoint of the run, if it has any
    average: int | None = None  # from the average of the newest so many checkpoints
    epsilon: float | None = None  # their exponential weights
    warm: bool = False  # only weights are taken, from another mel too
    given: Checkpoint | None = None  # from this one, which has been read
    must_write: bool = False  # the average is to be on disk; a job that only reads does without


def starting_point(
    config: Config, start: Start, usable: Callable[[Checkpoint], None] = lambda checkpoint: None
) -> Checkpoint | None:
    """The checkpoint to start from: the run's newest, the one named, an average, or None for fresh weights.

    Each file is read once. usable: raises InputError where the run cannot go on from a checkpoint; the newest for which
    it does not is taken. Raises InputError.
    """
    path = config.train_config.checkpoint_path
    if start.given is not None:
        return _fitting(start.given, config)
    if start.resume and (newest := newest_whole(config, usable)):
        return newest
    if start.average is not None:
        return _average(config, newest_checkpoints(path or config.run_folder, start.average), start)
    return replace(_fitting(read_checkpoint(path), config, start.warm), sources=(Path(path),)) if path else None


def newest_whole(config: Config, usable: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
    """The run's newest checkpoint that can be used, after warnings of those that cannot; None where there is none.

    usable: as for `starting_point`. InputError where there are some, but none that can be used.
    """
    with torch.random.fork_rng(devices=[]):  # none of the run's own random numbers
        model = build_model(config.waveflow_config, config.data_config)

    def read(path: Path) -> Checkpoint:
        checkpoint = _fitting(read_checkpoint(path, of_run=True), config)
        _check_fit(checkpoint, model)
        usable(checkpoint)
        return checkpoint

    return checkpoints.newest_whole(config.run_folder, FILE_NAME, read)


def _check_fit(checkpoint: Checkpoint, model: nn.Module) -> None:
    kind = model.config
    shown = lambda name: to_published(name, kind.coupling_type, kind.transform)  # noqa: E731
    checkpoints.check_weights(model, checkpoint.weights, f"checkpoint {checkpoint.path}", shown)


def _fitting(checkpoint: Checkpoint, config: Config, warm: bool = False) -> Checkpoint:
    """The checkpoint if it is of the config's model; those of other runs are named after their folder too, so that
    their results do not meet the run's own.
    """
    check_config(checkpoint, config, warm)
    folder = checkpoint.path.resolve().parent
    own = folder == config.run_folder.resolve()
    return replace(checkpoint, name=checkpoint.path.name if own else f"{folder.name}_{checkpoint.path.name}")


def _average(config: Config, newest_first: Sequence[Path], start: Start) -> Checkpoint:
    """The average as a checkpoint, and as a file beside those that it is of."""
    average = average_of(newest_first, start.epsilon)
    check_config(average, config, start.warm)
    model = build_model(config.waveflow_config, config.data_config)
    load_weights(model, average.weights, f"the average of {newest_first[0]} and others")
    suffix = "" if start.epsilon is None else f"_epsilon{in_a_name(start.epsilon)}"
    target = newest_first[0].with_name(f"{newest_first[0].name}_average{len(newest_first)}{suffix}")
    entries = {name: value for name, value in _entries(average, newest_first).items() if name != "model"}
    place = f": {target}"
    try:
        save_checkpoint(target, model, **entries)
    except OSError as error:
        if start.must_write:
            raise
        terminal.warn(f"the average could not be written to {target} ({error.strerror or error})")
        place = ""
    terminal.tell(f"average of {', '.join(path.name for path in newest_first)}{place}")
    return replace(average, name=target.name, sources=newest_first)


if __name__ == "__main__":
    from harness.stopping import leave
    from jobs.files import main  # stands above this room, and only this command line needs it

    leave(main())
