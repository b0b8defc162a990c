"""Rates and hops: any hop, strides given or derived, heights that do not divide it; the configs of other rates."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from audio import MelSpectrogram, read_wav, write_wav
from config import DataConfig, config_from_dict, load_config
from data import ClipDataset
from evaluation.likelihood import clip_likelihoods
from fast.engine import SynthesisEngine
from harness.errors import InputError
from modules import Upsampler
from tests.support.experiments import run
from tests.support.vocoders import random_vocoder
from vocoder import Vocoder

ROOT = Path(__file__).parents[1]
RATES = sorted((ROOT / "configs").glob("*[0-9]k.json"))


def experiment(**data):
    sections = {"training_files": "train.txt", "test_files": "test.txt"} | data
    return {
        "train_config": {},
        "data_config": sections,
        "waveflow_config": {"res_channels": 8, "coupling_type": "waveflow"},
    }


# --- strides


@pytest.mark.parametrize(
    ("hop", "strides"), [(256, (16, 16)), (300, (20, 15)), (275, (25, 11)), (441, (21, 21)), (257, (257,))]
)
def test_strides_that_are_left_out_follow_from_the_hop(hop, strides):
    assert config_from_dict(experiment(hop_length=hop)).waveflow_config.upsample_strides == strides


def test_strides_that_are_given_stay():
    sections = experiment(hop_length=300)
    sections["waveflow_config"]["upsample_strides"] = [3, 4, 25]
    assert config_from_dict(sections).waveflow_config.upsample_strides == (3, 4, 25)
    with pytest.raises(InputError, match=r"hop_length is 200, but .*\[3, 4, 25\] multiply to 300"):
        config_from_dict({**sections, "data_config": {**sections["data_config"], "hop_length": 200}})


@pytest.mark.parametrize("strides", [(11, 25), (21, 21), (3, 4, 25), (257,), (2, 3), (5, 2, 2)])
def test_an_upsampler_of_any_strides_covers_the_frames_exactly(strides):
    torch.manual_seed(0)
    upsampler, mel, hop = Upsampler(strides).double(), torch.randn(2, 10, 9, dtype=torch.float64), math.prod(strides)
    whole = upsampler(mel)
    assert whole.shape == (2, 10, 9 * hop)
    for start, stop in ((0, 3 * hop), (hop + 1, 5 * hop - 1), (6 * hop, 9 * hop)):  # what the engine asks for in tiles
        piece = upsampler.columns(mel[0], 1, start, stop)  # [1, n, M]
        torch.testing.assert_close(piece[0].t(), whole[0, :, start:stop])


def test_even_strides_compute_what_was_published():
    upsampler, mel = Upsampler((16, 16)), torch.randn(1, 80, 7)
    image = mel.unsqueeze(1)
    for conv in upsampler.convs:
        image = F.conv_transpose2d(image, conv.weight(), conv.bias, stride=(1, 16), padding=(1, 8))
        image = F.leaky_relu(image, 0.4)
    assert torch.equal(upsampler(mel), image.squeeze(1))


# --- heights


@pytest.mark.parametrize(("strides", "height"), [((11, 25), 8), ((21, 21), 16), ((3, 4), 7), ((3, 3), 9)])
@pytest.mark.parametrize("coupling_type", ["nanoflow", "waveflow_official"])
def test_synthesis_is_as_long_as_the_mel_says_and_inverts_the_likelihood(strides, height, coupling_type):
    model = random_vocoder(coupling_type, upsample_strides=strides, n_height=height, dtype=torch.float64)
    hop = math.prod(strides)
    mel = torch.randn(2, 80, 5, dtype=torch.float64)
    torch.manual_seed(3)
    audio = model.reverse(mel)
    assert audio.shape == (2, 4 * hop)
    torch.manual_seed(3)
    torch.testing.assert_close(model.reverse_fast(mel), audio)
    z = model.sample_noise(mel, 1.0)
    assert z.shape == (2, 1, height, -(-4 * hop // height))
    torch.testing.assert_close(model(SynthesisEngine(model)(mel, z), mel)[0], z, atol=1e-7, rtol=0)


def test_the_likelihood_of_a_clip_is_that_of_its_whole_columns(tmp_path):
    data = DataConfig(hop_length=275, segment_length=2_750)
    write_wav(tmp_path / "a.wav", 0.1 * torch.randn(4_000), data.sampling_rate)
    clips = ClipDataset([str(tmp_path / "a.wav")], data)
    model = random_vocoder(upsample_strides=(25, 11), n_height=8)
    [result] = clip_likelihoods(model, clips, 1.0, torch.device("cpu"))
    assert result.samples == 4_000 // 275 * 275 // 8 * 8
    _, audio, mel = clips[0]
    sound = Vocoder(model, data)(mel, seed=0)
    assert len(sound) == len(audio) == 4_000 // 275 * 275


# --- bands


def test_no_upper_frequency_is_half_the_rate():
    data = config_from_dict(experiment(sampling_rate=24_000, mel_fmax=None)).data_config
    assert data.mel_fmax == 12_000.0
    sound = torch.randn(4_000)
    torch.testing.assert_close(MelSpectrogram(data)(sound), MelSpectrogram(data.replace(mel_fmax=12_000.0))(sound))
    for wrong in ({"sampling_rate": "24000"}, {"mel_fmin": 12_000.0, "sampling_rate": 24_000}):
        with pytest.raises(InputError, match=r"sampling_rate|mel_fmin"):
            config_from_dict(experiment(mel_fmax=None, **wrong))


# --- the shipped configs


def test_there_is_a_config_for_each_usual_rate():
    assert [load_config(path).data_config.sampling_rate for path in RATES] == [16_000, 24_000, 44_100, 48_000]


@pytest.mark.parametrize("path", RATES, ids=lambda path: path.stem)
def test_a_config_of_another_rate_trains_evaluates_and_synthesizes(path, tmp_path, capsys):
    config = load_config(path)
    rate, hop = config.data_config.sampling_rate, config.data_config.hop_length
    for name in ("a", "b", "c"):
        time = torch.arange(int(0.4 * rate)) / rate
        sound = 0.3 * torch.sin(2 * math.pi * 220 * time) + 0.01 * torch.randn(len(time))
        write_wav(tmp_path / f"{name}.wav", sound, rate)
    (tmp_path / "train.txt").write_text("a.wav\nb.wav\n")
    (tmp_path / "test.txt").write_text("c.wav\n")
    small = {
        "train_config": {"output_directory": str(tmp_path / "runs"), "batch_size": 2, "num_workers": 0},
        "data_config": {
            "training_files": str(tmp_path / "train.txt"),
            "test_files": str(tmp_path / "test.txt"),
            "segment_length": config.data_config.segment_length // 4 // 16 * 16,
        },
        "waveflow_config": {"res_channels": 8, "n_layer": 2, "n_flow": 2, "size_flow_embed": 4},
    }
    settings = [
        f"{section}.{key}={json.dumps(value)}" for section, keys in small.items() for key, value in keys.items()
    ]
    arguments = ["-c", path, *(word for setting in settings for word in ("--set", setting))]
    assert run(*arguments, "--max_iterations", 3) == 0
    assert run(*arguments, "--evaluate") == 0
    assert run(*arguments, "--synthesize") == 0
    assert "log-likelihood" in capsys.readouterr().out
    [wav] = (tmp_path / "runs").rglob("c.wav")
    assert len(read_wav(wav, rate)) == int(0.4 * rate) // hop * hop
