"""A trained model for its users: mels in, audio out.

    from vocoder import Vocoder
    vocoder = Vocoder.from_pretrained("experiments/waveflow-h16-r64")
    audio = vocoder(mel)

Many clips go through the engine a few at once, and each sounds as it does alone.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

import checkpoint as ckpt
from audio import MelSpectrogram, check_mel, resample, rescale
from config import Config, DataConfig, config_with, load_config
from data import load_synthesis_entry
from fast.engine import SynthesisEngine, slow_precision_warning
from harness.checkpoints import newest_whole
from harness.devices import choose_device
from harness.errors import InputError
from model import FlowVocoder, build_model
from synthesis.denoiser import bias_spectrum, denoise, silent_mel
from synthesis.mel_checks import MelReader, MelStatistics
from synthesis.mel_matching import match_mel
from synthesis.streaming import SHORTEST_BLOCK, Reach, Stream, stream_engines

# Seconds of audio synthesized at once. A clip does not fill a GPU; 60 s are within the largest of its buckets. On a
# CPU only clips shorter than a tile of the engine gain from company, and wavs are to appear one after the other.
BATCH_SECONDS = {"cpu": 2.0, "cuda": 60.0}
PRETRAINED = {  # weights that come with the project, by name
    "nanoflow": Path(__file__).parent / "pretrained" / "nanoflow-lp128-r64.safetensors",
}

Array = np.ndarray | Tensor
Item = TypeVar("Item")


@dataclass(frozen=True)
class Clip:
    """A sound to be made."""

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


PLAIN = Finish()


class Vocoder:
    """Speech from log-mels by a trained flow vocoder, which stays as it is.

    data: how the mels were made; precision: of the products, as for the engine ("float32", "bfloat16", "float16");
    name: of the checkpoint; reader: of the mels that it is given.
    """

    def __init__(
        self,
        model: FlowVocoder,
        data: DataConfig,
        precision: str | None = None,
        name: str = "",
        reader: MelReader | None = None,
    ) -> None:
        self.model, self.data, self.name = model.eval(), data, name
        self.reader = reader or MelReader(data)
        self.engine, self.precision = SynthesisEngine(model, precision), precision
        self.device = next(model.parameters()).device

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Config,
        config: str | Path | Config | None = None,
        device: str | torch.device | None = None,
        precision: str | None = None,
        mel_preset: str | None = None,
    ) -> "Vocoder":
        """The vocoder of a checkpoint file, of a run's folder (its newest whole one), of an experiment's run, or, by
        name, of weights that come with the project (`PRETRAINED`).

        config: experiment file or Config, needed where a checkpoint does not know its own, as the published ones.
        mel_preset: front end of the mels that will be given to it, of `synthesis.mel_presets`; by default its own.
        device: by default a GPU where there is any. A moving average of the weights is preferred to the last ones.
        Raises InputError.
        """
        if config is not None and not isinstance(config, Config):
            config = load_config(config)
        if isinstance(path, Config) or Path(path).suffix == ".json":
            config = path if isinstance(path, Config) else load_config(path)
            path = config.run_folder
            if not path.is_dir():
                raise InputError(f"no checkpoint in {path}, which does not exist; train first, or name a file")
        checkpoint = find_checkpoint(path, partial(warnings.warn, stacklevel=3))
        config = config_of(checkpoint, config)
        device = choose_device(None if device is None else str(device))
        if warning := slow_precision_warning(precision, device):
            warnings.warn(warning, stacklevel=2)
        model = trained_model(checkpoint, config).to(device)
        reader = MelReader(config.data_config, mel_preset, MelStatistics.read(checkpoint.mel_statistics), _warn)
        return cls(model, config.data_config, precision, checkpoint.name, reader)

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the audio."""
        return self.data.sampling_rate

    @property
    def hop_length(self) -> int:
        """Audio samples per mel frame."""
        return self.data.hop_length

    @property
    def n_mels(self) -> int:
        """Bands of a mel."""
        return self.data.n_mel_channels

    @cached_property
    def mel_spectrogram(self) -> MelSpectrogram:
        """The front end of this vocoder, on the CPU."""
        return MelSpectrogram(self.data)

    def mel(self, audio: Array, sampling_rate: int) -> Array:
        """This vocoder's own log-mel [M, F] of audio [T] in [-1, 1] at any rate; an array like the audio.

        F = T // hop_length + 1, T counted at the vocoder's own rate. Raises InputError.
        """
        samples = resample(torch.as_tensor(audio).detach().cpu(), sampling_rate, self.sampling_rate)
        if self.data.rescale:
            samples = rescale(samples, samples.abs().max().item())
        return _like(audio, self.mel_spectrogram(samples))

    def __call__(
        self,
        mel: Array | Sequence[Array],
        temp: float = 1.0,
        seed: int | None = None,
        match_mel: int = 0,
        denoise: float = 0.0,
    ) -> Array | list[Array]:
        """Audio [T] in [-1, 1] of a log-mel [M, F], T = hop_length (F - 1): [B, T] of [B, M, F], a list of a list.

        Arrays are like the mel: numpy, or tensors on its device. Each of several mels sounds as it does alone.
        temp: standard deviation of the noise that synthesis starts from; seed: the same noise again, for each mel;
        without, it comes from PyTorch's global generator. match_mel: passes of `synthesis.mel_matching`, which filters
        the audio until its own mel is the one asked for; denoise: strength of `synthesis.denoiser`, before that.
        Raises InputError.
        """
        finish = Finish(match_mel, denoise)
        if isinstance(mel, (list, tuple)):
            return self._audio_of(mel, temp, seed, finish)
        if getattr(mel, "ndim", 0) == 3 and len(mel):
            return (torch if isinstance(mel, Tensor) else np).stack(self._audio_of(list(mel), temp, seed, finish))
        return self._audio_of([mel], temp, seed, finish)[0]

    def _audio_of(self, mels: Sequence[Array], temp: float, seed: int | None, finish: Finish) -> list[Array]:
        if not 0 <= temp < math.inf:
            raise InputError(f"temp {temp}: expected a finite number of at least 0")
        clips = []
        for number, mel in enumerate(mels):
            name = f"mel {number}" if len(mels) > 1 else "mel"
            if not isinstance(mel, (np.ndarray, Tensor)):
                raise InputError(f"{name}: of type {type(mel).__name__}, expected a numpy array or a tensor")
            clips.append(self.clip(name, self.reader(torch.as_tensor(mel).detach().cpu(), name), temp, seed))
        sounds = [sound for batch in self.synthesize(clips, finish=finish) for sound in batch]
        if spoilt := next((sound for sound in sounds if not sound.is_finite), None):
            raise InputError(f"{spoilt.clip.source}: the synthesis is not finite; train longer, or lower temp")
        return [_like(mel, sound.audio.clamp(-1, 1)) for mel, sound in zip(mels, sounds, strict=True)]

    def stream(
        self,
        mels: Array | Iterable[Array],
        temp: float = 1.0,
        seed: int | None = None,
        lookahead_frames: int | None = None,
    ) -> Iterator[Array]:
        """Audio [n] in [-1, 1], chunk after chunk, of a mel [M, F] or of one still being made: frames [M] or [M, f].

        Equal to the whole to 1e-4 with the same noise (`synthesis.streaming.frame_noise`). Chunks come later than their
        frames by what the flows can see (`fast.engine.receptive_field`), and by `lookahead_frames` and a block at most
        where that is given, at some cost in sound. Memory does not grow. Raises InputError.
        """
        if not 0 <= temp < math.inf:
            raise InputError(f"temp {temp}: expected a finite number of at least 0")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        reach = Reach.of(self.model.config, lookahead_frames)
        return self._stream(mels, Stream(self.model, self._stream_engines, reach, temp, generator))

    def _stream(self, mels: Array | Iterable[Array], stream: Stream) -> Iterator[Array]:
        example: list[Array] = []

        def frames() -> Iterator[Tensor]:
            for number, mel in enumerate([mels] if isinstance(mels, (np.ndarray, Tensor)) else mels):
                example[:] = [mel]
                frame = torch.as_tensor(mel).detach().cpu()
                frame = frame.unsqueeze(1) if frame.dim() == 1 else frame
                count = frame.size(-1)  # a single frame is fine here
                yield from self.reader(torch.cat([frame, frame], -1), f"mel {number}")[:, :count].split(
                    SHORTEST_BLOCK, 1
                )

        for audio in stream.run(frames()):
            if not audio.isfinite().all():
                raise InputError("mel: the synthesis is not finite; train longer, or lower temp")
            yield _like(example[0], audio.cpu().clamp(-1, 1))

    @cached_property
    def _stream_engines(self) -> list[SynthesisEngine]:
        return stream_engines(self.model, self.precision)

    def read(self, path: str, temp: float, seed: int) -> Clip:
        """A clip of a wav, with its recording, or of a mel file; InputError where it is neither."""
        mel, recording = load_synthesis_entry(path, self.data, self.mel_spectrogram)
        mel = self.reader(mel, path) if recording is None else mel
        return replace(self.clip(path, mel, temp, seed), recording=recording)

    def clip(self, source: str, mel: Tensor, temp: float, seed: int | None) -> Clip:
        """A mel [M, F] on the CPU with noise for it; InputError, naming the source, where it is not one."""
        mel = check_mel(mel, source, self.n_mels)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        z = self.model.sample_noise(mel.unsqueeze(0), temp, generator)[0, 0]
        return Clip(source, mel, z)

    def synthesize(
        self, clips: Iterable[Clip], batch_seconds: float | None = None, finish: Finish = PLAIN
    ) -> Iterator[list[Sound]]:
        """The sounds of clips, batch by batch: `batch_seconds` of audio at most, by default what suits the device.

        Clips are taken when they are needed; those before one that cannot be had come first, then its error.
        """
        at_once = BATCH_SECONDS[self.device.type] if batch_seconds is None else batch_seconds
        for batch in in_batches(clips, lambda clip: clip.z.numel(), at_once * self.sampling_rate):
            yield self._synthesize_batch(batch, finish)

    def _synthesize_batch(self, batch: Sequence[Clip], finish: Finish) -> list[Sound]:
        """Each clip as it sounds alone; the time is shared out by samples."""
        began = time.perf_counter()
        inputs = [(clip.mel.to(self.device), clip.z.to(self.device)) for clip in batch]
        lengths = [self.hop_length * (clip.mel.size(1) - 1) for clip in batch]  # noise is of whole columns
        sounds = [
            audio[:length].cpu() for audio, length in zip(self.engine.synthesize_many(inputs), lengths, strict=True)
        ]
        sounds = [self._finished(audio, clip.mel, finish) for audio, clip in zip(sounds, batch, strict=True)]
        per_sample = (time.perf_counter() - began) / sum(map(len, sounds))
        return [Sound(clip, audio, per_sample * len(audio)) for clip, audio in zip(batch, sounds, strict=True)]

    def _finished(self, audio: Tensor, mel: Tensor, finish: Finish) -> Tensor:
        if finish.denoise:
            audio = denoise(audio, self.bias, finish.denoise, self.data)
        if finish.match_mel:
            audio = match_mel(audio[None], mel[None], self.mel_spectrogram, finish.match_mel)[0]
        return audio

    @cached_property
    def bias(self) -> Tensor:
        """Magnitudes [n_fft/2 + 1, 1] of what this vocoder makes of silence without noise, on the CPU."""
        mel = silent_mel(self.data).to(self.device)
        z = self.model.sample_noise(mel.unsqueeze(0), temp=0.0)[0, 0]
        return bias_spectrum(self.engine.synthesize_many([(mel, z)])[0].cpu(), self.data)


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


