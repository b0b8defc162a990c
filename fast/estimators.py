"""Twin of `Flow.forward` for likelihoods: what the flows of a pass share is computed once, by the fastest way.

Three ways, each with the convolutions of `Estimator.forward` as their meaning: convolutions over weights that are
folded once, with channels innermost; on CPUs in full precision the products of `winograd.py`; on CUDA in half precision
the fused layers of `gpu_training.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fast.folding import (
    EstimatorWeights,
    LayerWeights,
    fold_estimators,
    fold_front,
    fold_projection,
    fold_residual,
    fold_skip,
    rows_seen,
    shrinkage,
)
from fast.gpu_training import FusedEstimator
from fast.winograd import GatedLayer, Geometry, Layer, Workspace, padding, product_weights
from modules import Estimator, Flow, Transform, permute_rows, shift_down


@dataclass(frozen=True)
class Execution:
    """Way in which a likelihood is computed; what it gives is the same."""

    plain: bool = False  # by `modules.py` itself, the reference
    compile: bool = False  # torch.compile training steps, where Winograd's products are not faster still
    checkpoint_activations: bool = False  # keep one flow's activations at a time, recomputing them for gradients
    half: torch.dtype | None = None  # of products, where they are not in full precision

    def products(self, like: Tensor) -> AbstractContextManager:
        """The context in which products on a tensor's device are of this precision, whatever thread runs them."""
        return nullcontext() if self.half is None else torch.autocast(like.device.type, dtype=self.half)


class FastFlows:
    """The flows of one pass over a batch, all with the conditioning [B, M, h, W] that they are made for."""

    def __init__(self, flows: Sequence[Flow], conditioning: Tensor, execution: Execution) -> None:
        self.execution = execution
        with torch.autocast(conditioning.device.type, enabled=False):
            folded = fold_estimators(flows)
        compiles = execution.compile and torch.is_grad_enabled()
        kind = next(kind for kind in KINDS if kind.suits(flows[0], conditioning, compiles))
        self._bound: dict[Estimator, AnyEstimator] = kind.bind(folded, flows, conditioning)

    def __call__(self, flow: Flow, x: Tensor) -> tuple[Tensor, Tensor]:
        """Twin of `flow.forward`: x [B, 1, h, W] -> z [B, 1, h, W], log|det| [B]."""
        estimator = self._bound[flow.estimator]
        if not (self.execution.checkpoint_activations and torch.is_grad_enabled()):
            return _forward(flow, x, estimator)
        if estimator.keeps:
            estimator.prepare(rows_seen(flow))  # made here, outside what is recomputed
        return checkpoint(_forward, flow, x, estimator, use_reentrant=False)


def folded_flows(flows: Sequence[Flow], conditioning: Tensor) -> list[Flow]:
    """Flows for `Flow.inverse` that compute what does not depend on the rows above once, not again for each row."""
    folded = fold_estimators(flows)
    bound = {key: ConvEstimator(weights, conditioning, keeps=True) for key, weights in folded.items()}
    return [replace(flow, estimator=_EstimatorOfFlow(flow, bound[flow.estimator])) for flow in flows]


@dataclass(frozen=True)
class _EstimatorOfFlow:
    """Twin of `Estimator` for one flow, called in the same way; what else it is given, it has."""

    flow: Flow
    bound: "ConvEstimator"

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        return self.bound.features(self.flow, x)


def _forward(flow: Flow, x: Tensor, estimator: "AnyEstimator") -> tuple[Tensor, Tensor]:
    if flow.couples_first:
        z, log_det = flow.transform(x[:, :, 1:], estimator.params(flow, x[:, :, :-1]))
        return permute_rows(torch.cat([x[:, :, :1], z], dim=2), flow.permutation), log_det.flatten(1).sum(1)
    x = permute_rows(x, flow.permutation)
    z, log_det = flow.transform(x, estimator.params(flow, shift_down(x)))
    return z, log_det.flatten(1).sum(1)


# --- by convolutions ------------------------------------------------------------------------------------------------


