"""Statistics of each flow on some clips, and of z beside the Gaussian that it should be."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.tiles import Watched, forward_of
from harness.devices import exact_convolutions
from harness.stopping import safe_point
from model import FlowVocoder
from modules import squeeze

LINEAR_PREDICTION = "linear prediction"


@dataclass(frozen=True)
class FlowStatistics:
    """Statistics of a step over all samples of some clips; of the linear prediction only its share is known.

    log_det: what it adds to the likelihood, in nats per sample. log_s is log|dz/dx| of a sample.
    """

    name: str
    log_det: float
    output_std: float
    mean: float | None = None  # of log_s, of the samples that the flow transforms
    std: float | None = None
    low: float | None = None
    high: float | None = None


class NoiseStatistics(NamedTuple):
    """Moments of z; under a Gaussian, excess kurtosis and skewness are 0, and 0.27 % lie beyond three deviations."""

    mean: float
    std: float
    skewness: float
    excess_kurtosis: float
    beyond: float  # share of samples further than three sigma from 0

    @classmethod
    def of(cls, z: Tensor, sigma: float = 1.0) -> "NoiseStatistics":
        """Statistics of noise [N] that should be of deviation sigma."""
        z = z.double()
        mean, centred = z.mean(), z - z.mean()
        variance = centred.square().mean()
        third, fourth = centred.pow(3).mean(), centred.pow(4).mean()
        beyond = (z.abs() > 3 * sigma).double().mean()
        values = (mean, variance.sqrt(), third / variance**1.5, fourth / variance.square() - 3, beyond)
        return cls(*(value.item() for value in values))


@torch.no_grad()
@exact_convolutions()
def flow_statistics(
    model: FlowVocoder, clips: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[list[FlowStatistics], Tensor]:
    """Statistics of each step, in the order of the likelihood, and z [N] on the CPU, of clips (audio [T], mel [M, F]).

    The clips go one at a time; up to n_height - 1 samples of each are left out.
    """
    sums: dict[str, _Sums] = {}
    noise = []
    for audio, mel in clips:
        safe_point()
        audio = audio[: len(audio) // model.config.n_height * model.config.n_height]
        z = audio
        for name, z, log_det, log_s in _steps(model, audio[None].to(device), mel[None].to(device)):
            sums.setdefault(name, _Sums()).add(z, log_det, log_s)
        noise.append(z.flatten().float().cpu())
    return [total.statistics(name) for name, total in sums.items()], torch.cat(noise)


def _steps(model: FlowVocoder, audio: Tensor, mel: Tensor) -> Iterator[tuple[str, Tensor, float, Tensor | None]]:
    """Name, output, log|det| and log_s of each step of `FlowVocoder.forward`."""
    with model.execution.products(audio):
        conditioning = model.condition(mel, audio.size(1))
        if model.linear_prediction is not None:
            audio, log_det = model.linear_prediction(audio, mel)
            yield LINEAR_PREDICTION, audio, log_det.item(), None
        x, seen = squeeze(audio.unsqueeze(1), model.config.n_height), []
        note = partial(_noted, seen)
        flows = [replace(flow, transform=Watched(flow.transform, note)) for flow in model.flows()]
        for flow, forward in zip(flows, forward_of(model, flows, conditioning), strict=True):
            x, log_det = forward(x)
            yield f"flow {flow.index}", x, log_det.item(), seen.pop()


def _noted(seen: list[Tensor], log_s: Tensor) -> Tensor:
    seen.append(log_s)
    return log_s


class _Sums:
    """Sums over clips, in double precision, from which the statistics of a step come."""

    def __init__(self) -> None:
        self.samples, self.log_det, self.output, self.output_square = 0, 0.0, 0.0, 0.0
        self.count, self.total, self.square, self.low, self.high = 0, 0.0, 0.0, math.inf, -math.inf

    def add(self, z: Tensor, log_det: float, log_s: Tensor | None) -> None:
        """Count a clip's output z and log_s, whatever their shapes."""
        self.samples += z.numel()
        self.log_det += log_det
        self.output += z.double().sum().item()
        self.output_square += z.double().square().sum().item()
        if log_s is not None:
            self.count += log_s.numel()
            self.total += log_s.double().sum().item()
            self.square += log_s.double().square().sum().item()
            self.low, self.high = min(self.low, log_s.min().item()), max(self.high, log_s.max().item())

    def statistics(self, name: str) -> FlowStatistics:
        """Means and deviations of what was counted."""
        shares = self.log_det / self.samples, _std(self.output, self.output_square, self.samples)
        if not self.count:
            return FlowStatistics(name, *shares)
        deviation = _std(self.total, self.square, self.count)
        return FlowStatistics(name, *shares, self.total / self.count, deviation, self.low, self.high)


def _std(total: float, square: float, count: int) -> float:
    variance = square / count - (total / count) ** 2
    return math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
