"""Pictures of mel spectrograms."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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
