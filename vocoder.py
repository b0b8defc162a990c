"""A trained model for its users: mels in, audio out.

    from vocoder import Vocoder
    vocoder = Vocoder.from_pretrained("experiments/waveflow-h16-r64")
    audio = vocoder(mel)

Many clips go through the engine a few at once, and each sounds as it does alone.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint as ckpt
from audio import MelSpectrogram, check_mel, resample, rescale
from config import Config, DataConfig, config_with, load_config
from data import load_synthesis_entry
from fast.engine import SynthesisEngine, check_precision, slow_precision_warning
from harness.checkpoints import newest_whole
from harness.devices import choose_device
from harness.errors import InputError
from model import FlowVocoder, build_model
from synthesis.arguments import generator_of, items_of, number, path_of, rate_of, recording_of, seed_of, tensor_of
from synthesis.clips import PLAIN, Clip, Finish, Sound, checked_clip, in_batches
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
# The remedy for weights without a config, of commands that have no flag for one.
CONVERT = "make weights that do: python checkpoint.py convert FILE OUT -c CONFIG"
Array = np.ndarray | Tensor


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
        check_precision(precision)  # what is quickly told comes first
        device = choose_device(None if device is None else str(device))
        warn = partial(warnings.warn, stacklevel=5)  # of the line that calls this
        checkpoint, config = find_trained(path, config, "pass config=FILE, the experiment file", warn)
        return cls.of(checkpoint, config, device, precision, mel_preset)

    @classmethod
    def of(
        cls,
        checkpoint: ckpt.Checkpoint,
        config: Config,
        device: torch.device | None = None,
        precision: str | None = None,
        mel_preset: str | None = None,
    ) -> "Vocoder":
        """The vocoder of a checkpoint and its config (`find_trained`); the rest as for `from_pretrained`."""
        device = choose_device() if device is None else device
        if warning := slow_precision_warning(precision, device):
            warnings.warn(warning, stacklevel=3)
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

        F = T // hop_length + 1, T counted at the vocoder's own rate; of [1, T], [1, M, F]. Raises InputError.
        """
        rate = rate_of(sampling_rate)
        given = recording_of(audio, rate, self.sampling_rate)
        samples = resample(given.flatten(), rate, self.sampling_rate)
        if self.data.rescale and len(samples):
            samples = rescale(samples, samples.abs().max().item())
        mel = self.mel_spectrogram(samples)
        if not mel.isfinite().all():
            raise InputError(f"audio of samples up to {given.abs().max():.3g}: expected them in [-1, 1]; scale it down")
        return _like(audio, mel.unsqueeze(0) if given.dim() == 2 else mel)

    def __call__(
        self,
        mel: Array | Sequence[Array],
        temp: float = 1.0,
        seed: int | None = None,
        match_mel: int = 0,
        denoise: float = 0.0,
    ) -> Array | list[Array]:
        """Audio [T] in [-1, 1] of a log-mel [M, F], T = hop_length (F - 1): [B, T] of [B, M, F], a list of a list.

        Mels are of any floating-point type, arrays of audio like them in kind, numpy or tensors on their device, and
        float32. Each of several mels sounds as it does alone.
        temp: standard deviation of the noise that synthesis starts from; seed: the same noise again, for each mel;
        without, it comes from PyTorch's global generator. match_mel: passes of `synthesis.mel_matching`, which filters
        the audio until its own mel is the one asked for; denoise: strength of `synthesis.denoiser`, before that.
        Raises InputError.
        """
        finish = Finish(match_mel, denoise)
        if isinstance(mel, (list, tuple)):
            audio = self._audio_of(mel, temp, seed, finish)
            return [_like(given, made) for given, made in zip(mel, audio, strict=True)]
        numbers = tensor_of(mel, "mel")
        is_batch = numbers.dim() == 3 and len(numbers) > 0
        audio = self._audio_of(list(numbers) if is_batch else [numbers], temp, seed, finish)
        return _like(mel, torch.stack(audio) if is_batch else audio[0])

    def _audio_of(self, mels: Sequence[object], temp: float, seed: int | None, finish: Finish) -> list[Tensor]:
        """The audio [T] of each, on the CPU."""
        temp, seed = number(temp, "temp"), seed_of(seed)  # also where there is no mel
        clips = []
        for place, mel in enumerate(mels):
            name = f"mel {place}" if len(mels) > 1 else "mel"
            clips.append(self.clip(name, self.reader(tensor_of(mel, name), name), temp, seed))
        sounds = [sound for batch in self.synthesize(clips, finish=finish) for sound in batch]
        if spoilt := next((sound for sound in sounds if not sound.is_finite), None):
            raise InputError(f"{spoilt.clip.source}: the synthesis is not finite; train longer, or lower temp")
        return [sound.audio.clamp(-1, 1) for sound in sounds]

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
        temp, generator = number(temp, "temp"), generator_of(seed)
        reach = Reach.of(self.model.config, lookahead_frames)
        whole = isinstance(mels, (np.ndarray, Tensor))
        pieces = items_of([mels] if whole else mels, "mels", "a numpy array, a tensor, or several, one after another")
        return self._stream(pieces, Stream(self.model, self._stream_engines, reach, temp, generator))

    def _stream(self, mels: Iterable[Array], stream: Stream) -> Iterator[Array]:
        example: list[Array] = []

        def frames() -> Iterator[Tensor]:
            for place, mel in enumerate(mels):
                name = f"mel {place}"
                frame = tensor_of(mel, name)
                frame = frame.unsqueeze(1) if frame.dim() == 1 else frame
                frame = self.reader(frame, name, least_frames=1).clone()  # its owner may write into it meanwhile
                example[:] = [mel]
                yield from frame.split(SHORTEST_BLOCK, 1)

        for audio in stream.run(frames()):
            if not audio.isfinite().all():
                raise InputError("mel: the synthesis is not finite; train longer, or lower temp")
            yield _like(example[0], audio.cpu().clamp(-1, 1))

    @cached_property
    def _stream_engines(self) -> list[SynthesisEngine]:
        return stream_engines(self.model, self.precision)

    def read(self, path: str | Path, temp: float, seed: int | None) -> Clip:
        """A clip of a wav, with its recording, or of a mel file; InputError where it is neither."""
        path = str(path_of(path, "path", "the name of a wav or of a mel file"))
        mel, recording = load_synthesis_entry(path, self.data, self.mel_spectrogram)
        mel = self.reader(mel, path) if recording is None else mel
        return replace(self.clip(path, mel, temp, seed), recording=recording)

    def clip(self, source: str, mel: Array, temp: float, seed: int | None) -> Clip:
        """A mel [M, F] with noise for it; InputError, naming the source, where it is not one."""
        source = str(source)
        mel = check_mel(tensor_of(mel, source), source, self.n_mels)
        z = self.model.sample_noise(mel.unsqueeze(0), number(temp, "temp"), generator_of(seed))[0, 0]
        return Clip(source, mel, z)

    def synthesize(
        self, clips: Iterable[Clip], batch_seconds: float | None = None, finish: Finish = PLAIN
    ) -> Iterator[list[Sound]]:
        """The sounds of clips, batch by batch: `batch_seconds` of audio at most, by default what suits the device.

        Clips are taken when they are needed; those before one that cannot be had come first, then its error.
        """
        at_once = BATCH_SECONDS[self.device.type] if batch_seconds is None else number(batch_seconds, "batch_seconds")
        if not isinstance(finish, Finish):
            raise InputError(f"finish: of type {type(finish).__name__}, expected a Finish(match_mel, denoise)")
        checked = map(checked_clip, items_of(clips, "clips", "a list of what Vocoder.clip gives"))
        batches = in_batches(checked, lambda clip: clip.z.numel(), at_once * self.sampling_rate)
        return (self._synthesize_batch(batch, finish) for batch in batches)

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


