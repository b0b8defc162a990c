"""Distance of a synthesis from its recording, and the noise that it must be better than."""

import torch
from torch import Tensor


def log_mel_distance(mel: Tensor, reference: Tensor) -> float:
    """Mean absolute difference of two log-mel spectrograms [80, F] over their common frames, in nats."""
    frames = min(mel.size(1), reference.size(1))
    return (mel[:, :frames] - reference[:, :frames]).abs().mean().item()


def noise_like(audio: Tensor) -> Tensor:
    """White noise [T] of the recording's power: what a synthesis must be better than."""
    noise = torch.randn(len(audio), generator=torch.Generator().manual_seed(0))
    return noise * audio.square().mean().sqrt().cpu()
