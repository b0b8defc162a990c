"""The estimator: a 2-D WaveNet, causal in height, symmetric in width. Shapes as in `modules.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import WaveFlowConfig
from fast.folding import fold_front, fold_projection, fold_residual, fold_skip, shrinkage
from fast.winograd import GatedLayer, Geometry, Layer, Workspace, padding, product_weights
from modules import SQRT_HALF, Affine, Spline, WeightNorm, permute_rows


class LayerWeights(NamedTuple):
    """One estimator layer with weight norm folded; `gate_bias` [n_flow or 1, 2R] holds the flow's embedding too."""

    gate: Tensor  # [2R, R, 3, 3]
    gate_bias: Tensor
    res_skip: Tensor  # [2R, R, 1, 1], first R rows residual, last R skip
    res_skip_bias: Tensor  # [2R]
    conditioning: tuple[Tensor, Tensor]  # [2R, M, 1, 1], [2R]

    def to(self, dtype: torch.dtype) -> "LayerWeights":
        """The same in another precision."""
        *own, (weight, bias) = self
        return LayerWeights(*(tensor.to(dtype) for tensor in own), (weight.to(dtype), bias.to(dtype)))


class EstimatorLayer(nn.Module):
    """The parameters of one gated layer: 3x3 dilated, 1x1 conditioning, 1x1 embedding, 1x1 residual and skip."""

    def __init__(self, res_channels: int, cin_channels: int, size_flow_embed: int, dilation: tuple[int, int]) -> None:
        super().__init__()
        self.dilation = dilation
        self.gate_conv = WeightNorm(2 * res_channels, res_channels, 3, 3)
        self.cond_conv = WeightNorm(2 * res_channels, cin_channels, 1, 1)
        self.embed_conv = WeightNorm(2 * res_channels, size_flow_embed, 1, 1) if size_flow_embed else None
        self.res_skip_conv = WeightNorm(2 * res_channels, res_channels, 1, 1)

    def fold(self, flow_embedding: Tensor | None) -> LayerWeights:
        """Weights without weight norm; the embedding table [n_flow, E] becomes a bias for each flow."""
        gate_bias = self.gate_conv.bias.unsqueeze(0)
        if self.embed_conv is not None:
            gate_bias = gate_bias + F.linear(flow_embedding, self.embed_conv.weight().flatten(1), self.embed_conv.bias)
        return LayerWeights(
            gate=self.gate_conv.weight().contiguous(memory_format=torch.channels_last),
            gate_bias=gate_bias,
            res_skip=self.res_skip_conv.weight(),
            res_skip_bias=self.res_skip_conv.bias,
            conditioning=(self.cond_conv.weight(), self.cond_conv.bias),
        )


class Estimator(nn.Module):
    """The 2-D WaveNet of a flow (WaveFlow, section 3): features of row r from rows <= r of its input.

    Causal in height, symmetric in width. NanoFlow gives one estimator to all flows.
    """

    def __init__(self, config: WaveFlowConfig) -> None:
        super().__init__()
        self.compiled = False  # torch.compile training steps, where Winograd's products are not faster still
        self.front_conv = WeightNorm(config.res_channels, 1, 1, 1)
        size_flow_embed = config.size_flow_embed if config.coupling_type == "nanoflow" else 0
        self.layers = nn.ModuleList(
            EstimatorLayer(config.res_channels, config.cin_channels, size_flow_embed, config.dilations(layer))
            for layer in range(config.n_layer)
        )

    def bind(
        self,
        conditioning: Tensor,
        flow_embedding: Tensor | None = None,
        shared: bool = False,
        workspace: Workspace | None = None,
    ) -> "BoundEstimator | WinogradEstimator":
        """The estimator for one pass: what all flows that use it share is computed once.

        conditioning [B, M, h, W] in the row order of the audio; flow_embedding [n_flow, E] or None. Given
        the pass's workspace, a faster way than convolutions is taken where there is one; they are the reference.
        """
        kind = conditioning.device.type
        with torch.autocast(kind, enabled=False):
            weights = [layer.fold(flow_embedding) for layer in self.layers]
            front = (self.front_conv.weight(), self.front_conv.bias)
        if torch.is_autocast_enabled(kind):  # cast here, they are not cast again for every flow
            dtype = torch.get_autocast_dtype(kind)
            weights = [layer.to(dtype) for layer in weights]
            front = (front[0].to(dtype), front[1].to(dtype))
        dilations = [layer.dilation for layer in self.layers]
        if workspace is not None and _suits_winograd(conditioning, len(self.layers)):
            return WinogradEstimator(front, weights, dilations, conditioning, flow_embedding is not None, workspace)
        run = _compiled_estimate() if self.compiled and torch.is_grad_enabled() else _estimate
        return BoundEstimator(front, weights, dilations, conditioning, shared, run)


