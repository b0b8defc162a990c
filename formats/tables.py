"""Tables as CSV: written whole, with names of files in them as the file system has them, UTF-8 or not."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.files import written_whole


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A line of the columns' names and one per row, whole or not at all; OSError where the disk refuses."""
    with (
        written_whole(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
