"""Each metric on sounds whose figure is known."""

import math

import numpy as np
import pytest
import torch

from audio import MelSpectrogram
from config import DataConfig
from evaluation import metrics
from evaluation.metrics import ClipMetrics, Recording, cepstral_distortion, interval, means, pitch_errors, table

RATE = 22_050


def harmonics(pitch, seconds=0.6):
    axis = torch.arange(round(RATE * seconds)) / RATE
    return 0.1 * sum(torch.sin(2 * math.pi * pitch * k * axis) / k for k in range(1, 10))


def test_a_recording_is_as_good_as_itself_and_noise_is_worse():
    recording = Recording(harmonics(150), MelSpectrogram(DataConfig()))
    same = recording.compare(harmonics(150))
    for name in ("log_mel", "mrstft", "mcd", "f0_rmse"):
        assert same[name] == pytest.approx(0, abs=1e-6), name
    assert same["voicing_f1"] == 1
    noise = recording.compare(0.1 * torch.randn(len(recording.audio), generator=torch.Generator().manual_seed(0)))
    assert noise["log_mel"] > 1 and noise["mrstft"] > 1 and noise["mcd"] > 3
    assert noise["voicing_f1"] < 1 or noise["f0_rmse"] > 50


def test_a_semitone_is_a_hundred_cents():
    recording = Recording(harmonics(150), MelSpectrogram(DataConfig()))
    assert recording.compare(harmonics(150 * 2 ** (1 / 12)))["f0_rmse"] == pytest.approx(100, abs=12)
    silent = np.full(5, np.nan)
    assert all(map(math.isnan, pitch_errors(silent, silent)))
    error, f1 = pitch_errors(np.array([100, 200, np.nan]), np.array([100, np.nan, np.nan]))
    assert (error, f1) == (0, pytest.approx(2 / 3))


def test_mel_cepstral_distortion_is_that_of_its_formula():
    mel, bands = torch.zeros(80, 4), (torch.arange(80) + 0.5) / 80
    ripple = 0.2 * torch.cos(math.pi * 3 * bands)  # ln|H| = c3 cos(3 w), c3 = 0.2
    expected = 10 / math.log(10) * math.sqrt(2 * 0.2**2)
    assert cepstral_distortion(mel + ripple[:, None], mel) == pytest.approx(expected, rel=1e-5)
    assert cepstral_distortion(mel + 3, mel) == pytest.approx(0, abs=1e-6)  # loudness is not counted


def test_means_have_intervals_over_the_clips_that_have_a_figure():
    assert interval([1.0, 2.0, 3.0, math.nan]) == (2.0, pytest.approx(4.3026527 / math.sqrt(3)))
    assert str(interval([1.0, 2.0])) == "1.500 ± 6.353" and str(interval([1.0])) == "1.000"  # of one: no interval
    assert str(interval([math.nan])) == "none"
    assert interval([1.0])[0] == 1 and math.isnan(interval([1.0])[1]) and math.isnan(interval([math.nan])[0])
    clips = [ClipMetrics("a", str(n), {"stoi": 0.5}) for n in range(3)] + [ClipMetrics("b", "0", {"stoi": 0.25})]
    assert table(means(clips)).splitlines()[1] == f"{'a':6}    0.500 ± 0.000"


def test_pesq_and_dnsmos_are_there_where_their_packages_are(monkeypatch):
    sound = harmonics(150)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert metrics._extra() == {}
    monkeypatch.setattr(metrics, "find_spec", lambda name: name)
    assert set(metrics._extra()) == {"pesq", "dnsmos"}
    pytest.importorskip("pesq")
    assert metrics._pesq(sound, sound, RATE) > 4