def _suits_winograd(conditioning: Tensor, n_layer: int) -> bool:
    """On CPUs in full precision: their convolutions are slower than their matrix products. Not for clips so short
    that padding would be over a fifth of the work."""
    width, device = conditioning.size(3), conditioning.device.type
    return device == "cpu" and not torch.is_autocast_enabled(device) and 4 * padding(width, n_layer) <= width


@dataclass
class BoundEstimator:
    """An estimator with its weights folded; one that is shared is called by every flow."""

    front: tuple[Tensor, Tensor]
    weights: list[LayerWeights]
    dilations: list[tuple[int, int]]
    conditioning: Tensor
    keeps: bool  # what `prepare` gives
    run: Callable[..., Tensor]
    _products: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    def params(
        self, x: Tensor, prepared: list[Tensor], flow: int, gates: Tensor | None, transform: Affine | Spline
    ) -> Tensor:
        """Parameters [B, P, h', W] of the flow's transform for the first h' rows, x [B, 1, h', W]."""
        return transform.project(self(x, prepared, flow, gates))

    def __call__(self, x: Tensor, products: list[Tensor], flow: int, gates: Tensor | None = None) -> Tensor:
        """Features [B, R, h', W] of the first h' rows, x [B, 1, h', W].

        products: what `prepare` gave for the flow's row order; flow picks the embedding; gates [L, R] replace
        sqrt(1/2) in the residual update (NanoFlow, section 3.3). Channels are innermost in memory throughout: the
        dilated convolutions are then matrix products at full speed on CPUs and in half precision on GPUs.
        """
        if self.run is not _estimate and not x.requires_grad:
            x = x.detach().requires_grad_()  # the first flow too runs the graph that the others need
        biases = [weights.gate_bias[flow % len(weights.gate_bias)] for weights in self.weights]
        products = [product[:, :, : x.size(2)] for product in products]
        return self.run(x, self.front, self.weights, biases, self.dilations, products, gates)

    def prepare(self, order: tuple[int, ...]) -> list[Tensor]:
        """Each layer's conditioning product [B, 2R, h, W] with the rows in `order`.

        A shared estimator keeps them: the few orders that occur are computed once each.
        """
        if order in self._products:
            return self._products[order]
        permuted = permute_rows(self.conditioning, order).contiguous(memory_format=torch.channels_last)
        products = [F.conv2d(permuted, *weights.conditioning) for weights in self.weights]
        if self.keeps:
            self._products[order] = products
        return products


def _estimate(
    x: Tensor,
    front: tuple[Tensor, Tensor],
    layers: list[LayerWeights],
    biases: list[Tensor],
    dilations: list[tuple[int, int]],
    products: list[Tensor],
    gates: Tensor | None,
) -> Tensor:
    """What `BoundEstimator` computes; a function of tensors, so that all flows run one compiled graph."""
    hidden = F.conv2d(x, *front).contiguous(memory_format=torch.channels_last)  # [B, R, h', W]
    features = 0
    for index, (weights, bias, dilation) in enumerate(zip(layers, biases, dilations, strict=True)):
        gated = _gated(hidden, weights.gate, bias, products[index], dilation)
        residual, skip = _residual_and_skip(gated, weights, is_last=index == len(layers) - 1)
        features = features + skip
        if residual is not None:
            hidden = _update(hidden, residual, None if gates is None else gates[index])
    return features


