"""LJSpeech 1.1 (Ito and Johnson, 2017), downloaded, checked and split: one speaker, 24 hours at 22,050 Hz."""

import os
from dataclasses import dataclass
from pathlib import Path

from corpora.lists import FileLists, write_lists
from corpora.names import check_listable
from harness.downloads import RemoteArchive, damage_named, download, unpack
from harness.errors import InputError
from harness.files import read_text

MAX_METADATA_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Corpus(RemoteArchive):
    """An archive in LJSpeech's layout, metadata.csv and wavs/ in its folder; its first `n_test` clips are for test."""

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


def prepare_corpus(
    folder: str | Path, corpus: Corpus, archive: str | Path | None = None, unpacked: str | Path | None = None
) -> FileLists:
    """Have a corpus in `folder`, with its lists: from an unpacked copy, a local archive, or the web.

    What is already there is used again: an unpacked corpus, a whole archive, the beginning of a download.
    InputError says what is wrong with an archive or a copy; those are never changed or removed.
    """
    folder = Path(folder)
    check_listable(folder if unpacked is None else unpacked)
    if unpacked is not None:
        source = Path(unpacked)
        source = source / corpus.folder if (source / corpus.folder).is_dir() else source
    else:
        source = folder / corpus.folder
        if not source.exists():
            path = archive or download(corpus, folder, remedy="pass --archive FILE")
            unpack(path, corpus, folder, remedy="pass --folder DIR with an unpacked copy")
    clips = _listed_clips(source, corpus)
    return write_lists(folder, train=clips[corpus.n_test :], test=clips[: corpus.n_test])


def _listed_clips(source: Path, corpus: Corpus) -> list[str]:
    """Paths of all clips of an unpacked corpus, in order; InputError if it is not whole."""
    metadata = source / "metadata.csv"
    if not metadata.is_file():
        raise InputError(f"{source}: no metadata.csv there; expected an unpacked {corpus.folder}")
    with damage_named(metadata, "cannot be read"):
        lines = read_text(metadata, MAX_METADATA_BYTES, errors="replace").split("\n")
    clips = [str(source / "wavs" / f"{name}.wav") for name in sorted(line.split("|")[0] for line in lines if line)]
    missing = [clip for clip in clips if not os.path.isfile(clip)]
    if missing or len(clips) != corpus.n_clips:
        found = f"{len(clips) - len(missing)} of {corpus.n_clips} clips"
        first = f" ({missing[0]} is missing)" if missing else ""
        raise InputError(f"{source}: holds {found}{first}; remove the folder and unpack the corpus again")
    return clips
