"""harness/downloads.py: a small archive served over loopback, whole or with every fault."""

import hashlib
import io
import os
import tarfile

import pytest

from harness.downloads import RemoteArchive, check_file, download, unpack
from harness.errors import InputError
from tests.support.web import serving

REMEDY = "do otherwise"


def archive_of(path, url="http://127.0.0.1:9/none.tar.bz2", **changes):
    """What the archive's publisher would state of it."""
    content = path.read_bytes()
    stated = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "unpacked_size": 10_000}
    return RemoteArchive(**{"url": url, "folder": "things", **stated, **changes})


@pytest.fixture
def things(tmp_path):
    folder = tmp_path / "origin" / "things"
    folder.mkdir(parents=True)
    (folder / "one.bin").write_bytes(os.urandom(5_000))
    return folder


@pytest.fixture
def archive(things, tmp_path):
    path = tmp_path / "things.tar.bz2"
    with tarfile.open(path, "w:bz2") as tar:
        tar.add(things, arcname="things")
    return path


@pytest.fixture
def server(archive, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(archive.read_bytes()) as server:
        yield server


def test_an_archive_is_unpacked_whole(archive, things, tmp_path):
    unpack(archive, archive_of(archive), tmp_path / "here", REMEDY)
    assert (tmp_path / "here" / "things" / "one.bin").read_bytes() == (things / "one.bin").read_bytes()
    assert os.listdir(tmp_path / "here") == ["things"] and archive.exists()


def test_a_file_with_another_checksum_is_refused_and_left(archive, tmp_path):
    with pytest.raises(InputError, match=r"SHA-256 .* expected 00.*get it again"):
        unpack(archive, archive_of(archive, sha256="00" * 32), tmp_path / "here", REMEDY)
    assert archive.exists() and not (tmp_path / "here").exists()


def member(name, **attributes):
    entry = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(entry, key, value)
    return entry


@pytest.mark.parametrize(
    "hostile",
    [
        member("../outside.txt", size=4),
        member("things/link", type=tarfile.SYMTYPE, linkname="../../.."),
        member("things/hard", type=tarfile.LNKTYPE, linkname="../../outside.txt"),
        member("things/pipe", type=tarfile.FIFOTYPE),
    ],
    ids=["path", "symbolic link", "hard link", "pipe"],
)
def test_an_archive_that_leads_outside_is_refused_and_leaves_nothing(things, tmp_path, hostile):
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(things, arcname="things")
        tar.addfile(hostile, io.BytesIO(b"evil"))
    with pytest.raises(InputError, match=r"hostile\.tar: cannot be unpacked"):
        unpack(path, archive_of(path), tmp_path / "here", REMEDY)
    assert os.listdir(tmp_path / "here") == []
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("content", ["truncated", "no archive", "another archive"])
def test_a_file_that_is_no_such_archive_is_refused(archive, tmp_path, content):
    path = tmp_path / "wrong.tar.bz2"
    if content == "another archive":
        with tarfile.open(path, "w") as tar:
            tar.add(archive, arcname="other/something")
    else:
        path.write_bytes(archive.read_bytes()[:300] if content == "truncated" else b"text" * 100)
    with pytest.raises(InputError, match=r"wrong\.tar\.bz2: (cannot be unpacked|holds no folder)"):
        unpack(path, archive_of(path), tmp_path / "here", REMEDY)
    assert os.listdir(tmp_path / "here") == []


def test_too_little_space_is_said_before_anything_is_fetched(archive, tmp_path):
    with pytest.raises(InputError, match=r"GB free, .* GB needed"):
        download(archive_of(archive, unpacked_size=10**18), tmp_path / "here", REMEDY)
    assert os.listdir(tmp_path / "here") == []


def test_a_download_is_not_repeated(server, archive, tmp_path):
    stated = archive_of(archive, server.url)
    for _ in range(2):
        path = download(stated, tmp_path / "here", REMEDY)
        check_file(path, stated)
    assert server.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped_if_the_server_can(server, archive, tmp_path, ranges):
    stated = archive_of(archive, server.url)
    server.cut, server.ranges = 1_000, ranges
    with pytest.raises(InputError, match=r"download .* failed .*ended after 1000 of .*run the command again"):
        download(stated, tmp_path / "here", REMEDY)
    server.cut = None
    download(stated, tmp_path / "here", REMEDY)
    assert server.asked == [None, "bytes=1000-"]
    assert (tmp_path / "here" / "LJSpeech-1.1.tar.bz2").read_bytes() == archive.read_bytes()


def test_a_download_longer_than_stated_is_stopped_and_refused(server, archive, tmp_path):
    stated = archive_of(archive, server.url)
    server.content += bytes(5_000_000)
    path = download(stated, tmp_path / "here", REMEDY)
    with pytest.raises(InputError, match="SHA-256"):
        check_file(path, stated)
    assert path.stat().st_size < 3_000_000


def test_a_server_that_is_not_there_is_one_line_with_the_remedy(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match=r"download of http://127\.0\.0\.1:9/none.* failed .*do otherwise") as error:
        download(archive_of(archive), tmp_path / "here", REMEDY)
    assert "\n" not in str(error.value)