@cache
def _compiled_estimate() -> Callable[..., Tensor]:
    # Training steps have one shape, so each graph is made for its own: a shape that varies would make slower code.
    return torch.compile(_estimate, dynamic=False, fullgraph=True)


def _gated(hidden: Tensor, weight: Tensor, bias: Tensor, product: Tensor, dilation: tuple[int, int]) -> Tensor:
    dilation_h, dilation_w = dilation
    past = F.pad(hidden, (0, 0, 2 * dilation_h, 0))  # causal: rows above only
    both = F.conv2d(past, weight, bias, padding=(0, dilation_w), dilation=dilation) + product  # [B, 2R, h', W]
    filters, gates = both.chunk(2, dim=1)
    return torch.tanh(filters) * torch.sigmoid(gates)


def _residual_and_skip(gated: Tensor, weights: LayerWeights, is_last: bool) -> tuple[Tensor | None, Tensor]:
    if is_last:  # nothing follows the last residual; its half of the weights is kept for equal counts and checkpoints
        half = len(weights.res_skip_bias) // 2
        return None, F.conv2d(gated, weights.res_skip[half:], weights.res_skip_bias[half:])
    return F.conv2d(gated, weights.res_skip, weights.res_skip_bias).chunk(2, dim=1)


def _update(hidden: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    return (hidden + residual) * SQRT_HALF if gate is None else hidden + residual * gate.view(-1, 1, 1)


# --- the same by fewer products ------------------------------------------------------------------------------------


class WinogradEstimator:
    """An estimator for one pass by the layers of `winograd.py`, equal to `BoundEstimator`.

    conditioning [B, M, h, W] in the row order of the audio.
    """

    keeps = True  # what `prepare` gives

    def __init__(
        self,
        front: tuple[Tensor, Tensor],
        weights: list[LayerWeights],
        dilations: list[tuple[int, int]],
        conditioning: Tensor,
        has_gates: bool,
        workspace: Workspace,
    ) -> None:
        self.weights, self.dilations, self.conditioning, self.workspace = weights, dilations, conditioning, workspace
        self.shrinks = shrinkage(len(weights), has_gates)
        taps = [layer.gate.permute(2, 3, 1, 0) * shrink for layer, shrink in zip(weights, self.shrinks, strict=True)]
        self.front, self.entry = fold_front(front, taps[0])
        self.products = [None, *(product_weights(tap) for tap in taps[1:])]

    def prepare(self, order: tuple[int, ...]) -> Tensor:
        """The conditioning for a flow with this row order, as `Workspace.rows`."""
        return self.workspace.rows(self.conditioning, order, len(self.weights))

    def params(
        self, x: Tensor, prepared: Tensor, flow: int, gates: Tensor | None, transform: Affine | Spline
    ) -> Tensor:
        """Parameters [B, P, h, W] of the flow's transform, as `BoundEstimator.params`."""
        project, offset = fold_projection(transform)
        width = x.size(3)
        hidden, params = None, x.new_zeros(*prepared.shape[:3], len(project))
        for index, weights in enumerate(self.weights):
            skip, skip_offset = fold_skip(project, weights)
            offset = offset + skip_offset
            layer = self._layer(index, flow, None if gates is None else gates[index], skip)
            if index == 0:
                hidden, params = self._enter(x, prepared, params, layer)
            else:
                geometry = Geometry(self.dilations[index], width, self.workspace)
                hidden, params = GatedLayer.apply(geometry, hidden, params, prepared, *layer)
        return (params + offset)[:, :, :width, : transform.n_params].permute(0, 3, 1, 2)

    def _layer(self, index: int, flow: int, gate: Tensor | None, skip: Tensor) -> Layer:
        weights, residual = self.weights[index], (None, None)
        if index < len(self.weights) - 1:
            residual = fold_residual(weights, self.shrinks[index], gate)
        conditioning, bias = weights.conditioning
        bias = bias + weights.gate_bias[flow % len(weights.gate_bias)]
        return Layer(self.products[index], conditioning.flatten(1).t(), bias, *residual, skip)

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
