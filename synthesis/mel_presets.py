"""Mels of other front ends, by name: what each does, and its mel as this vocoder's own, where nothing is lost.

A mel is a logarithm of filtered spectra. Another base, floor or scale of that logarithm can be undone exactly. Other
filters, frames or frequencies cannot, nor power in place of magnitude: such a preset is refused with the difference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from audio import LOG_FLOOR
from config import DataConfig
from harness.errors import InputError, show

DECIBEL = math.log(10) / 20  # nats of magnitude
NATS = {"e": 1.0, "10": math.log(10), "dB": DECIBEL}


@dataclass(frozen=True)
class Preset:
    """A front end: nats of a band's magnitude are (scale * value + offset), in its logarithm's base."""

    what: str  # for a list of them
    base: str | None = "e"  # of the logarithm: "e", "10" or "dB"; None: there is none
    scale: float = 1.0
    offset: float = 0.0
    frames: Mapping[str, float | None] = field(default_factory=dict)  # keys of data_config; none: those of the vocoder
    lost: str = ""  # what no conversion brings back


def _frames(rate: int, n_fft: int, hop: int, bands: int, fmin: float, fmax: float | None) -> dict[str, float | None]:
    """Settings of data_config; fmax None: half the rate. The window is as long as the Fourier transform."""
    return {
        "sampling_rate": rate,
        "filter_length": n_fft,
        "win_length": n_fft,
        "hop_length": hop,
        "n_mel_channels": bands,
        "mel_fmin": fmin,
        "mel_fmax": rate / 2 if fmax is None else fmax,
    }


_HTK = "its filters are HTK's, without normalisation, and ours are Slaney's"
_POWER = "its bands are sums of power, which do not tell sums of magnitudes"
_LJ, _ESPNET = _frames(22_050, 1024, 256, 80, 0, 8_000), _frames(22_050, 1024, 256, 80, 80, 7_600)
PRESETS = {
    "tacotron2": Preset("NVIDIA's Tacotron 2, FastPitch and NeMo: natural log, floor 1e-5", frames=_LJ),
    "waveglow": Preset("NVIDIA's WaveGlow: as tacotron2", frames=_LJ),
    "hifigan": Preset("HiFi-GAN, Matcha-TTS: as tacotron2, frames half a hop later", frames=_LJ),
    "bigvgan": Preset("BigVGAN at 22 kHz, 80 bands to 8 kHz: as hifigan", frames=_LJ),
    "bigvgan_24khz": Preset(
        "BigVGAN at 24 kHz, 100 bands: as hifigan", frames=_frames(24_000, 1024, 256, 100, 0, 12_000)
    ),
    "bigvgan_v2_22khz": Preset(
        "BigVGAN v2 at 22 kHz, 80 bands: as hifigan", frames=_frames(22_050, 1024, 256, 80, 0, None)
    ),
    "bigvgan_v2_44khz": Preset(
        "BigVGAN v2 at 44.1 kHz, 128 bands: as hifigan", frames=_frames(44_100, 2048, 512, 128, 0, None)
    ),
    "vocos": Preset(
        "Vocos: natural log, floor 1e-7, torchaudio's filters",
        frames=_frames(24_000, 1024, 256, 100, 0, None),
        lost=_HTK,
    ),
    "espnet": Preset("ESPnet on LJSpeech: log10, floor 1e-10", "10", frames=_ESPNET),
    "speecht5": Preset("SpeechT5: log10, floor 1e-10, 16 kHz", "10", frames=_frames(16_000, 1024, 256, 80, 80, 7_600)),
    "parallel_wavegan": Preset(
        "ParallelWaveGAN: as espnet, normalised by statistics of its corpus",
        "10",
        frames=_ESPNET,
        lost="it is normalised by the statistics of its corpus: undo that (times scale, plus mean) and give espnet",
    ),
    "r9y9": Preset(
        "WaveNet vocoder, FloWaveNet: decibels with reference 20, mapped to [0, 1]",
        "dB",
        100.0,
        -80.0,
        frames=_frames(22_050, 1024, 256, 80, 125, 7_600),
    ),
    "librosa_db": Preset("librosa.amplitude_to_db(melspectrogram(power=1)), ref 1, at the vocoder's settings", "dB"),
    "librosa_power_db": Preset("librosa.power_to_db(melspectrogram()), its default", "dB", lost=_POWER),
    "natural_log": Preset("natural log, any floor, at the vocoder's settings"),
    "log10": Preset("log10, any floor, at the vocoder's settings", "10"),
    "decibels": Preset("20 log10, any floor, at the vocoder's settings", "dB"),
    "unit_decibels": Preset("(20 log10 - 10 + 100) / 100 in [0, 1], `use_dbmel` of this project", "dB", 100.0, -90.0),
    "symmetric": Preset("20 log10 - 20 from -100 to 0 mapped to [-4, 4]", "dB", 12.5, -30.0),
    "linear": Preset("magnitudes without a logarithm, at the vocoder's settings", None),
}


def convert_mel(mel: Tensor, name: str, data: DataConfig) -> Tensor:
    """A mel [M, F] of the preset called `name` as one of `data` settings [M, F]; InputError where that is not the same.

    What is below the floor of `data` is raised to it, as its own front end would.
    """
    preset = find_preset(name, data)
    if preset.base is None:
        nats = mel.clamp(min=LOG_FLOOR).log()
    else:
        nats = (mel * preset.scale + preset.offset) * NATS[preset.base]
    nats = nats.clamp(min=math.log(LOG_FLOOR))
    return ((nats / DECIBEL - 10 + 100) / 100).clamp(0, 1) if data.use_dbmel else nats


def find_preset(name: str, data: DataConfig) -> Preset:
    """The preset called `name`; InputError where there is none, or its mels cannot be had for `data` settings."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"mel_preset {show(name)}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    different = [
        f"{key} {value:g}, this vocoder {getattr(data, key):g}"
        for key, value in preset.frames.items()
        if value is not None and getattr(data, key) != value
    ]
    if different or preset.lost:
        reasons = "; ".join([*([preset.lost] if preset.lost else []), *different])
        raise InputError(
            f"mel_preset {name}: cannot become a mel of this vocoder: {reasons}; make mels by this vocoder's settings, "
            "or take a vocoder of those"
        )
    return preset
