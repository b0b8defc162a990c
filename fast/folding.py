"""Weights of `modules.Flow` as the fast rooms multiply them: what does not depend on the sound is worked out once.

For training and synthesis alike an estimator is folded first: weight norm, and the flow embedding, which becomes a
bias of the gate for each flow. Then the factors sqrt(1/2) of the residual updates go into the weights around them, the
1x1 convolution in front into the first layer, and the skip branch into the projection: their product over all layers
is R -> P and not R -> R -> P. Synthesis also adds all biases of a gate to the conditioning product as one more row, and
takes the -2 of tanh(a) = 1 - 2 sigmoid(-2a), which is several times cheaper than tanh on a CPU.

Columns are rows of a matrix here, [n, channels], so that every product is [n, in] x [in, out].
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import Estimator, EstimatorLayer, Flow, Transform

PROJECTION_MULTIPLE = 16  # columns of the projection are zero-padded to this: BLAS is slow on two columns
BIAS_ROWS = 16  # below the weights of a residual update: the bias, and zeros, since BLAS likes whole vectors


# --- an estimator, with gradients ------------------------------------------------------------------------------------


class LayerWeights(NamedTuple):
    """One `EstimatorLayer` with weight norm folded; `gate_bias` [n_flow or 1, 2R] holds the embeddings too."""

    gate: Tensor  # [2R, R, 3, 3]
    gate_bias: Tensor
    res_skip: Tensor  # [2R, R, 1, 1], first R rows residual, last R skip
    res_skip_bias: Tensor  # [2R]
    conditioning: Tensor  # [2R, M, 1, 1]
    conditioning_bias: Tensor  # [2R]

    def bias_of(self, flow: int) -> Tensor:
        """Bias [2R] of the gate's convolution for a flow."""
        return self.gate_bias[flow % len(self.gate_bias)]


class EstimatorWeights(NamedTuple):
    """An `Estimator` with weight norm folded."""

    front: tuple[Tensor, Tensor]  # [R, 1, 1, 1], [R]
    layers: list[LayerWeights]
    dilations: list[tuple[int, int]]  # (height, width)
    residual_scale: float  # where there are no gates

    def to(self, dtype: torch.dtype) -> "EstimatorWeights":
        """Copy in another precision."""
        front = (self.front[0].to(dtype), self.front[1].to(dtype))
        layers = [LayerWeights(*(tensor.to(dtype) for tensor in layer)) for layer in self.layers]
        return self._replace(front=front, layers=layers)


def fold_estimators(flows: Sequence[Flow]) -> dict[Estimator, EstimatorWeights]:
    """The estimators of some flows, each folded once whoever shares it."""
    embeddings = None if flows[0].embedding is None else torch.stack([flow.embedding for flow in flows])
    return {estimator: _fold_estimator(estimator, embeddings) for estimator in {flow.estimator: 0 for flow in flows}}


def _fold_estimator(estimator: Estimator, embeddings: Tensor | None) -> EstimatorWeights:
    front = estimator.front_conv
    return EstimatorWeights(
        front=(front.weight(), front.bias),
        layers=[_fold_layer(layer, embeddings) for layer in estimator.layers],
        dilations=[layer.dilation for layer in estimator.layers],
        residual_scale=estimator.layers[0].residual_scale,
    )


def _fold_layer(layer: EstimatorLayer, embeddings: Tensor | None) -> LayerWeights:
    gate_bias = layer.gate_conv.bias.unsqueeze(0)
    if layer.embed_conv is not None:
        weight = layer.embed_conv.weight().flatten(1)
        gate_bias = gate_bias + F.linear(embeddings, weight, layer.embed_conv.bias)  # [n_flow, 2R]
    return LayerWeights(
        gate=layer.gate_conv.weight().contiguous(memory_format=torch.channels_last),
        gate_bias=gate_bias,
        res_skip=layer.res_skip_conv.weight(),
        res_skip_bias=layer.res_skip_conv.bias,
        conditioning=layer.cond_conv.weight(),
        conditioning_bias=layer.cond_conv.bias,
    )


# --- synthesis: what a flow becomes -----------------------------------------------------------------------------------


class FoldedLayer(NamedTuple):
    """One gated layer. The first R gate outputs are the tanh branch, times -2."""

    dilation: tuple[int, int]  # (height, width)
    gate: Tensor | None  # of the 3x3 convolution, as the engine arranged it; None for layer 0, see FoldedFlow.entry
    conditioning: Tensor  # [M + 1, 2R]; the last row is the sum of all biases
    skip: Tensor  # [R, P]
    residual: Tensor | None  # [R + BIAS_ROWS, R]; None for the last layer, where nothing follows


@dataclass(frozen=True)
class FoldedFlow:
    """One flow."""

    permutation: Tensor  # [h], source row of each row
    order: tuple[int, ...]  # of the conditioning's rows, as the estimator's rows see them
    untouched: int  # rows on top that pass as they are: 0, or 1 where the permutation comes after the coupling
    transform: Transform
    n_params: int  # columns of the projection, before they are padded to P
    front: Tensor  # [2, R]: of x, and of the mask of columns that belong to a clip
    entry: Tensor  # [18, 2R]: layer 0 applied straight to nine taps of x and nine of the mask
    layers: list[FoldedLayer]
    offset: Tensor  # [P], what the projection gives when every gate is shut; not in half precision


