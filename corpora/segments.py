"""Places of speech in a take: silence at the ends left out, long takes cut at their pauses."""

import numpy as np

FRAME_SECONDS = 0.01
BLOCK_FRAMES = 6000  # squared at a time, in double precision
MARGIN_SECONDS = 0.1  # of what is left of the silence at each end


def levels(audio: np.ndarray, rate: int) -> np.ndarray:
    """Root mean square of each frame of FRAME_SECONDS, [T / frame], the last one as short as it is."""
    frame = max(1, round(FRAME_SECONDS * rate))
    blocks = (audio[first : first + BLOCK_FRAMES * frame] for first in range(0, len(audio), BLOCK_FRAMES * frame))
    power = [np.add.reduceat(np.square(block, dtype=np.float64), np.arange(0, len(block), frame)) for block in blocks]
    return np.sqrt(np.concatenate(power) / np.diff(np.arange(0, len(audio), frame), append=len(audio)))


def find_segments(audio: np.ndarray, rate: int, trim_db: float, max_seconds: float) -> list[tuple[int, int]]:
    """(first sample, behind the last) of the pieces of a take [T], each of at most max_seconds.

    Frames trim_db below the loudest are silence; 0 keeps it all. A take that is too long is cut in the middle of its
    quietest tenth of a second between half of and the whole length.
    """
    level = levels(audio, rate)
    floor = level.max() * 10 ** (-trim_db / 20) if trim_db else -1.0
    return [
        piece
        for first, last in _cuts(level, round(max_seconds / FRAME_SECONDS))
        if (piece := _trimmed(level, first, last, floor, len(audio), rate))
    ]


def _cuts(level: np.ndarray, longest: int) -> list[tuple[int, int]]:
    """Frames at which to cut, so that no piece is longer than so many of them."""
    smooth = np.convolve(level, np.ones(10) / 10, mode="same")
    pieces, first = [], 0
    while len(level) - first > longest:
        half = first + longest // 2
        # Not so late that next to nothing remains: the rest is shared out, at worst in halves.
        last = min(first + longest, max(half + 1, len(level) - longest // 2))
        cut = half + int(np.argmin(smooth[half:last]))
        pieces.append((first, max(cut, first + 1)))
        first = pieces[-1][1]
    return [*pieces, (first, len(level))]


def _trimmed(level: np.ndarray, first: int, last: int, floor: float, samples: int, rate: int) -> tuple[int, int] | None:
    loud = np.flatnonzero(level[first:last] > floor)
    if not len(loud):
        return None
    margin, frame = round(MARGIN_SECONDS / FRAME_SECONDS), max(1, round(FRAME_SECONDS * rate))
    begin = max(first, first + int(loud[0]) - margin)
    end = min(last, first + int(loud[-1]) + 1 + margin)
    return begin * frame, min(end * frame, samples)
