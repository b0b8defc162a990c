"""Corpora made ready for training: LJSpeech, downloaded and checked; and the demo corpus, spoken by espeak-ng.

Each ends as a folder of 16-bit wavs at 22,050 Hz with train_files.txt and test_files.txt beside it, whose paths begin
as the folder was given, so that they hold from the directory where the command was run.
"""

import ctypes
import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import INT16_SCALE, wav_length, write_wav
from harness.errors import InputError
from harness.files import written_whole

SAMPLING_RATE = 22_050  # Hz, of both corpora
CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 60  # seconds without a byte before a download is given up


# --- LJSpeech -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the web, and how to know that it is the right one."""

    url: str
    sha256: str
    size: int  # bytes
    unpacked_size: int = 0  # bytes on disk, roughly, if it is to be unpacked

    @property
    def name(self) -> str:
        """Of the file itself."""
        return self.url.rpartition("/")[-1]


@dataclass(frozen=True, kw_only=True)
class Corpus(RemoteFile):
    """An archive on the web: `folder` with metadata.csv and wavs/ inside; its first `n_test` clips are for test."""

    folder: str
    n_clips: int
    n_test: int


LJSPEECH = Corpus(
    url="https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2",
    sha256="be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5",
    size=2_748_572_632,
    unpacked_size=3_810_000_000,
    folder="LJSpeech-1.1",
    n_clips=13_100,
    n_test=1_310,
)


@dataclass(frozen=True)
class FileLists:
    """Where a corpus' lists are, and how many clips they name."""

    training_files: Path
    test_files: Path
    n_train: int
    n_test: int


def prepare_corpus(
    folder: str | Path, corpus: Corpus, archive: str | Path | None = None, unpacked: str | Path | None = None
) -> FileLists:
    """Have a corpus in `folder`, with its lists: from an unpacked copy, a local archive, or the web.

    What is already there is used again: an unpacked corpus, a whole archive, the beginning of a download.
    InputError says what is wrong with an archive or a copy; those are never changed or removed.
    """
    folder = Path(folder)
    if unpacked is not None:
        source = Path(unpacked)
        source = source / corpus.folder if (source / corpus.folder).is_dir() else source
    else:
        source = folder / corpus.folder
        if not source.exists():
            unpack(archive or download(corpus, folder), corpus, folder)
    clips = _listed_clips(source, corpus)
    return _write_lists(folder, train=clips[corpus.n_test :], test=clips[: corpus.n_test])


def _listed_clips(source: Path, corpus: Corpus) -> list[str]:
    """Paths of all clips of an unpacked corpus, in order; InputError if it is not whole."""
    metadata = source / "metadata.csv"
    if not metadata.is_file():
        raise InputError(f"{source}: no metadata.csv there; expected an unpacked {corpus.folder}")
    lines = metadata.read_text(encoding="utf-8", errors="replace").split("\n")
    clips = [str(source / "wavs" / f"{name}.wav") for name in sorted(line.split("|")[0] for line in lines if line)]
    missing = [clip for clip in clips if not os.path.isfile(clip)]
    if missing or len(clips) != corpus.n_clips:
        found = f"{len(clips) - len(missing)} of {corpus.n_clips} clips"
        first = f" ({missing[0]} is missing)" if missing else ""
        raise InputError(f"{source}: holds {found}{first}; remove the folder and unpack the corpus again")
    return clips


def _write_lists(folder: Path, train: Sequence[str], test: Sequence[str]) -> FileLists:
    lists = FileLists(folder / "train_files.txt", folder / "test_files.txt", len(train), len(test))
    for path, clips in ((lists.training_files, train), (lists.test_files, test)):
        with written_whole(path) as temporary:
            temporary.write_text("".join(f"{clip}\n" for clip in clips), encoding="utf-8")
    return lists


def download(file: RemoteFile, folder: Path, remedy: str = "pass --archive FILE") -> Path:
    """Fetch a file into `folder`, going on with an earlier part of it; returns its path, contents unchecked.

    remedy: what to do with a file that the user fetched by other means.
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


def unpack(archive: str | Path, corpus: Corpus, folder: Path) -> None:
    """Check the archive and unpack it into `folder`, where the corpus appears whole or not at all."""
    if not os.path.isfile(archive):
        raise InputError(f"{archive}: no such archive")
    if not hasattr(tarfile, "data_filter"):
        raise InputError("this Python cannot unpack archives safely; use 3.11.4 or newer, or pass --folder")
    check_file(archive, corpus)
    _check_space(folder, corpus.unpacked_size)
    temporary = folder / f"{corpus.folder}.part"
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier run that was killed
    try:
        _extract(archive, corpus, temporary)
        if not (temporary / corpus.folder).is_dir():
            raise InputError(f"{archive}: holds no folder {corpus.folder}; expected the archive of {corpus.url}")
        os.replace(temporary / corpus.folder, folder / corpus.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def damage_named(path: str | Path, complaint: str) -> Iterator[None]:
    """Turn what a parser makes of arbitrary bytes, which may be any exception, into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: {complaint} ({reason})") from None


