"""A mel beside those that a vocoder was trained on: what cannot be right, its likely cause, and the preset for it."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from audio import LOG_FLOOR, check_mel
from config import DataConfig
from synthesis.mel_presets import convert_mel, find_preset

SILENCE = 0.5  # nats above the floor, or less: nothing to judge
BEYOND = 1e9  # any scale: what comes of such numbers is not finite, and then refused
FEW = 20  # frames, of which a mean says little
MARGIN = 0.05  # of rounding, say in half precision


@dataclass(frozen=True)
class MelStatistics:
    """Mels of a training corpus, over all bands and frames of some clips."""

    mean: float
    std: float
    low: float
    high: float
    clips: int

    @classmethod
    def of(cls, mels: list[Tensor]) -> Self:
        """Statistics of mels [M, F], of at least one."""
        values = torch.cat([mel.flatten() for mel in mels]).double()
        mean, std = values.mean().item(), values.std(correction=0).item()
        return cls(mean, std, values.min().item(), values.max().item(), len(mels))

    @classmethod
    def read(cls, entry: object) -> Self | None:
        """Statistics of a file's entry; None where it is absent or damaged, since nothing depends on it."""
        names = {"mean": float, "std": float, "low": float, "high": float, "clips": int}
        if not isinstance(entry, Mapping) or any(type(entry.get(name)) is not kind for name, kind in names.items()):
            return None
        found = cls(**{name: entry[name] for name in names})
        return found if all(map(math.isfinite, asdict(found).values())) and found.std > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a file."""
        return asdict(self)


SPEECH = MelStatistics(-5.5, 2.1, math.log(LOG_FLOOR), 1.5, 0)  # of natural logs, where a file knows none of its own


def mel_warning(mel: Tensor, data: DataConfig, known: MelStatistics | None) -> str | None:
    """One line about a mel [M, F] that this vocoder's front end cannot or hardly have made, or None."""
    low, high, mean, _ = _summary(mel)
    found = _of_decibels(low, high) if data.use_dbmel else _of_logarithms(mel, data, known or SPEECH)
    if found is None or max(-low, high) > BEYOND:
        return None
    cause, preset = found
    remedy = f"give mel_preset {preset}" if preset else "make it by this vocoder's settings (python data.py mel)"
    return f"mel values {low:.3g} to {high:.3g}, mean {mean:.3g}: {cause}; it will sound like noise: {remedy}"


def _summary(mel: Tensor) -> tuple[float, float, float, float]:
    return mel.min().item(), mel.max().item(), mel.mean().item(), mel.std(correction=0).item()


def _of_decibels(low: float, high: float) -> tuple[str, str] | None:
    if low < -MARGIN or high > 1 + MARGIN:
        return "expected decibels mapped to [0, 1]; these look like natural logs", "natural_log"
    return None


def _of_logarithms(mel: Tensor, data: DataConfig, known: MelStatistics) -> tuple[str, str] | None:
    low, high, mean, std = _summary(mel)
    floor = math.log(LOG_FLOOR)
    if low >= floor - MARGIN and high < floor + SILENCE:
        return None
    if low >= 0:
        unit = high <= 1 + MARGIN and mean > 0.1
        return ("decibels mapped to [0, 1]", "unit_decibels") if unit else ("no logarithm", "linear")
    if low < -25 or high > 12:
        return "decibels, where natural logs are expected", "librosa_db"
    if low < floor - MARGIN:
        return "below ln 1e-5, so its floor is another, or it is of power", "natural_log"
    if abs(mean) < 0.5 and 0.6 < std < 1.6:
        return "normalised to mean 0 and variance 1 (CMVN), which is to be undone with its statistics", ""
    if low >= -4 - MARGIN and high <= 4 + MARGIN and (low < -4 + MARGIN or high > 2):
        return "normalised to [-4, 4]", "symmetric"
    loudest = math.log(data.win_length / 2 * data.filter_length / data.sampling_rate)  # a window's sum, a filter's area
    if high > max(loudest, 0) + 1:
        return "louder than full scale", ""
    away = (mean - known.mean) / known.std if mel.size(1) >= FEW else 0.0
    if away > 0.8 and std < 0.65 * known.std:
        return "log10, where natural logs are expected", "log10"
    if abs(away) > 2:
        return f"its mean is far from that of the training data, {known.mean:.3g}", ""
    return None


class MelReader:
    """Mels that users bring, as a vocoder's own: checked, converted from a preset, and warned of where they look wrong.

    known: statistics of the mels that it was trained on. One warning is given, of the first mel that needs it.
    """

    def __init__(
        self,
        data: DataConfig,
        preset: str | None = None,
        known: MelStatistics | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        if preset is not None:
            find_preset(preset, data)  # refused at once
        self.data, self.preset, self.known, self.warn, self.warned = data, preset, known, warn, False

    def __call__(self, mel: Tensor, source: str, least_frames: int = 2) -> Tensor:
        """A mel [M, F] or [1, M, F] on the CPU -> [M, F]; InputError, naming the source, where it is none."""
        mel = check_mel(mel, source, self.data.n_mel_channels, least_frames)
        if self.preset is not None:
            mel = convert_mel(mel, self.preset, self.data)
        if not self.warned and (warning := mel_warning(mel, self.data, self.known)):
            self.warn(f"{source}: {warning}")
            self.warned = True
        return mel
