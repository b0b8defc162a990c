"""A vocoder's speech beside its recordings, and beside what is to be had without training: its floors.

For each recording the mel is synthesized from, and scored, next to the untrained filter of the linear prediction driven
by white noise, and to white noise itself; each as it comes, and after mel matching, which helps all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from audio import MelSpectrogram, write_wav
from data import output_names, read_clip
from evaluation.distance import intelligibility, log_mel_distance, noise_like
from evaluation.pictures import save_spectrograms
from harness import terminal
from harness.files import check_apart
from synthesis.mel_matching import match_mel
from vocoder import Vocoder

SHOWN_SECONDS = 1.5  # of the picture
KINDS = ("synthesis", "filter alone", "white noise")


@dataclass(frozen=True)
class Score:
    """Likeness of a sound to its recording."""

    stoi: float  # short-time objective intelligibility, 1 at best
    log_mel: float  # log-mel distance in nats, 0 at best


def speak(vocoder: Vocoder, files: Sequence[str], folder: Path, temp: float, passes: int) -> dict[str, list[Score]]:
    """Synthesize recordings into `folder`, with a picture of the first; returns the mean scores of each kind of sound,
    as it comes and after so many passes of mel matching.
    """
    scores: dict[str, list[list[Score]]] = {}
    sounds = [_file_name(output, name) for output in output_names(files) for name in ("recording", *KINDS)]
    check_apart((folder / name for name in sounds), files, "choose another folder")
    for number, (file, output) in enumerate(zip(files, output_names(files), strict=True)):
        recording = read_clip(file, vocoder.data)
        plain = sounds_of(vocoder, recording, temp, seed=number)
        matched = _matched(plain, vocoder.mel_spectrogram, recording, passes)
        for name in plain:
            pair = [score(sounds[name], recording, vocoder.mel_spectrogram) for sounds in (plain, matched)]
            scores.setdefault(name, []).append(pair)
        for name, sound in {"recording": recording, **matched}.items():
            write_wav(folder / _file_name(output, name), sound, vocoder.sampling_rate)
        if number == 0:
            _draw(folder / "spectrograms.png", recording, plain, matched, vocoder.sampling_rate)
    return {name: [_mean([pair[place] for pair in pairs]) for place in (0, 1)] for name, pairs in scores.items()}


def _file_name(output: str, kind: str) -> str:
    return f"{output.removesuffix('.wav')}.{kind.replace(' ', '_')}.wav"


def sounds_of(vocoder: Vocoder, recording: Tensor, temp: float, seed: int) -> dict[str, Tensor]:
    """The synthesis [T] of a recording's mel, and its floors, by name."""
    mel = vocoder.mel_spectrogram(recording)
    sounds = {"synthesis": vocoder(mel, temp=temp, seed=seed)}
    if (filter_of := vocoder.model.linear_prediction) is not None:
        noise = temp * torch.randn(1, len(recording), generator=torch.Generator().manual_seed(seed))
        sounds["filter alone"] = filter_of.inverse(noise.to(vocoder.device), mel[None].to(vocoder.device))[0].cpu()
    sounds["white noise"] = noise_like(recording)
    return {name: sound.clamp(-1, 1) for name, sound in sounds.items()}


def score(sound: Tensor, recording: Tensor, mel_fn: MelSpectrogram) -> Score:
    """Likeness of a sound [T] to its recording [T]."""
    rate = mel_fn.config.sampling_rate
    return Score(intelligibility(sound, recording, rate), log_mel_distance(mel_fn(sound), mel_fn(recording)))


def say_scores(means: Mapping[str, Sequence[Score]], n_files: int, passes: int) -> None:
    """A table of what `speak` returned."""
    terminal.say(f"{f'mean of {n_files} recording(s)':24}   as it comes      after {passes} passes of mel matching")
    for name, pair in means.items():
        cells = "   ".join(f"STOI {one.stoi:.3f}, log-mel {one.log_mel:.3f}" for one in pair)
        terminal.say(f"{name:24} {cells}")


def _draw(path: Path, recording: Tensor, plain: Mapping[str, Tensor], matched: Mapping[str, Tensor], rate: int) -> None:
    shown = {"recording": recording, "synthesis, mel matched": matched["synthesis"], **plain}
    save_spectrograms(path, {name: sound[: round(SHOWN_SECONDS * rate)] for name, sound in shown.items()}, rate)


def _matched(sounds: Mapping[str, Tensor], mel_fn: MelSpectrogram, recording: Tensor, passes: int) -> dict[str, Tensor]:
    mel = mel_fn(recording)[None]
    return {name: match_mel(sound[None], mel, mel_fn, passes)[0].clamp(-1, 1) for name, sound in sounds.items()}


def _mean(scores: Sequence[Score]) -> Score:
    heard = [one.stoi for one in scores if one.stoi == one.stoi]  # nan: too little speech to tell
    stoi = sum(heard) / len(heard) if heard else float("nan")
    return Score(stoi, sum(one.log_mel for one in scores) / len(scores))
