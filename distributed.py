"""Devices and processes. On one device every function is a no-op, so the loops have no branches."""

import torch
from torch import nn

from config import InputError


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, or the best there is. Raises InputError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: unknown; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: not supported; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: not there; this machine shows {torch.cuda.device_count()} CUDA device(s)")
    return device


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on all visible GPUs, as published, unless one was named or there is but one."""
    if device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        return nn.DataParallel(model)
    return model
