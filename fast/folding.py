"""The weights of a flow as synthesis multiplies them: every constant of the inverse is worked out once.

Columns are rows of a matrix here, [n, channels], so that every product is [n, in] x [in, out]. What is folded:
weight norm; the flow embedding and every bias of a gate, which become one row of the conditioning product; the
factors sqrt(1/2) of the residual updates, into the weights around them; the 1x1 convolution in front, into the
first layer; the skip branch and the projection, whose product over all layers is R -> P and not R -> R -> P; and
the -2 of tanh(a) = 1 - 2 sigmoid(-2a), which is several times cheaper than tanh on a CPU.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import SQRT_HALF, Affine, Spline

if TYPE_CHECKING:
    from fast.estimators import LayerWeights
    from model import Flow, FlowVocoder

PROJECTION_MULTIPLE = 16  # columns of the projection are zero-padded to this: BLAS is slow on two columns
BIAS_ROWS = 16  # below the weights of a residual update: the bias, and zeros, since BLAS likes whole vectors


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
    order: tuple[int, ...]  # of the rows of its conditioning
    transform: Affine | Spline
    n_params: int  # columns of the projection, before they are padded to P
    front: Tensor  # [2, R]: of x, and of the mask of columns that belong to a clip
    entry: Tensor  # [18, 2R]: layer 0 applied straight to nine taps of x and nine of the mask
    layers: list[FoldedLayer]
    offset: Tensor  # [P], what the projection gives when every gate is shut; not in half precision


# --- algebra that training shares (winograd.py), with gradients ---------------------------------------------------


def shrinkage(n_layer: int, has_gates: bool) -> list[float]:
    """By what H_l is divided, the hidden state of each layer: without gates by sqrt(1/2)^l, so that its update is a
    plain sum."""
    return [1.0 if has_gates else SQRT_HALF**layer for layer in range(n_layer)]


def fold_front(front: tuple[Tensor, Tensor], taps: Tensor) -> tuple[Tensor, Tensor]:
    """The 1x1 convolution in front as [2, R]: of x, and of the mask of columns that belong to a clip; and layer 0,
    whose taps are [3, 3, R, 2R], applied straight to nine taps of x and nine of the mask: [18, 2R]."""
    both = torch.stack([front[0].flatten(), front[1]])
    return both, torch.einsum("pr,hwro->phwo", both, taps).flatten(0, 2)


def fold_projection(transform: Affine | Spline) -> tuple[Tensor, Tensor]:
    """Weight [P, R] and bias [P] of the projection, P padded."""
    project, offset = transform.fold()
    n_padding = -len(offset) % PROJECTION_MULTIPLE
    return F.pad(project.flatten(1), (0, 0, 0, n_padding)), F.pad(offset, (0, n_padding))


def fold_skip(project: Tensor, weights: "LayerWeights") -> tuple[Tensor, Tensor]:
    """A layer's skip branch and the projection in one: [R, P], and what it adds to the bias [P]."""
    skip, bias = (tensor.chunk(2)[1] for tensor in (weights.res_skip.flatten(1), weights.res_skip_bias))
    return (project @ skip).t(), project @ bias


def fold_residual(weights: "LayerWeights", shrink: float, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight [R, R] and bias [R] of a residual update, times the flow's gate [R] or for the shrunk hidden state."""
    weight, bias = (tensor.chunk(2)[0] for tensor in (weights.res_skip.flatten(1), weights.res_skip_bias))
    factor = torch.full_like(bias, 1 / shrink) if gate is None else gate
    return (weight * factor.unsqueeze(1)).t(), bias * factor


# --- synthesis ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_flows(model: "FlowVocoder", dtype: torch.dtype, arrange: Callable[[Tensor], Tensor]) -> list[FoldedFlow]:
    """The flows of a model in likelihood order, sharing nothing with it.

    arrange lays out the taps [3, 3, R, 2R] of a 3x3 convolution, height (oldest row first) by width.
    """
    flows = list(model.flows(next(model.parameters()).new_empty(0)))  # no conditioning: only weights are read
    arranged = {}

    def gate_of(weights: "LayerWeights", shrink: float) -> Tensor:
        if id(weights) not in arranged:  # a shared estimator is arranged once
            arranged[id(weights)] = arrange(_gate_taps(weights, shrink)).to(dtype)
        return arranged[id(weights)]

    return [_fold_flow(flow, dtype, gate_of) for flow in flows]


def _fold_flow(flow: "Flow", dtype: torch.dtype, gate_of: Callable[["LayerWeights", float], Tensor]) -> FoldedFlow:
    estimator = flow.estimator
    project, offset = fold_projection(flow.transform)
    shrinks = shrinkage(len(estimator.weights), flow.gates is not None)
    layers = []
    for index, (weights, dilation) in enumerate(zip(estimator.weights, estimator.dilations, strict=True)):
        skip, skip_offset = fold_skip(project, weights)
        offset = offset + skip_offset
        residual = None
        if index < len(estimator.weights) - 1:
            gate = None if flow.gates is None else flow.gates[index]
            weight, bias = fold_residual(weights, shrinks[index], gate)
            residual = torch.cat([weight, F.pad(bias.unsqueeze(0), (0, 0, 0, BIAS_ROWS - 1))]).to(dtype)
        layers.append(
            FoldedLayer(
                dilation=dilation,
                gate=gate_of(weights, shrinks[index]) if index else None,
                conditioning=_fold_conditioning(weights, flow.index).to(dtype),
                skip=skip.contiguous().to(dtype),
                residual=residual,
            )
        )
    front, entry = fold_front(estimator.front, _gate_taps(estimator.weights[0], 1.0))
    return FoldedFlow(
        permutation=torch.tensor(flow.permutation, device=project.device),
        order=flow.order,
        transform=copy.deepcopy(flow.transform),
        n_params=flow.transform.n_params,
        front=front.to(dtype),
        entry=entry.to(dtype),
        layers=layers,
        offset=offset,
    )


def _gate_taps(weights: "LayerWeights", shrink: float) -> Tensor:
    return _scaled(weights.gate.permute(2, 3, 1, 0) * shrink)  # [3, 3, R, 2R]


def _scaled(gate: Tensor) -> Tensor:
    """[..., 2R] with the tanh half times -2."""
    filters, gates = gate.chunk(2, dim=-1)
    return torch.cat([-2 * filters, gates], dim=-1)


def _fold_conditioning(weights: "LayerWeights", flow: int) -> Tensor:
    weight, bias = weights.conditioning
    bias = bias + weights.gate_bias[flow % len(weights.gate_bias)]
    return _scaled(torch.cat([weight.flatten(1).t(), bias.unsqueeze(0)]))
