"""End of every recipe: train_files.txt and test_files.txt beside a corpus of 16-bit mono wavs.

Paths begin as the folder was given, so that they hold from the directory where the command was run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.files import written_whole


@dataclass(frozen=True)
class FileLists:
    """Paths of a corpus' lists, and how many clips they name."""

    training_files: Path
    test_files: Path
    n_train: int
    n_test: int

    def __str__(self) -> str:
        return (
            f"training: {self.n_train} clips in {self.training_files}\ntest: {self.n_test} clips in {self.test_files}"
        )


def write_lists(folder: Path, train: Sequence[str], test: Sequence[str]) -> FileLists:
    """Write the paths of the clips, one per line, each list whole or not at all."""
    lists = FileLists(folder / "train_files.txt", folder / "test_files.txt", len(train), len(test))
    for path, clips in ((lists.training_files, train), (lists.test_files, test)):
        with written_whole(path) as temporary:
            temporary.write_text("".join(f"{clip}\n" for clip in clips), encoding="utf-8")
    return lists
