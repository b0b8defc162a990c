"""Asterisk's core sounds in US English: seventeen minutes of one voice, real speech that Debian packages.

The recordings are by Allison Smith, under CC BY-SA 3.0. They come as G.722 at 16 kHz, so there is nothing above 8 kHz.
"""

import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from audio import INT16_SCALE, wav_length, write_wav
from corpora.lists import FileLists, write_lists, write_text
from corpora.names import check_listable, plain_name
from harness import terminal
from harness.downloads import damage_named
from harness.errors import InputError, show
from harness.files import RefusedFile, read_bytes
from harness.pools import thread_pool

VOICE = "en_US_f_Allison"
SAMPLING_RATE = 22_050  # Hz
SHORTEST = 8_000  # bytes, a second; what is shorter is a letter or a digit
N_CLIPS, N_TEST = 373, 37  # in version 1.6.1; held out
MAX_BYTES = 2**28  # of all sounds together; the real ones are 8 MB
MAX_BETWEEN = 2**24  # bytes of an archive's names and other headers
_Found = tuple[tuple[str, ...], int, Callable[[], bytes]]  # a sound: parts of its path, bytes, how to read it
CREDITS = """\
Speech: "Asterisk core sounds (US English)", recorded by Allison Smith (http://www.theivrvoice.com), with financial
contributions by Digium, Inc. (http://www.digium.com); copyright 2003-2010 Allison Smith, licensed under CC BY-SA 3.0
(https://creativecommons.org/licenses/by-sa/3.0/). Changes: decoded from G.722 and resampled to 22,050 Hz, 16-bit mono.
"""


def prepare_corpus(folder: str | Path, archive: str | Path | None = None, unpacked: str | Path = ".") -> FileLists:
    """Decode the sounds into `folder` and write their lists; wavs that are there already are kept.

    archive: Debian's package, or a tar of the sounds; else they are taken from the folder `unpacked`. The split depends
    on the names only. InputError where there are no sounds, or no ffmpeg to decode them with.
    """
    folder = Path(folder)
    check_listable(folder)
    source = Path(unpacked if archive is None else archive)
    complaint = "cannot be read" if archive is None else "not a Debian package or tar"
    with damage_named(source, complaint):
        sounds = _gathered(_in_folder(source) if archive is None else _in_archive(source), source)
    if not sounds:
        raise InputError(
            f"{source}: holds no .g722 sound of a second; expected Debian's "
            "package asterisk-core-sounds-en-g722 or what it installs"
        )
    if len(sounds) != N_CLIPS:
        terminal.warn(f"{len(sounds)} sounds, {N_CLIPS} expected: the split is not that of the published figures")
    clips = sorted(_decode_all(sounds, folder / "wavs"))
    write_text(folder / "CREDITS.txt", CREDITS)
    random.Random(0).shuffle(clips)
    return write_lists(folder, train=clips[N_TEST:], test=clips[:N_TEST])


# --- where the sounds are ---------------------------------------------------------------------------------


def _gathered(found: Iterable[_Found], source: str | Path) -> dict[str, bytes]:
    """Sounds of a second at least by the names of their clips, each the path below the voice's folder, if it has one.

    InputError where they are too large together, or two have one name.
    """
    sounds: dict[str, bytes] = {}
    taken, total = set(), 0
    for parts, size, read in found:
        if size < SHORTEST:
            continue
        name = _name(parts)
        if name.casefold() in taken:
            raise InputError(f"{source}: two sounds, the clips of which would be {name}.wav; leave one of them out")
        taken.add(name.casefold())
        total += size
        if total > MAX_BYTES:
            raise InputError(f"{source}: over {MAX_BYTES} bytes of sounds; expected some 8 MB")
        sounds[name] = read()
    return sounds


def _in_folder(folder: Path) -> Iterator[_Found]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for path in sorted(folder.rglob("*.g722")):
        if path.is_file():
            yield path.relative_to(folder).parts, path.stat().st_size, partial(read_bytes, path, MAX_BYTES)


