"""What the flow vocoder is made of: row operations, the estimator, the transforms, the upsampler, the loss.

Shapes: B batch, T audio samples, F mel frames, M mel bands, h squeeze height, W = T/h columns,
R residual channels, L layers, E embedding size. Every transform follows one contract: forward maps
data to noise and also gives log|det|, inverse maps noise to data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import InputError, WaveFlowConfig
from spline import rational_quadratic_spline

SQRT_HALF = math.sqrt(0.5)
LEAKY_SLOPE = 0.4  # of the upsampler


# --- rows -------------------------------------------------------------------------------------------------


def squeeze(x: Tensor, n_height: int) -> Tensor:
    """[B, C, T] -> [B, C, h, T/h], filled column by column: row i, column j holds sample j*h + i."""
    if x.size(-1) % n_height:
        raise InputError(f"{x.size(-1)} samples are not a multiple of the squeeze height {n_height}; cut the audio")
    return x.unflatten(-1, (-1, n_height)).transpose(-1, -2).contiguous()


def unsqueeze(x: Tensor) -> Tensor:
    """[B, C, h, W] -> [B, C, h*W], the inverse of `squeeze`."""
    return x.transpose(-1, -2).flatten(-2)


def shift_down(x: Tensor) -> Tensor:
    """[B, C, h, W] moved down by one row, zeros on top, so that row r sees rows < r only."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def row_permutation(n_height: int, halves: bool) -> list[int]:
    """Source row of each row: all rows reversed, or the upper and the lower half separately.

    Each is its own inverse. Halves are strategy (b) of the WaveFlow paper, section 4.
    """
    middle = n_height // 2
    if halves:
        return [*reversed(range(middle)), *reversed(range(middle, n_height))]
    return [*reversed(range(n_height))]


