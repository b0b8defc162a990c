"""Synthesis of many: a list, files or folders to sound files, with what each took, at one temperature or several."""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import soundfile
from torch import Tensor

from audio import INT16_SCALE, is_mel_file, write_wav
from config import Config
from data import check_synthesis_entries, output_names, read_synthesis_files
from evaluation.comparison import compare_with_recording
from harness import terminal
from harness.errors import InputError
from harness.files import check_apart, in_a_name, written_whole
from harness.folder import record_more
from harness.processes import gather, is_main, share
from harness.stopping import safe_point, uninterrupted
from jobs.inputs import check_input, find_inputs, read_recording
from vocoder import PLAIN, Clip, Finish, Sound, Vocoder

STDOUT = "-"


@dataclass(frozen=True)
class Request:
    """Wishes about a synthesis."""

    inputs: Sequence[str] = ()  # files and folders; none: the test list of the config
    output: str | None = None  # folder, or STDOUT; None: a folder of the run
    format: str = "wav"
    temps: Sequence[float] = (1.0,)  # standard deviations of the noise
    seed: int | None = None  # of the noise of the first clip, the next has the next; None: the config's
    mel_preset: str | None = None  # front end of the mels; None: the vocoder's own
    precision: str | None = None  # of the products; None: that of the weights
    batch_seconds: float | None = None  # of audio at once; None: as the device likes
    finish: Finish = PLAIN

    def entries(self, config: Config) -> list[str]:
        """Every file to synthesize from; InputError, naming it, where one is not fit for that."""
        if not self.inputs:
            entries = read_synthesis_files(config.data_config)
            check_synthesis_entries(entries, config.data_config)
        else:
            entries = find_inputs(self.inputs)
            for entry in entries:
                check_input(entry, config.data_config.sampling_rate)
        if self.output == STDOUT and len(entries) * len(self.temps) != 1:
            raise InputError(
                f"--output -: {len(entries)} input(s) at {len(self.temps)} temperature(s); stdout takes one sound"
            )
        return entries


def synthesize_all(vocoder: Vocoder, entries: Sequence[str], request: Request, config: Config) -> None:
    """Write the sound of every entry at every temperature; several processes share them. Raises InputError."""
    folders = {temp: _folder(request, temp, config, vocoder.name) for temp in request.temps}
    if request.output != STDOUT:
        names = output_names(entries, f".{request.format}")
        for folder in folders.values():
            check_apart((folder / name for name in names), entries, "choose another folder")
    for temp, folder in folders.items():
        clips = _clips(vocoder, entries, request, temp, config.train_config.seed)
        samples, seconds = 0, 0.0
        for sounds in vocoder.synthesize(clips, request.batch_seconds, request.finish):
            safe_point()
            _write_batch(sounds, folder, vocoder, request)
            samples += sum(len(sound.audio) for sound in sounds)
            seconds += sum(sound.seconds for sound in sounds)
        samples, seconds = map(sum, zip(*gather([(samples, seconds)]), strict=True))
        terminal.say(f"{len(entries)} clip(s): {_speed(samples, seconds, vocoder.sampling_rate)}")
        if request.output != STDOUT:
            terminal.say(f"{request.format}s: {folder}")
            if is_main():
                record_more(config.run_folder, output=str(folder), synthesis=vocoder.engine.choices)


def _folder(request: Request, temp: float, config: Config, name: str) -> Path:
    """Folder of one temperature: of several, each has its own."""
    if request.output is not None:
        return Path(request.output, f"temp{in_a_name(temp)}") if len(request.temps) > 1 else Path(request.output)
    finish = request.finish
    matched = f"_matched{finish.match_mel}" if finish.match_mel else ""
    denoised = f"_denoised{in_a_name(finish.denoise)}" if finish.denoise else ""
    return config.run_folder / "synthesis" / f"{name}_temp{in_a_name(temp)}{denoised}{matched}"


def _clips(vocoder: Vocoder, entries: Sequence[str], request: Request, temp: float, seed: int) -> Iterator[Clip]:
    """Share of this process in the clips; on the main process the first recording of a list stays, for comparison."""
    compared = is_main() and not request.inputs
    first = seed if request.seed is None else request.seed
    names = output_names(entries, f".{request.format}")
    for place, (entry, output) in share(list(enumerate(zip(entries, names, strict=True)))):
        # noise that does not depend on who does the others
        clip = (
            _read(vocoder, entry, temp, first + place) if request.inputs else vocoder.read(entry, temp, first + place)
        )
        yield replace(clip, output=output, recording=clip.recording if compared else None)
        compared = compared and clip.recording is None


def _read(vocoder: Vocoder, entry: str, temp: float, seed: int) -> Clip:
    """A clip of a mel file, or of a sound of any format and rate."""
    if is_mel_file(entry):
        return vocoder.read(entry, temp, seed)
    return vocoder.clip(entry, vocoder.mel_spectrogram(read_recording(entry, vocoder.data)), temp, seed)


def _write_batch(sounds: Sequence[Sound], folder: Path, vocoder: Vocoder, request: Request) -> None:
    """File and line of each sound; InputError names one that is not finite, after the others have been written."""
    shared = f" (its share of a batch of {len(sounds)})" if len(sounds) > 1 else ""
    for sound in filter(lambda sound: sound.is_finite, sounds):
        if request.output == STDOUT:
            sys.__stdout__.buffer.write(encoded(sound.audio, vocoder.sampling_rate, request.format))
            sys.__stdout__.buffer.flush()
        elif request.format == "wav":
            write_wav(folder / sound.clip.output, sound.audio, vocoder.sampling_rate)
        else:
            with written_whole(folder / sound.clip.output) as temporary:
                temporary.write_bytes(encoded(sound.audio, vocoder.sampling_rate, request.format))
        speed = _speed(len(sound.audio), sound.seconds, vocoder.sampling_rate)
        terminal.tell(f"{sound.clip.output}: {speed}{shared}")
        if (recording := sound.clip.recording) is not None:
            picture = (folder / sound.clip.output).with_suffix(".png")
            distances = compare_with_recording(sound.audio, recording, vocoder.mel_spectrogram, picture)
            shown = ", ".join(f"{distance:.3f} of the {name}" for name, distance in distances.items())
            terminal.say(f"log-mel distance to the recording: {shown}; picture: {picture}")
    for sound in sounds:
        if not sound.is_finite:
            raise InputError(f"{sound.clip.source}: the synthesis is not finite; train longer, or lower --temp")


def encoded(audio: Tensor, sampling_rate: int, kind: str) -> bytes:
    """Audio [T] as the bytes of a 16-bit file."""
    scaled = (audio * INT16_SCALE).round().clamp(-INT16_SCALE, INT16_SCALE - 1).short()
    content = io.BytesIO()
    with uninterrupted():  # libsndfile calls back to write into memory, and an exception there would cost samples
        soundfile.write(content, scaled.numpy(), sampling_rate, format=kind.upper(), subtype="PCM_16")
    return content.getvalue()


def _speed(samples: int, seconds: float, sampling_rate: int) -> str:
    return (
        f"{samples / sampling_rate:.2f} s of audio in {seconds:.2f} s, {samples / seconds / 1000:.1f} kHz, "
        f"{samples / sampling_rate / seconds:.2f} x real time"
    )
