import pytest
import torch

from audio import MelSpectrogram
from config import DataConfig
from evaluation.distance import log_mel_distance
from synthesis.mel_matching import match_mel
from tests.test_linear_prediction import SETTINGS, speech_like


def mel_and_noise(data, samples=24_000):
    """The mel of something like speech, and white noise of its power."""
    mel_fn = MelSpectrogram(data)
    audio = torch.stack([speech_like(samples, seed) for seed in range(2)]).float()
    noise = audio.std() * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    return mel_fn, mel_fn(audio), noise


@pytest.mark.parametrize("data", SETTINGS.values(), ids=SETTINGS)
def test_passes_bring_the_mel_nearer(data):
    mel_fn, mel, noise = mel_and_noise(data)
    distances = [log_mel_distance(mel_fn(match_mel(noise, mel, mel_fn, passes))[0], mel[0]) for passes in (0, 1, 4)]
    assert distances[0] > 1.5 * distances[1] > 1.5 * 1.2 * distances[2]


def test_audio_of_that_mel_stays_and_clips_of_a_batch_do_not_meet():
    mel_fn, mel, noise = mel_and_noise(DataConfig())
    torch.testing.assert_close(match_mel(noise, mel_fn(noise), mel_fn, 3), noise, atol=1e-5, rtol=0)
    both = match_mel(noise, mel, mel_fn, 2)
    torch.testing.assert_close(match_mel(noise[1:], mel[1:], mel_fn, 2), both[1:])
