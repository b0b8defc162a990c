"""Linear prediction from the mel: the outermost flow, audio to residual by an all-pole model that the mel determines.

The mel says what the power spectrum of each frame is, and so which filter would whiten it (LPCNet, Valin & Skoglund,
2019, computes its predictor in the same way from cepstra). With the coefficients c and the gain g of the frame that a
sample t belongs to, and one learned scale s,

    e_t = (x_t - sum_k c_k x_{t-k}) / (s g),        x_t = s g e_t + sum_k c_k x_{t-k}

is a triangular map with log|det| = -sum_t log(s g). Zeros are what came before the first sample.

Every frame's filter is stable, but filters that change may not be: of mels that jump from one sharp resonance to
another in every frame, as no recording's do, what rings of one can grow in the next without end. So a frame of the
inverse that would be louder than PEAK_LIMIT, far beyond full scale, is turned down to it, before the next one hears
it: turned down, not cut off, whose distortion would set the next filter ringing. Below the limit the inverse is exact.

Frame f of a mel is centred on sample f * hop, so it owns samples [f hop - hop // 2, (f + 1) hop - hop // 2); what
follows the last frame belongs to the last.

Precision. Whatever the model's is, filters and filtering are in float64: the spectra of a frame span seven decades,
which is the condition number of the equations solved here, and the recursion of the inverse feeds every rounding error
back into its input. Only the residual and the audio are in the precision of what was given.

Shapes: B batch, T samples, M mel bands, F frames, K FFT bins, p order.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import DataConfig
from harness.errors import InputError

LOG_MEL_LIMIT = 25.0  # nats: far beyond full scale and below digital silence; powers stay within float64
RELATIVE_FLOOR = 1e-7  # of a frame's mean power, added to every bin: bounds the condition number
ABSOLUTE_FLOOR = 1e-11  # of full scale, 110 dB down: digital silence has a filter too
ABOVE_BANDS = 0.1  # power of the bins above the last band, of which the mel says nothing, beside that of the band
MAX_REFLECTION = 1 - 1e-9  # rounding can not make a filter unstable
PEAK_LIMIT = 8.0  # 18 dB over full scale
FRAMES_AT_ONCE = 64  # of the block form: its matrices are hop x (hop + p) numbers for each


class Spectrum(NamedTuple):
    """Power of the FFT bins as it follows from the values of the mel bands, in float64."""

    interpolate: Tensor  # [M, K], log power of the bands -> of the bins
    offset: Tensor  # [K], added to that


class LinearPrediction(nn.Module):
    """The flow between audio and residual, by linear prediction of the given order from mels of `data` settings."""

    def __init__(self, data: DataConfig, order: int) -> None:
        super().__init__()
        if not 0 < order < data.filter_length:
            raise InputError(f"linear_prediction {order}: expected an order from 1 to {data.filter_length - 1}")
        self.data, self.order = data, order
        spectrum_of(data, torch.device("cpu"))  # settings without any usable band are refused here
        self.log_scale = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def initialise(self, audio: Tensor, mel: Tensor, context: int = 0) -> None:
        """Choose the scale with which the residual of audio [B, T] has unit variance; 1 where that is silence."""
        self.log_scale.zero_()
        power = self(audio.double(), mel, context)[0].square().mean()
        if power > 0 and power.isfinite():
            self.log_scale.copy_(power.log() / 2)

    def filters(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [B, F, p] and gain [B, F] of each frame of a mel [B, M, F], float64, with gradients."""
        coefficients, log_gain = self._filters(mel)
        return coefficients, log_gain.exp()

    def forward(self, audio: Tensor, mel: Tensor, context: int = 0) -> tuple[Tensor, Tensor]:
        """audio [B, T], mel [B, M, F] -> residual [B, T - context], log|det| [B]; any T.

        context: samples at the start that are given, and only serve to predict the rest.
        """
        hop, lead, samples = self.data.hop_length, self.data.hop_length // 2, audio.size(1)
        n_frames = -(-(samples + lead) // hop)
        coefficients, log_gain = self._filters(mel, n_frames)
        log_gain = log_gain + self.log_scale.double()
        padded = F.pad(audio.double(), (self.order + lead, n_frames * hop - lead - samples))
        windows = padded.unfold(1, hop + self.order, hop)  # [B, F', p + hop], each after the past it is predicted from
        predicted = _convolve(windows, coefficients)[..., self.order - 1 : -1]
        residual = (windows[..., self.order :] - predicted) * torch.exp(-log_gain).unsqueeze(2)
        owned = [max(0, stop - max(start, context)) for _, start, stop in self._blocks(0, samples)]
        log_det = -(log_gain * log_gain.new_tensor(owned)).sum(1)
        return residual.flatten(1)[:, lead + context : lead + samples].to(audio.dtype), log_det.to(audio.dtype)

    @torch.no_grad()
    def inverse(self, residual: Tensor, mel: Tensor, start: int = 0, past: Tensor | None = None) -> Tensor:
        """residual [B, T], mel [B, M, F] -> audio [B, T].

        A stream goes on from its state: the residual is that of samples from `start` on, `past` [B, p] the audio
        before them, and the mel still that of the whole clip, or as much of it as there is yet.
        """
        blocks = list(self._blocks(start, residual.size(1)))
        if not blocks:
            return residual.clone()
        frames = slice(blocks[0][0], blocks[-1][0] + 1)
        coefficients, log_gain = self._filters(mel, frames.stop, frames.start)
        past = residual.new_zeros(len(residual), self.order) if past is None else past
        excitation = residual.double() * self._per_sample(torch.exp(log_gain + self.log_scale.double()), blocks)
        spans = [(first - start, stop - start) for _, first, stop in blocks]
        invert = _invert_by_samples if residual.device.type == "cpu" else _invert_by_blocks
        return invert(excitation, coefficients, past.double(), spans).to(residual.dtype)

    # --- frames -------------------------------------------------------------------------------------------------

    def _blocks(self, start: int, samples: int) -> Iterator[tuple[int, int, int]]:
        """(frame, first sample, behind the last) of the stretches of [start, start + samples) that share a frame."""
        hop, lead, stop = self.data.hop_length, self.data.hop_length // 2, start + samples
        while start < stop:
            frame = (start + lead) // hop
            end = min((frame + 1) * hop - lead, stop)
            yield frame, start, end
            start = end

    def _per_sample(self, values: Tensor, blocks: list[tuple[int, int, int]]) -> Tensor:
        lengths = torch.tensor([stop - first for _, first, stop in blocks], device=values.device)
        samples = blocks[-1][2] - blocks[0][1]
        return values.repeat_interleave(lengths, dim=1, output_size=samples)  # [B, T]

    def _filters(self, mel: Tensor, stop: int | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Coefficients [B, F', p] and log gain [B, F'] of frames [start, stop), the last of the mel as often as asked.

        A frame with a value that is not finite gets a filter that is not: nothing of it is heard unnoticed.
        """
        if stop is not None:
            frames = torch.arange(start, stop, device=mel.device).clamp(max=mel.size(2) - 1)
            mel = mel.index_select(2, frames)
        power = self.power(mel.transpose(1, 2))  # [B, F', K]
        lags = torch.fft.irfft(power, n=self.data.filter_length)[..., : self.order + 1]
        coefficients, error = levinson(lags.flatten(0, 1).t())
        return coefficients.t().unflatten(0, lags.shape[:2]), error.log().div(2).view(lags.shape[:2])

    def power(self, mel: Tensor) -> Tensor:
        """Power spectral density [B, F, K] that a mel [B, F, M] tells of, white noise of variance 1 having 1."""
        mel = mel.double()
        if self.data.use_dbmel:
            mel = (100 * mel - 90) * (math.log(10) / 20)
        mel = mel.clamp(-LOG_MEL_LIMIT, LOG_MEL_LIMIT).where(mel.isfinite(), math.nan)
        interpolate, offset = spectrum_of(self.data, mel.device)
        power = torch.exp(torch.ops.aten.matmul(2 * mel, interpolate) + offset)  # `@` is Apex's to cast to half
        return power + RELATIVE_FLOOR * power.mean(-1, keepdim=True) + ABSOLUTE_FLOOR


def bands_to_bins(data: DataConfig, device: torch.device) -> Tensor:
    """Weights [M, K] that interpolate a logarithm from the centroids of the bands to the FFT bins."""
    return spectrum_of(data, device).interpolate


@cache
def spectrum_of(data: DataConfig, device: torch.device) -> Spectrum:
    """Spectrum of such mels: magnitudes are summed with Slaney's weights, and the sum is seen at the centroid."""
    import librosa.filters  # seconds to import, and only needed here

    bank = librosa.filters.mel(
        sr=data.sampling_rate,
        n_fft=data.filter_length,
        n_mels=data.n_mel_channels,
        fmin=data.mel_fmin,
        fmax=data.mel_fmax,
        dtype=np.float64,
    )  # [M, K]
    area, bins = bank.sum(1), np.arange(bank.shape[1])
    used = area > 0  # bands narrower than a bin can be without one
    if not used.any():
        raise InputError(f"linear_prediction: none of the {len(bank)} mel bands holds an FFT bin; use wider bands")
    centroids, place = np.unique(bank[used] @ bins / area[used], return_inverse=True)
    shared = np.equal.outer(place, np.arange(len(centroids)))  # bands of one centroid count alike
    each = shared / shared.sum(0)
    between = np.stack([np.interp(bins, centroids, row) for row in np.eye(len(centroids))])
    interpolate = np.zeros_like(bank)
    interpolate[used] = each @ between
    window = torch.hann_window(data.win_length, dtype=torch.float64).square().sum().item()
    log_area = np.log(np.where(used, area, 1))
    offset = -2 * log_area @ interpolate - math.log(window) + np.where(bins > centroids[-1], math.log(ABOVE_BANDS), 0)
    with torch.inference_mode(False):  # whoever asks first, a later backward pass may need it
        return Spectrum(torch.tensor(interpolate, device=device), torch.tensor(offset, device=device))


def levinson(lags: Tensor) -> tuple[Tensor, Tensor]:
    """Autocorrelations [p + 1, N] -> predictors [p, N] and their error powers [N] (Levinson-Durbin recursion).

    N systems at once in p steps. The reflection coefficients are kept within the unit circle, so that 1/A is stable.
    """
    error, backwards, order = lags[0], lags.flip(0), len(lags) - 1
    predictor = lags[:0]
    for step in range(1, order + 1):
        missing = lags[step] - (predictor * backwards[order - step + 1 : order]).sum(0)
        reflection = (missing / error).clamp(-MAX_REFLECTION, MAX_REFLECTION)
        predictor = torch.cat([predictor - reflection * predictor.flip(0), reflection.unsqueeze(0)])
        error = error * (1 - reflection.square())
    return predictor, error


# --- filtering ------------------------------------------------------------------------------------------------


def _convolve(windows: Tensor, coefficients: Tensor) -> Tensor:
    """Windows [..., n] and filters [..., p] -> the first n samples of their convolution, from sample p - 1 on."""
    size = windows.size(-1)  # the end wraps round into samples 0 to p - 2
    return torch.fft.irfft(torch.fft.rfft(windows) * torch.fft.rfft(coefficients, n=size), n=size)


def _invert_by_samples(excitation: Tensor, coefficients: Tensor, past: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Sample after sample in compiled code, which on a CPU is a tenth of the work of blocks.

    excitation [B, T], coefficients [B, F, p] of the F spans, past [B, p] -> audio [B, T].
    """
    from scipy.signal import lfilter

    order = coefficients.size(2)
    audio = np.concatenate([past.numpy(), excitation.numpy()], axis=1)
    denominators = F.pad(-coefficients, (1, 0), value=1.0).numpy()  # [B, F, p + 1]
    for clip, filters in zip(audio, denominators, strict=True):
        for denominator, (start, stop) in zip(filters, spans, strict=True):
            block = clip[start + order : stop + order]
            rung = min(order, len(block))
            block[:rung] -= np.convolve(clip[start : start + order], denominator[1:])[order - 1 :][:rung]
            block[:] = lfilter([1.0], denominator, block)
            if (peak := np.abs(block).max()) > PEAK_LIMIT:
                block *= PEAK_LIMIT / peak
    return torch.from_numpy(audio[:, order:])


def _invert_by_blocks(excitation: Tensor, coefficients: Tensor, past: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Invert by matrices, for accelerators: all spans at once, then span after span what the past adds.

    For a span of n samples, A x = u + P x', with A [n, n] lower triangular, P [n, p] upper, x' the p samples before.
    """
    order, hop = coefficients.size(2), max(stop - start for start, stop in spans)
    audio = torch.cat([past, excitation], dim=1)
    for chunk in range(0, len(spans), FRAMES_AT_ONCE):
        within = spans[chunk : chunk + FRAMES_AT_ONCE]
        inputs = torch.stack([F.pad(excitation[:, a:b], (0, hop - b + a)) for a, b in within], dim=1)  # [B, F', hop]
        own, before = _span_matrices(coefficients[:, chunk : chunk + FRAMES_AT_ONCE], hop)
        right = torch.cat([inputs.unsqueeze(3), before], dim=3)
        responses = torch.linalg.solve_triangular(own, right, upper=False, unitriangular=True)  # [B, F', hop, 1 + p]
        _scan(audio, responses, within, limited=False)
        start, stop = within[0][0] + order, within[-1][1] + order
        if (audio[:, start:stop].abs() > PEAK_LIMIT).any():  # rare, and then worth doing once more
            _scan(audio, responses, within, limited=True)
    return audio[:, order:]


def _scan(audio: Tensor, responses: Tensor, spans: list[tuple[int, int]], limited: bool) -> None:
    """Fill in the spans of audio [B, p + T] from their responses [B, F, hop, 1 + p], to the input and to each sample
    of the past."""
    order = responses.size(3) - 1
    for index, (start, stop) in enumerate(spans):
        of_span = responses[:, index, : stop - start]
        block = torch.baddbmm(of_span[..., :1], of_span[..., 1:], audio[:, start : start + order].unsqueeze(2))
        if limited:
            block = block * (PEAK_LIMIT / block.abs().amax(1, keepdim=True).clamp(min=PEAK_LIMIT))
        audio[:, start + order : stop + order] = block.squeeze(2)


def _span_matrices(coefficients: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Filters [B, F, p] -> A [B, F, size, size] and P [B, F, size, p] of spans of that size."""
    order = coefficients.size(2)
    row = F.pad(coefficients.flip(2), (0, size))  # the past of a span's first sample, then the span
    rows = torch.cat([row] * size, dim=2)[..., : size * (order + size - 1)]
    shifted = rows.unflatten(2, (size, order + size - 1))  # each row one to the right of the one above
    return torch.eye(size).to(row) - F.pad(shifted[..., order:], (0, 1)), shifted[..., :order]
