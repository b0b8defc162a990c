"""Variants of the vocoder that are no config keys: each replaces one part of a model, which is trained like any other.

A variant is worth a key only if it helps, so they live here and not in `model.py`. Adapted and separable estimators
give their weights as the estimators of `modules.py` do, so everything of `fast/` runs them too.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, DataConfig, WaveFlowConfig
from fast.estimators import Execution
from linear_prediction import LinearPrediction, bands_to_bins
from model import FlowVocoder
from modules import Conv, Estimator, Flow, Upsampler, gaussian_log_density

INT16_STEP = 1 / 32_768  # from one value of 16-bit audio to the next

# --- the mel before it is upsampled ---------------------------------------------------------------------------


class MelConditioner(nn.Module):
    """A residual bottleneck over frames, the identity at first: a depthwise convolution, then M -> width -> M."""

    def __init__(self, n_mels: int, width: int = 16, kernel: int = 5) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(n_mels, n_mels, kernel, padding=kernel // 2, groups=n_mels)
        self.down, self.up = nn.Conv1d(n_mels, width, 1), nn.Conv1d(width, n_mels, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, M, F] -> [B, M, F]."""
        return mel + self.up(F.silu(self.down(self.depthwise(mel))))


class ConditionedUpsampler(nn.Module):
    """An upsampler behind a conditioner, for training and for the tiles of synthesis."""

    def __init__(self, conditioner: MelConditioner, upsampler: Upsampler) -> None:
        super().__init__()
        self.conditioner, self.upsampler = conditioner, upsampler
        self.strides, self.convs = upsampler.strides, upsampler.convs

    def forward(self, mel: Tensor) -> Tensor:
        """[B, M, F] -> [B, M, F * hop]."""
        return self.upsampler(self.conditioner(mel))

    def columns(self, mel: Tensor, n_height: int, start: int, stop: int) -> Tensor:
        """`Upsampler.columns` of the conditioned mel [M, F], all of which is conditioned for each tile."""
        return self.upsampler.columns(self.conditioner(mel.unsqueeze(0))[0], n_height, start, stop)


class ConditionedVocoder(FlowVocoder):
    """A mel conditioner before upsampling."""

    def __init__(self, config: WaveFlowConfig, data_config: DataConfig) -> None:
        super().__init__(config, data_config)
        self.upsampler = ConditionedUpsampler(MelConditioner(config.cin_channels), self.upsampler)


# --- estimators -----------------------------------------------------------------------------------------------


class AdaptedConv(nn.Module):
    """View of a 1x1 convolution [2R, R] with a product of two small matrices added to its residual half."""

    def __init__(self, conv: Conv, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.conv, self.down, self.up = conv, down, up  # down [r, R], up [R, r]

    @property
    def bias(self) -> Tensor:
        """[2R], that of the convolution."""
        return self.conv.bias

    def weight(self) -> Tensor:
        """[2R, R, 1, 1]."""
        weight = self.conv.weight()
        change = (self.up.unsqueeze(2) * self.down.unsqueeze(0)).sum(1)  # [R, R], in full precision
        return weight + F.pad(change, (0, 0, 0, len(weight) - len(change)))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, h, W] -> [B, 2R, h, W]."""
        return F.conv2d(x, self.weight(), self.bias)


class AdaptedVocoder(FlowVocoder):
    """Rank-r adapters of the residual products, a pair of matrices for each flow and layer, instead of gates.

    At rank 1 they are 2R numbers where the gates are R.
    """

    def __init__(self, config: WaveFlowConfig, data_config: DataConfig, rank: int = 1) -> None:
        super().__init__(config, data_config)
        self.gates, n_res = None, config.res_channels
        self.register_buffer("ones", torch.ones(config.n_layer, n_res), persistent=False)
        shape = (config.n_flow, config.n_layer)
        self.down = nn.Parameter(torch.randn(*shape, rank, n_res) / math.sqrt(n_res))
        self.up = nn.Parameter(torch.zeros(*shape, n_res, rank))

    def flows(self) -> list[Flow]:
        """The flows, each with its own view of the shared estimator."""
        return [replace(flow, estimator=self._adapted(flow), gates=self.ones) for flow in super().flows()]

    def _adapted(self, flow: Flow) -> Estimator:
        view, layers = _view(flow.estimator), []
        for layer, down, up in zip(flow.estimator.layers, self.down[flow.index], self.up[flow.index], strict=True):
            layers.append(_view(layer))
            layers[-1].res_skip_conv = AdaptedConv(layer.res_skip_conv, down, up)
        view.layers = nn.ModuleList(layers)
        return view


def _view(module: nn.Module) -> Any:
    """A second module of the same parameters, whose parts can be replaced."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