# --- algebra that training shares (winograd.py), with gradients ---------------------------------------------------


def rows_seen(flow: Flow) -> tuple[int, ...]:
    """Rows of the conditioning that the estimator's rows see."""
    return flow.order[1:] if flow.couples_first else flow.order


def shrinkage(flow: Flow) -> list[float]:
    """Divisors of H_l, the hidden state of each layer: without gates sqrt(1/2)^l, so that its update is a plain sum."""
    layers = flow.estimator.layers
    scale = layers[0].residual_scale if flow.gates is None else 1.0
    return [scale**layer for layer in range(len(layers))]


def fold_front(front: tuple[Tensor, Tensor], taps: Tensor) -> tuple[Tensor, Tensor]:
    """The 1x1 convolution in front as [2, R]: of x, and of the mask of columns that belong to a clip; and layer 0,
    whose taps are [3, 3, R, 2R], applied straight to nine taps of x and nine of the mask: [18, 2R]."""
    both = torch.stack([front[0].flatten(), front[1]])
    return both, torch.einsum("pr,hwro->phwo", both, taps).flatten(0, 2)


def fold_projection(transform: Transform) -> tuple[Tensor, Tensor]:
    """Weight [P, R] and bias [P] of the projection, P padded."""
    project, offset = transform.fold()
    n_padding = params_padded(transform) - len(offset)
    return F.pad(project.flatten(1), (0, 0, 0, n_padding)), F.pad(offset, (0, n_padding))


def params_padded(transform: Transform) -> int:
    """Columns P of the projection as products take it."""
    return -(-transform.n_params // PROJECTION_MULTIPLE) * PROJECTION_MULTIPLE


def fold_skip(project: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """A layer's skip branch and the projection in one: [R, P], and what it adds to the bias [P]."""
    skip, bias = (tensor.chunk(2)[1] for tensor in (weights.res_skip.flatten(1), weights.res_skip_bias))
    return (project @ skip).t(), project @ bias


def fold_residual(weights: LayerWeights, shrink: float, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight [R, R] and bias [R] of a residual update, times the flow's gate [R] or for the shrunk hidden state."""
    weight, bias = (tensor.chunk(2)[0] for tensor in (weights.res_skip.flatten(1), weights.res_skip_bias))
    factor = torch.full_like(bias, 1 / shrink) if gate is None else gate
    return (weight * factor.unsqueeze(1)).t(), bias * factor


# --- synthesis ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_flows(flows: Sequence[Flow], dtype: torch.dtype, arrange: Callable[[Tensor], Tensor]) -> list[FoldedFlow]:
    """The flows of a model, sharing nothing with it.

    arrange lays out the taps [3, 3, R, 2R] of a 3x3 convolution, height (oldest row first) by width; those of a shared
    estimator are arranged once.
    """
    folded, gates = fold_estimators(flows), {}
    for estimator, weights in folded.items():
        shrinks = shrinkage(flows[0])
        gates[estimator] = [
            arrange(_gate_taps(layer, shrink)).to(dtype) if index else None
            for index, (layer, shrink) in enumerate(zip(weights.layers, shrinks, strict=True))
        ]
    return [_fold_flow(flow, folded[flow.estimator], gates[flow.estimator], dtype) for flow in flows]


def _fold_flow(
    flow: Flow, estimator: EstimatorWeights, gates: Sequence[Tensor | None], dtype: torch.dtype
) -> FoldedFlow:
    project, offset = fold_projection(flow.transform)
    shrinks = shrinkage(flow)
    layers = []
    for index, weights in enumerate(estimator.layers):
        skip, skip_offset = fold_skip(project, weights)
        offset = offset + skip_offset
        residual = None
        if index < len(estimator.layers) - 1:
            gate = None if flow.gates is None else flow.gates[index]
            weight, bias = fold_residual(weights, shrinks[index], gate)
            residual = torch.cat([weight, F.pad(bias.unsqueeze(0), (0, 0, 0, BIAS_ROWS - 1))]).to(dtype)
        layers.append(
            FoldedLayer(
                dilation=estimator.dilations[index],
                gate=gates[index],
                conditioning=_fold_conditioning(weights, flow.index).to(dtype),
                skip=skip.contiguous().to(dtype),
                residual=residual,
            )
        )
    front, entry = fold_front(estimator.front, _gate_taps(estimator.layers[0], 1.0))
    return FoldedFlow(
        permutation=torch.tensor(flow.permutation, device=project.device),
        order=rows_seen(flow),
        untouched=int(flow.couples_first),
        transform=copy.deepcopy(flow.transform),
        n_params=flow.transform.n_params,
        front=front.to(dtype),
        entry=entry.to(dtype),
        layers=layers,
        offset=offset,
    )


def _gate_taps(weights: LayerWeights, shrink: float) -> Tensor:
    return _scaled(weights.gate.permute(2, 3, 1, 0) * shrink)  # [3, 3, R, 2R]


def _scaled(gate: Tensor) -> Tensor:
    """[..., 2R] with the tanh half times -2."""
    filters, gates = gate.chunk(2, dim=-1)
    return torch.cat([-2 * filters, gates], dim=-1)


def _fold_conditioning(weights: LayerWeights, flow: int) -> Tensor:
    bias = weights.conditioning_bias + weights.bias_of(flow)
    return _scaled(torch.cat([weights.conditioning.flatten(1).t(), bias.unsqueeze(0)]))
