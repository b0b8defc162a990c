"""Small vocoders with random parameters: fresh ones are near the identity, which hides mistakes."""

import torch

from fast.estimators import Execution
from model import build_model


def small_config(coupling_type="nanoflow", **changes):
    """A waveflow_config that runs in milliseconds."""
    config = {
        "res_channels": 6,
        "n_height": 8,
        "n_layer": 3,
        "n_flow": 3,
        "coupling_type": coupling_type,
        "size_flow_embed": 5 if coupling_type == "nanoflow" else 0,
        **changes,
    }
    if coupling_type == "waveflow_official":  # affine only; a row passes as it is, so there must be another
        config |= {"transform": "affine", "n_height": max(2, config["n_height"])}
    return config


def random_vocoder(coupling_type="nanoflow", seed=0, dtype=torch.float32, data_config=None, **changes):
    """A vocoder whose every parameter matters, projections, gates and scales included."""
    torch.manual_seed(seed)
    model = build_model(small_config(coupling_type, **changes), data_config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("transforms"):
                parameter.normal_(std=0.15)
            elif name.startswith("gates"):
                parameter.normal_(mean=0.8, std=0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def random_input(model, frames=4, batch=2, seed=1):
    """Audio [B, hop (F - 1)] and mel [B, 80, F] in the model's precision."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    samples = model.config.hop_length * (frames - 1)
    audio = 0.5 * torch.randn(batch, samples, generator=generator, dtype=torch.float64)
    mel = torch.randn(batch, model.config.cin_channels, frames, generator=generator, dtype=torch.float64)
    return audio.to(dtype), mel.to(dtype)


def plain_inverse(model, mel, z):
    """`FlowVocoder.reverse` by `modules.py` alone, for which nothing is folded or kept."""
    execution, model.execution = model.execution, Execution(plain=True)
    try:
        return model.reverse(mel, z=z)
    finally:
        model.execution = execution
