"""Parts of the image flows: actnorm, permutations, couplings, estimators, splits, and one flow step.

Shapes: B batch, C channels, H height, W width, D channels of the flow indication map at the first level. Every
transform follows one contract: forward maps data to noise and also gives log|det| [B], inverse maps noise to data.
The state of a flow stays in float32 whatever autocast does; only the estimators run in half precision.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import InputError
from spline import MIN_BIN, rational_quadratic_spline

SPLINE_BINS, TAIL_BOUND = 8, 5.0
SINGULAR = 1e14  # of a matrix's and its inverse's largest values: in float64 nothing is left of the digits
CONSTANT = 1e-6  # a standard deviation of rounding errors
UNIT_SLOPE = math.log(math.expm1(1 - MIN_BIN))  # the raw spline derivative that means a slope of 1


def squeeze(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4C, H/2, W/2]: the four pixels of a block, row by row, become channels."""
    return F.pixel_unshuffle(x, 2)


def unsqueeze(x: Tensor) -> Tensor:
    """[B, 4C, H, W] -> [B, C, 2H, 2W], the inverse of `squeeze`."""
    return F.pixel_shuffle(x, 2)


def gaussian_log_density(x: Tensor, mean: Tensor | float = 0.0, log_std: Tensor | float = 0.0) -> Tensor:
    """log N(x; mean, exp(log_std)^2) summed over all axes but the first: [B, ...] -> [B], in nats."""
    squares = ((x - mean) * (torch.exp(-log_std) if isinstance(log_std, Tensor) else math.exp(-log_std))) ** 2
    return -(0.5 * (math.log(2 * math.pi) + squares) + log_std).flatten(1).sum(1)


# --- element-wise and linear steps --------------------------------------------------------------------------


class ActNorm(nn.Module):
    """y = (x + bias) exp(logs) per channel, set by the first training batch to mean 0 and std `scale` (Glow, 3.1).

    Whether that has happened is a buffer, so that a reloaded model never starts over.
    """

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))
        self._known_initialised = False  # spares reading the buffer back from the device in every call

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] -> y, log|det| [B]."""
        if self.training and not self._is_initialised():
            self._initialise(x.detach())
        log_det = self.logs.sum() * x.size(2) * x.size(3)
        return (x + self.bias) * torch.exp(self.logs), log_det.expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        """y [B, C, H, W] -> x."""
        return y * torch.exp(-self.logs) - self.bias

    def _is_initialised(self) -> bool:
        self._known_initialised = self._known_initialised or bool(self.initialised)
        return self._known_initialised

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        x = x.to(self.bias.dtype)
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
        std = torch.where(std < CONSTANT, self.scale, std)  # nothing to scale: not amplified a million times
        self.bias.copy_(-mean)
        self.logs.copy_(torch.log(self.scale / (std + 1e-6)))
        self.initialised.fill_(True)

    def _load_from_state_dict(self, *arguments: object) -> None:
        self._known_initialised = False
        super()._load_from_state_dict(*arguments)


class InvertibleConv1x1(nn.Module):
    """A learned mixing of the channels, started as a rotation (Glow, 3.2).

    With `LU_decomposed`, W = P (L + I)(U + diag(sign_s exp(log_s))), whose log|det| costs C instead of C^3.
    """

    def __init__(self, channels: int, LU_decomposed: bool) -> None:
        super().__init__()
        self.LU_decomposed = LU_decomposed
        weight = torch.linalg.qr(torch.randn(channels, channels))[0]
        if not LU_decomposed:
            self.weight = nn.Parameter(weight)
            return
        p, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()
        self.register_buffer("p", p)
        self.register_buffer("sign_s", torch.sign(diagonal))
        self.lower = nn.Parameter(lower)  # only what lies strictly below the diagonal counts
        self.log_s = nn.Parameter(torch.log(diagonal.abs()))
        self.upper = nn.Parameter(upper.triu(1))

    def matrix(self) -> Tensor:
        """W [C, C]."""
        if not self.LU_decomposed:
            return self.weight
        lower = self.lower.tril(-1) + torch.eye(len(self.lower)).to(self.lower)
        upper = self.upper.triu(1) + torch.diag(self.sign_s * torch.exp(self.log_s))
        return self.p @ lower @ upper

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] -> z, log|det| [B]."""
        with torch.autocast(x.device.type, enabled=False):
            log_det = self.log_s.sum() if self.LU_decomposed else torch.linalg.slogdet(self.weight)[1]
            z = F.conv2d(x, self.matrix()[:, :, None, None])
        return z, (log_det * x.size(2) * x.size(3)).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """z [B, C, H, W] -> x."""
        with torch.autocast(z.device.type, enabled=False):
            matrix = self.matrix().double()  # a badly conditioned W needs the digits
            inverse, info = torch.linalg.inv_ex(matrix)
            # A vanished entry of U is covered by rounding in the product: it is looked for where it is.
            vanished = self.LU_decomposed and not torch.exp(self.log_s.double().min()) > 1 / SINGULAR
            if info or vanished or not inverse.abs().max() * matrix.abs().max() < SINGULAR:
                raise InputError(
                    f"a mixing matrix of {len(inverse)} channels has become singular: the model has no inverse; take "
                    "an earlier checkpoint, or train with a lower rate or with LU_decomposed"
                )
            return F.conv2d(z, inverse.to(z)[:, :, None, None])