def trained_model(checkpoint: ckpt.Checkpoint, config: Config) -> FlowVocoder:
    """A model with the checkpoint's weights, on the CPU, in evaluation mode; InputError if they are of another."""
    model = build_model(config.waveflow_config, config.data_config)
    weights = checkpoint.average if has_average(checkpoint, config) else checkpoint.weights
    ckpt.load_weights(model, weights, f"checkpoint {checkpoint.name}")
    return model.eval()


def has_average(checkpoint: ckpt.Checkpoint, config: Config) -> bool:
    """Tell whether a moving average of the weights is what the run meant to be used, and is there."""
    return config.train_config.ema_decay > 0 and checkpoint.average is not None


def find_checkpoint(path: str | Path, warn: Callable[[str], None]) -> ckpt.Checkpoint:
    """The checkpoint in a file, the newest whole one of a run's folder, or weights that come with the project by name.

    Those of a folder that are broken are warned of. Raises InputError.
    """
    path = Path(path) if Path(path).exists() else PRETRAINED.get(str(path), Path(path))
    if not path.is_dir():
        return ckpt.read_checkpoint(path)
    newest = newest_whole(path, ckpt.FILE_NAME, lambda file: ckpt.read_checkpoint(file, of_run=True), warn)
    if newest is None:
        raise InputError(f"no checkpoint in {path} that can be read; train first, or name a file")
    return newest


