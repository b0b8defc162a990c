"""Parts of the flow vocoder, small to large: rows, convolutions, the estimator, transforms, one flow, the loss.

    B   batch                 T   audio samples        R   residual channels of the estimator (res_channels)
    F   mel frames            h   squeeze height       L   layers of the estimator (n_layer)
    M   mel bands             W   columns, T / h       E   size of the flow embedding (size_flow_embed)
    x   audio, squeezed       z   noise                P   parameters of a transform for each sample (n_params)
    C   channels of any kind

Row i, column j of a squeezed signal [B, C, h, W] is sample j * h + i. One contract holds for every invertible step:
forward maps data to noise and also gives log|det|, inverse maps noise to data. What stands here is written to be read
and is the reference; `fast/` computes the same numbers sooner.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import WaveFlowConfig
from harness.errors import InputError
from spline import rational_quadratic_spline

SQRT_HALF = math.sqrt(0.5)
LEAKY_SLOPE = 0.4  # of the upsampler
CONTEXT_FRAMES = 2  # mel frames that the upsampler sees on each side: its layers reach 1 + 1/stride + ... < 2


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
    rows = x.unbind(2)  # indexing with a list would make an accelerator wait for the list
    return torch.stack([rows[row] for row in order], dim=2)


# --- weight norm ------------------------------------------------------------------------------------------


def normalised(weight_g: Tensor, weight_v: Tensor) -> Tensor:
    """Weight norm, w = g v / |v|, with one norm for each index of the first axis (Salimans & Kingma, 2016)."""
    return weight_v * (weight_g / torch.linalg.vector_norm(weight_v.flatten(1), dim=1).view_as(weight_g))


class WeightNorm(nn.Module):
    """Weight and bias of a convolution under weight norm, initialised as PyTorch initialises convolutions."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        weight = torch.empty(shape).uniform_(-bound, bound)
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(
            torch.linalg.vector_norm(weight.flatten(1), dim=1).view(-1, *[1] * (len(shape) - 1))
        )
        self.weight_v = nn.Parameter(weight)

    def weight(self) -> Tensor:
        """Weight of the convolution, g v / |v|."""
        return normalised(self.weight_g, self.weight_v)


class Conv(WeightNorm):
    """A weight-normalised 2-D convolution without padding: [B, n_in, h, W] -> [B, n_out, h', W']."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 1, dilation: tuple[int, int] = (1, 1)) -> None:
        super().__init__(n_out, n_in, kernel, kernel)
        self.dilation = dilation  # (height, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, dilation=self.dilation)


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
            # An odd stride cannot be padded alike on both sides: one sample more goes in front, one less behind.
            before, less = (stride + 1) // 2, stride % 2
            image = F.conv_transpose2d(image, conv.weight(), conv.bias, (1, stride), (1, before), (0, less))
            image = F.leaky_relu(image, LEAKY_SLOPE)
        return image.squeeze(1)

    def columns(self, mel: Tensor, n_height: int, start: int, stop: int) -> Tensor:
        """Squeezed conditioning [h, n, M] of columns [start, stop) of a clip, upsampling no more of its mel [M, F]."""
        first, last, hop = start * n_height, stop * n_height, math.prod(self.strides)  # samples
        frame = max(first // hop - CONTEXT_FRAMES, 0)
        seen = mel[:, frame : -(-last // hop) + CONTEXT_FRAMES].unsqueeze(0)
        samples = self(seen)[:, :, first - frame * hop : last - frame * hop]
        return squeeze(samples, n_height)[0].permute(1, 2, 0)


# --- the estimator: a 2-D WaveNet -----------------------------------------------------------------------------


class EstimatorLayer(nn.Module):
    """One gated layer: causal in height, symmetric in width (WaveFlow, section 3.1)."""

    def __init__(self, config: WaveFlowConfig, layer: int) -> None:
        super().__init__()
        n_res, n_embed = config.res_channels, config.size_flow_embed if config.coupling_type == "nanoflow" else 0
        self.dilation = config.dilations(layer)  # (height, width)
        self.residual_scale = 1.0 if config.couples_first else SQRT_HALF
        self.gate_conv = Conv(n_res, 2 * n_res, kernel=3, dilation=self.dilation)
        self.cond_conv = Conv(config.cin_channels, 2 * n_res)
        self.embed_conv = Conv(n_embed, 2 * n_res) if n_embed else None
        self.res_skip_conv = Conv(n_res, 2 * n_res)

    def forward(
        self, hidden: Tensor, conditioning: Tensor, embedding: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, R, h, W], conditioning [B, M, h, W], the flow's embedding [E] and gate [R] -> hidden, skip.

        NanoFlow tells the layer which flow it works for inside the gate (section 3.2), and lets the flow scale each
        channel of the residual (section 3.3).
        """
        dilation_h, dilation_w = self.dilation
        past = F.pad(hidden, (dilation_w, dilation_w, 2 * dilation_h, 0))  # rows above only
        both = self.gate_conv(past) + self.cond_conv(conditioning)  # [B, 2R, h, W]
        if embedding is not None:
            both = both + self.embed_conv(embedding.view(1, -1, 1, 1))
        filters, gates = both.chunk(2, dim=1)
        residual, skip = self.res_skip_conv(torch.tanh(filters) * torch.sigmoid(gates)).chunk(2, dim=1)
        if gate is None:
            return (hidden + residual) * self.residual_scale, skip
        return hidden + residual * gate.view(-1, 1, 1), skip


