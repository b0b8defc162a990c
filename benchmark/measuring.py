"""Times of workloads that take turns, beside the fastest matrix product that the machine shows meanwhile."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmark.workloads import Workload
from fast.engine import PRECISIONS

PEAK_SIZE = 2048


@dataclass
class Measured:
    """A workload and what was measured of it."""

    workload: Workload
    peak_memory: int  # bytes
    seconds: list[float] = field(default_factory=list)  # of each run


def measure(found: Sequence[Measured], repeats: int, device: torch.device) -> dict[str, float]:
    """Time all workloads in turn, `repeats` rounds after one to warm up; returns the matrix peak by precision."""
    precisions = sorted({one.workload.precision for one in found})
    peaks = dict.fromkeys(precisions, 0.0)
    for one in found:
        one.workload.job.run()
    for _ in range(repeats):
        for precision in precisions:
            peaks[precision] = max(peaks[precision], matrix_peak(precision, device))
        for one in found:
            one.seconds.append(timed(one.workload.job.run, device))
    return peaks


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, the device's queue drained before and after."""
    _synchronize(device)
    began = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - began


def matrix_peak(precision: str, device: torch.device, size: int = PEAK_SIZE) -> float:
    """FLOP/s of a large matrix product, the best of three."""
    a, b = torch.randn(2, size, size, device=device).to(PRECISIONS[precision])
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b, out=out), device) for _ in range(3))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(one: Measured, peaks: dict[str, float], baseline: Measured | None, rate: int) -> dict[str, Any]:
    """One row of the table; rate: samples of audio per second."""
    seconds = statistics.median(one.seconds)
    workload, samples, flop_rate = one.workload, one.workload.job.samples, one.workload.flop / seconds
    row = {
        "workload": workload.name,
        "precision": workload.precision,
        "samples": samples,
        "seconds": seconds,
        "fastest_seconds": min(one.seconds),
        "samples_per_second": samples / seconds,
        "times_real_time": samples / seconds / rate,
        "flop_per_second": flop_rate,
        "percent_of_peak": 100 * flop_rate / peaks[workload.precision],
        "peak_memory_bytes": one.peak_memory,
    }
    if baseline is not None:
        row[f"ratio_to_{baseline.workload.name}"] = _ratio(one, baseline)
    return row


def _ratio(one: Measured, baseline: Measured) -> float:
    # Round by round, so that a machine that is busy for a while slows both sides of a ratio.
    pairs = zip(one.seconds, baseline.seconds, strict=True)
    per_sample = one.workload.job.samples / baseline.workload.job.samples
    return statistics.median(base / seconds * per_sample for seconds, base in pairs)