class SeparableConv(nn.Module):
    """A k x k convolution made of a depthwise and a 1x1 one; `weight` is the full kernel that the two amount to."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: tuple[int, int]) -> None:
        super().__init__()
        self.dilation = dilation  # (height, width)
        self.depthwise = nn.Parameter(torch.empty(n_in, 1, kernel, kernel).uniform_(-1 / kernel, 1 / kernel))
        self.pointwise = Conv(n_in, n_out)

    @property
    def bias(self) -> Tensor:
        """[n_out]."""
        return self.pointwise.bias

    def weight(self) -> Tensor:
        """[n_out, n_in, k, k]."""
        return self.pointwise.weight() * self.depthwise.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, h, W] -> [B, n_out, h', W'], without padding."""
        return self.pointwise(F.conv2d(x, self.depthwise, dilation=self.dilation, groups=len(self.depthwise)))


class SeparableVocoder(FlowVocoder):
    """Depthwise-separable 3x3 convolutions, for estimators of nearly twice the width at the same cost."""

    def __init__(self, config: WaveFlowConfig, data_config: DataConfig) -> None:
        super().__init__(config, data_config)
        n_res = config.res_channels
        for estimator in self.estimators:
            for layer in estimator.layers:
                layer.gate_conv = SeparableConv(n_res, 2 * n_res, 3, layer.dilation)


# --- linear prediction ----------------------------------------------------------------------------------------


