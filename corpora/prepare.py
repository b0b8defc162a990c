"""`python data.py prepare`: own recordings of any kind to 16-bit mono clips, lists, an experiment file and a report.

A take is one recording given, a clip one piece of it that is written. What became of each take is noted in
`takes.jsonl` as soon as it is done, so that an interrupted run goes on, and a later one does what is new only.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from audio import INT16_SCALE, shortest_audio, write_wav
from config import Config
from corpora import splits
from corpora.lists import FileLists, write_lists, write_text
from corpora.loudness import gain, loudness, peak_of
from corpora.names import check_listable
from corpora.recordings import Source, find_sources, read_recording
from corpora.segments import find_segments
from corpora.takes import MAX_NOTES_BYTES, Clip, Take, clip_names, read_notes, take_names
from harness import terminal
from harness.downloads import damage_named
from harness.errors import InputError, one_line
from harness.files import Appended, read_text, written_whole
from harness.pools import thread_pool

MIN_SECONDS = 0.3  # of a clip; what is shorter is no speech
SILENT = 1e-4  # peak below which nothing can be heard, -80 dBFS


@dataclass(frozen=True)
class Preparation:
    """Choices of what is done to recordings besides resampling them."""

    trim_db: float = 60.0  # below the loudest frame is silence; 0: nothing is
    max_seconds: float = 15.0
    level: str = "keep"  # or "peak", "loudness"
    valid: float = 0.05  # shares of the takes
    test: float = 0.05
    by_speaker: bool = False  # hold out whole speakers, the first folders of the paths, instead of some takes of each


def prepare(
    inputs: Sequence[str | Path], folder: Path, config: Config, how: Preparation
) -> tuple[list[Take], FileLists]:
    """Make a corpus of recordings in `folder`; returns the takes and the lists.

    InputError where nothing of the recordings can be used, or the folder holds something else.
    """
    check_listable(folder)
    if folder.is_dir() and os.listdir(folder) and not (folder / "takes.jsonl").is_file():
        raise InputError(f"{folder}: not empty, and no corpus that was prepared before; choose another folder")
    sources = [source for source in find_sources(inputs) if not source.path.resolve().is_relative_to(folder.resolve())]
    folder.mkdir(parents=True, exist_ok=True)
    takes = list(_convert_all(sources, folder, config, how))
    _mark_duplicates(takes)
    used = [take for take in takes if take.clips and not take.problem]
    if not used:
        raise InputError(f"no recording can be used; the first: {takes[0].path}: {takes[0].problem}")
    _assign(used, folder, how)
    names = {name: [_wav(folder, clip.name) for take in used if take.used_as == name for clip in take.clips]
             for name in splits.SETS}  # fmt: skip
    lists = write_lists(folder, names["train"], names["test"], names["valid"])
    _write_config(folder, config, lists)
    return takes, lists


def _wav(folder: Path, name: str) -> str:
    return str(folder / "wavs" / f"{name}.wav")


# --- takes ------------------------------------------------------------------------------------------------


def _convert_all(sources: Sequence[Source], folder: Path, config: Config, how: Preparation) -> Iterator[Take]:
    """The takes in order, a few at once, those noted before and unchanged not again."""
    known = read_notes(folder / "takes.jsonl")
    names = take_names(sources, known)
    notes = Appended(folder / "takes.jsonl")

    def convert(source: Source) -> Take:
        stamp = _stamp(source.path, config, how)
        earlier = known.get(str(source.path))
        if (
            earlier
            and (earlier.stamp, earlier.name) == (stamp, names[source])
            and all(Path(_wav(folder, clip.name)).is_file() for clip in earlier.clips)
        ):
            return earlier
        take = Take(str(source.path), source.below.as_posix(), stamp, names[source], source.speaker)
        try:
            _convert(take, folder, config, how)
        except (InputError, OSError) as error:
            take.problem = str(error).removeprefix(one_line(f"{source.path}: "))
        return take

    try:
        with thread_pool() as pool:
            for take in terminal.bar(pool.map(convert, sources), "prepare", len(sources), unit="take"):
                if known.get(take.path) is not take:
                    notes.write(json.dumps(asdict(take)) + "\n")
                yield take
    finally:
        notes.close()


def _convert(take: Take, folder: Path, config: Config, how: Preparation) -> None:
    """Read, level, cut and write a recording; fills the take in."""
    rate = config.data_config.sampling_rate
    recording = read_recording(Path(take.path), rate)
    audio = recording.audio
    take.form, take.rate, take.seconds = recording.form, recording.rate, len(audio) / rate
    take.offset, take.clipped = recording.offset, recording.clipped
    if not len(audio) or peak_of(audio) < SILENT:
        take.problem = "silent"
        return
    take.loudness = loudness(audio, rate)
    audio *= np.float32(gain(audio, take.loudness, how.level))
    shortest = max(round(MIN_SECONDS * rate), shortest_audio(config.data_config) + config.data_config.hop_length)
    pieces = find_segments(audio, rate, how.trim_db, how.max_seconds)
    pieces = [(first, last) for first, last in pieces if last - first >= shortest]
    for name, (first, last) in zip(clip_names(take.name, len(pieces)), pieces, strict=True):
        samples, digest = _to_16_bit(audio[first:last], name)
        write_wav(_wav(folder, name), torch.from_numpy(samples), rate)
        take.clips.append(Clip(name, last - first, digest))
    if not pieces:
        take.problem = f"too short: {take.seconds:.2f} s, at least {shortest / rate:.2f} are needed"


def _to_16_bit(audio: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Samples with triangular dither of one step, always the same for a name; those on the steps stay as they are."""
    scaled = audio * np.float32(INT16_SCALE)
    whole = np.round(scaled)
    digest = hashlib.blake2b(whole.astype(np.int32).tobytes(), digest_size=16).hexdigest()
    if not np.array_equal(whole, scaled):
        random = np.random.default_rng(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big"))
        dither = random.random(len(audio), np.float32) - random.random(len(audio), np.float32)
        whole = np.round(scaled + dither)
    return whole / np.float32(INT16_SCALE), digest


def _stamp(path: Path, config: Config, how: Preparation) -> str:
    """A hash of what a take's clips depend on."""
    status = path.stat()
    data = config.data_config
    settings = (data.sampling_rate, data.filter_length, data.hop_length, how.trim_db, how.max_seconds, how.level)
    text = repr((status.st_size, status.st_mtime_ns, settings))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


# --- sets -------------------------------------------------------------------------------------------------


def _mark_duplicates(takes: Sequence[Take]) -> None:
    """Leave out clips that are those of an earlier take."""
    first: dict[str, Take] = {}
    for take in takes:
        copies = [clip for clip in take.clips if first.setdefault(clip.digest, take) is not take]
        if copies and not take.problem:
            take.problem = f"the same audio as {first[copies[0].digest].path}"


def _assign(takes: Sequence[Take], folder: Path, how: Preparation) -> None:
    path = folder / "split.json"
    unit = (lambda take: take.speaker or take.below) if how.by_speaker else (lambda take: take.below)
    known = _known_sets(path) if path.is_file() else {}
    speakers = {} if how.by_speaker else {take.below: take.speaker for take in takes}
    sets = splits.assign(list(dict.fromkeys(map(unit, takes))), how.valid, how.test, known, speakers)
    for take in takes:
        take.used_as = sets[unit(take)]
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(known | sets, indent=1, ensure_ascii=False), encoding="utf-8")


def _known_sets(path: Path) -> dict[str, str]:
    """The set of each unit that an earlier run chose. Raises InputError."""
    with damage_named(path, "holds no sets of takes; mend it, or remove it for a new split"):
        known = json.loads(read_text(path, MAX_NOTES_BYTES))
        if not isinstance(known, dict) or not all(name in splits.SETS for name in known.values()):
            raise ValueError(f"expected {', '.join(splits.SETS)} by name")
        "".join(known).encode()  # half of a surrogate pair, which JSON can hold, could not be written again
    return known


def _write_config(folder: Path, config: Config, lists: FileLists) -> None:
    """The experiment file with these lists; its likelihoods are of the validation and of the test clips."""
    sections = config.to_dict()
    tests = [path for path, n in ((lists.validation_files, lists.n_valid), (lists.test_files, lists.n_test)) if n]
    sections["data_config"] |= {
        "training_files": str(lists.training_files),
        "test_files": [str(path) for path in tests] if len(tests) > 1 else str((tests or [lists.training_files])[0]),
    }
    write_text(folder / "config.json", json.dumps(sections, indent=4) + "\n")
