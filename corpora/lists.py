"""End of every recipe: train_files.txt and test_files.txt beside a corpus of 16-bit mono wavs.

Paths begin as the folder was given, so that they hold from the directory where the command was run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corpora.names import check_listable
from harness import terminal
from harness.files import write_keeping


@dataclass(frozen=True)
class FileLists:
    """Paths of a corpus' lists, and how many clips they name."""

    training_files: Path
    test_files: Path
    n_train: int
    n_test: int
    validation_files: Path | None = None
    n_valid: int = 0

    def __str__(self) -> str:
        named = {"training": (self.n_train, self.training_files), "test": (self.n_test, self.test_files)}
        if self.validation_files:
            named["validation"] = (self.n_valid, self.validation_files)
        return "\n".join(f"{name}: {count} clips in {path}" for name, (count, path) in named.items())


def write_text(path: Path, text: str) -> None:
    """Write a text of a corpus, and say where another one is kept that was in its place."""
    if (kept := write_keeping(path, text)) is not None:
        terminal.warn(f"{path}: another one was there; it is {kept.name} now")


def write_lists(
    folder: Path, train: Sequence[str], test: Sequence[str], valid: Sequence[str] | None = None
) -> FileLists:
    """Write the paths of the clips, one per line, each list whole or not at all; valid_files.txt if it is given.

    A list of other paths, such as one that somebody has shortened, is kept under another name. InputError where a list
    cannot hold one of the paths.
    """
    clips = {"train": train, "test": test} | ({} if valid is None else {"valid": valid})
    paths = {name: folder / f"{name}_files.txt" for name in clips}
    for clip in (clip for some in clips.values() for clip in some):
        check_listable(clip)
    for name, path in paths.items():
        write_text(path, "".join(f"{clip}\n" for clip in clips[name]))
    return FileLists(paths["train"], paths["test"], len(train), len(test), paths.get("valid"), len(valid or ()))
