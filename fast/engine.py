"""Twin of `FlowVocoder.reverse`: an engine built once from a model, which it leaves alone.

It checks what comes in and hands it to one of two back ends: `cpu.py`, or `gpu.py` for an accelerator.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from config import WaveFlowConfig
from fast.cpu import CpuEngine
from fast.cpu_queues import ConvQueue
from fast.gpu import GraphEngine
from harness.devices import exact_convolutions, fast_bfloat16
from harness.errors import InputError, show
from linear_prediction import LinearPrediction
from modules import CONTEXT_FRAMES, Flow, Upsampler

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Invertible(Protocol):
    """The side of a `FlowVocoder` that synthesis needs."""

    config: WaveFlowConfig
    upsampler: Upsampler
    linear_prediction: LinearPrediction | None

    def flows(self) -> list[Flow]:
        """Flows in the order of the likelihood."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights, on the device of the synthesis."""

    def buffers(self) -> Iterator[Tensor]:
        """Tensors beside the weights on which results depend."""


def check_precision(precision: str | None) -> None:
    """InputError where products in such a precision are not known; None is that of the model."""
    if precision is not None and not (isinstance(precision, str) and precision in PRECISIONS):
        raise InputError(f"precision {show(precision)}: expected one of {', '.join(PRECISIONS)}")


def slow_precision_warning(precision: str | None, device: torch.device) -> str | None:
    """One line where products in this precision would take longer than in float32, or None.

    Without hardware for them PyTorch multiplies half-precision matrices on a CPU some hundred times slower.
    """
    if device.type != "cpu" or precision not in ("bfloat16", "float16"):
        return None
    if fast_bfloat16() if precision == "bfloat16" else torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return None
    return f"this CPU has no {precision} products; synthesizing in float32, which is faster here"


class ReceptiveField(NamedTuple):
    """Reach of synthesis, in audio samples."""

    per_flow: int  # to each side, through all rows of a flow
    total: int  # to each side, through all flows
    mel_frames: int  # of the mel beyond that, in frames


def receptive_field(config: WaveFlowConfig) -> ReceptiveField:
    """Reach of a sample; `total` samples is also the exact latency of streaming.

    A row looks 2^L - 1 columns beyond the row above it, a column is h samples.
    """
    columns = (2**config.n_layer - 1) * (config.n_height - 1)
    per_flow = columns * config.n_height
    return ReceptiveField(per_flow, per_flow * config.n_flow, CONTEXT_FRAMES)


class SynthesisEngine:
    """The inverse of a flow vocoder; every height, dilation cycle, variant and transform.

    precision: "float32", "bfloat16", "float16" or "float64" for the products; by default the model's own. Noise,
    audio and the parameters of the transforms are never below float32. Where half precision would be slower than
    float32 it is float32 (`slow_precision_warning`), unless `even_if_slow`. queue and tile are those of `CpuEngine`.
    Later changes to the model are not seen.
    """

    def __init__(
        self,
        model: Invertible,
        precision: str | None = None,
        tile: int | None = None,
        even_if_slow: bool = False,
        queue: type[ConvQueue] | None = None,
    ) -> None:
        check_precision(precision)
        parameter = next(model.parameters())
        if slow_precision_warning(precision, parameter.device) and not even_if_slow:
            precision = "float32"
        self.config = model.config
        self.dtype = parameter.dtype if precision is None else PRECISIONS[precision]
        upsampler = copy.deepcopy(model.upsampler).requires_grad_(False)
        self.linear_prediction = copy.deepcopy(model.linear_prediction)
        if parameter.is_cuda:
            self.back_end = GraphEngine(model.flows(), upsampler, self.dtype)
        else:
            self.back_end = CpuEngine(model.flows(), upsampler, self.dtype, tile, queue)

    def __call__(self, mel: Tensor, z: Tensor) -> Tensor:
        """mel [B, M, F], noise z [B, 1, h, W] -> audio [B, h*W]."""
        if mel.dim() != 3 or z.dim() != 4 or len(mel) != len(z):
            raise InputError(
                f"mel {list(mel.shape)} and z {list(z.shape)}: expected [batch, bands, frames] and "
                "[batch, 1, height, columns]"
            )
        return torch.stack(self.synthesize_many([(m, noise[0]) for m, noise in zip(mel, z, strict=True)]))

    @property
    def choices(self) -> dict[str, str]:
        """Choices of the back end so far, such as kernels by their speed, for a run's record."""
        return self.back_end.choices

    @torch.inference_mode(False)  # what is kept for the next call can be written in any mode
    @torch.no_grad()
    @exact_convolutions()
    def synthesize_many(self, clips: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """(mel [M, F], noise z [h, W]) of any lengths -> audio [h*W] of each, as if it were alone."""
        if not clips:
            raise InputError("no clips to synthesize; give at least one mel and its noise")
        for mel, z in clips:
            self._check(mel, z)
        sounds = self.back_end.synthesize_many(clips)
        if self.linear_prediction is None:
            return sounds
        return [
            self.linear_prediction.inverse(e[None], mel[None])[0] for e, (mel, _) in zip(sounds, clips, strict=True)
        ]

    def _check(self, mel: Tensor, z: Tensor) -> None:
        config = self.config
        if mel.dim() != 2 or mel.size(0) != config.cin_channels:
            raise InputError(f"mel of shape {list(mel.shape)}: expected [{config.cin_channels}, frames]")
        if z.dim() != 2 or z.size(0) != config.n_height or not z.size(1):
            raise InputError(f"z of shape {list(z.shape)}: expected [{config.n_height}, columns]")
        covered = mel.size(1) * config.hop_length
        if covered < z.numel():
            raise InputError(f"a mel of {mel.size(1)} frames covers {covered} samples, but z has {z.numel()}")


# --- a model's own engine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """An engine, and the weights it was made from as they were then."""

    engine: SynthesisEngine
    weights: list[Tensor]  # held, so that no other takes the place of one in memory
    versions: list[tuple[int, int]]

    def is_of(self, weights: list[Tensor]) -> bool:
        """Tell whether these are the same weights, unchanged."""
        same = len(weights) == len(self.weights) and all(map(lambda a, b: a is b, weights, self.weights))
        return same and _versions(weights) == self.versions


_kept: WeakKeyDictionary[Invertible, _Kept] = WeakKeyDictionary()  # beside the models, which stay as they are


def engine_of(model: Invertible) -> SynthesisEngine:
    """Engine of a model in its own precision, kept until a weight changes and dropped with the model.

    PyTorch counts the changes of a tensor; not those through its `.data`, which are not seen. It does not count those
    of weights made in inference mode: their engine is made for each call.
    """
    _count_fused_steps()
    weights = [*model.parameters(), *model.buffers()]
    if any(weight.is_inference() for weight in weights):
        return SynthesisEngine(model)
    kept = _kept.get(model)
    if kept is None or not kept.is_of(weights):
        with torch.inference_mode(False):
            kept = _Kept(SynthesisEngine(model), weights, _versions(weights))
        _kept[model] = kept
    return kept.engine


@cache
def _count_fused_steps() -> None:
    """Count what fused optimizers change, as PyTorch does not, from now on in this process."""
    register_optimizer_step_post_hook(_count_fused_step)


def _count_fused_step(optimizer: torch.optim.Optimizer, _args: Any, _options: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


def _versions(weights: list[Tensor]) -> list[tuple[int, int]]:
    return [(weight.data_ptr(), weight._version) for weight in weights]
