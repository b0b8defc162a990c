"""Other vocoders' mels, made here by their published formulas, through their presets."""

import warnings

import librosa
import numpy as np
import pytest
import torch

from audio import MelSpectrogram, read_wav
from config import DataConfig
from harness.errors import InputError
from synthesis.mel_checks import MelReader, MelStatistics, mel_warning
from synthesis.mel_presets import PRESETS, convert_mel
from tests.support.experiments import RATE, ROOT, fails, run
from tests.support.vocoders import random_vocoder
from vocoder import Vocoder

SPEECH = read_wav(ROOT / "pretrained" / "speech" / "priv-introsaved.wav", RATE)[: 60 * 256]
NATIVE = DataConfig()
ESPNET = DataConfig(mel_fmin=80, mel_fmax=7600)
R9Y9 = DataConfig(mel_fmin=125, mel_fmax=7600)


def filters(fmin, fmax):
    return librosa.filters.mel(sr=RATE, n_fft=1024, n_mels=80, fmin=fmin, fmax=fmax)


def magnitudes(audio):
    return np.abs(librosa.stft(audio, n_fft=1024, hop_length=256, win_length=1024, pad_mode="reflect"))


def hifigan(audio):
    """Frames without centring, the audio reflected by (n_fft - hop) / 2."""
    padded = np.pad(audio, (384, 384), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 1024)[::256]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    spectrum = np.fft.rfft(frames * window).T
    magnitude = np.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)
    return np.log(np.clip(filters(0, 8000) @ magnitude, 1e-5, None))


def espnet(audio):
    spectrum = np.sqrt(np.maximum(magnitudes(audio) ** 2, 1e-10))
    return np.log10(np.maximum(filters(80, 7600) @ spectrum, 1e-10))


def librosa_db(audio):
    settings = {"n_fft": 1024, "hop_length": 256, "n_mels": 80, "fmin": 0, "fmax": 8000, "pad_mode": "reflect"}
    return librosa.amplitude_to_db(librosa.feature.melspectrogram(y=audio, sr=RATE, power=1.0, **settings), top_db=None)


def r9y9(audio):
    decibels = 20 * np.log10(np.maximum(1e-5, filters(125, 7600) @ magnitudes(audio))) - 20
    return np.clip((decibels + 100) / 100, 0, 1)


def symmetric(audio):
    decibels = 20 * np.log10(np.maximum(1e-5, filters(0, 8000) @ magnitudes(audio))) - 20
    return np.clip(8 * ((decibels + 100) / 100) - 4, -4, 4)


def natural_log(audio):
    return np.log(np.clip(filters(0, 8000) @ magnitudes(audio), 1e-7, None))


def log10(audio):
    return np.log10(np.maximum(1e-5, filters(0, 8000) @ magnitudes(audio)))


def linear(audio):
    return filters(0, 8000) @ magnitudes(audio)


CASES = [
    ("hifigan", hifigan, NATIVE, 128),
    ("bigvgan", hifigan, NATIVE, 128),
    ("espnet", espnet, ESPNET, 0),
    ("librosa_db", librosa_db, NATIVE, 0),
    ("r9y9", r9y9, R9Y9, 0),
    ("symmetric", symmetric, NATIVE, 0),
    ("natural_log", natural_log, NATIVE, 0),
    ("log10", log10, NATIVE, 0),
    ("linear", linear, NATIVE, 0),
]


@pytest.mark.parametrize(("name", "formula", "data", "later"), CASES, ids=[case[0] for case in CASES])
def test_a_foreign_mel_gives_the_audio_of_our_own(name, formula, data, later):
    audio = SPEECH + 0.003 * torch.randn(len(SPEECH), generator=torch.Generator().manual_seed(0))  # above every floor
    foreign = torch.from_numpy(formula(audio.numpy())).float()[:, 4:34]
    own = MelSpectrogram(data)(audio[later:])[:, 4:34]
    torch.testing.assert_close(convert_mel(foreign, name, data), own, atol=2e-3, rtol=0)
    vocoder = Vocoder(random_vocoder(data_config=data), data)
    through = Vocoder(vocoder.model, data, reader=MelReader(data, name))
    torch.testing.assert_close(through(foreign, seed=0), vocoder(own, seed=0), atol=5e-3, rtol=0)


