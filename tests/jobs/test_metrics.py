"""train.py --evaluate --metrics: checkpoints and a foreign folder in one table, every clip in a CSV."""

import csv
import shutil

import pytest
import soundfile

from audio import read_wav
from tests.support.experiments import RATE, fails, run, write_config, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with checkpoints 4 and 8."""
    top = tmp_path_factory.mktemp("metrics")
    corpus = top / "corpus"
    corpus.mkdir()
    path = write_config(top / "config.json", write_corpus(corpus), top / "runs")
    assert run("-c", path, "--max_iterations", 8) == 0
    return top / "runs" / "tiny"


def test_checkpoints_and_a_folder_of_sounds_stand_in_one_table(folder, tmp_path, capsys):
    config, corpus = folder.parents[1] / "config.json", folder.parents[1] / "corpus"
    foreign = tmp_path / "recordings"
    foreign.mkdir()
    shutil.copy(corpus / "clip6.wav", foreign)
    soundfile.write(foreign / "clip7.flac", read_wav(corpus / "clip7.wav", RATE).numpy(), RATE)
    assert run("-c", config, "--evaluate", "--metrics", folder / "waveflow_4", foreign) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if "±" in line}
    assert {"waveflow_8", "waveflow_4", "recordings"} <= set(rows)
    assert rows["recordings"].split()[1] == "0.000"  # log-mel distance of the recordings to themselves
    with open(folder / "evaluation" / "waveflow_8_metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    names = ["system", "clip", "log_mel", "mrstft", "mcd", "f0_rmse", "voicing_f1", "stoi"]
    assert list(lines[0])[: len(names)] == names
    figures = {(line["system"], line["clip"].rpartition("/")[2]): float(line["log_mel"]) for line in lines}
    assert figures["recordings", "clip6.wav"] < 1e-6 < 0.2 < figures["waveflow_8", "clip6.wav"]


def test_what_has_no_recording_or_no_sound_is_named(folder, tmp_path, capsys):
    job = ["--evaluate", "--weights", folder / "waveflow_8", "--metrics"]
    (tmp_path / "other").mkdir()
    shutil.copy(folder.parents[1] / "corpus" / "clip6.wav", tmp_path / "other")
    assert "no sound called clip7" in fails(capsys, *job, tmp_path / "other")
    assert "expected a checkpoint, a run's folder or a folder of sounds" in fails(capsys, *job, tmp_path / "nothing")
    (tmp_path / "mel.npy").write_bytes(b"")
    assert "metrics need a recording" in fails(capsys, *job, "--input", tmp_path / "mel.npy")
    with pytest.raises(SystemExit):
        run("-c", folder.parents[1] / "config.json", "--metrics")
    assert "give it too" in capsys.readouterr().err