def trained_model(checkpoint: ckpt.Checkpoint, config: Config) -> FlowVocoder:
    """A model with the checkpoint's weights, on the CPU, in evaluation mode; InputError if they are of another."""
    model = build_model(config.waveflow_config, config.data_config)
    weights = checkpoint.average if has_average(checkpoint, config) else checkpoint.weights
    ckpt.load_weights(model, weights, f"checkpoint {checkpoint.name}")
    return model.eval()


def has_average(checkpoint: ckpt.Checkpoint, config: Config) -> bool:
    """Tell whether a moving average of the weights is what the run meant to be used, and is there."""
    return config.train_config.ema_decay > 0 and checkpoint.average is not None


def find_trained(
    path: str | Path | Config, config: str | Path | Config | None, remedy: str, warn: Callable[[str], None]
) -> tuple[ckpt.Checkpoint, Config]:
    """The checkpoint that `Vocoder.from_pretrained` is of, and its config; remedy: for one that knows none.

    Raises InputError.
    """
    if config is not None and not isinstance(config, Config):
        config = load_config(path_of(config, "config", "an experiment file, or a Config"))
    if not isinstance(path, Config):
        path = path_of(path, "path", "a checkpoint, the folder of a run, an experiment file, or a name")
        path = load_config(path) if path.suffix == ".json" else path
    if isinstance(path, Config):
        config, path = path, path.run_folder
        if not os.path.isdir(path):
            raise InputError(f"no checkpoint in {path}, which does not exist; train first, or name a file")
    checkpoint = find_checkpoint(path, warn)
    return checkpoint, config_of(checkpoint, config, remedy)


