"""corpora.py: a small archive in the place of LJSpeech, served over loopback; the demo corpus."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import data
from audio import read_wav, write_wav
from corpora import recipes as corpora
from corpora.recipes import LJSPEECH, Corpus, make_demo_corpus, prepare_corpus
from data import overlap_warning, read_file_list
from harness.errors import InputError

ROOT = Path(__file__).parents[2]
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


# --- LJSpeech


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


def test_an_archive_with_another_checksum_is_refused_and_left(archive, tmp_path):
    with pytest.raises(InputError, match=r"SHA-256 .* expected 00.*get it again"):
        prepare_corpus(tmp_path / "corpus", corpus_of(archive, sha256="00" * 32), archive=archive)
    assert archive.exists() and not (tmp_path / "corpus").exists()


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


def member(name, **attributes):
    entry = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(entry, key, value)
    return entry


@pytest.mark.parametrize(
    "hostile",
    [
        member("../outside.txt", size=4),
        member("LJSpeech-1.1/link", type=tarfile.SYMTYPE, linkname="../../.."),
        member("LJSpeech-1.1/hard", type=tarfile.LNKTYPE, linkname="../../outside.txt"),
        member("LJSpeech-1.1/pipe", type=tarfile.FIFOTYPE),
    ],
    ids=["path", "symbolic link", "hard link", "pipe"],
)
def test_an_archive_that_leads_outside_is_refused_and_leaves_nothing(unpacked, tmp_path, hostile):
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(unpacked, arcname="LJSpeech-1.1")
        tar.addfile(hostile, io.BytesIO(b"evil"))
    with pytest.raises(InputError, match=r"hostile\.tar: cannot be unpacked"):
        prepare_corpus(tmp_path / "corpus", corpus_of(path), archive=path)
    assert os.listdir(tmp_path / "corpus") == []
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("content", ["truncated", "no archive", "another archive"])
def test_a_file_that_is_no_archive_of_the_corpus_is_refused(archive, tmp_path, content):
    path = tmp_path / "wrong.tar.bz2"
    if content == "another archive":
        with tarfile.open(path, "w") as tar:
            tar.add(archive, arcname="VCTK/something")
    else:
        path.write_bytes(archive.read_bytes()[:300] if content == "truncated" else b"text" * 100)
    with pytest.raises(InputError, match=r"wrong\.tar\.bz2: (cannot be unpacked|holds no folder)"):
        prepare_corpus(tmp_path / "corpus", corpus_of(path), archive=path)
    assert os.listdir(tmp_path / "corpus") == []


def test_too_little_space_is_said_before_anything_is_fetched(archive, tmp_path):
    with pytest.raises(InputError, match=r"GB free, .* GB needed"):
        prepare_corpus(tmp_path / "corpus", corpus_of(archive, unpacked_size=10**18))
    assert os.listdir(tmp_path / "corpus") == []


# --- downloading


class Server(ThreadingHTTPServer):
    """Serves one file on loopback; `cut` ends a response early, `ranges` says whether it can start in the middle."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.cut, self.ranges, self.asked = content, None, True, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/LJSpeech-1.1.tar.bz2"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.server.content) - start))
        self.end_headers()
        self.wfile.write(self.server.content[start : self.server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(archive, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(archive.read_bytes())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_unpacked_and_not_repeated(server, archive, tmp_path):
    corpus = corpus_of(archive, server.url)
    lists = prepare_corpus(tmp_path / "corpus", corpus)
    assert_split(lists, tmp_path / "corpus" / "LJSpeech-1.1" / "wavs")
    shutil.rmtree(tmp_path / "corpus" / "LJSpeech-1.1")
    prepare_corpus(tmp_path / "corpus", corpus)
    assert server.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped_if_the_server_can(server, archive, tmp_path, ranges):
    corpus = corpus_of(archive, server.url)
    server.cut, server.ranges = 1_000, ranges
    with pytest.raises(InputError, match=r"download .* failed .*ended after 1000 of .*run the command again"):
        prepare_corpus(tmp_path / "corpus", corpus)
    server.cut = None
    prepare_corpus(tmp_path / "corpus", corpus)
    assert server.asked == [None, "bytes=1000-"]
    assert (tmp_path / "corpus" / "LJSpeech-1.1.tar.bz2").read_bytes() == archive.read_bytes()


def test_a_download_longer_than_stated_is_stopped_and_refused(server, archive, tmp_path):
    corpus = corpus_of(archive, server.url)
    server.content += bytes(5_000_000)
    with pytest.raises(InputError, match="SHA-256"):
        prepare_corpus(tmp_path / "corpus", corpus)
    assert (tmp_path / "corpus" / "LJSpeech-1.1.tar.bz2").stat().st_size < 3_000_000


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
    monkeypatch.setattr(corpora, "LJSPEECH", corpus_of(archive, server.url))
    for number, source in enumerate((["--archive", str(archive)], ["--folder", str(unpacked)], [])):
        assert data.main(["ljspeech", str(tmp_path / str(number)), *source]) == 0
        assert "training: 4 clips" in capsys.readouterr().out
    assert len(server.asked) == 1
    assert data.main(["ljspeech", str(tmp_path / "x"), "--archive", "nowhere"]) == 1
    assert capsys.readouterr().err == "error: nowhere: no such archive\n"


# --- the demo corpus


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


def test_the_demo_command_makes_the_same_samples_again_and_ends_cleanly(demo, tmp_path):
    command = [sys.executable, "data.py", "demo", str(tmp_path / "again")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "demo corpus made" in result.stdout
    for path in (demo[0] / "wavs").iterdir():
        assert (tmp_path / "again" / "wavs" / path.name).read_bytes() == path.read_bytes()
