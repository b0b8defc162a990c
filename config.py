"""Experiment configuration: JSON files and `--set` overrides become frozen sections, checked once.

The only place that knows key names. Keys and defaults are those of the published configs (Lee et al., 2020) but for
those described as "added". `python config.py` prints the reference of all keys, docs/config.md.
"""

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from harness.errors import InputError, Remedies
from harness.files import RefusedFile, read_text
from harness.settings import Names, Settings, Sizes, Switch, parse_section, reference_table, show, unknown_key

MAX_WEIGHTS = 2**31
MAX_BYTES = 2**20  # of an experiment file
MAX_INT = 2**31 - 1
MAX_STRIDE = 2**12
REMEDIES = Remedies(
    resume="the checkpoints are intact: go on with --resume latest",
    weights_only="--warm_start takes its weights only",
    bad_steps="the checkpoints are intact: look at the files with --check_data, or go on from a checkpoint with a "
    "lower train_config.learning_rate",
    worker_died="the checkpoints are intact: go on with --resume latest, with fewer workers (train_config.num_workers) "
    "if it happens again",
)  # of train.py; here, below every room that gives advice
CouplingType = Literal["waveflow", "waveflow_official", "nanoflow_naive", "nanoflow_decomp", "nanoflow"]


def _plain(default: Any, description: str) -> Any:
    """A field without a range, described for docs/config.md."""
    return Field(default, description=description)


def _count(default: Any, description: str, maximum: int = MAX_INT, minimum: int = 1) -> Any:
    """A whole number of something."""
    return Field(default, ge=minimum, le=maximum, description=description)


def _above_zero(default: float, description: str, maximum: float = 1e6) -> Any:
    return Field(default, gt=0, le=maximum, description=description)


class TrainConfig(Settings):
    """`train_config`: the optimisation and where its files go."""

    fp16_run: Switch = _plain(False, "half precision, of `amp_backend` and `amp_dtype`")
    output_directory: str = _plain("experiments", "runs go to `<output_directory>/<model_name>`")
    epochs: int = _count(100_000, "passes over the training clips")
    learning_rate: float = _above_zero(1e-3, "of Adam", maximum=100)
    lr_decay_step: int = _count(200_000, "iterations after which the learning rate is multiplied by `lr_decay_gamma`")
    lr_decay_gamma: float = _above_zero(0.5, "see `lr_decay_step`", maximum=1)
    sigma: float = _above_zero(1.0, "standard deviation of the Gaussian prior")
    iters_per_checkpoint: int = _count(5_000, "iterations from one checkpoint, evaluation and sample to the next")
    batch_size: int = _count(8, "crops per step, over all devices and processes", maximum=2**16)
    seed: int = _count(1234, "of weights, data order, crops and noise", minimum=0)
    checkpoint_path: str = _plain("", "checkpoint to start from; with `-a` a folder of them; empty: fresh weights")
    with_tensorboard: Switch = _plain(True, "write curves, samples and pictures for TensorBoard")
    max_grad_norm: float = _above_zero(
        5.0, "added (5 in the published loop): gradients are scaled down to this norm", maximum=1e12
    )
    amp_backend: Literal["torch", "apex"] = _plain(
        "torch", "added: who computes `fp16_run`; `apex` is NVIDIA Apex, level O1, where a version with `amp` is there"
    )
    amp_dtype: Literal["auto", "float16", "bfloat16"] = _plain(
        "auto", "added: half precision of `torch`; auto: bfloat16, or float16 with loss scaling on a GPU without it"
    )
    num_workers: int = _count(2, "added: data loading processes; batches do not depend on it", 2**8, minimum=0)
    keep_checkpoints: int = _count(0, "added: how many checkpoints stay, the newest; 0, as published: all", minimum=0)
    checkpoint_activations: Switch = _plain(
        False, "added: keep one flow's activations at a time and compute the rest again: slower, in less memory"
    )
    max_bad_steps: int = _count(10, "added: steps in a row with a loss or gradient that is not finite before the stop")
    accumulation_steps: int = _count(
        1, "added: parts of a batch that go through one after the other; the gradient is that of the whole", 2**16
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        le=0.9999999,
        description="added: moving average of the weights, evaluated and synthesized with, saved as `ema`; 0: none",
    )
    trained_parts: Literal["all", "gates-embedding-projections"] = _plain(
        "all", "added: what training changes; the few parameters of each flow suffice for a new voice, say"
    )
    warmup_steps: int = _count(
        0, "added: steps over which the learning rate rises to the schedule; 0, as published: none", minimum=0
    )
    crop_context: int = _count(
        0,
        "added: samples at the start of each training crop, a multiple of `n_height`, that are only the past of the "
        "rest, for linear prediction; 0: what comes before a crop is taken for zeros",
        2**26,
        minimum=0,
    )
    compile: Switch = _plain(
        False,
        "added: `torch.compile` of the estimator in training steps; needs a C++ compiler on CPUs, Triton on GPUs",
    )


