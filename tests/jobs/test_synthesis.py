"""train.py --synthesize of a user's own files: any format and rate, mels, folders; to folders, flac and stdout."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from audio import read_wav
from config import load_config
from tests.support.experiments import RATE, ROOT, fails, run, write_config, write_corpus
from vocoder import Vocoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder."""
    top = tmp_path_factory.mktemp("own")
    corpus = top / "corpus"
    corpus.mkdir()
    path = write_config(top / "config.json", write_corpus(corpus), top / "runs")
    assert run("-c", path, "--max_iterations", 4) == 0
    return top / "runs" / "tiny"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Sounds of several kinds in a folder, with a mel and a file that is neither."""
    top = tmp_path_factory.mktemp("sounds")
    axis = np.arange(48_000 // 3) / 48_000
    tone = (0.3 * np.sin(2 * np.pi * 220 * axis)).astype(np.float32)
    soundfile.write(top / "stereo.flac", np.stack([tone, tone], axis=1), 48_000)
    (top / "below").mkdir()
    soundfile.write(top / "below" / "single.ogg", tone, 48_000)
    soundfile.write(top / "float.wav", tone[::3], 16_000, subtype="FLOAT")
    np.save(top / "mel.npy", np.full((80, 9), -5.0, np.float32))
    torch.save(torch.full((80, 7), -5.0), top / "other.pt")
    (top / "notes.txt").write_text("not a sound")
    return top


def test_files_of_any_kind_become_sounds_without_a_config(folder, sounds, tmp_path, capsys):
    assert run("--synthesize", "--weights", folder, "--input", sounds, "--output", tmp_path) == 0
    lengths = {path.stem: len(read_wav(path, RATE)) for path in tmp_path.glob("*.wav")}
    third = RATE // 3 // 256 * 256
    assert lengths == {"stereo": third, "single": third, "float": third, "mel": 8 * 256, "other": 6 * 256}
    assert "5 clip(s)" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".wav"}


def test_the_noise_is_that_of_the_seed(folder, sounds, tmp_path):
    arguments = ["--synthesize", "--weights", folder / "waveflow_4", "--input", sounds / "mel.npy", "-t", 0.5]
    assert run(*arguments, "--output", tmp_path, "--seed", 7) == 0
    vocoder = Vocoder.from_pretrained(folder, device="cpu")
    expected = vocoder(np.load(sounds / "mel.npy"), temp=0.5, seed=7)
    np.testing.assert_allclose(read_wav(tmp_path / "mel.wav", RATE).numpy(), expected, atol=2 / 32_768)


def test_flac_and_wav_hold_the_same_and_temperatures_have_folders(folder, sounds, tmp_path):
    arguments = ["--synthesize", "--weights", folder, "--input", sounds / "mel.npy", "-t", 0.5, 1]
    assert run(*arguments, "--output", tmp_path / "wav") == 0
    assert run(*arguments, "--output", tmp_path / "flac", "--format", "flac") == 0
    for temp in ("temp0.5", "temp1"):
        flac, rate = soundfile.read(tmp_path / "flac" / temp / "mel.flac", dtype="int16")
        assert rate == RATE
        wav = (read_wav(tmp_path / "wav" / temp / "mel.wav", RATE) * 32_768).numpy()
        np.testing.assert_array_equal(flac, wav.astype(np.int16))


@pytest.mark.parametrize(
    ("inputs", "flags"),
    [
        (["talk.wav"], ["--output", "."]),
        (["talk.wav"], []),  # from within the folder that it would go to
        ([".", "below"], ["--output", "."]),
        (["talk.flac"], ["--output", "../own", "--format", "flac"]),
        (["below"], ["--output", "below"]),
        (["temp0.5/talk.wav"], ["--output", ".", "-t", 0.5, 1]),
        (["temp1/talk.wav"], ["--output", ".", "-t", 0.5, 1]),  # the last: nothing of the first is written
    ],
)
def test_nothing_is_written_over_a_recording(folder, tmp_path, monkeypatch, capsys, inputs, flags):
    """Whatever it is called: refused before the first sound."""
    own = folder / "synthesis" / "waveflow_4_temp1" if not flags else tmp_path / "own"
    for name in ("talk.wav", "talk.flac", "below/talk.wav", "temp0.5/talk.wav", "temp1/talk.wav"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(own / name, np.linspace(-0.5, 0.5, 4_000), RATE)
    before = {path: path.read_bytes() for path in own.rglob("*.*") if path.is_file()}
    monkeypatch.chdir(own)
    error = fails(capsys, "--synthesize", "--weights", folder, "--input", *inputs, *flags)
    assert "which is read, and would be written over; choose another folder" in error
    assert {path: path.read_bytes() for path in own.rglob("*.*") if path.is_file()} == before


def test_every_temperature_has_a_folder_of_its_own(folder, sounds, tmp_path):
    arguments = ["--synthesize", "--weights", folder, "--input", sounds / "mel.npy", "--output", tmp_path]
    assert run(*arguments, "-t", 0.5, 0.5000001, 0.5) == 0
    assert sorted(os.listdir(tmp_path)) == ["temp0.5", "temp0.5000001"]


def test_a_sound_goes_to_stdout_and_the_words_to_stderr(folder, sounds):
    command = ["train.py", "--synthesize", "--weights", folder, "--input", sounds / "mel.npy", "--output", "-"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
    audio, rate = soundfile.read(io.BytesIO(done.stdout))
    assert (len(audio), rate) == (8 * 256, RATE)
    assert b"mel.wav: 0.09 s of audio" in done.stderr


def test_denoising_takes_off_what_silence_sounds_like(folder, tmp_path):
    vocoder = Vocoder.from_pretrained(folder, device="cpu")
    silence = torch.full((80, 60), -11.5129)
    plain, less = (vocoder(silence, temp=0.0, denoise=strength) for strength in (0.0, 1.0))
    middle = slice(10 * 256, 50 * 256)
    assert less[middle].square().mean() < 0.02 * plain[middle].square().mean()
    np.save(tmp_path / "mel.npy", silence.numpy())
    assert run("--synthesize", "--weights", folder, "--input", tmp_path, "--output", tmp_path, "--denoise", 1) == 0
    speech = torch.full((80, 20), -5.0)
    torch.testing.assert_close(vocoder(speech, seed=0, denoise=1e-6), vocoder(speech, seed=0), atol=1e-3, rtol=0)


def test_weights_that_come_with_the_project_have_a_name(tmp_path, sounds):
    arguments = ["--synthesize", "--weights", "nanoflow", "--input", sounds / "float.wav", "--output", tmp_path]
    assert run(*arguments, "--device", "cpu") == 0
    audio = read_wav(tmp_path / "float.wav", RATE)
    assert len(audio) == RATE // 3 // 256 * 256 and audio.abs().max() > 0.05


def test_weights_are_evaluated_by_the_config_they_know(folder, capsys):
    assert run("--evaluate", "--weights", folder) == 0
    assert "log-likelihood" in capsys.readouterr().out
    config = load_config(folder.parents[1] / "config.json")
    lists = f"data_config.test_files={config.data_config.training_files}"
    assert run("--evaluate", "--weights", folder / "waveflow_4", "--set", lists) == 0
    assert "mean over 6 clips" in capsys.readouterr().out


def test_what_cannot_be_read_is_named_before_anything_is_written(folder, sounds, tmp_path, capsys):
    job = ["--synthesize", "--weights", folder, "--output", tmp_path / "out", "--input"]
    (tmp_path / "empty").mkdir()
    assert "no sound or mel in this folder" in fails(capsys, *job, tmp_path / "empty")
    assert "no such file or folder" in fails(capsys, *job, sounds / "nothing.wav")
    os.mkfifo(tmp_path / "pipe.npy")
    assert "pipe.npy: a named pipe, expected a file" in fails(capsys, *job, tmp_path / "pipe.npy")
    assert "not a sound file" in fails(capsys, *job, sounds / "mel.npy", sounds / "notes.txt")
    soundfile.write(tmp_path / "short.wav", np.zeros(99), 48_000)
    assert "at least 0.02" in fails(capsys, *job, tmp_path / "short.wav")
    assert "stdout takes one sound" in fails(capsys, *job[:3], "--output", "-", "--input", sounds)
    assert not (tmp_path / "out").exists()


def test_published_weights_need_a_config(sounds, capsys):
    published = ROOT / "tests" / "golden" / "checkpoints_nanoflow" / "waveflow_60"
    message = fails(capsys, "--synthesize", "--weights", published, "--input", sounds / "mel.npy", "--output", "-")
    assert "does not know its config" in message
