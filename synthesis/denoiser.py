"""Taking a vocoder's own noise out of its audio: what it makes of silence is subtracted from every spectrum.

A vocoder hums a little even where its mel is silent. The magnitudes of that hum, times a strength, are taken off those
of the audio, and phases stay (as WaveGlow's denoiser does). A strength of 0.01 to 0.1 is usual; 1 takes off all of it.
"""

import math

import torch
from torch import Tensor

from audio import LOG_FLOOR
from config import DataConfig
from harness.errors import InputError
from synthesis.arguments import MAX_STRENGTH, number

FRAMES = 88  # of silence, of which the middle is heard: about a second


def silent_mel(data: DataConfig, frames: int = FRAMES) -> Tensor:
    """The mel [M, frames] of digital silence."""
    return torch.full((data.n_mel_channels, frames), 0.0 if data.use_dbmel else math.log(LOG_FLOOR))


def bias_spectrum(hum: Tensor, data: DataConfig) -> Tensor:
    """Magnitudes [n_fft/2 + 1, 1] of a vocoder's audio [T] of silence, the mean over the frames of its middle half."""
    magnitudes = _spectrum(hum, data).abs()
    quarter = magnitudes.size(1) // 4
    return magnitudes[:, quarter : magnitudes.size(1) - quarter].mean(1, keepdim=True)


def denoise(audio: Tensor, bias: Tensor, strength: float, data: DataConfig) -> Tensor:
    """Audio [T] without `strength` times the bias spectrum [n_fft/2 + 1, 1]; [T]. Raises InputError."""
    strength = number(strength, "denoise", MAX_STRENGTH)
    if audio.dim() != 1 or bias.shape != (data.filter_length // 2 + 1, 1):
        raise InputError(
            f"denoise: audio {list(audio.shape)} and bias {list(bias.shape)}, expected [T] and "
            f"[{data.filter_length // 2 + 1}, 1]"
        )
    spectrum = _spectrum(audio, data)
    magnitudes = spectrum.abs()
    kept = (magnitudes - strength * bias).clamp(min=0) / magnitudes.clamp(min=torch.finfo(audio.dtype).tiny)
    return torch.istft(spectrum * kept, **_frames(data), window=_window(data, audio), length=len(audio))


def _spectrum(audio: Tensor, data: DataConfig) -> Tensor:
    return torch.stft(
        audio, **_frames(data), window=_window(data, audio), pad_mode="constant", return_complex=True
    )  # silence beyond the ends: a clip may be shorter than half a window


def _frames(data: DataConfig) -> dict[str, int]:
    hop = min(data.hop_length, data.win_length // 4)  # frames that overlap enough to be added up
    return {"n_fft": data.filter_length, "hop_length": hop, "win_length": data.win_length}


def _window(data: DataConfig, audio: Tensor) -> Tensor:
    return torch.hann_window(data.win_length, device=audio.device)
