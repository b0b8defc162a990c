"""Lists of recordings as they exist: a path per line, with a text behind it, in Kaldi's form, or in JSON lines."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError
from harness.files import RefusedFile, read_text

MAX_BYTES = 2**28  # of a list, with texts
AUDIO_KEYS = ("audio_filepath", "audio", "wav", "path", "file")  # of a JSON line
MEL_KEYS = ("mel_filepath", "mel")
TEXT_KEYS = ("text", "transcript", "normalized_text")
MEL_SUFFIXES = (".npy", ".pt")


@dataclass(frozen=True)
class Entry:
    """An entry of a list; what it lacks is empty."""

    audio: str
    mel: str = ""
    text: str = ""


def read_entries(path: str | Path, beside: Sequence[Path] = ()) -> list[Entry]:
    """The entries of a list, blank lines skipped; a byte order mark and any line ends are understood.

    A line is a path; `path|text`, with `|` or a tab; `id|text` beside a folder `wavs`; `path|mel`, a saved mel of it;
    `id path` as in Kaldi's scp files; or a JSON object with `audio_filepath`.
    A relative path is taken from the current folder, else from the list's own, else from those `beside`.
    InputError where the list is missing, empty, or no text.
    """
    path = Path(path)
    try:
        text = read_text(path, MAX_BYTES).removeprefix("\ufeff")
    except FileNotFoundError:
        raise InputError(f"file list {path}: no such file; expected one wav path per line") from None
    except (OSError, RefusedFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"file list {path}: cannot be read as text ({reason})") from None
    if "\0" in text:
        raise InputError(f"file list {path}: holds null bytes; expected one wav path per line")
    folders = [path.parent, *beside]
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    entries = [_entry(line, folders, f"file list {path}, line {number}") for number, line in lines if line]
    if not entries:
        raise InputError(f"file list {path}: empty; expected one wav path per line")
    return entries


def _entry(line: str, folders: Sequence[Path], where: str) -> Entry:
    if line.startswith("{"):
        return _json_entry(line, folders, where)
    separator = "|" if "|" in line else "\t"
    first, *rest = (field.strip() for field in line.split(separator))
    if not rest:
        return Entry(_kaldi(line, folders))
    if rest[0].lower().endswith(MEL_SUFFIXES):
        return Entry(_locate(first, folders), _locate(rest[0], folders), separator.join(rest[1:]))
    if _is_there(rest[0], folders) and not _is_there(first, folders):  # `id<tab>path`
        return Entry(_locate(rest[0], folders))
    return Entry(_named(first, folders), text=separator.join(rest))


def _json_entry(line: str, folders: Sequence[Path], where: str) -> Entry:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: begins with a brace, and is no JSON object") from None
    found = [next((values[key] for key in keys if isinstance(values.get(key), str)), "")
             for keys in (AUDIO_KEYS, MEL_KEYS, TEXT_KEYS)]  # fmt: skip
    audio, mel, text = found
    if not audio:
        raise InputError(f"{where}: a JSON object without {AUDIO_KEYS[0]!r}; expected the path of a recording there")
    return Entry(_locate(audio, folders), _locate(mel, folders) if mel else "", text)


def _kaldi(line: str, folders: Sequence[Path]) -> str:
    """The path of a line, which may follow an id and a space; a path with spaces in it comes first."""
    _, space, path = line.partition(" ")
    if space and not _is_there(line, folders) and _is_there(path.strip(), folders):
        return _locate(path.strip(), folders)
    return _locate(line, folders)


def _named(name: str, folders: Sequence[Path]) -> str:
    """The recording of an id, in the folder `wavs` beside the list, unless it is a path itself."""
    if not _is_there(name, folders):
        for folder in folders:
            for candidate in (folder / "wavs" / f"{name}.wav", folder / "wavs" / name, folder / f"{name}.wav"):
                if os.path.isfile(candidate):  # which a name that is too long does not raise from
                    return str(candidate)
    return _locate(name, folders)


def _is_there(path: str, folders: Sequence[Path]) -> bool:
    return os.path.exists(_locate(path, folders))


def _locate(path: str, folders: Sequence[Path]) -> str:
    if os.path.exists(path):
        return path
    return next((str(folder / path) for folder in folders if os.path.exists(folder / path)), path)
