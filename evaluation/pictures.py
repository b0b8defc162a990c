"""Pictures of sound: mel spectrograms, and spectrograms that show harmonics."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mel_figure(mels: Mapping[str, Tensor]) -> "Figure":
    """Matplotlib figure of mel spectrograms [80, F] by name, one under the other, on one colour scale."""
    from matplotlib.figure import Figure  # slow to import

    low = min(mel.min().item() for mel in mels.values())
    high = max(mel.max().item() for mel in mels.values())
    figure = Figure(figsize=(10, 2.6 * len(mels)), layout="constrained")
    for index, (name, mel) in enumerate(mels.items()):
        axes = figure.add_subplot(len(mels), 1, index + 1)
        image = axes.imshow(mel.float().cpu().numpy(), origin="lower", aspect="auto", vmin=low, vmax=high)
        axes.set(title=name, xlabel="frame", ylabel="mel band")
        figure.colorbar(image, ax=axes, label="log magnitude")
    return figure


def save_mel_figure(path: Path, mels: Mapping[str, Tensor]) -> None:
    """Write that figure as a PNG file, whole or not at all."""
    with written_whole(path) as temporary:
        mel_figure(mels).savefig(temporary, format="png", dpi=100)


def save_spectrograms(path: Path, sounds: Mapping[str, Tensor], sampling_rate: int, top: float = 5_000.0) -> None:
    """Power spectrograms of sounds [T] by name, one under the other up to `top` Hz, in dB below the loudest, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(sounds)), layout="constrained")
    for index, (name, sound) in enumerate(sounds.items()):
        size = 1024  # samples, some 46 ms: pitch shows as harmonics
        window = torch.hann_window(size)
        power = torch.stft(sound.cpu().float(), size, size // 8, window=window, return_complex=True).abs().square()
        decibels = 10 * torch.log10(power + 1e-10)
        shown = decibels[: round(top / sampling_rate * size) + 1] - decibels.max()
        axes = figure.add_subplot(len(sounds), 1, index + 1)
        extent = (0, len(sound) / sampling_rate, 0, top / 1000)
        axes.imshow(shown.numpy(), origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0, cmap="magma")
        axes.set(title=name, xlabel="s" if index == len(sounds) - 1 else None, ylabel="kHz")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
