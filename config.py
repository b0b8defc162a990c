"""Experiment configuration: JSON files and `--set` overrides become frozen dataclasses, checked once.

The only place that knows key names. Keys and defaults are those of the published configs
(Lee et al., 2020); the fields marked "added" are this project's. Imports nothing of ours.
"""

import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.errors import InputError, Remedies

MAX_WEIGHTS = 2**31
MAX_CHARACTERS = 2**20  # of an experiment file
REMEDIES = Remedies(
    resume="the checkpoints are intact: go on with --resume latest",
    weights_only="--warm_start takes its weights only",
    bad_steps="the checkpoints are intact: look at the files with --check_data, or go on from a checkpoint with a "
    "lower train_config.learning_rate",
    worker_died="the checkpoints are intact: go on with --resume latest, with fewer workers (train_config.num_workers) "
    "if it happens again",
)  # of train.py; here, below every room that gives advice
COUPLING_TYPES = ("waveflow", "nanoflow_naive", "nanoflow_decomp", "nanoflow")


def _positive(default: Any = MISSING, maximum: int = 2**31 - 1) -> Any:
    return field(default=default, metadata={"minimum": 1, "maximum": maximum})


def _at_least_zero(default: Any, maximum: float = 2**31 - 1) -> Any:
    return field(default=default, metadata={"minimum": 0, "maximum": maximum})


def _above_zero(default: Any) -> Any:
    return field(default=default, metadata={"above": 0.0})


