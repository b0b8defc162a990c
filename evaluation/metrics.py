"""Metrics of a sound beside its recording, and their means over clips with 95 % intervals.

All but DNSMOS compare with the recording, frame by frame: a synthesis is as long as the recording its mel came from.
PESQ and DNSMOS are there where the packages `pesq` and `speechmos` are (requirements-extra.txt).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import dct
from scipy.stats import t as student
from torch import Tensor

from audio import MelSpectrogram, resample
from evaluation.distance import intelligibility, log_mel_distance
from harness.files import write_table
from harness.stopping import uninterrupted

RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # FFT, hop, window of Parallel WaveGAN
CEPSTRA = slice(1, 14)  # of the mel-cepstral distortion; the 0th is loudness
PITCH_RANGE = (65.0, 500.0)  # Hz
WIDEBAND = 16_000  # Hz, of PESQ and DNSMOS


class ClipMetrics(NamedTuple):
    """A sound's figures by name; nan where a clip has none."""

    system: str
    clip: str
    values: dict[str, float]


class Mean(NamedTuple):
    """A mean over clips, and half of its 95 % interval; nan where there are too few."""

    value: float
    half: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "none"
        return f"{self.value:.3f}" if math.isnan(self.half) else f"{self.value:.3f} ± {self.half:.3f}"


UNITS = {
    "log_mel": "nats, 0 at best",
    "mrstft": "0 at best",
    "mcd": "dB, 0 at best",
    "f0_rmse": "cents, 0 at best",
    "voicing_f1": "1 at best",
    "stoi": "1 at best",
    "pesq": "MOS-LQO, 4.64 at best",
    "dnsmos": "MOS, 5 at best",
}


class Recording:
    """A recording [T], what its sounds are compared with; its pitch is tracked once."""

    def __init__(self, audio: Tensor, mel_fn: MelSpectrogram) -> None:
        self.audio, self.mel_fn, self.rate = audio, mel_fn, mel_fn.config.sampling_rate
        self.pitch = lru_cache(maxsize=1)(lambda: pitch(audio, self.rate, mel_fn.config.hop_length))

    def compare(self, sound: Tensor) -> dict[str, float]:
        """Figures of a sound [T'], over what the two have in common."""
        samples = min(len(sound), len(self.audio))
        sound, audio = sound[:samples].cpu().float().clamp(-1, 1), self.audio[:samples].cpu().float()
        mel, own = self.mel_fn(sound), self.mel_fn(audio)
        error, f1 = pitch_errors(pitch(sound, self.rate, self.mel_fn.config.hop_length), self.pitch())
        values = {
            "log_mel": log_mel_distance(mel, own),
            "mrstft": stft_distance(sound, audio),
            "mcd": cepstral_distortion(mel, own) if not self.mel_fn.config.use_dbmel else math.nan,
            "f0_rmse": error,
            "voicing_f1": f1,
            "stoi": intelligibility(sound, audio, self.rate),
        }
        return {**values, **{name: metric(sound, audio, self.rate) for name, metric in _extra().items()}}


def stft_distance(sound: Tensor, recording: Tensor) -> float:
    """Multi-resolution STFT distance of two sounds [T]: spectral convergence plus mean difference of log magnitudes."""
    total = 0.0
    for n_fft, hop, window in RESOLUTIONS:
        frames = {"n_fft": n_fft, "hop_length": hop, "win_length": window, "window": torch.hann_window(window)}
        one, other = (
            torch.stft(audio, **frames, pad_mode="constant", return_complex=True).abs().clamp(min=1e-7)
            for audio in (sound, recording)
        )
        convergence = torch.linalg.norm(other - one) / torch.linalg.norm(other)
        total += (convergence + (other.log() - one.log()).abs().mean()).item()
    return total / len(RESOLUTIONS)


def cepstral_distortion(mel: Tensor, reference: Tensor) -> float:
    """Mel-cepstral distortion of two log-mels [M, F] in dB: cepstra 1 to 13 of the bands, frames as they stand."""
    frames = min(mel.size(1), reference.size(1))
    change = (mel[:, :frames] - reference[:, :frames]).double().numpy()
    cepstra = dct(change, axis=0, norm="ortho") * math.sqrt(2 / len(change))
    return float(10 / math.log(10) * np.sqrt(2 * np.square(cepstra[CEPSTRA]).sum(0)).mean())


