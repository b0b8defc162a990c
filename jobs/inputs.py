"""Inputs of a user: sound files of any format and rate, mel files, and folders of both."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from audio import MEL_SUFFIXES, is_mel_file, resample, rescale, shortest_audio
from config import DataConfig
from harness.errors import InputError
from harness.files import kind_of

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64")
MAX_SAMPLES = 2**28  # over all channels: an hour and a half of stereo at 24 kHz, 1 GiB


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


def check_sound(path: str) -> None:
    """InputError, naming the file, where soundfile cannot read it; only its header is looked at."""
    import soundfile  # with librosa; not needed for wavs of lists

    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        reason = str(error.error_string).strip().rstrip(".")
        raise InputError(f"{path}: not a sound file that can be read ({reason}); convert it to wav or flac") from None
    if not 0 < info.frames * info.channels <= MAX_SAMPLES:
        raise InputError(
            f"{path}: {info.frames} samples of {info.channels} channel(s), expected 1 to {MAX_SAMPLES}; cut it up"
        )


def read_sound(path: str, sampling_rate: int) -> Tensor:
    """Audio [T] at `sampling_rate` of a file of any format and rate; the mean of its channels. Raises InputError."""
    import soundfile

    check_sound(path)
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # [T, channels]
    audio = torch.from_numpy(samples).mean(1)
    if not audio.isfinite().all():
        raise InputError(f"{path}: holds samples that are not finite; make it again")
    return resample(audio, rate, sampling_rate)


def check_input(path: str) -> None:
    """InputError where a sound cannot be read; mels are looked at when they are read."""
    if not is_mel_file(path):
        check_sound(path)


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