def _extract(archive: str | Path, corpus: Corpus, folder: Path) -> None:
    with (
        damage_named(archive, "cannot be unpacked"),
        tarfile.open(archive) as tar,
        _byte_bar("unpack", corpus.unpacked_size) as bar,
    ):
        for member in tar:
            tar.extract(member, folder, filter="data")  # refuses paths and links that lead outside
            bar.update(member.size)


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


def _check_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; choose another folder")


def _byte_bar(title: str, total: int, initial: int = 0) -> tqdm:
    return tqdm(desc=title, total=total, initial=initial, unit="B", unit_scale=True, unit_divisor=1000)


# --- the demo corpus ------------------------------------------------------------------------------------------

SENTENCES = Path(__file__).parents[1] / "configs" / "demo_sentences.txt"
TEST_EVERY = 10  # every tenth sentence is held out
VOICE, WORDS_PER_MINUTE = "en-us", 165
VOLUME = 70  # percent of espeak-ng's default, whose peaks touch full scale
# espeak-ng's pauses are digital silence, where a flow's density has no bound and likelihoods mean nothing. A noise
# floor of 8 steps of 16-bit audio, -72 dBFS, makes them a quiet room.
NOISE_FLOOR = 8.0


def make_demo_corpus(folder: str | Path, sentences: str | Path = SENTENCES) -> tuple[FileLists, bool]:
    """Speak the sentences into `folder`; returns the lists, and whether a finished corpus was found and kept.

    The same sentences give the same samples wherever this runs.
    """
    folder = Path(folder)
    text = [line for line in Path(sentences).read_text(encoding="utf-8").splitlines() if line]
    clips = [str(folder / "wavs" / f"demo_{number:03d}.wav") for number in range(1, len(text) + 1)]
    metadata = "".join(f"{Path(clip).stem}|{line}\n" for clip, line in zip(clips, text, strict=True))
    finished = _is_finished(folder, metadata, clips)
    if not finished:
        _speak_clips(text, clips)
    lists = _write_lists(
        folder,
        train=[clip for number, clip in enumerate(clips, 1) if number % TEST_EVERY],
        test=[clip for number, clip in enumerate(clips, 1) if number % TEST_EVERY == 0],
    )
    with written_whole(folder / "metadata.csv") as temporary:  # last: its presence says that all the rest is there
        temporary.write_text(metadata, encoding="utf-8")
    return lists, finished


def _is_finished(folder: Path, metadata: str, clips: Sequence[str]) -> bool:
    try:
        if (folder / "metadata.csv").read_text(encoding="utf-8") != metadata:
            return False
        return all(wav_length(clip, SAMPLING_RATE) > 0 for clip in clips)
    except (InputError, OSError, ValueError):
        return False


def _speak_clips(text: Sequence[str], clips: Sequence[str]) -> None:
    # In a process of its own: the C library gives the same samples again only from its first initialisation on.
    with ProcessPoolExecutor(1) as pool:
        try:
            spoken = pool.submit(speak, text).result()
        except BrokenProcessPool:
            raise InputError("espeak-ng crashed; reinstall the espeakng-loader package") from None
    noise = np.random.default_rng(0)
    for clip, samples in zip(clips, tqdm(spoken, desc="demo corpus", unit="clip"), strict=True):
        floor = noise.normal(0.0, NOISE_FLOOR, len(samples))
        write_wav(clip, torch.from_numpy((samples + floor) / INT16_SCALE), SAMPLING_RATE)


def speak(text: Sequence[str]) -> list[np.ndarray]:
    """Each sentence as int16 samples at SAMPLING_RATE, by espeak-ng's C library (constants of its speak_lib.h)."""
    import espeakng_loader  # only the demo needs it

    synchronous, dont_exit, rate_parameter, volume_parameter, utf8 = 2, 0x8000, 1, 2, 1
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = os.fsencode(espeakng_loader.get_data_path())
    if library.espeak_Initialize(synchronous, 0, data, dont_exit) != SAMPLING_RATE:
        raise InputError(f"espeak-ng found no data in {os.fsdecode(data)}; reinstall the espeakng-loader package")
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: "ctypes._Pointer", count: int, events: int) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())  # the buffer is espeak's
        return 0  # go on

    library.espeak_SetSynthCallback(collect)
    library.espeak_SetVoiceByName(VOICE.encode())
    library.espeak_SetParameter(rate_parameter, WORDS_PER_MINUTE, 0)
    library.espeak_SetParameter(volume_parameter, VOLUME, 0)
    spoken = []
    for sentence in text:
        pieces.clear()
        encoded = sentence.encode()
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, utf8, None, None)
        spoken.append(np.concatenate(pieces))
    library.espeak_Terminate()
    return spoken