def pitch(audio: Tensor, rate: int, hop: int) -> np.ndarray:
    """Pitch of each frame in Hz by probabilistic YIN (Mauch & Dixon, 2014); nan where there is none."""
    import librosa  # seconds to import

    low, high = PITCH_RANGE
    frame = 2 ** math.ceil(math.log2(2.5 * rate / low))
    with uninterrupted():  # or the process may end with a segmentation fault
        return librosa.pyin(audio.numpy(), fmin=low, fmax=high, sr=rate, frame_length=frame, hop_length=hop)[0]


def pitch_errors(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Root mean square error in cents over the frames that are voiced in both, and F1 of the voicing; nan where none
    is voiced.
    """
    frames = min(len(found), len(expected))
    found, expected = found[:frames], expected[:frames]
    voiced, meant = ~np.isnan(found), ~np.isnan(expected)
    both = voiced & meant
    if not (voiced | meant).any():
        return math.nan, math.nan
    f1 = 2 * both.sum() / (voiced.sum() + meant.sum())
    cents = 1200 * np.log2(found[both] / expected[both])
    return float(np.sqrt(np.square(cents).mean())) if both.any() else math.nan, float(f1)


# --- what needs further packages --------------------------------------------------------------------------


def _extra() -> dict[str, Callable[[Tensor, Tensor, int], float]]:
    wanted = {"pesq": ("pesq", _pesq), "dnsmos": ("speechmos", _dnsmos)}
    return {name: metric for name, (package, metric) in wanted.items() if find_spec(package) is not None}


def _pesq(sound: Tensor, recording: Tensor, rate: int) -> float:
    """Wideband PESQ (ITU-T P.862.2); nan where it finds no speech."""
    import pesq

    heard, meant = (resample(audio, rate, WIDEBAND).numpy() for audio in (sound, recording))
    try:
        return float(pesq.pesq(WIDEBAND, meant, heard, "wb"))
    except pesq.PesqError:
        return math.nan


def _dnsmos(sound: Tensor, recording: Tensor, rate: int) -> float:
    """Overall quality by DNSMOS (Reddy et al., 2022), of the sound alone."""
    from speechmos import dnsmos

    return float(dnsmos.run(resample(sound, rate, WIDEBAND).numpy(), sr=WIDEBAND)["ovrl_mos"])


# --- over clips -------------------------------------------------------------------------------------------


def means(clips: Sequence[ClipMetrics]) -> dict[str, dict[str, Mean]]:
    """Means of each system's figures over the clips that have them."""
    found: dict[str, dict[str, Mean]] = {}
    for system in dict.fromkeys(clip.system for clip in clips):
        rows = [clip.values for clip in clips if clip.system == system]
        found[system] = {name: interval([row[name] for row in rows]) for name in rows[0]}
    return found


def interval(values: Sequence[float]) -> Mean:
    """Mean and half of the 95 % interval (Student's t) of the values that are not nan."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return Mean(math.nan, math.nan)
    if len(known) == 1:
        return Mean(float(known[0]), math.nan)
    half = student.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known))
    return Mean(float(known.mean()), float(half))


def table(found: Mapping[str, Mapping[str, Mean]]) -> str:
    """Lines of a system each, columns of a metric each."""
    names = list(next(iter(found.values())))
    width = max(map(len, [*found, "system"]))
    lines = [f"{'system':{width}}  " + "  ".join(f"{name:>15}" for name in names)]
    for system, row in found.items():
        cells = (str(row[name]) for name in names)
        lines.append(f"{system:{width}}  " + "  ".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def write_metrics(path: Path, clips: Sequence[ClipMetrics]) -> None:
    """One CSV row per system and clip."""
    rows = ([clip.system, clip.clip, *clip.values.values()] for clip in clips)
    write_table(path, [["system", "clip", *clips[0].values], *rows])
