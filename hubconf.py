"""Entry points of torch.hub: `torch.hub.load(REPO_OR_DIR, "nanoflow", source="local")`."""

from pathlib import Path

import torch

from vocoder import Vocoder

dependencies = ["torch", "numpy", "scipy", "librosa", "pydantic", "safetensors"]


def nanoflow(
    path: str | Path = "nanoflow",
    config: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    mel_preset: str | None = None,
) -> Vocoder:
    """The vocoder of `Vocoder.from_pretrained`, by default of the weights that come with the project."""
    return Vocoder.from_pretrained(path, config, device, precision, mel_preset)
