"""Loudness of a recording (ITU-R BS.1770-4), and the gain that brings it or its peak to a level."""

import math
from collections.abc import Iterator

import numpy as np

BLOCK_SECONDS = 60  # filtered at a time
TARGET_LUFS = -23.0  # EBU R 128
TARGET_PEAK = 0.95
LIMIT = 0.999  # of any sample that is written


def loudness(audio: np.ndarray, rate: int) -> float:
    """Integrated loudness of mono audio [T] in LUFS, blocks of silence left out; -inf of silence."""
    hop = max(1, round(0.1 * rate))  # blocks of 0.4 s that overlap by three quarters
    sums = np.concatenate(list(_energies(audio, rate, hop)))
    counts = np.diff(np.arange(0, len(audio), hop), append=len(audio))
    span = min(4, len(sums))
    power = np.convolve(sums, np.ones(span), "valid") / np.convolve(counts, np.ones(span), "valid")
    gated = power[power > 10 ** ((-70 + 0.691) / 10)]
    if len(gated):
        gated = gated[gated > gated.mean() / 10]
    return -0.691 + 10 * math.log10(gated.mean()) if len(gated) else -math.inf


def _energies(audio: np.ndarray, rate: int, hop: int) -> Iterator[np.ndarray]:
    """Energies of the weighted audio in each hop, a minute at a time: an hour in double precision is gigabytes."""
    from scipy.signal import lfilter

    filters = _weighting(rate)
    states = [np.zeros(2) for _ in filters]
    for first in range(0, len(audio), BLOCK_SECONDS * 10 * hop):
        weighted = audio[first : first + BLOCK_SECONDS * 10 * hop].astype(np.float64)
        for i, (numerator, denominator) in enumerate(filters):
            weighted, states[i] = lfilter(numerator, denominator, weighted, zi=states[i])
        yield np.add.reduceat(np.square(weighted, out=weighted), np.arange(0, len(weighted), hop))


def _weighting(rate: int) -> list[tuple[list[float], list[float]]]:
    """The two filters of the K weighting: a high shelf for the head, a high pass; BS.1770's at 48 kHz, at any rate."""
    k, q = math.tan(math.pi * 1681.974450955533 / rate), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    middle, norm = high**0.4996667741545416, 1 + k / q + k * k
    shelf = [(high + middle * k / q + k * k) / norm, 2 * (k * k - high) / norm, (high - middle * k / q + k * k) / norm]
    poles = [1.0, 2 * (k * k - 1) / norm, (1 - k / q + k * k) / norm]
    k, q = math.tan(math.pi * 38.13547087602444 / rate), 0.5003270373238773
    norm = 1 + k / q + k * k
    return [(shelf, poles), ([1.0, -2.0, 1.0], [1.0, 2 * (k * k - 1) / norm, (1 - k / q + k * k) / norm])]


def peak_of(audio: np.ndarray) -> float:
    """The largest magnitude of samples [T], without a copy of them."""
    return float(max(audio.max(), -audio.min()))


def gain(audio: np.ndarray, lufs: float, level: str) -> float:
    """Factor for a recording: level "keep", "peak" or "loudness"; never one that would clip."""
    peak = peak_of(audio)
    wanted = 1.0
    if level == "peak" and peak > 0:
        wanted = TARGET_PEAK / peak
    elif level == "loudness" and math.isfinite(lufs):
        wanted = 10 ** ((TARGET_LUFS - lufs) / 20)
    return min(wanted, LIMIT / peak) if peak * wanted > 1 - 2.0**-15 else wanted
