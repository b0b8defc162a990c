"""Clips to be made, their sounds, and the treatment of these: what a vocoder is given and gives; batches of clips."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from harness.errors import InputError, show
from synthesis.arguments import MAX_STRENGTH, number, tensor_of, whole_number
from synthesis.mel_matching import MAX_PASSES

Item = TypeVar("Item")


@dataclass(frozen=True)
class Clip:
    """A sound to be made, as `Vocoder.clip` and `Vocoder.read` give it."""

    source: str  # what errors call it: its file
    mel: Tensor  # [M, F]
    z: Tensor  # noise [h, W]
    output: str = ""  # file name of its wav, if it is to have one
    recording: Tensor | None = None  # [T], of a clip that is to be compared with it


@dataclass(frozen=True)
class Sound:
    """The audio made of a clip."""

    clip: Clip
    audio: Tensor  # [T], on the CPU
    seconds: float  # its share of the time of its batch

    @property
    def is_finite(self) -> bool:
        """True where it can be heard at all; a model that was hardly trained may overflow."""
        return bool(torch.isfinite(self.audio).all())


@dataclass(frozen=True)
class Finish:
    """Treatment of the audio after the model."""

    match_mel: int = 0  # passes of `synthesis.mel_matching`
    denoise: float = 0.0  # strength of `synthesis.denoiser`, which comes first

    def __post_init__(self) -> None:
        object.__setattr__(self, "match_mel", whole_number(self.match_mel, "match_mel", 0, MAX_PASSES))
        object.__setattr__(self, "denoise", number(self.denoise, "denoise", MAX_STRENGTH))


PLAIN = Finish()


def checked_clip(clip: object) -> Clip:
    """A clip with its tensors in float32; InputError where it is none, or not of such as `Vocoder.clip` gives."""
    parts = (clip.mel, clip.z) if isinstance(clip, Clip) else (None,)
    if any(not isinstance(part, Tensor) or part.dim() != 2 for part in parts) or parts[0].size(1) < 2:
        raise InputError(
            f"clip {show(clip)}: expected what Vocoder.clip gives: a mel [M, F] of at least 2 frames, noise [h, W]"
        )
    where = f"of clip {clip.source}"
    return replace(clip, mel=tensor_of(clip.mel, f"mel {where}"), z=tensor_of(clip.z, f"noise {where}"))


def in_batches(items: Iterable[Item], size: Callable[[Item], float], limit: float) -> Iterator[list[Item]]:
    """Consecutive items in lists whose sizes come to at most `limit`; an item larger than that is alone.

    Items are taken when they are needed. Where one cannot be had, those before it come first, then its error.
    """
    batch: list[Item] = []
    total = 0.0
    try:
        for item in items:
            if batch and total + size(item) > limit:
                yield batch
                batch, total = [], 0.0
            batch.append(item)
            total += size(item)
    except (InputError, OSError):
        if batch:
            yield batch
        raise
    if batch:
        yield batch