def _in_archive(path: Path) -> Iterator[_Found]:
    if not path.is_file():
        raise InputError(f"{path}: no such archive")
    with _as_tar(path) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".g722"):
                yield Path(member.name).parts, member.size, partial(tar.sound, member)


def _name(parts: tuple[str, ...]) -> str:
    below = parts[parts.index(VOICE) + 1 :] if VOICE in parts else parts
    return plain_name([*below[:-1], below[-1].removesuffix(".g722")])


@contextmanager
def _as_tar(path: Path) -> Iterator["_Tar"]:
    with open(path, "rb") as file:
        if file.read(8) == b"!<arch>\n":
            _find_data(file)
        else:
            file.seek(0)
        with _Tar.open(fileobj=file, mode="r|*") as tar:  # a stream: it may begin anywhere in the file
            yield tar


class _Tar(tarfile.TarFile):
    """A tar whose names and other headers, which are held in memory, are MAX_BETWEEN bytes together at most."""

    def __init__(self, name: str | None, mode: str, stream: BinaryIO, **options: Any) -> None:
        self._headers = _Headers(stream)
        super().__init__(name, mode, self._headers, **options)

    def sound(self, member: tarfile.TarInfo) -> bytes:
        """Content of a member."""
        self._headers.left += member.size
        return self.extractfile(member).read()


class _Headers:
    """The stream of a tar, from which little is read, and the rest passed over."""

    def __init__(self, stream: BinaryIO) -> None:
        self.left, self._stream = MAX_BETWEEN, stream
        self.tell, self.seek, self.close = stream.tell, stream.seek, stream.close

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise RefusedFile(f"over {MAX_BETWEEN} bytes of names and other headers")
        return self._stream.read(size)


def _find_data(file: BinaryIO) -> None:
    """Go to the data in a package, an `ar` archive: a header of 60 bytes before each member, sizes made even."""
    while len(header := file.read(60)) == 60:
        if header.startswith(b"data.tar"):
            return
        size = header[48:58].rstrip()
        if not size.isdigit():
            raise InputError(f"{file.name}: a package with a member of {show(size)} bytes; get it again")
        file.seek(int(size) + int(size) % 2, 1)
    raise InputError(f"{file.name}: a package without data; get it again")


# --- decoding ---------------------------------------------------------------------------------------------


def _decode_all(sounds: dict[str, bytes], folder: Path) -> list[str]:
    """Write a wav of each sound that has none, a few at once; returns the paths."""
    if shutil.which("ffmpeg") is None:
        raise InputError("G.722 is decoded by ffmpeg, which is not there; install it (apt-get install ffmpeg)")

    def decode(name: str) -> str:
        path = folder / f"{name}.wav"
        if not _is_whole(path):
            write_wav(path, _decode(name, sounds[name]), SAMPLING_RATE)
        return str(path)

    with thread_pool() as pool:
        return list(terminal.bar(pool.map(decode, sounds), "asterisk", len(sounds), unit="clip"))


def _is_whole(path: Path) -> bool:
    try:
        return wav_length(path, SAMPLING_RATE) > 0
    except InputError:
        return False


def _decode(name: str, sound: bytes) -> torch.Tensor:
    output = ["-ac", "1", "-ar", str(SAMPLING_RATE), "-f", "s16le", "-"]
    command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", "-", *output]
    result = subprocess.run(command, input=sound, capture_output=True)
    if result.returncode or len(result.stdout) < 2:
        reason = " ".join(result.stderr.decode(errors="replace").split())[:120]
        raise InputError(f"{name}.g722: ffmpeg could not decode it ({reason}); get the archive again")
    samples = np.frombuffer(result.stdout[: len(result.stdout) // 2 * 2], dtype="<i2")
    return torch.from_numpy(samples.astype(np.float32) / INT16_SCALE)