def permute_rows(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """[B, C, h, W] with row i taken from row order[i]."""
    return x.index_select(2, _row_index(order, x.device))


@cache
def _row_index(order: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first, a later backward pass may need it
        return torch.tensor(order, device=device)  # kept there: making it anew would wait for an accelerator


# --- weight norm ------------------------------------------------------------------------------------------


def normalised(weight_g: Tensor, weight_v: Tensor) -> Tensor:
    """Weight norm, w = g v / |v|, with one norm for each index of the first axis (Salimans & Kingma, 2016)."""
    return weight_v * (weight_g / torch.linalg.vector_norm(weight_v.flatten(1), dim=1).view_as(weight_g))


class WeightNorm(nn.Module):
    """The weight-normalised weight and bias of a convolution, initialised as PyTorch initialises convolutions."""

    def __init__(self, *shape: int, fan_in: int | None = None) -> None:
        super().__init__()
        fan_in = fan_in or math.prod(shape[1:])
        bound = 1 / math.sqrt(fan_in)
        weight = torch.empty(shape).uniform_(-bound, bound)
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(
            torch.linalg.vector_norm(weight.flatten(1), dim=1).view(-1, *[1] * (len(shape) - 1))
        )
        self.weight_v = nn.Parameter(weight)

    def weight(self) -> Tensor:
        """The folded weight; compute it once per step where the convolution is used more than once."""
        return normalised(self.weight_g, self.weight_v)


# --- conditioning -----------------------------------------------------------------------------------------


class Upsampler(nn.Module):
    """Mel frames to audio rate: transposed convolutions over the mel seen as a one-channel image."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = strides
        self.convs = nn.ModuleList(WeightNorm(1, 1, 3, 2 * stride) for stride in strides)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, M, F] -> [B, M, F * hop]."""
        image = mel.unsqueeze(1)  # [B, 1, M, F]
        for conv, stride in zip(self.convs, self.strides, strict=True):
            image = F.conv_transpose2d(image, conv.weight(), conv.bias, stride=(1, stride), padding=(1, stride // 2))
            image = F.leaky_relu(image, LEAKY_SLOPE)
        return image.squeeze(1)


# --- the estimator: a 2-D WaveNet ---------------------------------------------------------------------------


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
        self.compiled = False  # torch.compile training steps
        self.front_conv = WeightNorm(config.res_channels, 1, 1, 1)
        size_flow_embed = config.size_flow_embed if config.coupling_type == "nanoflow" else 0
        self.layers = nn.ModuleList(
            EstimatorLayer(config.res_channels, config.cin_channels, size_flow_embed, config.dilations(layer))
            for layer in range(config.n_layer)
        )

    def bind(
        self, conditioning: Tensor, flow_embedding: Tensor | None = None, shared: bool = False
    ) -> "BoundEstimator":
        """The estimator for one pass: what all flows that use it share is computed once.

        conditioning [B, M, h, W] in the row order of the audio; flow_embedding [n_flow, E] or None.
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
        run = _compiled_estimate() if self.compiled and torch.is_grad_enabled() else _estimate
        return BoundEstimator(front, weights, dilations, conditioning, shared, run)


@dataclass
class BoundEstimator:
    """An estimator with its weights folded; one that is shared is called by every flow."""

    front: tuple[Tensor, Tensor]
    weights: list[LayerWeights]
    dilations: list[tuple[int, int]]
    conditioning: Tensor
    shared: bool
    run: Callable[..., Tensor]
    _products: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    def __call__(self, x: Tensor, products: list[Tensor], flow: int, gates: Tensor | None = None) -> Tensor:
        """Features [B, R, h', W] of the first h' rows, x [B, 1, h', W].

        products: what `products` gave for the flow's row order; flow picks the embedding; gates [L, R] replace
        sqrt(1/2) in the residual update (NanoFlow, section 3.3). Channels are innermost in memory throughout: the
        dilated convolutions are then matrix products at full speed on CPUs and in half precision on GPUs.
        """
        if self.run is not _estimate and not x.requires_grad:
            x = x.detach().requires_grad_()  # the first flow too runs the graph that the others need
        biases = [weights.gate_bias[flow % len(weights.gate_bias)] for weights in self.weights]
        products = [product[:, :, : x.size(2)] for product in products]
        return self.run(x, self.front, self.weights, biases, self.dilations, products, gates)

    def products(self, order: tuple[int, ...]) -> list[Tensor]:
        """Each layer's conditioning product [B, 2R, h, W] with the rows in `order`.

        A shared estimator keeps them: the few orders that occur are computed once each.
        """
        if order in self._products:
            return self._products[order]
        permuted = permute_rows(self.conditioning, order).contiguous(memory_format=torch.channels_last)
        products = [F.conv2d(permuted, *weights.conditioning) for weights in self.weights]
        if self.shared:
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


class FlowEmbedding(nn.Module):
    """The flow indication table [n_flow, E] (NanoFlow, section 3.2), optionally weight-normalised by row."""

    def __init__(self, n_flow: int, size: int, weight_norm: bool) -> None:
        super().__init__()
        weight = nn.init.orthogonal_(torch.empty(n_flow, size))
        if weight_norm:
            self.weight_g = nn.Parameter(torch.linalg.vector_norm(weight, dim=1, keepdim=True))
            self.weight_v = nn.Parameter(weight)
        else:
            self.weight = nn.Parameter(weight)

    def table(self) -> Tensor:
        """[n_flow, E]."""
        return self.weight if hasattr(self, "weight") else normalised(self.weight_g, self.weight_v)


# --- transforms: features -> parameters, data <-> noise ------------------------------------------------------


class Affine(nn.Module):
    """z = x exp(log_s) + t, with log_s and t from a 1x1 convolution times exp(3 scale) (WaveFlow, eq. 6)."""

    def __init__(self, config: WaveFlowConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1, 2, 1, 1))
        self.conv = nn.Conv2d(config.res_channels, 2, 1)
        for parameter in self.conv.parameters():
            nn.init.uniform_(parameter, -1e-3, 1e-3)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight [2, R, 1, 1] and bias [2] of the projection, the learned scale multiplied in."""
        factor = torch.exp(3 * self.scale).view(2)
        return self.conv.weight * factor.view(2, 1, 1, 1), self.conv.bias * factor

    def project(self, features: Tensor) -> Tensor:
        """[B, R, h, W] -> parameters [B, 2, h, W], in float32 at least."""
        return _project(features, *self.fold())

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 1, h, W] -> z and log|dz/dx|, both [B, 1, h, W]."""
        log_s, t = params.chunk(2, dim=1)
        return x * torch.exp(log_s) + t, log_s

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """z [B, 1, h, W] -> x."""
        log_s, t = params.chunk(2, dim=1)
        return (z - t) * torch.exp(-log_s)


class Spline(nn.Module):
    """Element-wise rational-quadratic spline on [-tail_bound, tail_bound], identity outside (Durkan et al., 2019)."""

    def __init__(self, config: WaveFlowConfig) -> None:
        super().__init__()
        self.num_bin, self.tail_bound = config.num_bin, config.tail_bound
        self.conv = WeightNorm(3 * config.num_bin - 1, config.res_channels, 1, 1)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight [3 num_bin - 1, R, 1, 1] and bias of the projection; widths and heights divided by sqrt(R)."""
        weight = self.conv.weight()
        factor = weight.new_ones(len(weight))
        factor[: 2 * self.num_bin] = 1 / math.sqrt(weight.size(1))
        return weight * factor.view(-1, 1, 1, 1), self.conv.bias * factor

    def project(self, features: Tensor) -> Tensor:
        """[B, R, h, W] -> parameters [B, 3 num_bin - 1, h, W], in float32 at least."""
        return _project(features, *self.fold())

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 1, h, W] -> z and log|dz/dx|, both [B, 1, h, W]."""
        z, log_det = rational_quadratic_spline(x, *self._split(params), tail_bound=self.tail_bound)
        return z, log_det

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """z [B, 1, h, W] -> x."""
        return rational_quadratic_spline(z, *self._split(params), tail_bound=self.tail_bound, inverse=True)[0]

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        sizes = [self.num_bin, self.num_bin, self.num_bin - 1]
        return params.movedim(1, -1).unsqueeze(1).split(sizes, dim=-1)  # each [B, 1, h, W, bins]


def _project(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # The likelihood adds up log_s of every sample: half precision stops here.
    with torch.autocast(features.device.type, enabled=False):
        return F.conv2d(features.to(weight.dtype), weight, bias)


# --- one flow ---------------------------------------------------------------------------------------------


@dataclass
class Flow:
    """One invertible step of the vocoder: permute rows, shift down, estimate, transform every row.

    Made anew for each pass by `FlowVocoder.flows`, which knows what is shared; `order` is the row order that the
    conditioning has when this flow sees it.
    """

    index: int
    permutation: tuple[int, ...]
    order: tuple[int, ...]
    estimator: BoundEstimator
    transform: Affine | Spline
    gates: Tensor | None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: x [B, 1, h, W] -> z [B, 1, h, W], log|det| [B]."""
        x = permute_rows(x, self.permutation)
        params = self._params(shift_down(x), self.estimator.products(self.order))
        z, log_det = self.transform(x, params)
        return z, log_det.flatten(1).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """Noise to data, one row after the other, recomputing the rows above each time."""
        x, products = torch.zeros_like(z), self.estimator.products(self.order)
        for row in range(z.size(2)):
            params = self._params(shift_down(x[:, :, : row + 1]), products)
            x[:, :, row : row + 1] = self.transform.inverse(z[:, :, row : row + 1], params[:, :, row:])
        return permute_rows(x, self.permutation)  # its own inverse

    def forward_recomputed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, keeping its input only and computing the rest again in the backward pass."""
        if self.estimator.shared:
            self.estimator.products(self.order)  # serves other flows too: made here, outside what is recomputed
        return checkpoint(self.forward, x, use_reentrant=False)

    def _params(self, shifted: Tensor, products: list[Tensor]) -> Tensor:
        return self.transform.project(self.estimator(shifted, products, self.index, self.gates))


# --- loss -------------------------------------------------------------------------------------------------


def gaussian_log_density(z: Tensor, sigma: float = 1.0) -> Tensor:
    """log N(z; 0, sigma^2) summed over all axes but the first: [B, ...] -> [B], in nats."""
    constant = 0.5 * math.log(2 * math.pi) + math.log(sigma)
    return -(constant + z**2 / (2 * sigma**2)).flatten(1).sum(1)


class FlowLoss(nn.Module):
    """Negative log-likelihood in nats per audio sample, averaged over the batch."""

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        """outputs (z [B, 1, h, W], log|det| [B]) -> scalar."""
        z, log_det = outputs
        return -(gaussian_log_density(z, self.sigma) + log_det).sum() / z.numel()