class Estimator(nn.Module):
    """The 2-D WaveNet of a flow (WaveFlow, section 3.1): features of row r from rows <= r of its input."""

    def __init__(self, config: WaveFlowConfig) -> None:
        super().__init__()
        self.front_conv = Conv(1, config.res_channels)
        self.layers = nn.ModuleList(EstimatorLayer(config, layer) for layer in range(config.n_layer))

    def forward(
        self,
        x: Tensor,
        conditioning: Tensor,
        embedding: Tensor | None = None,
        gates: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """x [B, 1, h, W], conditioning [B, M, h, W], embedding [E] and gates [L, R] of the flow -> [B, R, h, W]."""
        hidden, features = self.front_conv(x), 0
        for layer, gate in zip(self.layers, [None] * len(self.layers) if gates is None else gates, strict=True):
            hidden, skip = layer(hidden, conditioning, embedding, gate)
            features = features + skip
        return features  # the last layer's hidden state is unused, as published


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


class Transform(nn.Module, ABC):
    """An invertible map of each sample by itself, whose n_params parameters are projected from its features."""

    n_params: int

    @abstractmethod
    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight [P, R, 1, 1] and bias [P] of the projection."""

    def project(self, features: Tensor) -> Tensor:
        """Features [B, R, h, W] -> parameters [B, P, h, W]."""
        return F.conv2d(features, *self.fold())

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 1, h, W] -> z and log|dz/dx|, both [B, 1, h, W]."""

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """z [B, 1, h, W] -> x."""


class Affine(Transform):
    """z = x exp(log_s) + t, with log_s and t from a 1x1 convolution times exp(3 scale) (WaveFlow, eq. 6).

    The released WaveFlow has no scale, and starts from zeros.
    """

    n_params = 2

    def __init__(self, config: WaveFlowConfig) -> None:
        super().__init__()
        self.scale = None if config.couples_first else nn.Parameter(torch.zeros(1, 2, 1, 1))
        self.conv = nn.Conv2d(config.res_channels, 2, 1)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter) if self.scale is None else nn.init.uniform_(parameter, -1e-3, 1e-3)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight [2, R, 1, 1] and bias [2] of the projection, the learned scale multiplied in."""
        if self.scale is None:
            return self.conv.weight, self.conv.bias
        factor = torch.exp(3 * self.scale).view(2)
        return self.conv.weight * factor.view(2, 1, 1, 1), self.conv.bias * factor

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_s, t = params.chunk(2, dim=1)
        return x * torch.exp(log_s) + t, log_s

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        log_s, t = params.chunk(2, dim=1)
        return (z - t) * torch.exp(-log_s)


class Spline(Transform):
    """Element-wise rational-quadratic spline on [-tail_bound, tail_bound], identity outside (Durkan et al., 2019)."""

    def __init__(self, config: WaveFlowConfig) -> None:
        super().__init__()
        self.num_bin, self.tail_bound = config.num_bin, config.tail_bound
        self.n_params = 3 * config.num_bin - 1
        self.conv = Conv(config.res_channels, self.n_params)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight [3 num_bin - 1, R, 1, 1] and bias of the projection; widths and heights divided by sqrt(R)."""
        weight = self.conv.weight()
        factor = weight.new_ones(len(weight))
        factor[: 2 * self.num_bin] = 1 / math.sqrt(weight.size(1))
        return weight * factor.view(-1, 1, 1, 1), self.conv.bias * factor

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = rational_quadratic_spline(x, *self._split(params), tail_bound=self.tail_bound)
        return z, log_det

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return rational_quadratic_spline(z, *self._split(params), tail_bound=self.tail_bound, inverse=True)[0]

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        sizes = [self.num_bin, self.num_bin, self.num_bin - 1]
        return params.movedim(1, -1).unsqueeze(1).split(sizes, dim=-1)  # each [B, 1, h, W, bins]


