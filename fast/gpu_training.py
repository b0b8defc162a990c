"""Twin of `EstimatorLayer.forward` in training on an accelerator: one kernel forward, three and some products backward.

A layer as PyTorch runs it is bound by memory: between its two convolutions the gate's inputs, its output and the
skip branch go out and come back. Here a layer reads its input and writes the next one; skip branch and projection are
merged, as in `folding.py`, into P parameters that are added up in float32. Nothing is kept for the backward pass but
the inputs of the layers: the gate is computed again. `estimators.py` says when it is used.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.folding import (
    EstimatorWeights,
    fold_projection,
    fold_residual,
    fold_skip,
    params_padded,
    rows_seen,
    shrinkage,
)
from modules import Estimator, Flow, permute_rows

try:
    from triton.runtime.errors import OutOfResources

    from fast import gpu_training_kernel as kernels
except ImportError:  # no Triton
    kernels, OutOfResources = None, MemoryError

CONDITIONING_BLOCK = 32  # the conditioning's channels are padded to a multiple of this
CHANNELS = (16, 32, 64, 128)  # that the kernels' blocks hold
MAX_PARAMS = 64
BLOCK_R, BLOCK_O = 32, 128  # outputs of the residual and of the taps' gradient at a time
PARTS = 32  # sums of rows that the gradients of the taps are added up from, in the same order always


class Tile(NamedTuple):
    """Sizes of the kernels' products."""

    block_n: int = 64  # columns
    block_k: int = 64  # depth, at most
    warps: int = 8
    stages: int = 3


class Layer(NamedTuple):
    """The weights of a gated layer; residual and its bias are None for the last layer."""

    taps: Tensor  # [9, R, 2R], oldest row first, then left to right
    conditioning: Tensor  # [M', 2R]
    bias: Tensor  # [2R], of the gate: all of them added up
    residual: Tensor | None  # [R, R]
    residual_bias: Tensor | None  # [R]
    skip: Tensor  # [R, P]


def padded(n_conditioning: int) -> int:
    """Channels of the conditioning as the kernels take them."""
    return -(-n_conditioning // CONDITIONING_BLOCK) * CONDITIONING_BLOCK


def can_fuse(n_res: int, n_params: int) -> bool:
    """Tell whether the kernels take a layer of so many channels and, padded, parameters."""
    return kernels is not None and n_res in CHANNELS and n_params <= MAX_PARAMS


@cache
@torch.inference_mode(False)  # whoever asks first
@torch.enable_grad()
def fits(device: torch.device, dtype: torch.dtype, n_res: int, n_params: int, n_conditioning: int) -> bool:
    """Tell whether a device has the registers and the shared memory for the kernels, by one layer of a few columns.

    Chips of data centres have; others hold some 100 KB for a block, less than layers of 128 channels take. What is
    compiled for it is what training needs anyway.
    """

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device, requires_grad=True)

    layer = Layer(
        taps=zeros(9, n_res, 2 * n_res),
        conditioning=zeros(n_conditioning, 2 * n_res),
        bias=zeros(2 * n_res, of=torch.float32),
        residual=zeros(n_res, n_res),
        residual_bias=zeros(n_res, of=torch.float32),
        skip=zeros(n_res, n_params),
    )
    values = zeros(1, 1, 1, n_res), zeros(1, 1, 1, n_params, of=torch.float32), zeros(1, 1, 1, n_conditioning)
    try:
        after, total = FusedLayer.apply((1, 1), *values, *layer)
        (after.sum() + total.sum()).backward()
    except OutOfResources:
        return False
    return True


class FusedLayer(torch.autograd.Function):
    """hidden [B, h, W, R], params [B, h, W, P] in float32, conditioning [B, h, W, M'], a `Layer` -> the next two."""

    @staticmethod
    def forward(
        ctx: Any, dilation: tuple[int, int], hidden: Tensor, params: Tensor, conditioning: Tensor, *weights: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        layer, launch = Layer(*weights), _Launch(dilation, hidden, conditioning, params.size(3))
        after = None if layer.residual is None else torch.empty_like(hidden)
        total = torch.empty_like(params)
        launch.forward(layer, (hidden, params, conditioning), after, total)
        ctx.save_for_backward(hidden, conditioning, *weights)
        ctx.dilation = dilation
        return after, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_after: Tensor | None, grad_params: Tensor) -> tuple[Tensor | None, ...]:
        hidden, conditioning, *weights = ctx.saved_tensors
        layer, grad_params = Layer(*weights), grad_params.contiguous()
        if layer.residual is not None:
            grad_after = torch.zeros_like(hidden) if grad_after is None else grad_after.contiguous()
        launch = _Launch(ctx.dilation, hidden, conditioning, grad_params.size(3))
        with torch.autocast(hidden.device.type, enabled=False):
            gated, grad_both = launch.gate_backward(layer, (hidden, conditioning), grad_after, grad_params)
            grad_hidden = launch.hidden_backward(layer, grad_both, grad_after)
            grad_layer = _weights_backward(launch, layer, (hidden, conditioning, gated), grad_both, grad_after)
            grad_layer = grad_layer._replace(skip=_product(gated, grad_params.to(gated.dtype)).to(layer.skip.dtype))
            grad_conditioning = grad_both @ layer.conditioning.t()
        return None, grad_hidden, grad_params, grad_conditioning, *grad_layer