class ConvEstimator:
    """Twin of `Estimator.forward` and the projection for one pass, by convolutions over folded weights.

    conditioning [B, M, h, W] in the row order of the audio; keeps: what `prepare` gives, as a shared estimator does.
    Channels are innermost in memory throughout: the dilated convolutions are then matrix products at full speed on CPUs
    and in half precision on GPUs.
    """

    @staticmethod
    def suits(_flow: Flow, _conditioning: Tensor, _compiles: bool) -> bool:
        """Choose it wherever nothing else is faster."""
        return True

    @classmethod
    def bind(
        cls, folded: Mapping[Estimator, EstimatorWeights], flows: Sequence[Flow], conditioning: Tensor
    ) -> "dict[Estimator, ConvEstimator]":
        """The estimators of a pass over some flows."""
        kind, keeps = conditioning.device.type, len(folded) < len(flows)
        if torch.is_autocast_enabled(kind):  # cast here, they are not cast again for every flow
            folded = {key: weights.to(torch.get_autocast_dtype(kind)) for key, weights in folded.items()}
        return {key: cls(weights, conditioning, keeps) for key, weights in folded.items()}

    def __init__(self, weights: EstimatorWeights, conditioning: Tensor, keeps: bool) -> None:
        self.weights, self.conditioning, self.keeps = weights, conditioning, keeps
        self._products: dict[tuple[int, ...], list[Tensor]] = {}

    def params(self, flow: Flow, x: Tensor) -> Tensor:
        """Parameters [B, P, h, W] of the flow's transform, from x [B, 1, h, W] moved down by a row."""
        return project(flow.transform, self.features(flow, x))

    def features(self, flow: Flow, x: Tensor) -> Tensor:
        """Features [B, R, h', W] of the first h' rows, x [B, 1, h', W]."""
        biases = [weights.bias_of(flow.index) for weights in self.weights.layers]
        products = [product[:, :, : x.size(2)] for product in self.prepare(rows_seen(flow))]
        return self._run(x, self.weights, biases, products, flow.gates)

    def prepare(self, order: tuple[int, ...]) -> list[Tensor]:
        """Conditioning product [B, 2R, h, W] of each layer, rows in `order`; the few orders that occur are kept."""
        if order in self._products:
            return self._products[order]
        permuted = permute_rows(self.conditioning, order).contiguous(memory_format=torch.channels_last)
        products = [F.conv2d(permuted, layer.conditioning, layer.conditioning_bias) for layer in self.weights.layers]
        if self.keeps:
            self._products[order] = products
        return products

    def _run(self, *of_a_flow: Any) -> Tensor:
        return _estimate(*of_a_flow)


class CompiledEstimator(ConvEstimator):
    """The convolutions as one compiled graph, for training."""

    @staticmethod
    def suits(_flow: Flow, _conditioning: Tensor, compiles: bool) -> bool:
        """Choose it where compiling is asked for, and gradients are."""
        return compiles

    def features(self, flow: Flow, x: Tensor) -> Tensor:
        # The first flow too runs the graph that the others need.
        return super().features(flow, x if x.requires_grad else x.detach().requires_grad_())

    def _run(self, *of_a_flow: Any) -> Tensor:
        return _compiled_estimate()(*of_a_flow)


def project(transform: Transform, features: Tensor) -> Tensor:
    """Twin of `transform.project` that stays in the precision of the weights also under autocast: the likelihood adds
    up log_s of every sample, so half precision stops here."""
    weight, bias = transform.fold()
    with torch.autocast(features.device.type, enabled=False):
        return torch.ops.aten.conv2d(features.to(weight.dtype), weight, bias)  # F.conv2d is not Apex's to cast here


def _estimate(
    x: Tensor, weights: EstimatorWeights, biases: list[Tensor], products: list[Tensor], gates: Tensor | None
) -> Tensor:
    """Features [B, R, h, W]; a function of tensors, so that all flows run one compiled graph."""
    hidden = F.conv2d(x, *weights.front).contiguous(memory_format=torch.channels_last)  # [B, R, h, W]
    features = 0
    for index, (layer, bias, dilation) in enumerate(zip(weights.layers, biases, weights.dilations, strict=True)):
        gated = _gated(hidden, layer.gate, bias, products[index], dilation)
        residual, skip = _residual_and_skip(gated, layer, is_last=index == len(weights.layers) - 1)
        features = features + skip
        if residual is not None:
            hidden = _update(hidden, residual, weights.residual_scale if gates is None else gates[index].view(-1, 1, 1))
    return features


@cache
def _compiled_estimate() -> Callable[..., Tensor]:
    # Training steps have one shape, so each graph is made for its own: a shape that varies would make slower code.
    return torch.compile(_estimate, dynamic=False, fullgraph=True)


def _gated(hidden: Tensor, weight: Tensor, bias: Tensor, product: Tensor, dilation: tuple[int, int]) -> Tensor:
    dilation_h, dilation_w = dilation
    past = F.pad(hidden, (0, 0, 2 * dilation_h, 0))  # causal: rows above only
    both = F.conv2d(past, weight, bias, padding=(0, dilation_w), dilation=dilation) + product  # [B, 2R, h, W]
    filters, gates = both.chunk(2, dim=1)
    return torch.tanh(filters) * torch.sigmoid(gates)


def _residual_and_skip(gated: Tensor, weights: LayerWeights, is_last: bool) -> tuple[Tensor | None, Tensor]:
    if is_last:  # nothing follows the last residual; its half of the weights is kept for equal counts and checkpoints
        half = len(weights.res_skip_bias) // 2
        return None, F.conv2d(gated, weights.res_skip[half:], weights.res_skip_bias[half:])
    return F.conv2d(gated, weights.res_skip, weights.res_skip_bias).chunk(2, dim=1)


def _update(hidden: Tensor, residual: Tensor, gate: Tensor | float) -> Tensor:
    return (hidden + residual) * gate if isinstance(gate, float) else hidden + residual * gate


