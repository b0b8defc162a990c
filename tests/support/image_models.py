"""Small image models with random parameters: fresh ones are near the identity, which hides mistakes."""

import torch

from image_density_experiments.model import build_model


def random_model(model_type="nanoflow", seed=0, dtype=torch.float32, **changes):
    """A model whose every parameter matters, and whose actnorms are initialised."""
    torch.manual_seed(seed)
    options = {"image_shape": (8, 8, 3), "hidden_channels": 6, "K": 3, "L": 2, **changes}
    model = build_model(model_type=model_type, **options).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "permutation" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("initialised"):
            buffer.fill_(True)
    return model


def random_images(model, n=4, seed=1):
    """Quantised, centred images [n, C, H, W] of the model's shape and precision."""
    height, width, channels = model.config.image_shape
    levels = 2**model.config.n_bits
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (n, channels, height, width), generator=generator)
    return (values / levels - 0.5).to(next(model.parameters()))