class InterpolatedPrediction(LinearPrediction):
    """A filter for each half hop, from the log-mel between two frames: spectra are interpolated, not coefficients, so
    that every filter is a stable one."""

    PARTS = 2

    def __init__(self, data: DataConfig, order: int) -> None:
        super().__init__(data.model_copy(update={"hop_length": data.hop_length // self.PARTS}), order)

    def forward(self, audio: Tensor, mel: Tensor, context: int = 0) -> tuple[Tensor, Tensor]:
        """`LinearPrediction.forward` by the filters in between."""
        return super().forward(audio, self._between(mel), context)

    @torch.no_grad()
    def inverse(self, residual: Tensor, mel: Tensor, start: int = 0, past: Tensor | None = None) -> Tensor:
        """`LinearPrediction.inverse` by the filters in between."""
        return super().inverse(residual, self._between(mel), start, past)

    def _between(self, mel: Tensor) -> Tensor:
        frames = (mel.size(2) - 1) * self.PARTS + 1
        return F.interpolate(mel.float(), frames, mode="linear", align_corners=True)


class LearnedConstants(LinearPrediction):
    """Learned power beyond the last band, floor and bandwidth of the filter; gradients go through its solution."""

    def __init__(self, data: DataConfig, order: int) -> None:
        super().__init__(data, order)
        self.log_above = nn.Parameter(torch.zeros(()))  # beside the usual factor
        self.log_floor = nn.Parameter(torch.tensor(math.log(1e-7)))  # of a frame's mean power, added to the usual one
        self.log_bandwidth = nn.Parameter(torch.tensor(math.log(5.0)))  # Hz, of the Gaussian that smooths the spectrum

    def power(self, mel: Tensor) -> Tensor:
        power = super().power(mel)  # [B, F, K]
        beyond = bands_to_bins(self.data, mel.device)[-1] >= 1  # bins from the last band's middle on
        power = power * torch.where(beyond, self.log_above.double().exp(), 1.0)
        power = power + self.log_floor.double().exp() * power.mean(-1, keepdim=True)
        lags = torch.fft.irfft(power, n=self.data.filter_length)
        places = torch.arange(self.data.filter_length, dtype=torch.float64, device=mel.device)
        distance = torch.minimum(places, self.data.filter_length - places)
        width = 2 * math.pi * self.log_bandwidth.double().exp() / self.data.sampling_rate
        return torch.fft.rfft(lags * torch.exp(-0.5 * (width * distance) ** 2)).real.clamp(min=1e-30)


class LearnedBands(LinearPrediction):
    """A learned correction of each band, before the filter is computed from the mel (own idea).

    The mel is the logarithm of a sum of magnitudes, and so not that of the mean power that the filter wants.
    """

    def __init__(self, data: DataConfig, order: int) -> None:
        super().__init__(data, order)
        self.bands = nn.Parameter(torch.zeros(data.n_mel_channels))

    def power(self, mel: Tensor) -> Tensor:
        return super().power(mel.double() + self.bands.double())


class LearnedGain(LinearPrediction):
    """A learned gain of each frame, a bounded linear function of its mel (own idea).

    How far the filter overrates the residual depends on the sound: a voiced frame's is spikes, a fricative's noise.
    """

    LIMIT = 2.0  # nats

    def __init__(self, data: DataConfig, order: int) -> None:
        super().__init__(data, order)
        self.weight = nn.Parameter(torch.zeros(data.n_mel_channels))

    def _filters(self, mel: Tensor, stop: int | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        coefficients, log_gain = super()._filters(mel, stop, start)
        if stop is not None:
            mel = mel[:, :, torch.arange(start, stop, device=mel.device).clamp(max=mel.size(2) - 1)]
        change = ((mel + 5) / 50).clamp(-1, 1).transpose(1, 2).double() @ self.weight.double()  # [B, F']
        return coefficients, log_gain + self.LIMIT * torch.tanh(change / self.LIMIT)


# --- density of the noise -------------------------------------------------------------------------------------


class GaussianPrior(nn.Module):
    """The published density of the noise."""

    def log_density(self, z: Tensor) -> Tensor:
        """[B, 1, h, W] -> nats [B]."""
        return gaussian_log_density(z)

    def sample(self, shape: torch.Size) -> Tensor:
        """Noise from PyTorch's global generator."""
        return torch.randn(shape)


class StudentPrior(nn.Module):
    """Student's t with learned degrees of freedom, above 2, for residuals with heavy tails."""

    def __init__(self) -> None:
        super().__init__()
        self.log_freedom = nn.Parameter(torch.tensor(math.log(8.0)))

    def _distribution(self) -> torch.distributions.StudentT:
        return torch.distributions.StudentT(2 + self.log_freedom.exp())

    def log_density(self, z: Tensor) -> Tensor:
        """[B, 1, h, W] -> nats [B]."""
        return self._distribution().log_prob(z).flatten(1).sum(1)

    @torch.no_grad()
    def sample(self, shape: torch.Size) -> Tensor:
        """Noise from PyTorch's global generator, scaled to variance 1, as temperatures suppose."""
        freedom = 2 + self.log_freedom.exp()
        return self._distribution().sample(shape) * torch.sqrt((freedom - 2) / freedom)


# --- what is trained ------------------------------------------------------------------------------------------


class Subject(nn.Module):
    """A model with the density of its noise: what a run trains and measures."""

    def __init__(self, model: FlowVocoder, prior: nn.Module, dither: float) -> None:
        super().__init__()
        self.model, self.prior, self.dither = model, prior, dither

    @property
    def execution(self) -> Execution:
        """The model's; whoever chooses the precision of a training step sets it."""
        return self.model.execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        self.model.execution = execution

    def forward(self, audio: Tensor, mel: Tensor, context: int = 0) -> tuple[Tensor, Tensor]:
        """`FlowVocoder.forward`; in training with dither, uniform noise as wide as a step of the audio."""
        if self.training and self.dither:
            audio = audio + self.dither * (torch.rand_like(audio) - 0.5)
        return self.model(audio, mel, context)

    def log_likelihood(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        """Nats [B] of what `forward` gave."""
        z, log_det = outputs
        return self.prior.log_density(z) + log_det

    def loss(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        """Negative log-likelihood in nats per sample, as `modules.FlowLoss`, under the density of this noise."""
        return -self.log_likelihood(outputs).sum() / outputs[0].numel()


@dataclass(frozen=True)
class Variant:
    """Parts that are replaced."""

    model: type[FlowVocoder] = FlowVocoder
    prediction: type[LinearPrediction] | None = None
    prior: Callable[[], nn.Module] = GaussianPrior
    dither: float = 0.0


VARIANTS = {
    "": Variant(),
    "conditioner": Variant(model=ConditionedVocoder),
    "adapters": Variant(model=AdaptedVocoder),
    "separable": Variant(model=SeparableVocoder),
    "interpolated": Variant(prediction=InterpolatedPrediction),
    "constants": Variant(prediction=LearnedConstants),
    "bands": Variant(prediction=LearnedBands),
    "gain": Variant(prediction=LearnedGain),
    "student": Variant(prior=StudentPrior),
    "dither": Variant(dither=INT16_STEP),
}


def build_subject(config: Config, variant: str = "") -> Subject:
    """A fresh model of a config, with the parts of a variant by its name; the weights that all have are the same."""
    parts = VARIANTS[variant]
    torch.manual_seed(config.train_config.seed)
    model = parts.model(config.waveflow_config, config.data_config)
    if parts.prediction is not None:
        model.linear_prediction = parts.prediction(config.data_config, config.waveflow_config.linear_prediction)
    return Subject(model, parts.prior(), parts.dither)
