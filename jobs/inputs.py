"""Inputs of a user: sound files of any format and rate, mel files, and folders of both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio import MEL_SUFFIXES, check_length, is_mel_file, resample, rescale, shortest_audio
from config import DataConfig
from formats.sounds import open_sound
from harness import terminal
from harness.errors import InputError
from harness.files import RefusedFile, kind_of

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64")


def find_inputs(paths: Sequence[str]) -> list[str]:
    """Files as they are named, folders as the sounds and mels in and below them, by name. Raises InputError."""
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if _is_input(file, path))
            if not inside:
                raise InputError(f"{path}: no sound or mel in this folder; expected {', '.join(_SUFFIXES)}")
            found += map(str, inside)
        elif path.is_file():
            found.append(str(path))
        elif path.exists():
            raise InputError(f"{path}: {kind_of(path.stat().st_mode)}, expected a file or a folder")
        else:
            raise InputError(f"{path}: no such file or folder")
    return found


_SUFFIXES = (*SOUND_SUFFIXES, *MEL_SUFFIXES)


def _is_input(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in _SUFFIXES and file.is_file() and not hidden


@contextmanager
def _opened(path: str, sampling_rate: int) -> Iterator[Any]:
    """A sound file, of a length that can be borne at its own rate and at `sampling_rate`.

    InputError, naming the file, where it is none, or where its samples turn out to be damaged in the block.
    """
    try:
        with terminal.libraries_hushed(), open_sound(path) as file:
            if file.frames < 1:
                raise InputError(f"{path}: holds no samples, or is damaged; get it again")
            check_length(path, file.frames, file.channels, file.samplerate, sampling_rate)
            yield file
    except (RefusedFile, OSError) as error:
        told = getattr(error, "strerror", None) or error
        remedy = "get it again, or convert it to wav or flac"
        raise InputError(f"{path}: not a sound file that can be read ({told}); {remedy}") from None


def read_sound(path: str, sampling_rate: int) -> Tensor:
    """Audio [T] at `sampling_rate` of a file of any format and rate; the mean of its channels. Raises InputError."""
    with _opened(path, sampling_rate) as file:
        samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate  # [T, channels]
    audio = torch.from_numpy(samples).mean(1)
    if not audio.isfinite().all():
        raise InputError(f"{path}: holds samples that are not finite; make it again")
    return resample(audio, rate, sampling_rate)


def check_input(path: str, sampling_rate: int) -> None:
    """InputError where the header of a sound cannot be read; mels are looked at when they are read."""
    if not is_mel_file(path):
        with _opened(path, sampling_rate):
            pass


def read_recording(path: str, data: DataConfig) -> Tensor:
    """Audio [T] of a file of any format and rate as `data` has it: its rate, whole frames, rescaled if it says so.

    InputError where it is too short for a mel.
    """
    audio = read_sound(path, data.sampling_rate)
    audio = audio[: len(audio) // data.hop_length * data.hop_length]
    if len(audio) < shortest_audio(data):
        seconds, needed = (samples / data.sampling_rate for samples in (len(audio), shortest_audio(data)))
        raise InputError(f"{path}: {seconds:.3f} s, at least {needed:.3f} s are needed")
    return rescale(audio, audio.abs().max().item()) if data.rescale else audio
