"""Recordings of any kind as they are found: folders, files, lists; read whole, mono, at one rate, without offset."""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from corpora.names import is_utf8
from formats.sounds import open_sound
from harness.downloads import damage_named
from harness.errors import InputError, show
from harness.files import RefusedFile, open_file
from harness.lists import read_entries

# Suffixes of recordings; libsndfile reads all but the last few, which are named with what to do about them.
KNOWN = {
    *("wav", "wave", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "snd", "caf", "w64", "rf64"),
    *("sph", "voc", "m4a", "aac", "mp4", "wma", "webm", "amr", "ape", "g722"),
}
LISTS = {"txt", "csv", "tsv", "lst", "scp", "jsonl", "json"}
BLOCK = 2**20  # samples read at a time, of all channels
MAX_HOURS = 6  # of one recording; it is held in memory at the new rate
MAX_FILE_BYTES = 2**36  # six hours of many channels
MAX_HEADER_BYTES = 2**20  # of such a wav, up to its samples
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
            try:
                found.setdefault(source.path.resolve(), source)
            except ValueError:  # a null byte, or half of a surrogate pair
                raise InputError(f"{given}: {show(str(source.path))} is no name of a file; mend the list") from None
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
    if not is_utf8(path):
        raise InputError(f"{path}: its name is not UTF-8; rename it")
    with damage_named(path, f"cannot be read; if it plays, convert it: ffmpeg -i {path} converted.wav"):
        _check_beginning(path)
        with _opened(path) as file:
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
    while len(block := file.read(max(1, BLOCK // file.channels), dtype="float32", always_2d=True)):
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
    audio, offset = _joined(parts), total / frames
    if abs(offset) > STEP:
        audio -= np.float32(offset)
    channels = f", {file.channels} channels" if file.channels > 1 else ""
    return Recording(audio, f"{file.format} {file.subtype}{channels}", file.samplerate, offset, clipped.total)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts as one array; each is let go as soon as it is copied, so that hours are never held twice."""
    audio = np.empty(sum(map(len, parts)), np.float32)
    end = len(audio)
    while parts:
        part = parts.pop()
        audio[end - len(part) : end] = part
        end -= len(part)
    return audio


@contextmanager
def _opened(path: Path) -> Iterator["soundfile.SoundFile"]:  # noqa: F821 (imported when needed)
    """A sound file; a wav without frames, as one written into a pipe is, with what its header promises put right."""
    import soundfile

    with open_sound(path) as sound:
        if sound.frames:
            yield sound
            return
    with open_file(path, MAX_STREAMED_BYTES) as file:
        header, size = bytearray(file.read(MAX_HEADER_BYTES)), os.fstat(file.fileno()).st_size
        data = header.find(b"data", 12)
        if header[:4] != b"RIFF" or data < 0 or any(header[data + 4 : data + 8]):
            raise RefusedFile("it holds no samples")
        header[4:8], header[data + 4 : data + 8] = struct.pack("<L", size - 8), struct.pack("<L", size - data - 8)
        file.seek(0)
        with soundfile.SoundFile(_Mended(file, bytes(header[: data + 8]))) as sound:
            yield sound


class _Mended:
    """A file with another beginning, as libsndfile asks for it."""

    def __init__(self, file: BinaryIO, beginning: bytes) -> None:
        self._file, self._beginning = file, beginning
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        before = self._beginning[self.tell() :][:size]
        content = self._file.read(size)
        return before + content[len(before) :]


class _Clipped:
    """Count of flags in runs of at least CLIPPED_RUN, within blocks."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, flags: np.ndarray) -> None:
        if flags.any():
            edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
            runs = edges[1::2] - edges[::2]
            self.total += int(runs[runs >= CLIPPED_RUN].sum())
