"""Sounds of a trained run for its report, with their spectrograms, z, and statistics of its flows, on test clips."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from audio import is_mel_file, read_wav, shortest_audio, wav_length
from checkpoint import Checkpoint
from config import Config, DataConfig
from data import ClipDataset
from evaluation.charts import Drawing, picture
from evaluation.distance import intelligibility, log_mel_distance
from evaluation.flow_statistics import FlowStatistics, NoiseStatistics, flow_statistics
from evaluation.pictures import decibels, palette_png
from harness.errors import InputError
from harness.lists import Entry, read_entries
from jobs.report_runs import Run
from jobs.synthesis import encoded
from vocoder import Vocoder, trained_model

SECONDS = 3.0  # of a clip, at most
STATISTICS_CLIPS = 4
TOP = 8_000.0  # Hz of the spectrograms
RANGE = 80.0  # dB below the loudest of the recording
DIFFERENCE = 30.0  # dB to either side
FRAMES_PER_SECOND = 86.0


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a test clip: audio [T], mel [M, F]."""

    path: str
    audio: Tensor
    mel: Tensor

    @property
    def key(self) -> tuple[str, int]:
        """Its identity, by which runs on the same recording are shown together."""
        return str(Path(self.path).resolve()), len(self.audio)


@dataclass(frozen=True)
class Heard:
    """A sound with its spectrogram; of a synthesis also the difference from its recording and figures."""

    title: str
    audio: str  # a data URI
    drawings: Sequence[Drawing]
    figures: str = ""


@dataclass(frozen=True)
class Made:
    """Syntheses of excerpts by a run's newest checkpoint, and statistics on them."""

    excerpts: Sequence[Excerpt]
    syntheses: Sequence[Heard | None]
    flows: Sequence[FlowStatistics]
    z: Tensor  # [N]
    noise: NoiseStatistics


def excerpts_of(run: Run, config: Config) -> list[Excerpt]:
    """The beginnings of a run's first test clips. InputError where they are not there any more."""
    data, found = config.data_config, []
    here = run.directory
    for name in data.test_lists:
        path = here / name if here is not None and not Path(name).exists() else Path(name)
        found += read_entries(path, [] if here is None else [here])
        if len(found) >= STATISTICS_CLIPS:
            break
    sounds = [entry for entry in found if not is_mel_file(entry.audio)][:STATISTICS_CLIPS]
    return [_excerpt(entry, data) for entry in sounds]


def _excerpt(entry: Entry, data: DataConfig) -> Excerpt:
    longest = min(round(SECONDS * data.sampling_rate), wav_length(entry.audio, data.sampling_rate))
    length = longest // data.hop_length * data.hop_length
    if length < max(shortest_audio(data), 1024):
        raise InputError(f"{entry.audio}: {length} samples, too short to be shown")
    mels = {entry.audio: entry.mel} if entry.mel else None
    return Excerpt(*ClipDataset([entry.audio], data, max_length=length, mels=mels)[0])


def make(
    run: Run, found: tuple[Checkpoint, Config], excerpts: Sequence[Excerpt], device: torch.device, shown: int
) -> Made:
    """Syntheses of the first `shown` excerpts at temperature 1, statistics of all; those not finite are noted."""
    checkpoint, config = found
    vocoder = Vocoder(trained_model(checkpoint, config).to(device), config.data_config, name=checkpoint.name)
    clips = [(excerpt.audio, excerpt.mel) for excerpt in excerpts]
    flows, z = flow_statistics(vocoder.model, clips, device)
    noise = NoiseStatistics.of(z, config.train_config.sigma)
    if not math.isfinite(noise.std):
        run.note("z of the test clips is not finite: the model has diverged")
    seed = config.train_config.seed
    syntheses = [_synthesis(run, vocoder, excerpt, seed + place) for place, excerpt in enumerate(excerpts[:shown])]
    return Made(excerpts[:shown], syntheses, flows, z, noise)


def _synthesis(run: Run, vocoder: Vocoder, excerpt: Excerpt, seed: int) -> Heard | None:
    [[sound]] = vocoder.synthesize([vocoder.clip(excerpt.path, excerpt.mel, 1.0, seed)])
    if not sound.is_finite:
        run.note(f"the synthesis of {Path(excerpt.path).name} is not finite: the model may need more training")
        return None
    audio, rate = sound.audio.clamp(-1, 1), vocoder.sampling_rate
    mel, recorded = vocoder.mel_spectrogram(audio), vocoder.mel_spectrogram(excerpt.audio)
    stoi = intelligibility(audio, excerpt.audio, rate)
    figures = f"log-mel distance {log_mel_distance(mel, recorded):.3f}" + (
        "" if math.isnan(stoi) else f", STOI {stoi:.3f}"
    )
    drawings = [
        _spectrogram(f"{run.label}: synthesis", audio, rate, excerpt.audio),
        _difference(audio, excerpt.audio, rate),
    ]
    return Heard(f"{run.label}, {vocoder.name}", _sound_uri(audio, rate), drawings, figures)


def recording(excerpt: Excerpt, rate: int) -> Heard:
    """The recording itself."""
    drawing = _spectrogram("recording", excerpt.audio, rate, excerpt.audio)
    return Heard("recording", _sound_uri(excerpt.audio, rate), [drawing])


def last_sample(run: Run) -> Heard | None:
    """The sample that the run wrote at its last checkpoint, for where recordings are gone; None where there is none."""
    paths = sorted((run.folder / "samples").glob("waveflow_*.wav"), key=lambda path: (len(path.name), path.name))
    if run.config is None or not paths:
        return None
    rate = run.config.data_config.sampling_rate
    audio = read_wav(paths[-1], rate, length=min(wav_length(paths[-1], rate), round(SECONDS * rate)))
    if len(audio) < 1024:
        return None
    drawing = _spectrogram(f"{run.label}: its sample", audio, rate, audio)
    return Heard(f"{run.label}, samples/{paths[-1].name}", _sound_uri(audio, rate), [drawing])


# --- data URIs --------------------------------------------------------------------------------------------


def _sound_uri(audio: Tensor, rate: int) -> str:
    return _uri("audio/flac", encoded(audio, rate, "flac"))


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _levels(audio: Tensor, rate: int) -> Tensor:
    return decibels(audio, rate, min(TOP, rate / 2), hop=round(rate / FRAMES_PER_SECOND))


def _drawn(title: str, values: Tensor, scale: tuple[float, float, str], audio: Tensor, rate: int) -> Drawing:
    return picture(title, _uri("image/png", palette_png(values, *scale)), len(audio) / rate, min(TOP, rate / 2))


def _spectrogram(title: str, audio: Tensor, rate: int, reference: Tensor) -> Drawing:
    loudest = _levels(reference, rate).max().item()
    return _drawn(title, _levels(audio, rate), (loudest - RANGE, loudest, "magma"), audio, rate)


def _difference(audio: Tensor, reference: Tensor, rate: int) -> Drawing:
    """Decibels of a synthesis above (red) or below (blue) its recording, of what is within the range of either."""
    floor = _levels(reference, rate).max().item() - RANGE
    one, other = (_levels(sound, rate).clamp(min=floor) for sound in (audio, reference))
    frames = min(one.size(1), other.size(1))
    title = f"difference: louder red, softer blue, to {DIFFERENCE:g} dB"
    return _drawn(title, one[:, :frames] - other[:, :frames], (-DIFFERENCE, DIFFERENCE, "RdBu_r"), audio, rate)
