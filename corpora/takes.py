"""Takes, what became of each recording: as they are noted in `takes.jsonl`, and what their clips are called."""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from corpora.names import plain_name
from corpora.recordings import Source
from harness.downloads import damage_named
from harness.files import read_text

MAX_NOTES_BYTES = 2**28
_PIECE = re.compile(r"_\d{3,}$")  # what the name of a piece of a take ends in
_CHECKED = ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass
class Clip:
    """A clip that was written."""

    __pydantic_config__ = _CHECKED

    name: str
    samples: Count
    digest: str  # of its samples before dither: the same for copies in another format


@dataclass
class Take:
    """A recording, what it was and what became of it; `problem` says why nothing did."""

    __pydantic_config__ = _CHECKED

    path: str
    below: str
    stamp: str  # of the file and of the settings
    name: str
    speaker: str = ""
    form: str = ""
    rate: Count = 0
    seconds: Finite = 0.0
    offset: Finite = 0.0
    clipped: Count = 0
    loudness: Annotated[float, Field(le=1_000)] = -math.inf  # LUFS, as it was
    problem: str = ""
    clips: list[Clip] = field(default_factory=list)
    used_as: str = ""  # its set


_NOTE = TypeAdapter(Take)


def read_notes(path: Path) -> dict[str, Take]:
    """Takes noted by earlier runs, by path.

    Left out is a line that was cut short by a crash, and one that no run of ours wrote: what clips are called is not
    its to say.
    """
    notes = {}
    if path.is_file():
        with damage_named(path, "cannot be read; remove it, its takes are made anew"):
            lines = read_text(path, MAX_NOTES_BYTES, errors="replace").splitlines()
        for line in lines:
            try:
                take = _NOTE.validate_json(line)
                fits = take.name in _possible_names(take.path, PurePath(take.below))
            except ValueError:
                continue
            if fits and [clip.name for clip in take.clips] == clip_names(take.name, len(take.clips)):
                notes[take.path] = take
    return notes


def take_names(sources: Sequence[Source], known: Mapping[str, Take]) -> dict[Source, str]:
    """A name for each source, from its path; one that is taken gets a hash behind it. Earlier names stay.

    Taken is also what a piece of another take may be called, and a name whose pieces another is called like.
    """
    names: dict[Source, str] = {}
    taken: set[str] = set()  # without case: some file systems hold A and a for the same
    beginnings: set[str] = set()

    def give(source: Source, name: str) -> None:
        names[source] = name
        taken.add(name.casefold())
        beginnings.add(_PIECE.sub("", name.casefold()))

    def is_free(name: str) -> bool:
        return name not in taken | beginnings and _PIECE.sub("", name) not in taken

    for source in sources:
        earlier = known.get(str(source.path))
        if earlier and earlier.name.casefold() not in taken:
            give(source, earlier.name)
    for source in sources:
        if source not in names:
            plain, hashed = _possible_names(str(source.path), source.below)
            give(source, plain if is_free(plain.casefold()) else hashed)
    return names


def clip_names(take: str, pieces: int) -> list[str]:
    """Names of the pieces of a take."""
    return [take] if pieces == 1 else [f"{take}_{number:03d}" for number in range(1, pieces + 1)]


def _possible_names(path: str, below: PurePath) -> tuple[str, str]:
    """The name of a take, and what it is called where another has that name."""
    name = plain_name(below.with_suffix("").parts)
    return name, f"{name}_{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"
