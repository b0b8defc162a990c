"""The peak memory of a piece of work, measured in a fresh process of its own: nothing of what ran before is in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.devices import resident_memory
from harness.pools import process_pool, results_of


def peak_memory(device: torch.device, work: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that work(*arguments) takes at most; a function of a module and arguments that pickle.

    On CUDA: the most that PyTorch had allocated. On a CPU: how far the resident set rose above what the new process
    held before the call, which is Python with its libraries; what these load when they are first used is counted, some
    80 MB in all. 0 where the system does not tell. Raises InputError where the process does not live to tell.
    """
    died = "the process that measures memory was ended, most likely for taking too much; choose smaller sizes"
    with process_pool(1, died, "spawn") as pool:
        return next(results_of([pool.submit(_measure, device, work, arguments)]))


def _measure(device: torch.device, work: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    before = resident_memory("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return resident_memory("VmHWM") - before