# --- one flow ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """One invertible step of the vocoder: permute the rows, shift down, estimate, transform every row.

    A view of the weights that `FlowVocoder` owns, some of which all its flows share. order is that of the rows of the
    conditioning, whose permutations add up from flow to flow.
    """

    index: int
    permutation: tuple[int, ...]
    order: tuple[int, ...]
    estimator: Estimator
    transform: Transform
    embedding: Tensor | None  # [E]
    gates: Tensor | None  # [L, R]

    couples_first = False

    def forward(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: x [B, 1, h, W], conditioning [B, M, h, W] -> z [B, 1, h, W], log|det| [B]."""
        x = permute_rows(x, self.permutation)
        conditioning = permute_rows(conditioning, self.order)
        features = self.estimator(shift_down(x), conditioning, self.embedding, self.gates)
        z, log_det = self.transform(x, self.transform.project(features))
        return z, log_det.flatten(1).sum(1)

    def inverse(self, z: Tensor, conditioning: Tensor) -> Tensor:
        """Noise to data, one row after the other: each needs the rows above it, which are computed again."""
        x, conditioning = torch.zeros_like(z), permute_rows(conditioning, self.order)
        for row in range(z.size(2)):
            above, seen = shift_down(x[:, :, : row + 1]), conditioning[:, :, : row + 1]
            features = self.estimator(above, seen, self.embedding, self.gates)
            params = self.transform.project(features[:, :, row:])
            x[:, :, row : row + 1] = self.transform.inverse(z[:, :, row : row + 1], params)
        return permute_rows(x, self.permutation)  # its own inverse


class ReleasedFlow(Flow):
    """The step of the WaveFlow that its authors released: couple, then permute.

    Row 0 passes as it is; the estimator sees rows 0 to h - 2 and transforms the row below each. order is the one that
    the conditioning has before this flow permutes it.
    """

    couples_first = True

    def forward(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        conditioning = permute_rows(conditioning, self.order)[:, :, 1:]
        features = self.estimator(x[:, :, :-1], conditioning, self.embedding, self.gates)
        z, log_det = self.transform(x[:, :, 1:], self.transform.project(features))
        return permute_rows(torch.cat([x[:, :, :1], z], dim=2), self.permutation), log_det.flatten(1).sum(1)

    def inverse(self, z: Tensor, conditioning: Tensor) -> Tensor:
        z, conditioning = permute_rows(z, self.permutation), permute_rows(conditioning, self.order)[:, :, 1:]
        x = torch.zeros_like(z)
        x[:, :, :1] = z[:, :, :1]
        for row in range(1, z.size(2)):
            features = self.estimator(x[:, :, :row], conditioning[:, :, :row], self.embedding, self.gates)
            params = self.transform.project(features[:, :, row - 1 :])
            x[:, :, row : row + 1] = self.transform.inverse(z[:, :, row : row + 1], params)
        return x


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
