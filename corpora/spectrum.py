"""Faults of a recording that its average spectrum shows: mains hum, and a band that ends below half of the rate."""

import numpy as np

SIZE = 4_096  # samples of a frame
QUIETEST = 0.2  # of the frames, in which nobody speaks and hum is heard
HUM_DB = 12.0  # above its neighbourhood, at the mains frequency and at a harmonic
EDGE_DB = 20.0  # down within EDGE_HZ at the end of a band
EDGE_HZ = 500.0
FLOOR_DB = 10.0  # what is above the end of a band stays within so much of the noise of 16 bits
TOP = 0.97  # of the band that is looked at: resamplers leave images of what is near 0 Hz at the very top
FULL_BAND = 0.94  # of half the rate; a band that ends above it is whole
RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100)  # that audio may be resampled up from
IMAGE = 0.3  # of the band, at most, is a mirror image that a resampler left
ALIKE = 0.4  # correlation of an image with what it is of
NOISE_DB = 10 * np.log10(np.square(np.hanning(SIZE)).sum() / 12 / 32_768**2)  # of rounding, in a bin of a frame


def power_frames(audio: np.ndarray) -> np.ndarray:
    """Power spectra [N, SIZE / 2 + 1] of the frames of audio [T], which overlap by half; none of less than a frame."""
    if len(audio) < SIZE:
        return np.empty((0, SIZE // 2 + 1))
    frames = np.lib.stride_tricks.sliding_window_view(audio, SIZE)[:: SIZE // 2]
    return np.square(np.abs(np.fft.rfft(frames * np.hanning(SIZE).astype(np.float32), axis=1)))


def find_hum(frames: np.ndarray, rate: int) -> float:
    """Mains frequency that hums in the quietest frames, 50 or 60 Hz; 0: none."""
    if len(frames) < 10:
        return 0.0
    order = np.argsort(frames[:, 20:].sum(axis=1))
    power = frames[order[: max(4, int(QUIETEST * len(frames)))]].mean(axis=0)
    for mains in (50.0, 60.0):
        peaks = [_peak_db(power, mains * harmonic, rate) for harmonic in (1, 2, 3)]
        if peaks[0] > HUM_DB and max(peaks[1:]) > HUM_DB:
            return mains
    return 0.0


def _peak_db(power: np.ndarray, frequency: float, rate: int) -> float:
    """Height of the spectrum at a frequency over its median within 25 Hz to each side."""
    place, reach = round(frequency * SIZE / rate), max(3, round(25 * SIZE / rate))
    around = power[max(1, place - reach) : place + reach + 1]
    return 10 * np.log10((power[place - 1 : place + 2].max() + 1e-20) / (np.median(around) + 1e-20))


def find_band_end(frames: np.ndarray, rate: int) -> float:
    """Frequency in Hz above which there is nothing but the noise of 16 bits; 0 where the band goes up to the top.

    Cheap resamplers leave a mirror image of the band above its end, which is no part of it.
    """
    if not len(frames):
        return 0.0
    width = max(1, round(100 * SIZE / rate))  # bins of 100 Hz
    power = frames.mean(axis=0)
    bands = power[: len(power) // width * width].reshape(-1, width).mean(axis=1)
    level, reach = 10 * np.log10(bands + 1e-20), max(1, round(EDGE_HZ / 100))
    level = level[: round(TOP * len(level))]
    end = _last_above_noise(level)
    if not reach <= end < FULL_BAND * len(bands):
        return 0.0
    if level[end - reach : end].max() - level[end : end + reach].min() < EDGE_DB:
        return 0.0
    for half in (source / 2 * SIZE / rate for source in RATES):  # in bins
        if (1 - IMAGE) * end < half / width < end and _mirrored(frames, half, end * width):
            end = _last_above_noise(level[: round(half / width)])
    return end * width * rate / SIZE


def _last_above_noise(level: np.ndarray) -> int:
    """Number of bands up to the last one that is above the noise of 16 bits."""
    above = np.flatnonzero(level > NOISE_DB + FLOOR_DB)
    return int(above[-1]) + 1 if len(above) else 0


def _mirrored(frames: np.ndarray, middle: float, end: int) -> bool:
    """Whether bins from `middle` to `end` follow those below it, mirrored, beyond their means and the loudness."""
    upper = np.arange(int(middle) + 1, end)
    lower = np.round(2 * middle - upper).astype(int)
    if len(upper) < 2:
        return False
    above, below = (np.log(frames[:, bins] + 1e-20) for bins in (upper, lower))
    above, below = (
        part - part.mean(axis=0) - (part - part.mean(axis=0)).mean(axis=1, keepdims=True) for part in (above, below)
    )
    return float((above * below).sum()) > ALIKE * float(np.linalg.norm(above) * np.linalg.norm(below))
