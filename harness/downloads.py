"""Files from the web: fetched with pauses, checked byte for byte, unpacked whole or not at all."""

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from harness import terminal
from harness.errors import InputError, reason

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 60  # seconds without a byte before a download is given up


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the web, and how to know that it is the right one."""

    url: str
    sha256: str
    size: int  # bytes
    unpacked_size: int = 0  # bytes on disk, roughly, if it is to be unpacked

    @property
    def name(self) -> str:
        """Name of the file itself."""
        return self.url.rpartition("/")[-1]


@dataclass(frozen=True, kw_only=True)
class RemoteArchive(RemoteFile):
    """A tar archive with everything inside one folder."""

    folder: str


def download(file: RemoteFile, folder: Path, remedy: str) -> Path:
    """Fetch a file into `folder`, going on with an earlier part of it; returns its path, contents unchecked.

    remedy: what to do with a file that the user fetched by other means, for the InputError of a failure.
    """
    path = folder / file.name
    if path.is_file():
        return path
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.is_file() else 0
    _check_space(folder, file.size - have + file.unpacked_size)
    try:
        _fetch(file, part, have)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise InputError(
            f"download of {file.url} failed ({error}); run the command again to go on where it stopped, "
            f"or fetch the file yourself and {remedy}"
        ) from None
    os.replace(part, path)
    return path


def _fetch(remote: RemoteFile, part: Path, have: int) -> None:
    """Append to `part` what is missing; a server that cannot start in the middle makes it start over."""
    if have >= remote.size:
        return
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        have = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        with open(part, "ab" if have else "wb") as file, _byte_bar("download", remote.size, have) as bar:
            while have <= remote.size and (data := response.read(CHUNK)):
                file.write(data)
                bar.update(len(data))
                have += len(data)
    if have < remote.size:
        raise ConnectionError(f"it ended after {have} of {remote.size} bytes")


def check_file(path: str | Path, expected: RemoteFile) -> None:
    """InputError if a local file is not byte for byte the one expected."""
    digest, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file, _byte_bar("check", size) as bar:
        while data := file.read(CHUNK):
            digest.update(data)
            bar.update(len(data))
    if digest.hexdigest() != expected.sha256:
        raise InputError(
            f"{path}: SHA-256 {digest.hexdigest()} ({size} bytes), expected {expected.sha256} ({expected.size} bytes); "
            f"the file is damaged or another one, remove it and get it again from {expected.url}"
        )


def unpack(path: str | Path, archive: RemoteArchive, folder: Path, remedy: str) -> None:
    """Check the archive at `path` and unpack it into `folder`, where its folder appears whole or not at all.

    remedy: what to do where Python is too old to unpack safely.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such archive")
    if not hasattr(tarfile, "data_filter"):
        raise InputError(f"this Python cannot unpack archives safely; use 3.11.4 or newer, or {remedy}")
    check_file(path, archive)
    _check_space(folder, archive.unpacked_size)
    temporary = folder / f"{archive.folder}.part"
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier run that was killed
    try:
        _extract(path, archive, temporary)
        if not (temporary / archive.folder).is_dir():
            raise InputError(f"{path}: holds no folder {archive.folder}; expected the archive of {archive.url}")
        os.replace(temporary / archive.folder, folder / archive.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(path: str | Path, archive: RemoteArchive, folder: Path) -> None:
    with (
        damage_named(path, "cannot be unpacked"),
        tarfile.open(path) as tar,
        _byte_bar("unpack", archive.unpacked_size) as bar,
    ):
        for member in tar:
            tar.extract(member, folder, filter="data")  # refuses paths and links that lead outside
            bar.update(member.size)


@contextmanager
def damage_named(path: str | Path, complaint: str) -> Iterator[None]:
    """Turn what a parser makes of arbitrary bytes, which may be any exception, into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {complaint} ({reason(error)[:120]})") from None


def _check_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; choose another folder")


def _byte_bar(title: str, total: int, initial: int = 0) -> tqdm:
    return terminal.bar(desc=title, total=total, initial=initial, unit="B", unit_scale=True, unit_divisor=1000)
