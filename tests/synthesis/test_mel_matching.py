import pytest
import torch

from audio import MelSpectrogram
from config import DataConfig
from evaluation.distance import log_mel_distance
from synthesis.mel_matching import match_mel
from tests.support.experiments import run
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


def test_synthesis_with_passes_is_another_folder_nearer_to_the_mel(trained, tmp_path, capsys):
    path, folder = trained
    distances = []
    for passes in (0, 2):
        assert run("-c", path, "--synthesize", "--match_mel", passes) == 0
        distances.append(float(capsys.readouterr().out.split("recording: ")[1].split(" of the synthesis")[0]))
    assert distances[1] < distances[0]
    assert sorted(f.name for f in (folder / "synthesis").iterdir()) == ["waveflow_8_temp1", "waveflow_8_temp1_matched2"]


def test_no_passes_change_nothing_and_silence_stays_silent():
    mel_fn, mel, noise = mel_and_noise(DataConfig())
    assert match_mel(noise, mel, mel_fn, 0) is noise
    assert (match_mel(torch.zeros_like(noise), mel, mel_fn, 8) == 0).all()
    loud = match_mel(1e-9 * noise, mel, mel_fn, 2)
    assert loud.abs().max() < 1e-5  # nothing is made of rounding errors in a pass or two
