"""Records of a run for people: tables as CSV, and TensorBoard, both over the iteration."""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from harness import terminal
from harness.errors import reason
from harness.files import Appended, RefusedFile, line_blocks, open_file, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


MAX_TABLE_BYTES = 2**32  # some 40 million steps
MAX_ROW_BYTES = 2**12
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # that may pass


class RunLog:
    """A table with a row per step or epoch, and TensorBoard scalars, audio and pictures, all over the iteration.

    columns: of the table, the iteration first. A run that resumes at iteration `start` drops what an interrupted one
    wrote beyond it.
    """

    def __init__(
        self, folder: Path, start: int, columns: Sequence[str], tensorboard: bool = False, file: str = "losses.csv"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.columns = columns
        self._table = self._open_table(folder / file, start)
        self._disk_refuses = False
        self._writer, self._tensorboard = None, folder / "tensorboard" if tensorboard else None
        self._open_writer(start + 1)

    def _open_table(self, path: Path, start: int) -> Appended:
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            file.write(",".join(self.columns).encode() + b"\n")
            if start and path.exists() and not path.is_dir():
                file.writelines(self._earlier(path, start))
        return Appended(path)

    def _earlier(self, path: Path, start: int) -> Iterator[bytes]:
        """Rows up to an iteration, of a table of whatever length and content."""
        try:
            with open_file(path, MAX_TABLE_BYTES) as table:
                for lines, _ in line_blocks(table, MAX_ROW_BYTES):
                    yield from (line + b"\n" for line in lines if self._is_earlier(line, start))
        except (RefusedFile, OSError) as error:
            terminal.warn(f"{path}: the earlier rows cannot be read ({reason(error)}); the table begins anew")

    def _is_earlier(self, line: bytes, start: int) -> bool:
        iteration, *values = line.split(b",")
        numbered = iteration.isdigit() and len(iteration) < 20
        return numbered and len(values) + 1 == len(self.columns) and int(iteration) <= start

    def _open_writer(self, first: int | None = None) -> None:
        if self._tensorboard is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            self._writer = SummaryWriter(self._tensorboard, purge_step=first)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                self._refused(error)
            else:  # another thing is in the place of its folder
                self._give_up(error)

    def steps(self, rows: Sequence[Sequence[float]]) -> None:
        """Append rows of the columns; TensorBoard gets the last.

        On a full disk the rows wait for space, and TensorBoard does without.
        """
        try:
            self._table.write("".join(",".join(map(str, row)) + "\n" for row in rows))
        except OSError as error:
            self._refused(error)
            return
        if self._disk_refuses:
            terminal.say("the disk takes the log again")
            self._disk_refuses = False
        if self._writer is None:
            self._open_writer()
        iteration, *values = rows[-1]
        for name, value in zip(self.columns[1:], values, strict=True):
            self.scalar(f"train/{name}", value, int(iteration))

    def _refused(self, error: OSError) -> None:
        if not self._disk_refuses:
            terminal.warn(f"the log cannot be written ({error.strerror or error}); training goes on")
        self._disk_refuses = True

    def _to_tensorboard(self, write: Callable[["SummaryWriter"], None]) -> None:
        if self._writer is None or self._disk_refuses:
            return
        try:
            write(self._writer)
        except OSError as error:  # of its writing thread, which has ended; with the next row, a new one
            self._writer = None
            self._refused(error)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on without TensorBoard: curves and pictures are not the work, whatever a library makes of them."""
        self._writer = self._tensorboard = None
        terminal.warn(f"TensorBoard gets no more ({type(error).__name__}: {reason(error)}); training goes on")

    def scalar(self, name: str, value: float, iteration: int) -> None:
        """A TensorBoard scalar."""
        self._to_tensorboard(lambda writer: writer.add_scalar(name, value, iteration))

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """TensorBoard scalars by name."""
        for name, value in values.items():
            self.scalar(name, value, iteration)

    def audio(self, name: str, audio: Tensor, sampling_rate: int, iteration: int) -> None:
        """A sound [T] for TensorBoard, clipped to [-1, 1]."""
        self._to_tensorboard(lambda writer: writer.add_audio(name, audio.clamp(-1, 1), iteration, sampling_rate))

    def figure(self, name: str, draw: Callable[[], "Figure"], iteration: int) -> None:
        """A picture for TensorBoard; drawn only where there is one."""
        self._to_tensorboard(lambda writer: writer.add_figure(name, draw(), iteration))

    def histogram(self, name: str, values: Tensor, iteration: int) -> None:
        """A TensorBoard histogram of values of any shape; none where some are not finite, which it cannot show."""
        if values.isfinite().all():
            self._to_tensorboard(lambda writer: writer.add_histogram(name, values, iteration))

    def charts(self, layout: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Several scalars over one another, on TensorBoard's page of custom scalars: their names by group and title."""
        lines = {group: {title: ["Multiline", list(names)] for title, names in charts.items()}
                 for group, charts in layout.items()}  # fmt: skip
        self._to_tensorboard(lambda writer: writer.add_custom_scalars(lines))

    @property
    def shows(self) -> bool:
        """Tell whether there is a TensorBoard to compute pictures and statistics for."""
        return self._writer is not None

    def close(self) -> None:
        """Flush and close the files."""
        with suppress(OSError):
            self._table.close()
        self._to_tensorboard(lambda writer: writer.close())


class NoLog:
    """Log of all processes but the main one: takes what a RunLog takes and writes nothing."""

    shows = False

    def steps(self, *_: Any) -> None:
        """Nothing, as all of them."""

    scalar = scalars = audio = figure = histogram = charts = close = steps
