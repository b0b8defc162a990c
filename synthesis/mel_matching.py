"""Matching the mel after synthesis: the audio is filtered until its own mel is the one that was asked for.

What a small or a young vocoder makes has the right spectrum on average, and fluctuates around it. Its own mel shows by
how much, band by band and frame by frame, and a zero-phase filter puts that right; since frames overlap, a few passes
are needed. Phases, and so what makes it speech rather than noise, remain those of the vocoder. Nothing is learned.

What comes out is no sample of the flow any more, and its distance to the mel says little about the model: a figure
that is to measure a model is taken without it.
"""

import math

import torch
from torch import Tensor

from audio import MelSpectrogram
from config import DataConfig
from harness.errors import InputError
from linear_prediction import bands_to_bins
from synthesis.arguments import whole_number

MAX_PASSES = 1000
MAX_CHANGE = 3.0  # nats in one pass, 26 dB: where there is next to nothing, nothing is made of rounding errors


def match_mel(audio: Tensor, mel: Tensor, mel_fn: MelSpectrogram, passes: int) -> Tensor:
    """audio [B, T], mel [B, M, F] with F at least T // hop + 1 -> audio [B, T] after so many passes.

    Raises InputError.
    """
    _check(audio, mel, mel_fn.config)
    for _ in range(whole_number(passes, "match_mel", 0, MAX_PASSES)):
        audio = _one_pass(audio, mel, mel_fn)
    return audio


def _check(audio: Tensor, mel: Tensor, data: DataConfig) -> None:
    frames = audio.size(1) // data.hop_length + 1 if audio.dim() == 2 else 0
    if not frames or mel.dim() != 3 or mel.shape[:2] != (len(audio), data.n_mel_channels) or mel.size(2) < frames:
        raise InputError(
            f"match_mel: audio {list(audio.shape)} and mel {list(mel.shape)}, expected [B, T] and "
            f"[B, {data.n_mel_channels}, F] of at least T // {data.hop_length} + 1 frames"
        )


def _one_pass(audio: Tensor, mel: Tensor, mel_fn: MelSpectrogram) -> Tensor:
    data = mel_fn.config
    own = mel_fn(audio)  # [B, M, F]
    change = mel[:, :, : own.size(2)] - own
    if data.use_dbmel:
        change = change * (5 * math.log(10))  # 100 dB are 1
    bins = change.clamp(-MAX_CHANGE, MAX_CHANGE).transpose(1, 2) @ bands_to_bins(data, audio.device).to(change)
    frames = {"n_fft": data.filter_length, "hop_length": data.hop_length, "win_length": data.win_length}
    spectrum = torch.stft(audio, **frames, window=mel_fn.window, pad_mode="reflect", return_complex=True)
    return torch.istft(spectrum * bins.transpose(1, 2).exp(), **frames, window=mel_fn.window, length=audio.size(1))
