"""vocoder.py: the three lines of a user, on checkpoints that the real command has written."""

import json
import shutil

import numpy as np
import pytest
import torch

import checkpoint as ckpt
from audio import read_wav
from config import load_config
from data import read_clip, read_file_list
from harness.errors import InputError
from tests.support.experiments import RATE, ROOT, run, write_config, write_corpus
from tests.support.vocoders import random_vocoder
from vocoder import Vocoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with checkpoints 4 and 8, and the experiment file two folders above."""
    top = tmp_path_factory.mktemp("vocoder")
    corpus = top / "corpus"
    corpus.mkdir()
    path = write_config(top / "config.json", write_corpus(corpus), top / "runs")
    assert run("-c", path, "--max_iterations", 8) == 0
    return top / "runs" / "tiny"


@pytest.fixture(scope="module")
def vocoder(folder):
    return Vocoder.from_pretrained(folder, device="cpu")


def mel_of(frames, seed=0):
    return torch.randn(80, frames, generator=torch.Generator().manual_seed(seed)) - 5


def test_a_mel_becomes_audio_by_the_models_own_inverse(folder, vocoder):
    model = random_vocoder()
    ckpt.load_weights(model, ckpt.load_checkpoint(folder / "waveflow_8")["model"])
    mel = mel_of(9)
    torch.manual_seed(3)
    expected = model.reverse(mel.unsqueeze(0), temp=0.8)[0].clamp(-1, 1)
    torch.testing.assert_close(vocoder(mel, temp=0.8, seed=3), expected, atol=1e-4, rtol=0)
    assert (vocoder.sampling_rate, vocoder.hop_length, vocoder.n_mels) == (RATE, 256, 80)


@pytest.mark.parametrize("source", ["file", "folder", "experiment"])
def test_a_file_a_folder_and_an_experiment_give_the_same(folder, vocoder, source):
    path = {"file": folder / "waveflow_8", "folder": str(folder), "experiment": folder.parents[1] / "config.json"}
    other = Vocoder.from_pretrained(path[source], device="cpu")
    assert torch.equal(other(mel_of(6), seed=1), vocoder(mel_of(6), seed=1))


def test_each_mel_of_a_list_sounds_as_it_does_alone(vocoder):
    mels = [mel_of(frames, seed) for seed, frames in enumerate((13, 7, 40, 2))]
    for mel, audio in zip(mels, vocoder(mels, seed=5), strict=True):
        assert audio.shape == (256 * (mel.size(1) - 1),)
        torch.testing.assert_close(audio, vocoder(mel, seed=5), atol=1e-5, rtol=0)
    assert vocoder([]) == []


def test_a_batch_of_mels_is_a_batch_of_audio(vocoder):
    mels = torch.stack([mel_of(9, seed) for seed in range(3)])
    audio = vocoder(mels, seed=5)
    assert audio.shape == (3, 8 * 256)
    torch.testing.assert_close(audio[1], vocoder(mels[1], seed=5), atol=1e-5, rtol=0)
    assert vocoder(mels[:1].numpy()).shape == (1, 8 * 256)


def test_numpy_gives_numpy_and_tensors_give_tensors(vocoder):
    mel = mel_of(9)
    tensor, array = vocoder(mel, seed=2), vocoder(mel.numpy().astype(np.float64), seed=2)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    np.testing.assert_array_equal(array, tensor.numpy())
    mixed = vocoder([mel, mel.numpy()], seed=2)
    assert [type(audio) for audio in mixed] == [torch.Tensor, np.ndarray]


def test_a_seed_makes_the_same_again_and_leaves_the_global_state(vocoder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, again = vocoder(mel_of(9), seed=7), vocoder(mel_of(9), seed=7)
    assert torch.equal(one, again) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, vocoder(mel_of(9), seed=8))
    free = vocoder(mel_of(9))
    assert not torch.equal(free, vocoder(mel_of(9)))
    torch.manual_seed(0)
    assert torch.equal(vocoder(mel_of(9)), free)


def test_the_wavs_of_the_command_are_those_of_the_vocoder(folder, vocoder):
    path = folder.parents[1] / "config.json"
    assert run("-c", path, "--synthesize", "-t", 0.8) == 0
    config = load_config(path)
    for number, file in enumerate(read_file_list(config.data_config.test_files)):
        mel = vocoder.mel(read_clip(file, config.data_config), RATE)
        audio = vocoder(mel, temp=0.8, seed=config.train_config.seed + number)
        name = file.rpartition("/")[-1]
        written = read_wav(folder / "synthesis" / "waveflow_8_temp0.8" / name, RATE)
        torch.testing.assert_close(written, audio, atol=2 / 32_768, rtol=0)


def test_mels_are_made_of_audio_at_any_rate(vocoder):
    time_axis = {rate: np.arange(rate) / rate for rate in (RATE, 44_100)}
    sounds = {rate: 0.3 * np.sin(2 * np.pi * 440 * axis) for rate, axis in time_axis.items()}
    mels = {rate: vocoder.mel(sound, rate) for rate, sound in sounds.items()}
    assert isinstance(mels[RATE], np.ndarray) and mels[RATE].shape == (80, RATE // 256 + 1)
    middle = slice(10, 70)
    loud = mels[RATE][:, middle].max(axis=1) > -4
    np.testing.assert_allclose(mels[44_100][loud, middle], mels[RATE][loud, middle], atol=0.05)
    assert isinstance(vocoder.mel(torch.from_numpy(sounds[RATE]), RATE), torch.Tensor)


def test_the_newest_whole_checkpoint_is_taken_and_the_broken_one_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "waveflow_8").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"waveflow_8: refused.*trying the one before"):
        broken = Vocoder.from_pretrained(copy, device="cpu")
    before = Vocoder.from_pretrained(folder / "waveflow_4", device="cpu")
    assert torch.equal(broken(mel_of(5), seed=0), before(mel_of(5), seed=0))


def test_the_moving_average_is_preferred(folder, tmp_path):
    content = torch.load(folder / "waveflow_8", weights_only=True)
    del content["digest"]
    content["ema"] = torch.load(folder / "waveflow_4", weights_only=True)["model"]
    content["config"]["train_config"]["ema_decay"] = 0.5
    torch.save(content, tmp_path / "waveflow_8")
    averaged = Vocoder.from_pretrained(tmp_path / "waveflow_8", device="cpu")
    expected = Vocoder.from_pretrained(folder / "waveflow_4", device="cpu")
    assert torch.equal(averaged(mel_of(5), seed=0), expected(mel_of(5), seed=0))


def test_published_weights_need_a_config_and_take_a_path_or_a_config(folder, tmp_path):
    golden = ROOT / "tests" / "golden" / "checkpoints_nanoflow" / "dataparallel" / "waveflow_60"
    with pytest.raises(InputError, match="does not know its config; pass config=FILE"):
        Vocoder.from_pretrained(golden)
    sections = json.loads((folder.parents[1] / "config.json").read_text())
    sections["waveflow_config"].update(res_channels=8, n_height=16, n_flow=4, size_flow_embed=16)
    (tmp_path / "config.json").write_text(json.dumps(sections))
    by_path = Vocoder.from_pretrained(golden, config=tmp_path / "config.json", device="cpu")
    by_config = Vocoder.from_pretrained(str(golden), config=load_config(tmp_path / "config.json"), device="cpu")
    assert torch.equal(by_path(mel_of(5), seed=0), by_config(mel_of(5), seed=0))


def test_half_precision_is_near_and_slow_hardware_is_said(folder, vocoder, monkeypatch):
    monkeypatch.setattr("fast.engine.fast_bfloat16", lambda: True)
    half = Vocoder.from_pretrained(folder, device="cpu", precision="bfloat16")
    difference = (half(mel_of(9), seed=0) - vocoder(mel_of(9), seed=0)).abs().mean()
    assert 0 < difference < 0.05
    monkeypatch.setattr("fast.engine.fast_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="no bfloat16 products"):
        Vocoder.from_pretrained(folder, device="cpu", precision="bfloat16")


@pytest.mark.parametrize(
    ("mel", "complaint"),
    [
        (mel_of(9).T, r"mel: a mel of shape \(9, 80\), expected \(80, frames\); it is transposed"),
        (mel_of(1), "one frame covers no audio"),
        (mel_of(9) / 0, "NaN or infinite"),
        (mel_of(9).int(), "expected floating-point"),
        ([mel_of(9), mel_of(9)[:40]], r"mel 1: a mel of shape \(40, 9\)"),
        ([[0.0, 1.0]], "of type list, expected a numpy array or a tensor"),
    ],
)
def test_what_is_no_mel_of_this_vocoder_is_refused_in_one_line(vocoder, mel, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        vocoder(mel)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temp", [-1, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(vocoder, temp):
    with pytest.raises(InputError, match="temp"):
        vocoder(mel_of(9), temp=temp)


def test_audio_that_has_no_mel_is_refused(vocoder):
    for audio, rate in ((np.zeros((2, 9000), np.float32), 44_100), (np.zeros(9000, np.int16), 44_100)):
        with pytest.raises(InputError, match="expected floating-point samples"):
            vocoder.mel(audio, rate)


def test_a_place_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in"):
        Vocoder.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        Vocoder.from_pretrained(tmp_path / "waveflow_1")
