"""Distance of a synthesis from its recording, and the noise that it must be better than."""

import warnings

import torch
from torch import Tensor


def log_mel_distance(mel: Tensor, reference: Tensor) -> float:
    """Mean absolute difference of two log-mel spectrograms [80, F] over their common frames, in nats."""
    frames = min(mel.size(1), reference.size(1))
    return (mel[:, :frames] - reference[:, :frames]).abs().mean().item()


def intelligibility(audio: Tensor, recording: Tensor, sampling_rate: int) -> float:
    """Short-time objective intelligibility of audio [T] beside its recording [T], at most 1 (Taal et al., 2011).

    nan where there is too little speech to tell: 30 frames of 25.6 ms above -40 dB are needed.
    """
    from pystoi import stoi  # takes a second to import

    samples = min(len(audio), len(recording))
    heard, meant = (sound[:samples].detach().cpu().double().numpy() for sound in (audio, recording))
    try:
        with warnings.catch_warnings(action="error", category=RuntimeWarning):  # too few frames
            return float(stoi(meant, heard, sampling_rate))
    except (RuntimeWarning, ValueError):  # of silence nothing is left to score
        return float("nan")


def noise_like(audio: Tensor) -> Tensor:
    """White noise [T] of the recording's power: what a synthesis must be better than."""
    noise = torch.randn(len(audio), generator=torch.Generator().manual_seed(0))
    return noise * audio.square().mean().sqrt().cpu()