class Permutation(nn.Module):
    """A fixed order of the channels: reversed, or shuffled once and kept in a buffer."""

    def __init__(self, channels: int, shuffle: bool) -> None:
        super().__init__()
        order = torch.randperm(channels) if shuffle else torch.arange(channels - 1, -1, -1)
        self.register_buffer("indices", order)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] -> z, log|det| = 0 [B]."""
        return x[:, self.indices], x.new_zeros(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """z [B, C, H, W] -> x."""
        return z[:, torch.argsort(self.indices)]


def make_permutation(kind: str, channels: int, LU_decomposed: bool) -> InvertibleConv1x1 | Permutation:
    """`flow_permutation`: invconv, shuffle or reverse."""
    if kind == "invconv":
        return InvertibleConv1x1(channels, LU_decomposed)
    return Permutation(channels, shuffle=kind == "shuffle")


# --- couplings: parameters [B, n C, H, W] act on x [B, C, H, W] ------------------------------------------------


class Additive:
    """z = x + t."""

    params_per_channel = 1

    @staticmethod
    def forward(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z, log|dz/dx| [B, C, H, W]."""
        return x + params, torch.zeros_like(x)

    @staticmethod
    def inverse(z: Tensor, params: Tensor) -> Tensor:
        """z -> x."""
        return z - params