def config_of(checkpoint: ckpt.Checkpoint, given: Config | None, overrides: Sequence[str] = ()) -> Config:
    """The config that is given, which must agree with the checkpoint, or its own, or that in its folder.

    overrides: `section.key=value`, of a config that is not given. Raises InputError.
    """
    config = given or _own_config(checkpoint, overrides)
    kind = config.waveflow_config
    if checkpoint.config is None and kind.coupling_type == "waveflow" and ckpt.is_released(checkpoint.weights):
        kind = kind.model_copy(update={"coupling_type": "waveflow_official"})  # whose own configs say "waveflow" too
        config = config.model_copy(update={"waveflow_config": kind})
    ckpt.check_config(checkpoint, config)
    return config


def _own_config(checkpoint: ckpt.Checkpoint, overrides: Sequence[str]) -> Config:
    path = checkpoint.path
    if checkpoint.config is not None:
        try:
            return config_with(checkpoint.config, overrides)
        except InputError as error:
            reason = str(error) if overrides else f"its config is damaged ({error})"
            raise InputError(f"checkpoint {path}: {reason}; pass config=FILE") from None
    if (path.parent / "config.json").is_file():
        return load_config(path.parent / "config.json", overrides)
    raise InputError(f"checkpoint {path}: does not know its config; pass config=FILE, the experiment file")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)  # the line that calls the vocoder


def _like(example: Array, result: Tensor) -> Array:
    return result.to(example.device) if isinstance(example, Tensor) else result.numpy()