# --- the same by fewer products ------------------------------------------------------------------------------------


class WinogradEstimator:
    """Twin of `Estimator.forward` and the projection for one pass, by the layers of `winograd.py`.

    conditioning [B, M, h, W] in the row order of the audio.
    """

    keeps = True  # what `prepare` gives

    @staticmethod
    def suits(flow: Flow, conditioning: Tensor, _compiles: bool) -> bool:
        """Choose it on CPUs in full precision, whose convolutions are slower than their matrix products, but not for
        clips so short that padding would be over a fifth of the work."""
        width, device, n_layer = conditioning.size(3), conditioning.device.type, len(flow.estimator.layers)
        return device == "cpu" and not torch.is_autocast_enabled(device) and 4 * padding(width, n_layer) <= width

    @classmethod
    def bind(
        cls, folded: Mapping[Estimator, EstimatorWeights], flows: Sequence[Flow], conditioning: Tensor
    ) -> "dict[Estimator, WinogradEstimator]":
        """The estimators of a pass over some flows, which work in the same memory one after the other."""
        workspace, shrinks = Workspace(), shrinkage(flows[0])
        return {key: cls(weights, conditioning, shrinks, workspace) for key, weights in folded.items()}

    def __init__(
        self, weights: EstimatorWeights, conditioning: Tensor, shrinks: list[float], workspace: Workspace
    ) -> None:
        self.weights, self.conditioning, self.workspace = weights, conditioning, workspace
        self.shrinks, layers = shrinks, weights.layers
        taps = [layer.gate.permute(2, 3, 1, 0) * shrink for layer, shrink in zip(layers, self.shrinks, strict=True)]
        self.front, self.entry = fold_front(weights.front, taps[0])
        self.products = [None, *(product_weights(tap) for tap in taps[1:])]

    def prepare(self, order: tuple[int, ...]) -> Tensor:
        """Conditioning for a flow with this row order, as `Workspace.rows` gives it."""
        return self.workspace.rows(self.conditioning, order, len(self.weights.layers))

    def params(self, flow: Flow, x: Tensor) -> Tensor:
        """Parameters [B, P, h, W] of the flow's transform, as `ConvEstimator.params`."""
        conditioning, width = self.prepare(rows_seen(flow)), x.size(3)
        project, offset = fold_projection(flow.transform)
        hidden, params = None, x.new_zeros(*conditioning.shape[:3], len(project))
        for index, weights in enumerate(self.weights.layers):
            skip, skip_offset = fold_skip(project, weights)
            offset = offset + skip_offset
            layer = self._layer(index, flow, skip)
            if index == 0:
                hidden, params = self._enter(x, conditioning, params, layer)
            else:
                geometry = Geometry(self.weights.dilations[index], width, self.workspace)
                hidden, params = GatedLayer.apply(geometry, hidden, params, conditioning, *layer)
        return (params + offset)[:, :, :width, : flow.transform.n_params].permute(0, 3, 1, 2)

    def _layer(self, index: int, flow: Flow, skip: Tensor) -> Layer:
        weights, residual = self.weights.layers[index], (None, None)
        if index < len(self.weights.layers) - 1:
            residual = fold_residual(weights, self.shrinks[index], None if flow.gates is None else flow.gates[index])
        bias = weights.conditioning_bias + weights.bias_of(flow.index)
        return Layer(self.products[index], weights.conditioning.flatten(1).t(), bias, *residual, skip)

    def _enter(self, x: Tensor, conditioning: Tensor, params: Tensor, layer: Layer) -> tuple[Tensor | None, Tensor]:
        """Layer 0, whose input of one channel is cheap to multiply as it is."""
        n_padding = conditioning.size(2) - x.size(3)
        near = torch.stack([x, torch.ones_like(x)], dim=4).squeeze(1)  # [B, h, W, 2], the mask beside x
        near = F.pad(near, (0, 0, 1, 1 + n_padding, 2, 0)).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)  # [B, h, W', 18]
        both = torch.addmm(layer.bias, near.flatten(0, 2), self.entry)
        filters, gates = torch.addmm(both, conditioning.flatten(0, 2), layer.conditioning).chunk(2, dim=1)
        gated = torch.tanh(filters) * torch.sigmoid(gates)
        params = torch.addmm(params.flatten(0, 2), gated, layer.skip).view_as(params)
        if layer.residual is None:
            return None, params
        update = torch.addmm(layer.residual_bias, gated, layer.residual)
        hidden = near[..., 7::9] @ self.front + update.view(*near.shape[:3], -1)
        return F.pad(hidden[:, :, : x.size(3)], (0, 0, 0, n_padding)), params


# --- which one ------------------------------------------------------------------------------------------------------

AnyEstimator = FusedEstimator | WinogradEstimator | CompiledEstimator | ConvEstimator
KINDS: tuple[type[AnyEstimator], ...] = (FusedEstimator, WinogradEstimator, CompiledEstimator, ConvEstimator)
"""Ways to compute the estimators of a pass; the first that suits it is taken."""
