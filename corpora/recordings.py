"""Recordings of any kind as they are found: folders, files, lists; read whole, mono, at one rate, without offset."""

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.downloads import damage_named
from harness.errors import InputError
from harness.files import open_file, read_bytes
from harness.lists import read_entries

# Suffixes of recordings; libsndfile reads all but the last few, which are named with what to do about them.
KNOWN = {
    *("wav", "wave", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "snd", "caf", "w64", "rf64"),
    *("sph", "voc", "m4a", "aac", "mp4", "wma", "webm", "amr", "ape", "g722"),
}
LISTS = {"txt", "csv", "tsv", "lst", "scp", "jsonl", "json"}
BLOCK = 2**20  # frames read at a time
MAX_HOURS = 6  # of one recording; it is held in memory at the new rate
MAX_FILE_BYTES = 2**36  # six hours of many channels
MAX_STREAMED_BYTES = 2**32  # of a wav whose header was written before its length was known, the most that wavs can have
STEP = 2.0**-15  # of 16-bit audio
CLIPPED_RUN = 3  # samples in a row at full scale; a single one may be a genuine peak


@dataclass(frozen=True)
class Source:
    """A recording, and the path below what was given: it names clips, and its first folder is the speaker."""

    path: Path
    below: Path

    @property
    def speaker(self) -> str:
        """The first folder of the path; empty where there is none."""
        return self.below.parts[0] if len(self.below.parts) > 1 else ""


@dataclass(frozen=True)
class Recording:
    """Audio [T] in [-1, 1] at the rate asked for, and what the file was."""

    audio: np.ndarray
    form: str  # as in "WAV PCM_24, 2 channels"
    rate: int  # Hz, of the file
    offset: float  # of the file, removed if it is above a step of 16 bits
    clipped: int  # frames in runs at full scale


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The recordings of files, folders and lists, in order, each once. InputError where one of them is not there."""
    found: dict[Path, Source] = {}
    for given in map(Path, inputs):
        for source in _sources_of(given):
            found.setdefault(source.path.resolve(), source)
    if not found:
        raise InputError(f"{', '.join(map(str, inputs))}: no recordings there; known are {', '.join(sorted(KNOWN))}")
    return list(found.values())


def _sources_of(given: Path) -> Iterator[Source]:
    if given.is_dir():
        for path in sorted(given.rglob("*")):
            if _suffix(path) in KNOWN and path.is_file() and not path.name.startswith("."):
                yield Source(path, path.relative_to(given))
    elif not given.is_file():
        raise InputError(f"{given}: no such file or folder")
    elif _suffix(given) in LISTS:
        for entry in read_entries(given):
            path = Path(entry.audio)
            yield Source(path, Path(path.parent.name, path.name) if path.parent.name else Path(path.name))
    else:
        yield Source(given, Path(given.name))


def _suffix(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def read_recording(path: Path, rate: int) -> Recording:
    """A whole recording, its channels averaged. InputError names a file that cannot be read, or is too long."""
    import soundfile

    with damage_named(path, f"cannot be read; if it plays, convert it: ffmpeg -i {path} converted.wav"):
        _check_beginning(path)
        with soundfile.SoundFile(path if soundfile.info(path).frames else _mended(path)) as file:
            if file.frames > MAX_HOURS * 3600 * file.samplerate and file.frames < 2**40:
                raise InputError(f"{path}: over {MAX_HOURS} hours; cut it into parts")
            return _read(file, path, rate)


def _check_beginning(path: Path) -> None:
    with open_file(path, MAX_FILE_BYTES) as file:
        beginning = file.read(64).lstrip()
    if not beginning:
        raise InputError(f"{path}: empty")
    if beginning[:1] in (b"<", b"{"):
        raise InputError(f"{path}: a web page or other text, no sound")


def _read(file: "soundfile.SoundFile", path: Path, rate: int) -> Recording:  # noqa: F821 (imported when needed)
    import soxr

    resample = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32") if file.samplerate != rate else None
    parts, total, frames, clipped = [], 0.0, 0, _Clipped()
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise InputError(f"{path}: holds NaN or infinite samples")
        clipped.add(np.abs(block).max(axis=1) >= 1 - STEP)
        mono = block.mean(axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0]
        total, frames = total + float(mono.sum(dtype=np.float64)), frames + len(mono)
        parts.append(mono if resample is None else resample.resample_chunk(mono))
        if frames > MAX_HOURS * 3600 * file.samplerate:
            raise InputError(f"{path}: over {MAX_HOURS} hours; cut it into parts")
    if not frames:
        raise InputError(f"{path}: holds no audio")
    if resample is not None:
        parts.append(resample.resample_chunk(np.zeros(0, np.float32), last=True))
    audio, offset = np.concatenate(parts), total / frames
    if abs(offset) > STEP:
        audio = audio - np.float32(offset)
    channels = f", {file.channels} channels" if file.channels > 1 else ""
    return Recording(audio, f"{file.format} {file.subtype}{channels}", file.samplerate, offset, clipped.total)


def _mended(path: Path) -> io.BytesIO:
    """A file without frames; if it is a wav written into a pipe, with what its header promises put right."""
    content = bytearray(read_bytes(path, MAX_STREAMED_BYTES))
    if content[:4] == b"RIFF" and (data := content.find(b"data", 12)) > 0 and not any(content[data + 4 : data + 8]):
        content[4:8] = struct.pack("<L", len(content) - 8)
        content[data + 4 : data + 8] = struct.pack("<L", len(content) - data - 8)
    return io.BytesIO(content)


class _Clipped:
    """Count of flags in runs of at least CLIPPED_RUN, within blocks."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, flags: np.ndarray) -> None:
        if flags.any():
            edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
            runs = edges[1::2] - edges[::2]
            self.total += int(runs[runs >= CLIPPED_RUN].sum())
