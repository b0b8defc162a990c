"""corpora/demo.py: what espeak-ng makes of the sentences."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audio import read_wav
from corpora.demo import make_demo_corpus
from data import overlap_warning, read_file_list
from harness.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, *make_demo_corpus(folder)


def test_the_demo_corpus_is_minutes_of_speech_at_a_sane_level(demo):
    _, lists, _ = demo
    files = read_file_list(lists.training_files) + read_file_list(lists.test_files)
    clips = [read_wav(path, 22_050) for path in files]
    assert 4 * 60 < sum(map(len, clips)) / 22_050 < 6 * 60
    assert all(1 < len(clip) / 22_050 < 6 for clip in clips)
    peaks = torch.stack([clip.abs().max() for clip in clips])
    assert 0.5 < peaks.max() < 0.9 and peaks.min() > 0.25  # -6 to -1 dBFS, no clip lost
    for clip in clips:
        blocks = clip[: len(clip) // 2_205 * 2_205].view(-1, 2_205)  # tenths of a second
        silent = (blocks.abs().amax(dim=1) < 0.005).int().tolist()
        assert "11111" not in "".join(map(str, silent))  # no half second without speech
        assert blocks.std(dim=1).min() > 1e-4  # nor digital silence


def test_the_demo_corpus_is_split_without_overlap(demo):
    folder, lists, finished = demo
    train, test = read_file_list(lists.training_files), read_file_list(lists.test_files)
    assert not finished and (len(train), len(test)) == (lists.n_train, lists.n_test)
    assert len(test) >= 10 and len(train) >= 8 * len(test)
    assert overlap_warning(train, test) is None
    assert sorted(train + test) == sorted(map(str, (folder / "wavs").iterdir()))
    text = (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()
    assert len({line.split("|")[1] for line in text}) == len(train + test)


def test_a_finished_demo_corpus_is_kept_and_a_damaged_one_made_again(demo, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(demo[0], folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "wavs").iterdir()}
    _, finished = make_demo_corpus(folder)
    assert finished and before == {path: path.stat().st_mtime_ns for path in (folder / "wavs").iterdir()}
    damaged = folder / "wavs" / "demo_007.wav"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    _, finished = make_demo_corpus(folder)
    assert not finished and damaged.read_bytes() == (demo[0] / "wavs" / "demo_007.wav").read_bytes()


def test_other_sentences_are_spoken_anew(tmp_path):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("One.\n\nTwo words.\n", encoding="utf-8")
    assert make_demo_corpus(tmp_path / "demo", sentences)[1] is False
    one = (tmp_path / "demo" / "wavs" / "demo_001.wav").read_bytes()
    sentences.write_text("Another.\nTwo words.\n", encoding="utf-8")
    assert make_demo_corpus(tmp_path / "demo", sentences)[1] is False
    assert (tmp_path / "demo" / "wavs" / "demo_001.wav").read_bytes() != one


@pytest.mark.parametrize("metadata", ["LJ001-0001|Printing,|Printing,\n", "demo_001|One.\nmine|Two.\n", b"\xff\x00"])
def test_the_folder_of_another_corpus_is_refused(tmp_path, metadata):
    """Before a word is spoken; nothing in it changes."""
    content = metadata if isinstance(metadata, bytes) else metadata.encode()
    (tmp_path / "metadata.csv").write_bytes(content)
    (tmp_path / "train_files.txt").write_text("mine\n")
    with pytest.raises(InputError, match=r"metadata\.csv: no table of the demo corpus; choose another folder"):
        make_demo_corpus(tmp_path)
    assert (tmp_path / "metadata.csv").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["metadata.csv", "train_files.txt"]


def test_lists_that_somebody_has_changed_are_kept(tmp_path, capsys):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("One.\nTwo words.\n", encoding="utf-8")
    folder = tmp_path / "demo"
    make_demo_corpus(folder, sentences)
    whole = (folder / "train_files.txt").read_text()
    for number in (1, 2):
        (folder / "train_files.txt").write_text(whole + f"mine {number}\n")
        make_demo_corpus(folder, sentences)
        assert (folder / f"train_files.txt.{number}").read_text() == whole + f"mine {number}\n"
        assert (folder / "train_files.txt").read_text() == whole
        assert f"another one was there; it is train_files.txt.{number} now" in capsys.readouterr().err
    make_demo_corpus(folder, sentences)
    assert sorted(path.name for path in folder.glob("*.[0-9]")) == ["train_files.txt.1", "train_files.txt.2"]


def test_the_demo_command_makes_the_same_samples_again_and_ends_cleanly(demo, tmp_path):
    command = [sys.executable, "data.py", "demo", str(tmp_path / "again")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "demo corpus made" in result.stdout
    for path in (demo[0] / "wavs").iterdir():
        assert (tmp_path / "again" / "wavs" / path.name).read_bytes() == path.read_bytes()