class DataConfig(Settings):
    """`data_config`: the corpus and its log-mel spectrogram (lengths in samples, frequencies in Hz)."""

    training_files: str = _plain(
        "", "list of wavs (docs/own_recordings.md), relative to the current folder, or else the config's"
    )
    test_files: Names = _plain(
        "", "list of wavs to evaluate, of wavs and mels to synthesize; or several lists, each with its own likelihood"
    )
    segment_length: int = _count(16_000, "samples per training crop, a multiple of `n_height`", 2**26)
    sampling_rate: int = _count(22_050, "Hz; wavs, or FLACs, must be 16-bit mono at this rate", 2**20)
    filter_length: int = _count(1_024, "samples of the Fourier transform, even", 2**16)
    hop_length: int = _count(256, "samples from one frame to the next, at least 2", 2**16, minimum=2)
    win_length: int = _count(1_024, "samples of the window, at most `filter_length`", 2**16)
    n_mel_channels: int = _count(80, "mel bands", 2**10)
    mel_fmin: float = Field(0.0, ge=0, le=MAX_INT, description="Hz at which the lowest band begins")
    mel_fmax: float = _above_zero(
        8_000.0, "Hz at which the highest band ends, at most half of `sampling_rate`, which `null` stands for"
    )
    rescale: Switch = _plain(False, "divide each clip by its peak, times 0.999")
    use_dbmel: Switch = _plain(False, "decibels mapped to [0, 1] instead of the natural logarithm")
    mel_source: Literal["crop", "clip"] = _plain(
        "crop",
        "added: `crop`: mel of each training crop by itself, as published; `clip`: hop-aligned frames of the clip's",
    )

    @property
    def test_lists(self) -> tuple[str, ...]:
        """The lists of `test_files`, however many."""
        return (self.test_files,) if isinstance(self.test_files, str) else self.test_files

    @model_validator(mode="before")
    @classmethod
    def _half_the_rate(cls, values: dict[str, Any]) -> dict[str, Any]:
        rate = values.get("sampling_rate", cls.model_fields["sampling_rate"].default)
        null = "mel_fmax" in values and values["mel_fmax"] is None
        return {**values, "mel_fmax": rate / 2} if null and type(rate) is int else values

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.filter_length % 2:
            raise InputError(f"filter_length {self.filter_length} is odd; frames are centred, so it must be even")
        if self.win_length > self.filter_length:
            raise InputError(f"win_length {self.win_length} is longer than filter_length {self.filter_length}")
        if not self.mel_fmin < self.mel_fmax <= self.sampling_rate / 2:
            raise InputError(
                f"mel_fmin {self.mel_fmin} and mel_fmax {self.mel_fmax}: expected mel_fmin < mel_fmax <= "
                f"{self.sampling_rate / 2} (half of sampling_rate)"
            )
        return self


class DistConfig(Settings):
    """`dist_config`: how processes of a multi-process run meet."""

    dist_backend: Literal["nccl", "gloo"] = _plain("nccl", "how GPUs talk; CPUs talk through gloo")
    dist_url: str = _plain("", "where the processes meet; empty or `env://`: where torchrun says")