def _product(x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient [in, out] of weights, from all positions."""
    return x.flatten(0, 2).t() @ gradient.flatten(0, 2)


def _weights_backward(
    launch: "_Launch", layer: Layer, values: Sequence[Tensor], grad_both: Tensor, grad_after: Tensor | None
) -> Layer:
    """Gradients of all weights but the skip branch's; values: hidden, conditioning, gated."""
    hidden, conditioning, gated = values
    residual = residual_bias = None
    if layer.residual is not None:
        residual, residual_bias = _product(gated, grad_after), grad_after.sum((0, 1, 2), dtype=torch.float32)
        residual_bias = residual_bias.to(layer.residual_bias.dtype)
    return Layer(
        taps=launch.taps_backward(hidden, grad_both).to(layer.taps.dtype),
        conditioning=_product(conditioning, grad_both),
        bias=grad_both.sum((0, 1, 2), dtype=torch.float32).to(layer.bias.dtype),
        residual=residual,
        residual_bias=residual_bias,
        skip=layer.skip,
    )


class _Launch:
    """The kernels for tensors of one shape."""

    def __init__(
        self, dilation: tuple[int, int], hidden: Tensor, conditioning: Tensor, n_params: int, tile: Tile | None = None
    ) -> None:
        n_clips, self.height, self.width, self.n_res = hidden.shape
        self.lines, self.n_params, self.n_conditioning = n_clips * self.height, n_params, conditioning.size(3)
        self.tile, self.place = tile or Tile(), (self.height, self.width, *dilation)
        precision = "tf32x3" if hidden.dtype is torch.float32 else "tf32"
        self.options = {"n_res": self.n_res, "precision": precision}
        self.options |= {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        self.grid = (-(-self.width // self.tile.block_n), self.lines)
        self.block_k = min(self.tile.block_k, self.n_res)

    def _whole(self, last: bool) -> dict[str, Any]:
        blocks = {"block_n": self.tile.block_n, "block_k": self.block_k, "block_c": CONDITIONING_BLOCK}
        sizes = {"n_params": self.n_params, "n_conditioning": self.n_conditioning, "last": last}
        return self.options | blocks | sizes

    def _gate(self, layer: Layer) -> tuple[Tensor, ...]:
        """Weights of the gate, what is summed innermost."""
        return layer.taps.flatten(0, 1).t().contiguous(), layer.conditioning.t().contiguous(), layer.bias

    def forward(self, layer: Layer, inputs: Sequence[Tensor], after: Tensor | None, total: Tensor) -> None:
        """Write after and total, from hidden, params and conditioning."""
        last = after is None
        residual = (total, total) if last else (layer.residual.t().contiguous(), layer.residual_bias)
        kernels.forward_kernel[self.grid](
            *inputs,
            *(total if last else after, total),
            *self._gate(layer),
            *(*residual, layer.skip.t().contiguous()),
            *self.place,
            **self._whole(last),
            block_r=min(BLOCK_R, self.n_res),
        )

    def gate_backward(
        self, layer: Layer, inputs: Sequence[Tensor], grad_after: Tensor | None, grad_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output [B, h, W, R] of the gate, made again, and the gradient [B, h, W, 2R] of what it takes."""
        hidden, last = inputs[0], layer.residual is None
        gated, grad_both = torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:3], 2 * self.n_res)
        kernels.gate_backward_kernel[self.grid](
            *inputs,
            *(grad_params if last else grad_after, grad_params, gated, grad_both),
            *self._gate(layer),
            *(layer.skip if last else layer.residual.contiguous(), layer.skip.contiguous()),
            *self.place,
            **self._whole(last),
        )
        return gated, grad_both

    def hidden_backward(self, layer: Layer, grad_both: Tensor, grad_after: Tensor | None) -> Tensor:
        """Gradient [B, h, W, R] of hidden."""
        last = layer.residual is None
        grad_hidden = grad_both.new_empty(*grad_both.shape[:3], self.n_res)
        kernels.hidden_backward_kernel[self.grid](
            *(grad_both, grad_both if last else grad_after, grad_hidden, layer.taps.contiguous()),
            *self.place,
            **self.options,
            last=last,
            block_n=self.tile.block_n,
            block_k=self.block_k,
        )
        return grad_hidden

    def taps_backward(self, hidden: Tensor, grad_both: Tensor) -> Tensor:
        """Gradient [9, R, 2R] of the taps, in float32."""
        parts, block_o = min(PARTS, self.lines), min(BLOCK_O, 2 * self.n_res)
        partial = torch.empty(parts, 9, self.n_res, 2 * self.n_res, dtype=torch.float32, device=hidden.device)
        kernels.taps_backward_kernel[9, 2 * self.n_res // block_o, parts](
            *(hidden, grad_both, partial),
            *(self.lines, *self.place),
            **self.options,
            block_o=block_o,
            block_k=self.block_k,
        )
        return partial.sum(0)


# --- an estimator -------------------------------------------------------------------------------------------------


def product_dtype(x: Tensor) -> torch.dtype:
    """Precision of products with x: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class FusedEstimator:
    """Twin of `Estimator.forward` and the projection for one pass, by fused layers in a precision.

    conditioning [B, M, h, W] in the row order of the audio.
    """

    keeps = True  # what `prepare` gives

    @staticmethod
    def suits(flow: Flow, conditioning: Tensor, _compiles: bool) -> bool:
        """Choose it on CUDA in half precision, where layers are bound by memory; float32's three products are not."""
        dtype = product_dtype(conditioning)
        if not conditioning.is_cuda or dtype not in (torch.float16, torch.bfloat16):
            return False
        n_res, n_params = flow.estimator.front_conv.bias.numel(), params_padded(flow.transform)
        n_conditioning = padded(conditioning.size(1))
        return can_fuse(n_res, n_params) and fits(conditioning.device, dtype, n_res, n_params, n_conditioning)

    @classmethod
    def bind(
        cls, folded: Mapping[Estimator, EstimatorWeights], flows: Sequence[Flow], conditioning: Tensor
    ) -> "dict[Estimator, FusedEstimator]":
        """The estimators of a pass over some flows."""
        shrinks, dtype = shrinkage(flows[0]), product_dtype(conditioning)
        return {key: cls(weights, conditioning, shrinks, dtype) for key, weights in folded.items()}

    def __init__(
        self, weights: EstimatorWeights, conditioning: Tensor, shrinks: list[float], dtype: torch.dtype
    ) -> None:
        self.weights, self.shrinks, self.dtype, self._rows = weights, shrinks, dtype, {}
        n_padding = padded(conditioning.size(1)) - conditioning.size(1)
        self.conditioning = F.pad(conditioning.to(dtype), (0, 0, 0, 0, 0, n_padding))
        self.layers = [
            (
                (layer.gate.permute(2, 3, 1, 0).flatten(0, 1) * shrink).to(dtype).contiguous(),
                F.pad(layer.conditioning.flatten(1).t(), (0, 0, 0, n_padding)).to(dtype),
            )
            for layer, shrink in zip(weights.layers, shrinks, strict=True)
        ]

    def prepare(self, order: tuple[int, ...]) -> Tensor:
        """Conditioning [B, h, W, M'] for a flow with this row order; the few that occur are kept."""
        if order not in self._rows:
            self._rows[order] = permute_rows(self.conditioning, order).permute(0, 2, 3, 1).contiguous()
        return self._rows[order]

    def params(self, flow: Flow, x: Tensor) -> Tensor:
        """Parameters [B, P, h, W] of the flow's transform in the precision of x, from x [B, 1, h, W]."""
        with torch.autocast(x.device.type, enabled=False):
            return self._params(flow, x, self.prepare(rows_seen(flow)))

    def _params(self, flow: Flow, x: Tensor, conditioning: Tensor) -> Tensor:
        project, offset = fold_projection(flow.transform)
        front, front_bias = (tensor.flatten() for tensor in self.weights.front)
        hidden = (x.permute(0, 2, 3, 1) * front + front_bias).to(self.dtype)  # [B, h, W, R]
        params = torch.zeros(*hidden.shape[:3], len(project), dtype=torch.float32, device=x.device)
        for index, weights in enumerate(self.weights.layers):
            skip, skip_offset = fold_skip(project, weights)
            offset = offset + skip_offset
            layer = self._layer(index, flow, skip)
            hidden, params = FusedLayer.apply(self.weights.dilations[index], hidden, params, conditioning, *layer)
        return (params + offset)[..., : flow.transform.n_params].permute(0, 3, 1, 2).to(x.dtype)

    def _layer(self, index: int, flow: Flow, skip: Tensor) -> Layer:
        weights, residual = self.weights.layers[index], (None, None)
        if index < len(self.weights.layers) - 1:
            weight, bias = fold_residual(
                weights, self.shrinks[index], None if flow.gates is None else flow.gates[index]
            )
            residual = (weight.to(self.dtype), bias)
        bias = weights.conditioning_bias + weights.bias_of(flow.index)
        return Layer(*self.layers[index], bias, *residual, skip.to(self.dtype))
