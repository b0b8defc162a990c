"""What the flow vocoder is made of beside the estimator: row operations, transforms, the upsampler, the loss.

Shapes: B batch, T audio samples, F mel frames, M mel bands, h squeeze height, W = T/h columns,
R residual channels, L layers, E embedding size. Every transform follows one contract: forward maps
data to noise and also gives log|det|, inverse maps noise to data.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import WaveFlowConfig
from harness.errors import InputError
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


# --- what flows share and own --------------------------------------------------------------------------------


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

    n_params = 2

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
        self.n_params = 3 * config.num_bin - 1
        self.conv = WeightNorm(self.n_params, config.res_channels, 1, 1)

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