def find_checkpoint(path: str | Path, warn: Callable[[str], None]) -> ckpt.Checkpoint:
    """The checkpoint in a file, the newest whole one of a run's folder, or weights that come with the project by name.

    Those of a folder that are broken are warned of. Raises InputError.
    """
    path = path_of(path, "weights", f"a checkpoint, the folder of a run, or a name ({', '.join(PRETRAINED)})")
    path = path if os.path.exists(path) else PRETRAINED.get(str(path), path)
    if not os.path.isdir(path):  # of names that no file can have, too, which those of pathlib do not bear
        return ckpt.read_checkpoint(path)
    newest = newest_whole(path, ckpt.FILE_NAME, lambda file: ckpt.read_checkpoint(file, of_run=True), warn)
    if newest is None:
        raise InputError(f"no checkpoint in {path} that can be read; train first, or name a file")
    return newest


def config_of(checkpoint: ckpt.Checkpoint, given: Config | None, remedy: str, overrides: Sequence[str] = ()) -> Config:
    """The config that is given, which must agree with the checkpoint, or its own, or that in its folder.

    remedy: how to give one; overrides: `section.key=value`, of a config that is not given. Raises InputError.
    """
    config = given or _own_config(checkpoint, remedy, overrides)
    kind = config.waveflow_config
    if checkpoint.config is None and kind.coupling_type == "waveflow" and ckpt.is_released(checkpoint.weights):
        kind = kind.model_copy(update={"coupling_type": "waveflow_official"})  # whose own configs say "waveflow" too
        config = config.model_copy(update={"waveflow_config": kind})
    ckpt.check_config(checkpoint, config)
    return config


def _own_config(checkpoint: ckpt.Checkpoint, remedy: str, overrides: Sequence[str]) -> Config:
    path = checkpoint.path
    if checkpoint.config is not None:
        try:
            return config_with(checkpoint.config, overrides)
        except InputError as error:
            reason = str(error) if overrides else f"its config is damaged ({error})"
            raise InputError(f"checkpoint {path}: {reason}; {remedy}") from None
    if os.path.isfile(path.parent / "config.json"):
        return load_config(path.parent / "config.json", overrides)
    raise InputError(f"checkpoint {path}: does not know its config; {remedy}")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)  # the line that calls the vocoder


def _like(example: Array, result: Tensor) -> Array:
    return result.to(example.device) if isinstance(example, Tensor) else result.numpy()