class WaveFlowConfig(Settings):
    """`waveflow_config`: the flow vocoder; `coupling_type` says what its flows share."""

    model_name: str = _plain("waveflow", "names the run's folder")
    cin_channels: int = _count(80, "mel bands, equal to `n_mel_channels`", 2**10)
    res_channels: int = _count(..., "residual channels of the estimator", 2**14)
    n_height: int = _count(16, "rows of the squeezed audio", 2**12)
    n_layer: int = _count(8, "layers of an estimator", 16)
    n_flow: int = _count(8, "flows", 128)
    n_layer_per_cycle: int = _count(1, "dilation in height of layer l: 2^(l mod this); in width: 2^l", 16)
    coupling_type: CouplingType = _plain(..., "what flows share")
    size_flow_embed: int = _count(0, "channels of the flow embedding, for `nanoflow`", 2**14, minimum=0)
    use_weightnorm_embed: Switch = _plain(False, "weight normalisation of the flow embedding table, row by row")
    bipartize: Switch = _plain(False, "the second half of the flows reverses the upper and lower rows apart")
    transform: Literal["affine", "spline"] = _plain("affine", "what a flow does to a sample")
    num_bin: int = _count(8, "bins of a spline", 2**8)
    tail_bound: float = _above_zero(5.0, "a spline is the identity beyond it")
    upsample_strides: Sizes = _plain(
        (16, 16), "added: numbers whose product is `hop_length`; left out: the two nearest to each other"
    )

    linear_prediction: int = _count(
        0, "added: order of linear prediction from the mel, the outermost flow; 0: none", maximum=512, minimum=0
    )

    @model_validator(mode="before")
    @classmethod
    def _released_name(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("coupling_type") == "waveflow_bipartize":  # of the released WaveFlow's configs only
            return {**values, "coupling_type": "waveflow_official", "bipartize": True}
        return values

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.coupling_type == "nanoflow" and self.size_flow_embed < 1:
            raise InputError('size_flow_embed: coupling_type "nanoflow" needs an embedding size of at least 1')
        if self.couples_first and (self.n_height < 2 or self.transform != "affine"):
            raise InputError(
                f'coupling_type "waveflow_official": expected n_height of at least 2 and the affine transform, got '
                f"{self.n_height} and {self.transform!r}"
            )
        if self.bipartize and self.n_height % 2:
            raise InputError(f"n_height {self.n_height} is odd; bipartize reverses its two halves, so it must be even")
        if not 1 <= len(self.upsample_strides) <= 16 or any(not 2 <= s <= MAX_STRIDE for s in self.upsample_strides):
            raise InputError(
                f"upsample_strides {show(list(self.upsample_strides))}: expected whole numbers from 2 to {MAX_STRIDE}"
            )
        if self.weights_at_least > MAX_WEIGHTS:
            raise InputError(
                f"res_channels {self.res_channels}, n_layer {self.n_layer}, n_flow {self.n_flow}: a model of over "
                f"{self.weights_at_least:.1e} weights; at most {MAX_WEIGHTS:.1e} are accepted"
            )
        name = self.model_name
        if not name.isprintable() or name in ("", ".", "..") or set(name) & set("/\\"):
            raise InputError(f"model_name {show(self.model_name)}: expected a plain folder name, without a slash")
        return self

    @property
    def hop_length(self) -> int:
        """Audio samples per mel frame."""
        return math.prod(self.upsample_strides)

    @property
    def weights_at_least(self) -> int:
        """Weights of the estimators' layers, which are most of them."""
        n_estimators = 1 if self.coupling_type.startswith("nanoflow") else self.n_flow
        inputs = 10 * self.res_channels + self.cin_channels + self.size_flow_embed  # 3x3, 1x1, and the conditioning
        return n_estimators * self.n_layer * 2 * self.res_channels * inputs

    @property
    def couples_first(self) -> bool:
        """Order of a flow's two halves: the released WaveFlow couples, then permutes; it scales nothing in between."""
        return self.coupling_type == "waveflow_official"

    def dilations(self, layer: int) -> tuple[int, int]:
        """(dilation_h, dilation_w) of an estimator layer."""
        return 2 ** (layer % self.n_layer_per_cycle), 2**layer


class Config(Settings):
    """A whole experiment file."""

    train_config: TrainConfig
    data_config: DataConfig
    waveflow_config: WaveFlowConfig
    dist_config: DistConfig = DistConfig()

    @model_validator(mode="after")
    def _relations(self) -> Self:
        data, model = self.data_config, self.waveflow_config
        if data.segment_length % model.n_height:
            near = round(data.segment_length / model.n_height) * model.n_height or model.n_height
            raise InputError(
                f"data_config.segment_length {data.segment_length} is not a multiple of "
                f"waveflow_config.n_height {model.n_height}; the nearest that is: {near}"
            )
        if model.n_height > data.hop_length:
            raise InputError(
                f"waveflow_config.n_height {model.n_height} is more than data_config.hop_length {data.hop_length}; a "
                "column of the squeezed audio may be as long as a frame at most"
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
        context = self.train_config.crop_context
        if context % model.n_height or context >= data.segment_length or (context and not model.linear_prediction):
            raise InputError(
                f"train_config.crop_context {context}: expected a multiple of waveflow_config.n_height "
                f"{model.n_height} below data_config.segment_length {data.segment_length}, and a "
                "waveflow_config.linear_prediction that makes use of it; or 0"
            )
        if model.linear_prediction >= data.filter_length:
            raise InputError(
                f"waveflow_config.linear_prediction {model.linear_prediction}: expected less than "
                f"data_config.filter_length {data.filter_length}"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Folder of the run's files."""
        return Path(self.train_config.output_directory) / self.waveflow_config.model_name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment file, apply `section.key=value` overrides (value in JSON, else text).

    Raises InputError naming the file and key.
    """
    try:
        sections = json.loads(read_text(path, MAX_BYTES), object_pairs_hook=_distinct)
    except FileNotFoundError:
        raise InputError(f"config {path}: no such file; the shipped ones are in configs/") from None
    except (OSError, RefusedFile) as error:
        raise InputError(f"config {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except RecursionError:
        raise InputError(f"config {path}: nested too deeply to be a config") from None
    except InputError as error:
        raise InputError(f"config {path}: {error}") from None
    except ValueError as error:
        raise InputError(f"config {path}: not valid JSON ({error})") from None
    if not isinstance(sections, dict):
        raise InputError(f"config {path}: expected an object with the sections {', '.join(Config.model_fields)}")
    for override in overrides:
        _apply_override(sections, override)
    try:
        return _located(config_from_dict(sections), Path(path).parent)
    except InputError as error:
        raise InputError(f"config {path}: {error}") from None


def _located(config: Config, folder: Path) -> Config:
    """The config with lists that are not in the current folder taken from its own, if they are there."""

    def locate(name: str) -> str:
        beside = str(folder / name)
        return beside if not os.path.exists(name) and os.path.exists(beside) else name

    data = config.data_config
    several = tuple(map(locate, data.test_lists))
    lists = {
        "training_files": locate(data.training_files),
        "test_files": several[0] if isinstance(data.test_files, str) else several,
    }
    return config.model_copy(update={"data_config": data.model_copy(update=lists)})


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; a key given twice is refused, where JSON itself would quietly take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        count = Counter(name for name, _ in pairs)
        twice = next(name for name in count if count[name] > 1)
        raise InputError(f"{show(twice)} is given twice; remove one of the two")
    return values


def config_from_dict(sections: dict[str, Any]) -> Config:
    """A checked Config from the four sections as plain dicts; `dist_config` may be left out."""
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    for name in sections:
        if name not in kinds:
            raise InputError(unknown_key(name, list(kinds)))
    for name in ("train_config", "data_config", "waveflow_config"):
        if name not in sections:
            raise InputError(f"section {name!r} is missing; expected {', '.join(kinds)}")
    data = sections["data_config"]
    for name in ("training_files", "test_files"):
        if isinstance(data, dict) and not data.get(name):
            raise InputError(f"data_config.{name}: missing; expected the path of a list of wav files")
    sections = _with_strides(sections)
    return Config(**{name: parse_section(kinds[name], value, f"{name}.") for name, value in sections.items()})


def _with_strides(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections with strides for the hop, if they are left out: two factors of it, as near to each other as can be.

    A prime is one stride.
    """
    data, model = sections["data_config"], sections["waveflow_config"]
    if not isinstance(data, dict) or not isinstance(model, dict) or "upsample_strides" in model:
        return sections
    hop = data.get("hop_length", DataConfig.model_fields["hop_length"].default)
    if type(hop) is not int or not 2 <= hop <= 2**16:
        return sections  # to be refused by name
    smaller = max(factor for factor in range(1, math.isqrt(hop) + 1) if hop % factor == 0)
    strides = [hop // smaller, smaller] if smaller > 1 else [hop]
    return {**sections, "waveflow_config": {**model, "upsample_strides": strides}}


def _apply_override(sections: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key):
        raise InputError(f"--set {override}: expected section.key=value, as in train_config.batch_size=4")
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except InputError as error:
        raise InputError(f"--set {show(override)}: {error}") from None
    except (ValueError, RecursionError):
        value = text
    if not isinstance(sections.setdefault(section, {}), dict):
        raise InputError(f"--set {override}: {section} is not a section")
    sections[section][key] = value


def config_with(sections: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A checked Config of the sections with `section.key=value` overrides; the sections stay as they are."""
    sections = copy.deepcopy(dict(sections))
    for override in overrides:
        _apply_override(sections, override)
    return config_from_dict(sections)


def reference_markdown() -> str:
    """The reference of all keys, made from the sections themselves: docs/config.md."""
    text = [
        "# Config reference\n",
        "JSON with the published keys in four sections; `--set section.key=value` overrides one. A key that is",
        "unknown, missing or of the wrong type is refused by name. Made by `python config.py`; a test compares.",
    ]
    for name, field in Config.model_fields.items():
        meaning = field.annotation.__doc__.partition(": ")[2]
        text.append(f"\n## {name}\n\n{meaning[0].upper()}{meaning[1:]}\n\n{reference_table(field.annotation)}")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    print(reference_markdown(), end="")
