"""Metrics of vocoders on recordings: copy-syntheses by checkpoints, and another vocoder's sounds in a folder."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import checkpoint as ckpt
from audio import is_mel_file, resample
from config import Config
from data import output_names
from evaluation.metrics import UNITS, ClipMetrics, Recording, means, table, write_metrics
from harness import terminal
from harness.errors import InputError
from harness.processes import gather, on_main, share
from harness.stopping import safe_point
from jobs.inputs import find_inputs, read_recording, read_sound
from jobs.synthesis import Request
from vocoder import CONVERT, PRETRAINED, Vocoder, find_trained

Maker = Callable[[int, Tensor], Tensor]  # number of a recording, the recording [T] -> the sound [T'], at its rate


def measure_all(
    vocoder: Vocoder, others: Sequence[str], entries: Sequence[str], request: Request, config: Config
) -> Path:
    """Say the table of all systems and write the figures of each clip; returns that file. Raises InputError."""
    if mel := next(filter(is_mel_file, entries), None):
        raise InputError(f"{mel}: a mel, where metrics need a recording to compare with")
    first = config.train_config.seed if request.seed is None else request.seed
    systems = {vocoder.name: _synthesis(vocoder, vocoder, request, first)}
    for path in others:
        name = path if Path(path).name in systems else Path(path).name
        systems[name] = _system(path, vocoder, entries, request, first)
    clips = gather(list(_measured(vocoder, systems, entries)))
    path = config.run_folder / "evaluation" / f"{vocoder.name}_metrics.csv"
    on_main(lambda: write_metrics(path, clips))
    found = means(clips)
    terminal.say(f"{len(entries)} clip(s), mean ± 95 % interval\n{table(found)}")
    terminal.say("; ".join(f"{name}: {UNITS[name]}" for name in next(iter(found.values()))))
    return path


def _measured(vocoder: Vocoder, systems: dict[str, Maker], entries: Sequence[str]) -> Iterator[ClipMetrics]:
    """Figures of this process's share of the recordings, one at a time."""
    recordings = share(list(enumerate(entries)))
    for number, entry in terminal.bar(recordings, "metrics", unit="clip", leave=False):
        safe_point()
        audio = read_recording(entry, vocoder.data)
        recording = Recording(audio, vocoder.mel_spectrogram)
        for name, make in systems.items():
            sound = make(number, audio)
            if not torch.isfinite(sound).all():
                raise InputError(f"{entry}: the synthesis by {name} is not finite; train longer, or lower --temp")
            yield ClipMetrics(name, entry, recording.compare(sound))


def _system(path: str, own: Vocoder, entries: Sequence[str], request: Request, seed: int) -> Maker:
    """Another checkpoint, run or named weights, or a folder of sounds."""
    if Path(path).is_dir() and not ckpt.list_checkpoints(path):
        return _folder(path, own, entries)
    if not Path(path).exists() and path not in PRETRAINED:
        raise InputError(f"--metrics {path}: expected a checkpoint, a run's folder or a folder of sounds")
    checkpoint, config = find_trained(path, None, CONVERT, terminal.warn)
    other = Vocoder.of(checkpoint, config, own.device, request.precision)
    return _synthesis(other, own, request, seed)


def _synthesis(vocoder: Vocoder, own: Vocoder, request: Request, seed: int) -> Maker:
    def make(number: int, recording: Tensor) -> Tensor:
        mel = vocoder.mel(recording, own.sampling_rate)
        clip = vocoder.clip("a recording", mel, request.temps[0], seed + number)
        [[sound]] = vocoder.synthesize([clip], finish=request.finish)
        return resample(sound.audio, vocoder.sampling_rate, own.sampling_rate)

    return make


def _folder(path: str, own: Vocoder, entries: Sequence[str]) -> Maker:
    """Sounds by the names that --synthesize gives them; InputError where one is missing."""
    sounds = {Path(file).stem: file for file in find_inputs([path]) if not is_mel_file(file)}
    stems = [Path(name).stem for name in output_names(entries)]
    if missing := [stem for stem in stems if stem not in sounds]:
        raise InputError(
            f"{path}: no sound called {missing[0]} (of {len(missing)} missing), expected one for each clip"
        )
    return lambda number, _: read_sound(sounds[stems[number]], own.sampling_rate)
