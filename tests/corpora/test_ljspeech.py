"""corpora/ljspeech.py: a small archive in the place of LJSpeech, local or served over loopback."""

import hashlib
import os
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch

import data
from audio import write_wav
from corpora import ljspeech
from corpora.ljspeech import LJSPEECH, Corpus, prepare_corpus
from data import read_file_list
from harness.errors import InputError
from tests.support.web import serving

NAMES = [f"LJ001-{number:04d}" for number in range(1, 7)]


def tar_of(source, path):
    with tarfile.open(path, "w:bz2") as tar:
        tar.add(source, arcname="LJSpeech-1.1")
    return path


def corpus_of(archive, url="http://127.0.0.1:9/none.tar.bz2", **changes):
    """What the archive's publisher would state of it."""
    content = archive.read_bytes()
    stated = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "unpacked_size": 10_000}
    return Corpus(**{"url": url, "folder": "LJSpeech-1.1", "n_clips": 6, "n_test": 2, **stated, **changes})


@pytest.fixture
def unpacked(tmp_path):
    folder = tmp_path / "origin" / "LJSpeech-1.1"
    for number, name in enumerate(reversed(NAMES)):
        sound = torch.randn(900, generator=torch.Generator().manual_seed(number)) * 0.1
        write_wav(folder / "wavs" / f"{name}.wav", sound, 22_050)
    (folder / "metadata.csv").write_text("".join(f'{name}|"Raw|Text|é"|text\n' for name in NAMES), encoding="utf-8")
    return folder


@pytest.fixture
def archive(unpacked, tmp_path):
    return tar_of(unpacked, tmp_path / "LJSpeech-1.1.tar.bz2")


@pytest.fixture
def server(archive, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(archive.read_bytes()) as server:
        yield server


def assert_split(lists, wavs):
    expected = [str(wavs / f"{name}.wav") for name in NAMES]
    assert read_file_list(lists.test_files) == expected[:2] and lists.n_test == 2
    assert read_file_list(lists.training_files) == expected[2:] and lists.n_train == 4


def test_a_local_archive_is_unpacked_and_split_in_order(archive, unpacked, tmp_path):
    folder = tmp_path / "corpus"
    lists = prepare_corpus(folder, corpus_of(archive), archive=archive)
    assert_split(lists, folder / "LJSpeech-1.1" / "wavs")
    for name in NAMES:
        original = (unpacked / "wavs" / f"{name}.wav").read_bytes()
        assert (folder / "LJSpeech-1.1" / "wavs" / f"{name}.wav").read_bytes() == original
    assert sorted(os.listdir(folder)) == ["LJSpeech-1.1", "test_files.txt", "train_files.txt"]
    assert archive.exists()


def test_an_unpacked_folder_is_used_where_it_is_and_so_is_its_parent(archive, unpacked, tmp_path):
    for source in (unpacked, unpacked.parent):
        lists = prepare_corpus(tmp_path / "lists", corpus_of(archive), unpacked=source)
        assert_split(lists, unpacked / "wavs")


def test_what_was_unpacked_before_is_kept(archive, tmp_path):
    prepare_corpus(tmp_path / "corpus", corpus_of(archive), archive=archive)
    lists = prepare_corpus(tmp_path / "corpus", corpus_of(archive), archive="not/needed.tar.bz2")
    assert_split(lists, tmp_path / "corpus" / "LJSpeech-1.1" / "wavs")


def test_paths_begin_as_the_folder_was_given(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lists = prepare_corpus("here", corpus_of(archive), archive=archive)
    assert read_file_list(lists.test_files)[0] == "here/LJSpeech-1.1/wavs/LJ001-0001.wav"


def test_a_missing_archive_or_folder_is_named(archive, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.tar: no such archive"):
        prepare_corpus(tmp_path / "corpus", corpus_of(archive), archive="nowhere.tar")
    with pytest.raises(InputError, match=r"nowhere: no metadata\.csv"):
        prepare_corpus(tmp_path / "corpus", corpus_of(archive), unpacked="nowhere")


def test_a_corpus_that_is_not_whole_is_refused(archive, unpacked, tmp_path):
    (unpacked / "wavs" / f"{NAMES[3]}.wav").unlink()
    with pytest.raises(InputError, match=r"holds 5 of 6 clips .*LJ001-0004\.wav is missing"):
        prepare_corpus(tmp_path / "corpus", corpus_of(archive), unpacked=unpacked)
    with pytest.raises(InputError, match="holds 6 of 13100 clips"):
        prepare_corpus(tmp_path / "corpus", replace(corpus_of(archive), n_clips=13_100), archive=archive)
    assert not (tmp_path / "corpus" / "train_files.txt").exists()


def test_a_download_is_unpacked_and_not_repeated(server, archive, tmp_path):
    corpus = corpus_of(archive, server.url)
    lists = prepare_corpus(tmp_path / "corpus", corpus)
    assert_split(lists, tmp_path / "corpus" / "LJSpeech-1.1" / "wavs")
    shutil.rmtree(tmp_path / "corpus" / "LJSpeech-1.1")
    prepare_corpus(tmp_path / "corpus", corpus)
    assert server.asked == [None]


def test_a_server_that_is_not_there_is_one_line(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match=r"download of http://127\.0\.0\.1:9/none.* failed .*--archive FILE") as error:
        prepare_corpus(tmp_path / "corpus", corpus_of(archive))
    assert "\n" not in str(error.value)


def test_ljspeech_is_the_published_one():
    assert LJSPEECH.sha256 == "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
    assert (LJSPEECH.n_clips, LJSPEECH.n_test, LJSPEECH.size) == (13_100, 1_310, 2_748_572_632)


def test_the_ljspeech_command_takes_an_archive_a_folder_or_the_web(
    server, archive, unpacked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ljspeech, "LJSPEECH", corpus_of(archive, server.url))
    for number, source in enumerate((["--archive", str(archive)], ["--folder", str(unpacked)], [])):
        assert data.main(["ljspeech", str(tmp_path / str(number)), *source]) == 0
        assert "training: 4 clips" in capsys.readouterr().out
    assert len(server.asked) == 1
    assert data.main(["ljspeech", str(tmp_path / "x"), "--archive", "nowhere"]) == 1
    assert capsys.readouterr().err == "error: nowhere: no such archive\n"