class Affine:
    """z = (x + shift) sigmoid(raw + 2), shift in the even channels and raw scale in the odd ones."""

    params_per_channel = 2

    @staticmethod
    def forward(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z, log|dz/dx| [B, C, H, W]."""
        log_scale = F.logsigmoid(params[:, 1::2] + 2)
        return (x + params[:, 0::2]) * torch.exp(log_scale), log_scale

    @staticmethod
    def inverse(z: Tensor, params: Tensor) -> Tensor:
        """z -> x."""
        return z * torch.exp(-F.logsigmoid(params[:, 1::2] + 2)) - params[:, 0::2]


class Spline:
    """Element-wise rational-quadratic spline, the identity while the parameters are zero (Durkan et al., 2019)."""

    params_per_channel = 3 * SPLINE_BINS - 1

    @staticmethod
    def forward(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z, log|dz/dx| [B, C, H, W]."""
        return rational_quadratic_spline(x, *_spline_params(params), tail_bound=TAIL_BOUND)

    @staticmethod
    def inverse(z: Tensor, params: Tensor) -> Tensor:
        """z -> x."""
        return rational_quadratic_spline(z, *_spline_params(params), tail_bound=TAIL_BOUND, inverse=True)[0]


def _spline_params(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    params = params.unflatten(1, (-1, Spline.params_per_channel)).movedim(2, -1)  # [B, C, H, W, 3 bins - 1]
    widths, heights, derivatives = params.split([SPLINE_BINS, SPLINE_BINS, SPLINE_BINS - 1], dim=-1)
    return widths, heights, derivatives + UNIT_SLOPE


COUPLINGS = {"affine": Affine, "additive": Additive, "spline": Spline}

# --- estimators -----------------------------------------------------------------------------------------------


class ZeroConv(nn.Module):
    """A convolution that starts as zero, its output times exp(3 logs); in float32 also under autocast (Glow, 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = _zeroed(nn.Conv2d(in_channels, out_channels, kernel_size, padding="same"))
        self.logs = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.to(self.logs.dtype)) * torch.exp(3 * self.logs)


class ZeroLinear(nn.Module):
    """A linear map that starts as zero, its output times exp(3 logs); in float32 also under autocast."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = _zeroed(nn.Linear(in_features, out_features))
        self.logs = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[B, n] -> [B, m]."""
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x.to(self.logs.dtype)) * torch.exp(3 * self.logs)


def _zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class EstimatorLayer(nn.Module):
    """Convolution, actnorm, ReLU; the actnorm stands for the bias."""

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden_channels, kernel_size, padding="same", bias=False)
        nn.init.normal_(self.conv.weight, std=0.05)
        self.actnorm = ActNorm(hidden_channels)

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, hidden, H, W]; gate [hidden, 1, 1] multiplies by its exponential before the ReLU."""
        x, _ = self.actnorm(self.conv(x))
        return F.relu(x if gate is None else x * torch.exp(gate))


class Estimator(nn.Module):
    """Features of the half that a coupling leaves alone: a stack of layers, one per kernel size.

    It gives features; a ZeroConv projects them to the coupling's parameters, and may be shared or not by itself.
    """

    def __init__(self, in_channels: int, hidden_channels: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        inputs = [in_channels] + [hidden_channels] * (len(kernel_sizes) - 1)
        self.layers = nn.ModuleList(
            EstimatorLayer(n, hidden_channels, kernel_size) for n, kernel_size in zip(inputs, kernel_sizes, strict=True)
        )

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> features [B, hidden, H, W]; gates [>= layers, hidden, 1, 1] or None."""
        for index, layer in enumerate(self.layers):
            x = layer(x, None if gates is None else gates[index])
        return x


class FlowIndication(nn.Module):
    """A learned map beside the input, which tells a shared estimator the step it works for (NanoFlow, 3.2)."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, channels, height, width))
        self.actnorm = ActNorm(channels)
        if height * width == 1:  # a single number has no spread to normalise: it stays what tells steps apart
            self.actnorm.initialised.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + channels, H, W]."""
        indication, _ = self.actnorm(self.map)
        return torch.cat([x, indication.expand(len(x), -1, -1, -1)], dim=1)


# --- one flow step ----------------------------------------------------------------------------------------------


class FlowStep(nn.Module):
    """Parts of a step of any model type: actnorm, permutation, and with `indication` the map and the gates."""

    def __init__(
        self,
        channels: int,
        permutation: nn.Module,
        actnorm_scale: float,
        indication: FlowIndication | None = None,
        gates: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        if channels % 2:
            raise InputError(f"{channels} channels cannot be halved by a coupling; expected an even number")
        self.actnorm = ActNorm(channels, actnorm_scale)
        self.permutation = permutation
        self.indication = indication
        self.register_parameter("gates", gates)


@dataclass
class BoundStep:
    """A step with the estimator and the projection it uses, its own or shared; made anew for each pass."""

    step: FlowStep
    estimator: Estimator
    projection: ZeroConv
    coupling: type[Additive] | type[Affine] | type[Spline]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: x [B, C, H, W] -> z, log|det| [B] (Glow, table 1)."""
        x, scale_log_det = self.step.actnorm(x)
        x, mixing_log_det = self.step.permutation(x)
        z1, x2 = x.chunk(2, dim=1)
        z2, log_scale = self.coupling.forward(x2, self._params(z1))
        return torch.cat([z1, z2], dim=1), scale_log_det + mixing_log_det + log_scale.flatten(1).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """Noise to data: z [B, C, H, W] -> x."""
        z1, z2 = z.chunk(2, dim=1)
        x2 = self.coupling.inverse(z2, self._params(z1))
        return self.step.actnorm.inverse(self.step.permutation.inverse(torch.cat([z1, x2], dim=1)))

    def modules(self) -> Iterator[nn.Module]:
        """The three modules whose parameters the step depends on."""
        return iter((self.step, self.estimator, self.projection))

    def _params(self, z1: Tensor) -> Tensor:
        inputs = z1 if self.step.indication is None else self.step.indication(z1)
        return self.projection(self.estimator(inputs, self.step.gates))


class Split(nn.Module):
    """The second half of the channels leaves as noise: Gaussian, with mean and scale from the first half (Glow, 3.6).

    It leaves standardised, so that all latents but the top one are compared with N(0, 1).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.prior = ZeroConv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, C, H, W] -> the half that goes on [B, C/2, H, W], noise of the same shape, log|det| [B]."""
        x, leaving = x.chunk(2, dim=1)
        mean, log_std = self._prior(x)
        return x, (leaving - mean) * torch.exp(-log_std), -log_std.flatten(1).sum(1)

    def inverse(self, x: Tensor, noise: Tensor) -> Tensor:
        """The two halves [B, C/2, H, W] -> [B, C, H, W]."""
        mean, log_std = self._prior(x)
        return torch.cat([x, mean + noise * torch.exp(log_std)], dim=1)

    def _prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        params = self.prior(x)
        return params[:, 0::2], params[:, 1::2]
