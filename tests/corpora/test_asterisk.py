"""corpora/asterisk.py: made-up sounds, as a folder, a tar and a Debian package, decoded by a stand-in for ffmpeg."""

import random
import shutil
import tarfile

import numpy as np
import pytest

import data
from audio import read_wav
from corpora.asterisk import SHORTEST, VOICE, prepare_corpus
from data import read_file_list
from harness.errors import InputError

SOUNDS = {f"digits/{n}.g722": n for n in range(39)} | {"vm-goodbye.g722": 50}  # path below the voice's folder: seed
NAMES = sorted(path.replace("/", "_").removesuffix(".g722") for path in SOUNDS)


def content(seed):
    return np.random.default_rng(seed).integers(-9_000, 9_000, 4_500).astype("<i2").tobytes()


@pytest.fixture
def voice(tmp_path):
    """What the package installs, a sound that is too short and a page of text among it."""
    folder = tmp_path / "usr" / "share" / VOICE
    for path, seed in SOUNDS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content(seed))
    (folder / "letters").mkdir()
    (folder / "letters" / "a.g722").write_bytes(bytes(SHORTEST - 1))
    (folder / "CREDITS").write_text("by")
    return folder


@pytest.fixture
def tar(voice, tmp_path):
    with tarfile.open(tmp_path / "data.tar.xz", "w:xz") as tar:
        tar.add(voice, arcname=f"./usr/share/{VOICE}")
    return tmp_path / "data.tar.xz"


@pytest.fixture
def package(tar, tmp_path):
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar.read_bytes()}
    path = tmp_path / "sounds.deb"
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, body in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode())
            file.write(body + b"\n" * (len(body) % 2))
    return path


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A decoder that takes every sound for what it makes of it."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncase "$*" in *"-f g722"*"-ar 22050"*) exec cat;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


def assert_corpus(folder, lists):
    order = [str(folder / "wavs" / f"{name}.wav") for name in NAMES]
    random.Random(0).shuffle(order)
    assert read_file_list(lists.test_files) == order[:37]
    assert read_file_list(lists.training_files) == order[37:]
    assert (read_wav(folder / "wavs" / "digits_7.wav", 22_050) * 32_768).numpy().astype("<i2").tobytes() == content(7)
    assert "Allison Smith" in (folder / "CREDITS.txt").read_text()


def test_the_package_its_tar_and_its_files_give_one_corpus(voice, tar, package, ffmpeg, tmp_path, capsys):
    sources = ({"archive": package}, {"archive": tar}, {"unpacked": voice}, {"unpacked": voice.parents[1]})
    for number, source in enumerate(sources):
        assert_corpus(tmp_path / str(number), prepare_corpus(tmp_path / str(number), **source))
        assert "40 sounds, 373 expected" in capsys.readouterr().err


def test_wavs_that_are_there_are_kept_and_broken_ones_made_again(voice, ffmpeg, tmp_path):
    prepare_corpus(tmp_path / "out", unpacked=voice)
    kept, broken = (tmp_path / "out" / "wavs" / f"digits_{n}.wav" for n in (1, 7))
    before = kept.stat().st_mtime_ns
    broken.write_bytes(broken.read_bytes()[:-9])
    assert_corpus(tmp_path / "out", prepare_corpus(tmp_path / "out", unpacked=voice))
    assert kept.stat().st_mtime_ns == before


def test_what_is_missing_is_named_in_one_line(voice, package, ffmpeg, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged.deb"
    damaged.write_bytes(package.read_bytes()[:-2_000])
    for words, source in (
        ("no such folder", ["--folder", "nowhere"]),
        ("holds no .g722 sound", ["--folder", tmp_path / "empty"]),
        ("no such archive", ["--archive", "nowhere"]),
        ("damaged.deb: not a Debian package or tar", ["--archive", damaged]),
    ):
        assert data.main(["asterisk", str(tmp_path / "out"), *map(str, source)]) == 1
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    ffmpeg.unlink()
    monkeypatch.setenv("PATH", str(ffmpeg.parent))
    with pytest.raises(InputError, match="decoded by ffmpeg, which is not there; install it"):
        prepare_corpus(tmp_path / "out", unpacked=voice)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_the_real_decoder_gives_two_samples_a_byte_at_16000_resampled(voice, tmp_path):
    lists = prepare_corpus(tmp_path / "out", unpacked=voice)
    lengths = {len(read_wav(path, 22_050)) for path in read_file_list(lists.test_files)}
    assert lengths == {-(-9_000 * 2 * 22_050 // 16_000)}


def test_a_hostile_package_is_refused(tmp_path):
    member = tarfile.TarInfo("x/../../big.g722")
    member.size = 2**29
    (tmp_path / "big.tar").write_bytes(member.tobuf())
    with pytest.raises(InputError, match=r"big\.tar: over \d+ bytes of sounds"):
        prepare_corpus(tmp_path / "out", archive=tmp_path / "big.tar")
