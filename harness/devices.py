"""Devices: the one a run computes on, models spread over several, what they are good at."""

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.errors import MAX_SHOWN, InputError, one_line
from harness.processes import local_rank, place, world_size


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, or the best there is; each of several processes gets a CUDA device of its own.

    Raises InputError where it is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):  # ValueError: half of a surrogate pair
        raise InputError(f"device {one_line(name, MAX_SHOWN)}: unknown; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name}: not supported; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and place()[1] > 1:
        if device.index is not None:
            raise InputError(f"device {name}: several processes cannot share one device; name none")
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: not there; this machine shows {torch.cuda.device_count()} CUDA device(s)")
    return device


def data_parallel(model: nn.Module, device: torch.device, find_unused: bool = False) -> nn.Module:
    """The model as the training step calls it.

    Among several processes, gradients are averaged over them; find_unused: where a step may leave parameters out. A
    process that is alone spreads its batch over all visible GPUs, as published, unless one was named or there is but
    one.
    """
    if world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, find_unused_parameters=find_unused)
    if device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        return nn.DataParallel(model)
    return model


def gradients_stay(model: nn.Module) -> AbstractContextManager:
    """Context in which backward passes through what `data_parallel` gave add up gradients without averaging them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def make_deterministic() -> None:
    """Allow only algorithms that give the same result twice, on the same machine; costs some speed on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it first starts
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def tf32_products() -> bool:
    """Tell whether float32 matrix products on CUDA may take TF32, whichever interface that was set through.

    Reading the older one, `allow_tf32`, raises RuntimeError once the newer one was used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def allow_tf32(products: bool | None = None, convolutions: bool | None = None) -> None:
    """Let float32 matrix products and convolutions on CUDA take TF32, or not; None: as it is.

    The older interface is set first and to the same: parts of PyTorch read it, and fail where the two disagree.
    """
    if products is not None:
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cuda.matmul.fp32_precision = "tf32" if products else "ieee"
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
        for kind in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):  # which are to agree as well
            kind.fp32_precision = "tf32" if convolutions else "ieee"


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Context of likelihoods and synthesis: float32 convolutions as exact as on a CPU, whatever training may take."""
    before = torch.backends.cudnn.conv.fp32_precision == "tf32"
    allow_tf32(convolutions=False)
    try:
        yield
    finally:
        allow_tf32(convolutions=before)


def prepare_training(device: torch.device) -> None:
    """Make a CUDA device the current one, for whatever thread pins memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def steps_of_one_shape(device: torch.device) -> Iterator[None]:
    """Context of training steps on CUDA: algorithms of convolutions are tried out, unless results must not vary.

    Not that of evaluation and synthesis, where each length would be tried anew.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fast_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices in hardware; without, it is slower at them than at float32."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resident_memory(mark: str = "VmRSS") -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM); 0 where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(mark)))


def memory_in_use(device: torch.device) -> dict[str, int]:
    """Bytes that this process takes, by name: resident now, and on a CUDA device the most that was ever allocated."""
    found = {"resident": resident_memory()}
    if device.type == "cuda":
        found["cuda_max_allocated"] = torch.cuda.max_memory_allocated(device)
    return {name: size for name, size in found.items() if size}
