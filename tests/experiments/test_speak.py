"""`python -m experiments speak`: what it scores is what it wrote, beside floors that need no training."""

import os
import re

import pytest
import torch

from audio import read_wav, write_wav
from evaluation.distance import intelligibility, log_mel_distance
from experiments import __main__ as experiments
from experiments.speak import sounds_of
from tests.support.experiments import run
from tests.test_linear_prediction import speech_like
from vocoder import PRETRAINED, Vocoder

SPEECH = sorted(experiments.SPEECH.glob("*.wav"))


def table(out):
    """{name: [(stoi, log_mel), (stoi, log_mel) after matching]}."""
    rows = re.findall(r"^(\w[\w ]*?)\s+STOI ([\d.]+), log-mel ([\d.]+)\s+STOI ([\d.]+), log-mel ([\d.]+)$", out, re.M)
    return {name: [tuple(map(float, row[:2])), tuple(map(float, row[2:]))] for name, *row in rows}


def test_the_shipped_weights_speak_and_are_scored_beside_their_floors(tmp_path, capsys):
    assert experiments.main(["speak", "--output", str(tmp_path), "--match_mel", "2", str(SPEECH[0])]) == 0
    scores = table(capsys.readouterr().out)
    assert list(scores) == ["synthesis", "filter alone", "white noise"]
    assert scores["synthesis"][0][0] > 0.7 > 0.5 > scores["white noise"][0][0]
    assert scores["synthesis"][0][1] < 0.7 < scores["white noise"][0][1]
    assert all(matched[1] < plain[1] for plain, matched in scores.values())  # nearer to the mel, whatever it was
    stem = SPEECH[0].stem
    rate = Vocoder.from_pretrained("nanoflow").sampling_rate
    recording, heard = (read_wav(tmp_path / f"{stem}.{name}.wav", rate) for name in ("recording", "synthesis"))
    assert len(recording) == len(heard)
    assert intelligibility(heard, recording, rate) == pytest.approx(scores["synthesis"][1][0], abs=0.01)
    assert (tmp_path / "spectrograms.png").stat().st_size > 10_000


def test_names_with_dots_stay_apart_and_no_recording_is_written_over(tmp_path, capsys):
    own = [tmp_path / name for name in ("a.wav", "a.one.wav", "a.two.wav", "a.recording.wav")]
    for path in own:
        write_wav(path, read_wav(SPEECH[0], 22_050)[:12_000], 22_050)
    assert experiments.main(["speak", "--output", str(tmp_path / "out"), "--match_mel", "1", *map(str, own)]) == 0
    kinds = ("recording", "synthesis", "filter_alone", "white_noise")
    expected = {f"{path.stem}.{kind}.wav" for path in own for kind in kinds}
    assert set(os.listdir(tmp_path / "out")) == {*expected, "spectrograms.png"}
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    assert experiments.main(["speak", "--output", str(tmp_path), *map(str, own)]) != 0
    assert "a.recording.wav, which is read, and would be written over" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_filter_alone_uses_no_weights():
    vocoder = Vocoder.from_pretrained("nanoflow")
    recording = read_wav(SPEECH[0], vocoder.sampling_rate)[: 40 * vocoder.hop_length]
    before = sounds_of(vocoder, recording, 1.0, seed=0)
    with torch.no_grad():
        for name, parameter in vocoder.model.named_parameters():
            if name != "linear_prediction.log_scale":
                parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    after = sounds_of(Vocoder(vocoder.model, vocoder.data), recording, 1.0, seed=0)
    assert torch.equal(before["filter alone"], after["filter alone"])
    assert not torch.equal(before["synthesis"], after["synthesis"])
    mels = {name: vocoder.mel_spectrogram(sound) for name, sound in before.items()}
    own = vocoder.mel_spectrogram(recording)
    assert log_mel_distance(mels["filter alone"], own) < log_mel_distance(mels["white noise"], own) / 2


def test_any_run_can_be_heard(config, corpus, tmp_path, capsys):
    path = config(train_config__iters_per_checkpoint=2)
    assert run("-c", path, "--max_iterations", 2) == 0
    arguments = ["speak", "--weights", str(path), "--list", str(corpus / "test.txt"), "--output", str(tmp_path / "a")]
    capsys.readouterr()
    assert experiments.main(arguments) == 0
    out = capsys.readouterr().out
    assert "filter alone" not in out and "white noise" in out  # a model without linear prediction


def test_intelligibility_of_a_recording_itself_is_one():
    speech = speech_like(22_050).float()
    assert intelligibility(speech, speech, 22_050) == pytest.approx(1, abs=1e-3)
    noise = speech.std() * torch.randn(22_050, generator=torch.Generator().manual_seed(0))
    assert intelligibility(noise, speech, 22_050) < 0.6
    assert intelligibility(speech[:200], speech[:200], 22_050) != intelligibility(speech[:200], speech[:200], 22_050)


def test_the_shipped_files_are_small_and_named():
    assert all(path.is_file() and path.stat().st_size < 4_000_000 for path in PRETRAINED.values())
    assert len(SPEECH) >= 3
