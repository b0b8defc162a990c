"""corpora/asterisk.py: made-up sounds, as a folder, a tar and a Debian package, decoded by a stand-in for ffmpeg."""

import gzip
import io
import os
import random
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import data
from audio import read_wav
from corpora.asterisk import SHORTEST, VOICE, prepare_corpus
from data import read_file_list
from harness.errors import InputError
from harness.pools import process_pool

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


def tar_of(path, *members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, body in members:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))


@pytest.mark.parametrize(
    "name, clip",
    [
        ("/etc/evil.g722", "etc_evil"),
        ("../../evil.g722", "evil"),
        ("//a/../b.g722", "a_.._b"),
        (f"/usr/{VOICE}/digits/1.g722", "digits_1"),
        (f"../{VOICE}/../../x.g722", "x"),
        (".g722", "clip"),
        ("a b\n|c.g722", "a_b__c"),
        ("\udcff/\udcfe.g722", "clip"),
        ("\u00e9\u8a9e.g722", "\u00e9\u8a9e"),
        ("long" * 70 + ".g722", ("long" * 70)[:150]),
    ],
)
def test_a_clip_is_in_the_corpus_whatever_its_member_is_called(ffmpeg, tmp_path, name, clip):
    files = set(tmp_path.rglob("*"))
    tar_of(tmp_path / "x.tar", (name, content(1)), ("other.g722", content(2)))
    prepare_corpus(tmp_path / "a" / "out", archive=tmp_path / "x.tar")
    assert {path.name for path in (tmp_path / "a" / "out" / "wavs").iterdir()} == {f"{clip}.wav", "other.wav"}
    new = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "a")} - files
    assert new == {tmp_path / "x.tar"}


@pytest.mark.parametrize("names", [("a/b", "a_b"), ("a", "a"), ("A/b", "a/B"), ("./a", "/a"), ("x" * 160, "x" * 170)])
def test_two_sounds_of_one_name_are_refused(ffmpeg, tmp_path, names):
    tar_of(tmp_path / "x.tar", *((f"{name}.g722", content(n)) for n, name in enumerate(names)))
    with pytest.raises(InputError, match=r"x\.tar: two sounds, the clips of which would be \w+\.wav; leave"):
        prepare_corpus(tmp_path / "out", archive=tmp_path / "x.tar")
    assert not (tmp_path / "out").exists()


def bare(size, name="x/../../big.g722", kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf()


def gzipped(folder, *pieces):
    with gzip.open(folder / "x.tar.gz", "wb", 1) as file:
        for piece in pieces:
            file.write(piece)
    return folder / "x.tar.gz"


def within(megabytes, work, *arguments):
    """What work gives in a process that may take no more memory than this one and so much."""
    with process_pool(1, "died", "fork", _limit, (megabytes,)) as pool:
        return pool.submit(work, *arguments).result()


def _limit(megabytes):
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + megabytes * 2**20, resource.RLIM_INFINITY))


def refusal(path, folder):
    with pytest.raises(InputError) as refused:
        prepare_corpus(folder, archive=path)
    return str(refused.value)


def test_a_hostile_package_is_refused(tmp_path):
    (tmp_path / "big.tar").write_bytes(bare(2**29))
    assert "big.tar: over 268435456 bytes of sounds" in refusal(tmp_path / "big.tar", tmp_path / "out")


LARGE = 2**27
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@pytest.mark.parametrize(
    "pieces",
    [
        *([bare(LARGE, kind=kind), *[bytes(2**20)] * (LARGE >> 20)] for kind in EXTENDED),
        [bare(8**11 - 1, kind=tarfile.XHDTYPE)],
        [bare(0, "empty")] * (LARGE >> 11),
        [bare(512, kind=tarfile.XGLTYPE) + b"12 a=bbbbbb\n".ljust(512, b"\0") + bare(0)] * (LARGE >> 12),
    ],
    ids=[*(f"extended {kind!r}" for kind in EXTENDED), "promised", "members", "globals"],
)
def test_what_stands_between_sounds_takes_little_memory(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr("corpora.asterisk.MAX_BETWEEN", 2**20)
    path = gzipped(tmp_path, *pieces)
    message = within(100, refusal, path, tmp_path / "out")
    assert "x.tar.gz: not a Debian package or tar (over 1048576 bytes of names" in message


@pytest.mark.parametrize("size", [b"-60", b"-1", b"+4", b"1_0", b"0x9", b"", b"4 4", "٣".encode(), b"9999999999"])
def test_a_package_whose_members_have_no_size_is_refused(tmp_path, size):
    """By a negative one, the same member came again without end."""
    header = b"debian-binary".ljust(48) + size.ljust(10) + b"`\n"
    (tmp_path / "x.deb").write_bytes(b"!<arch>\n" + header + b"2.0\n" + bytes(999))
    assert "x.deb: " in refusal(tmp_path / "x.deb", tmp_path / "out")


def test_sounds_are_read_up_to_a_size(voice, tmp_path):
    (voice / "big.g722").touch()
    for size in (2**28, 2**40):
        os.truncate(voice / "big.g722", size)
        with pytest.raises(InputError, match=r"share/\w+: over \d+ bytes of sounds; expected some 8 MB"):
            prepare_corpus(tmp_path / "out", unpacked=voice)