def _one_of(*choices: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`train_config`: the optimisation and where its files go."""

    fp16_run: bool = False
    output_directory: str = "experiments"
    epochs: int = _positive(100_000)
    learning_rate: float = _above_zero(1e-3)
    lr_decay_step: int = _positive(200_000)
    lr_decay_gamma: float = _above_zero(0.5)
    sigma: float = _above_zero(1.0)
    iters_per_checkpoint: int = _positive(5_000)
    batch_size: int = _positive(8, maximum=2**16)
    seed: int = _at_least_zero(1234)
    checkpoint_path: str = ""
    with_tensorboard: bool = True
    max_grad_norm: float = _above_zero(5.0)  # added: the published code has the 5 in its loop
    amp_backend: str = _one_of("torch", "apex", default="torch")  # added: who does fp16_run
    num_workers: int = _at_least_zero(2, maximum=2**8)  # added: data loading processes
    keep_checkpoints: int = _at_least_zero(0)  # added: how many stay, the newest; 0, as published: all
    checkpoint_activations: bool = False  # added: keep one flow's activations at a time; slower, in less memory
    max_bad_steps: int = _positive(10)  # added: steps in a row with a loss or gradient that is not finite, then stop
    accumulation_steps: int = _positive(1, maximum=2**16)  # added: parts of a batch that go through one after the other
    ema_decay: float = _at_least_zero(0.0, maximum=0.9999999)  # added: moving average of the weights; 0: none
    warmup_steps: int = _at_least_zero(0)  # added: over which the learning rate rises; 0, as published: none
    compile: bool = False  # added: torch.compile of the estimator for training steps


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`data_config`: the corpus and its log-mel spectrogram (lengths in samples, frequencies in Hz)."""

    training_files: str = ""
    test_files: str = ""
    segment_length: int = _positive(16_000, maximum=2**26)
    sampling_rate: int = _positive(22_050, maximum=2**20)
    filter_length: int = _positive(1_024, maximum=2**16)
    hop_length: int = _positive(256, maximum=2**16)
    win_length: int = _positive(1_024, maximum=2**16)
    n_mel_channels: int = _positive(80, maximum=2**10)
    mel_fmin: float = _at_least_zero(0.0)
    mel_fmax: float = _above_zero(8_000.0)
    rescale: bool = False
    use_dbmel: bool = False
    mel_source: str = _one_of("crop", "clip", default="crop")  # added: see spec defect 15 in the README

    def __post_init__(self) -> None:
        if self.filter_length % 2:
            raise InputError(f"filter_length {self.filter_length} is odd; frames are centred, so it must be even")
        if self.win_length > self.filter_length:
            raise InputError(f"win_length {self.win_length} is longer than filter_length {self.filter_length}")
        if not self.mel_fmin < self.mel_fmax <= self.sampling_rate / 2:
            raise InputError(
                f"mel_fmin {self.mel_fmin} and mel_fmax {self.mel_fmax}: expected mel_fmin < mel_fmax <= "
                f"{self.sampling_rate / 2} (half of sampling_rate)"
            )


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """`dist_config`: how processes of a multi-process run meet."""

    dist_backend: str = _one_of("nccl", "gloo", default="nccl")
    dist_url: str = ""


@dataclass(frozen=True, kw_only=True)
class WaveFlowConfig:
    """`waveflow_config`: the flow vocoder; `coupling_type` says what its flows share."""

    model_name: str = "waveflow"
    cin_channels: int = _positive(80, maximum=2**10)
    res_channels: int = _positive(maximum=2**14)
    n_height: int = _positive(16, maximum=2**12)
    n_layer: int = _positive(8, maximum=16)
    n_flow: int = _positive(8, maximum=128)
    n_layer_per_cycle: int = _positive(1, maximum=16)
    coupling_type: str = _one_of(*COUPLING_TYPES)
    size_flow_embed: int = _at_least_zero(0, maximum=2**14)
    use_weightnorm_embed: bool = False
    bipartize: bool = False
    transform: str = _one_of("affine", "spline", default="affine")
    num_bin: int = _positive(8, maximum=2**8)
    tail_bound: float = _above_zero(5.0)
    upsample_strides: tuple[int, ...] = (16, 16)  # added: their product is the hop

    def __post_init__(self) -> None:
        if self.coupling_type == "nanoflow" and self.size_flow_embed < 1:
            raise InputError('size_flow_embed: coupling_type "nanoflow" needs an embedding size of at least 1')
        if self.bipartize and self.n_height % 2:
            raise InputError(f"n_height {self.n_height} is odd; bipartize reverses its two halves, so it must be even")
        if not self.upsample_strides or any(s < 2 or s % 2 or s > 2**12 for s in self.upsample_strides):
            raise InputError(
                f"upsample_strides {_show(list(self.upsample_strides))}: expected even numbers from 2 to {2**12}"
            )
        if self.weights_at_least > MAX_WEIGHTS:
            raise InputError(
                f"res_channels {self.res_channels}, n_layer {self.n_layer}, n_flow {self.n_flow}: a model of over "
                f"{self.weights_at_least:.1e} weights; at most {MAX_WEIGHTS:.1e} are accepted"
            )
        if not self.model_name or self.model_name in (".", "..") or set(self.model_name) & set("/\\\0"):
            raise InputError(f"model_name {self.model_name!r}: expected a plain folder name, without a slash")

    @property
    def hop_length(self) -> int:
        """Audio samples per mel frame."""
        return math.prod(self.upsample_strides)

    @property
    def weights_at_least(self) -> int:
        """Those of the estimators' layers."""
        n_estimators = self.n_flow if self.coupling_type == "waveflow" else 1
        inputs = 10 * self.res_channels + self.cin_channels + self.size_flow_embed  # 3x3, 1x1, and the conditioning
        return n_estimators * self.n_layer * 2 * self.res_channels * inputs

    def dilations(self, layer: int) -> tuple[int, int]:
        """(dilation_h, dilation_w) of an estimator layer."""
        return 2 ** (layer % self.n_layer_per_cycle), 2**layer


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment file."""

    train_config: TrainConfig
    data_config: DataConfig
    waveflow_config: WaveFlowConfig
    dist_config: DistConfig = DistConfig()

    def __post_init__(self) -> None:
        data, model = self.data_config, self.waveflow_config
        if data.segment_length % model.n_height:
            near = round(data.segment_length / model.n_height) * model.n_height or model.n_height
            raise InputError(
                f"data_config.segment_length {data.segment_length} is not a multiple of "
                f"waveflow_config.n_height {model.n_height}; the nearest that is: {near}"
            )
        if data.hop_length % model.n_height:
            raise InputError(
                f"data_config.hop_length {data.hop_length} is not a multiple of waveflow_config.n_height "
                f"{model.n_height}, so whole clips could not be squeezed; choose a height that divides it"
            )
        if model.hop_length != data.hop_length:
            raise InputError(
                f"data_config.hop_length is {data.hop_length}, but waveflow_config.upsample_strides "
                f"{list(model.upsample_strides)} multiply to {model.hop_length}; make them equal"
            )
        if model.cin_channels != data.n_mel_channels:
            raise InputError(
                f"waveflow_config.cin_channels {model.cin_channels} differs from "
                f"data_config.n_mel_channels {data.n_mel_channels}; make them equal"
            )

    @property
    def run_folder(self) -> Path:
        """Where a run keeps its files."""
        return Path(self.train_config.output_directory) / self.waveflow_config.model_name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every key written out."""
        return asdict(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment file, apply `section.key=value` overrides (value in JSON, else text).

    Raises InputError naming the file and key.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        sections = json.loads(text, object_pairs_hook=_distinct) if len(text) <= MAX_CHARACTERS else None
    except FileNotFoundError:
        raise InputError(f"config {path}: no such file; the shipped ones are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: cannot be read ({error})") from None
    except RecursionError:
        raise InputError(f"config {path}: nested too deeply to be a config") from None
    except InputError as error:
        raise InputError(f"config {path}: {error}") from None
    except ValueError as error:
        raise InputError(f"config {path}: not valid JSON ({error})") from None
    if not isinstance(sections, dict):
        raise InputError(f"config {path}: expected an object with the sections {_names(Config)}")
    for override in overrides:
        _apply_override(sections, override)
    try:
        return config_from_dict(sections)
    except InputError as error:
        raise InputError(f"config {path}: {error}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; a key given twice is refused, where JSON itself would quietly take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{_show(twice)} is given twice; remove one of the two")
    return values


def config_from_dict(sections: dict[str, Any]) -> Config:
    """A checked Config from the four sections as plain dicts; `dist_config` may be left out."""
    hints = typing.get_type_hints(Config)
    _reject_unknown(sections, Config, "")
    for name in ("train_config", "data_config", "waveflow_config"):
        if name not in sections:
            raise InputError(f"section {name!r} is missing; expected {_names(Config)}")
    data = sections["data_config"]
    for name in ("training_files", "test_files"):
        if isinstance(data, dict) and not data.get(name):
            raise InputError(f"data_config.{name}: missing; expected the path of a list of wav files")
    return Config(**{name: section_from_dict(hints[name], value, f"{name}.") for name, value in sections.items()})


def section_from_dict(section: type, values: Any, prefix: str = "") -> Any:
    """Check a dict against one of the section dataclasses and build it; `prefix` names it in errors.

    The strings "True" and "False" of the published configs are accepted for booleans.
    """
    if isinstance(values, section):
        return values
    if not isinstance(values, dict):
        raise InputError(f"{prefix.rstrip('.') or section.__name__}: expected an object, got {_show(values)}")
    _reject_unknown(values, section, prefix)
    hints = typing.get_type_hints(section)
    checked = {}
    for spec in fields(section):
        if spec.name in values:
            checked[spec.name] = _check_value(values[spec.name], hints[spec.name], spec.metadata, prefix + spec.name)
        elif spec.default is MISSING:
            raise InputError(f"{prefix}{spec.name}: missing")
    try:
        return section(**checked)
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def _apply_override(sections: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key):
        raise InputError(f"--set {override}: expected section.key=value, as in train_config.batch_size=4")
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except InputError as error:
        raise InputError(f"--set {_show(override)}: {error}") from None
    except (ValueError, RecursionError):
        value = text
    if not isinstance(sections.setdefault(section, {}), dict):
        raise InputError(f"--set {override}: {section} is not a section")
    sections[section][key] = value


def _check_value(value: Any, kind: Any, limits: types.MappingProxyType, name: str) -> Any:
    if kind is bool and value in ("True", "False"):
        value = value == "True"
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**63 else math.inf
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or any(type(v) is not int for v in value):
            raise InputError(f"{name}: expected a list of whole numbers, got {_show(value)}")
        return tuple(value)
    if type(value) is not kind:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[kind]
        raise InputError(f"{name}: expected {expected}, got {_show(value)}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{name}: expected a finite number, got {value}")
    if "choices" in limits and value not in limits["choices"]:
        raise InputError(f"{name}: expected one of {', '.join(limits['choices'])}, got {_show(value)}")
    if "minimum" in limits and value < limits["minimum"]:
        raise InputError(f"{name}: expected at least {limits['minimum']}, got {value}")
    if "above" in limits and value <= limits["above"]:
        raise InputError(f"{name}: expected a number above {limits['above']:g}, got {value}")
    if "maximum" in limits and value > limits["maximum"]:
        raise InputError(f"{name}: expected at most {limits['maximum']}, got {_show(value)}")
    return value


def _reject_unknown(values: dict[str, Any], section: type, prefix: str) -> None:
    known = [spec.name for spec in fields(section)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise InputError(f"{prefix}{name}: unknown key; {hint}")


def _names(section: type) -> str:
    return ", ".join(spec.name for spec in fields(section))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
