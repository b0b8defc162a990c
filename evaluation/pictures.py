"""Pictures of sound: mel spectrograms, and spectrograms that show harmonics."""

import io
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


def decibels(sound: Tensor, sampling_rate: int, top: float, hop: int) -> Tensor:
    """Power spectrogram [bins, frames] of a sound [T] up to `top` Hz, in dB; windows of 1024 samples show harmonics."""
    size = 1024  # some 46 ms at 22,050 Hz
    window = torch.hann_window(size)
    power = torch.stft(sound.cpu().float(), size, hop, window=window, return_complex=True).abs().square()
    return 10 * torch.log10(power + 1e-10)[: round(top / sampling_rate * size) + 1]


def palette_png(values: Tensor, low: float, high: float, colours: str) -> bytes:
    """PNG of values [H, W], the first row lowest, in 64 colours of a Matplotlib map from `low` to `high`."""
    from matplotlib import colormaps
    from PIL import Image

    shades = 64
    index = ((values.nan_to_num(low) - low) / (high - low) * shades).clamp(0, shades - 1).to(torch.uint8).flip(0)
    picture = Image.fromarray(index.numpy())
    picture.putpalette(
        (colormaps[colours].resampled(shades)(range(shades))[:, :3] * 255).round().astype("uint8").tobytes()
    )
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return content.getvalue()


def save_spectrograms(path: Path, sounds: Mapping[str, Tensor], sampling_rate: int, top: float = 5_000.0) -> None:
    """Power spectrograms of sounds [T] by name, one under the other up to `top` Hz, in dB below the loudest, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(sounds)), layout="constrained")
    for index, (name, sound) in enumerate(sounds.items()):
        shown = decibels(sound, sampling_rate, top, hop=128)
        shown = shown - shown.max()
        axes = figure.add_subplot(len(sounds), 1, index + 1)
        extent = (0, len(sound) / sampling_rate, 0, top / 1000)
        axes.imshow(shown.numpy(), origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0, cmap="magma")
        axes.set(title=name, xlabel="s" if index == len(sounds) - 1 else None, ylabel="kHz")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