def test_the_decibels_of_use_dbmel_are_made_of_natural_logs():
    data = DataConfig(use_dbmel=True)
    own = MelSpectrogram(NATIVE)(SPEECH)
    torch.testing.assert_close(convert_mel(own, "natural_log", data), MelSpectrogram(data)(SPEECH), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("vocos", "HTK's, without normalisation.*sampling_rate 24000, this vocoder 22050.*n_mel_channels 100"),
        ("espnet", "mel_fmin 80, this vocoder 0; mel_fmax 7600, this vocoder 8000"),
        ("librosa_power_db", "sums of power"),
        ("parallel_wavegan", "give espnet"),
        ("bigvgan_v2_22khz", "mel_fmax 11025, this vocoder 8000"),
        ("griffin", "expected one of tacotron2, waveglow"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_difference(name, difference):
    with pytest.raises(InputError, match=difference) as error:
        MelReader(NATIVE, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("formula", "cause", "preset"),
    [
        (librosa_db, "decibels", "librosa_db"),
        (log10, "log10", "log10"),
        (linear, "no logarithm", "linear"),
        (r9y9, "mapped to \\[0, 1\\]", "unit_decibels"),
        (symmetric, "\\[-4, 4\\]", "symmetric"),
        (lambda audio: 2 * natural_log(audio), "of power", "natural_log"),
    ],
)
def test_a_mel_that_cannot_be_right_is_named_once_with_its_preset(formula, cause, preset):
    mel = torch.from_numpy(formula(SPEECH.numpy())).float()
    vocoder = Vocoder(random_vocoder(), NATIVE)
    vocoder.reader.warn = warnings.warn
    with pytest.warns(UserWarning, match=f"{cause}.*give mel_preset {preset}$") as caught:
        vocoder.reader(mel, "mel")
        vocoder.reader(mel, "mel")
    assert len(caught) == 1


def test_mels_of_our_own_front_end_are_not_warned_of():
    own = MelSpectrogram(NATIVE)
    for audio in (SPEECH, 0.1 * SPEECH, 0 * SPEECH, SPEECH / SPEECH.abs().max(), SPEECH[:4_000]):
        assert mel_warning(own(audio), NATIVE, None) is None
    normalised = own(SPEECH) - own(SPEECH).mean()
    assert "CMVN" in mel_warning(normalised / normalised.std(), NATIVE, None)
    assert "far from that of the training data" in mel_warning(own(SPEECH), NATIVE, MelStatistics(-1, 1, -5, 2, 9))


def test_a_run_knows_its_mels_and_warns_of_others(trained, tmp_path, capsys):
    _, folder = trained
    content = torch.load(folder / "waveflow_8", weights_only=True)
    known = content["mel_statistics"]
    assert known["clips"] == 6 and known["low"] <= known["mean"] <= known["high"] and known["std"] > 0
    np.save(tmp_path / "mel.npy", librosa_db(SPEECH.numpy()))
    job = ["--synthesize", "--weights", folder, "--input", tmp_path / "mel.npy", "--output", tmp_path]
    assert run(*job) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "mel.npy: mel values" in line and "give mel_preset librosa_db" in line
    assert run(*job, "--mel_preset", "librosa_db") == 0
    assert "warning" not in capsys.readouterr().err
    assert "mel_fmin 80, this vocoder 0" in fails(capsys, *job, "--mel_preset", "espnet")
    assert set(PRESETS) >= {"tacotron2", "waveglow", "hifigan", "bigvgan", "vocos", "espnet", "librosa_db"}
