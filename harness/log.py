"""What a run writes for people: the training log, TensorBoard, pictures of mel spectrograms."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evaluation import Likelihood, mel_figure
from harness import terminal
from harness.files import Appended, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """The per-step table `losses.csv` and TensorBoard scalars, audio and pictures, all over the iteration.

    A run that resumes at iteration n drops what an interrupted one wrote beyond n.
    """

    FILE = "losses.csv"
    COLUMNS = ("iteration", "loss", "prior", "log_det", "grad_norm", "learning_rate")

    def __init__(self, folder: Path, start: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._table = self._open_table(folder / self.FILE, start)
        self._disk_refuses = False
        self._writer, self._tensorboard = None, folder / "tensorboard" if tensorboard else None
        self._open_writer(start + 1)

    def _open_table(self, path: Path, start: int) -> Appended:
        rows = [",".join(self.COLUMNS)]
        if start and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                iteration, *values = line.split(",")
                if len(values) + 1 == len(self.COLUMNS) and iteration.isdecimal() and int(iteration) <= start:
                    rows.append(line)
        with written_whole(path) as temporary:
            temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        return Appended(path)

    def _open_writer(self, first: int | None = None) -> None:
        if self._tensorboard is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

        try:
            self._writer = SummaryWriter(self._tensorboard, purge_step=first)
        except OSError as error:
            self._refused(error)

    def steps(self, rows: Sequence[Sequence[float]]) -> None:
        """Rows of COLUMNS, one per training step; TensorBoard gets the last.

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
        for name, value in zip(self.COLUMNS[1:], values, strict=True):
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

    def scalar(self, name: str, value: float, iteration: int) -> None:
        """A TensorBoard scalar."""
        self._to_tensorboard(lambda writer: writer.add_scalar(name, value, iteration))

    def likelihood(self, result: Likelihood, iteration: int) -> None:
        """The test log-likelihood and its terms."""
        for name in ("mean", "weighted", "prior", "log_det"):
            self.scalar(f"test/log_likelihood_{name}", getattr(result, name), iteration)

    def sample(self, audio: Tensor, sampling_rate: int, mels: dict[str, Tensor], iteration: int) -> None:
        """A synthesized sample [T] and pictures of mels [80, F] by name."""
        if self._writer is None:
            return
        self._to_tensorboard(lambda writer: writer.add_audio("sample", audio.clamp(-1, 1), iteration, sampling_rate))
        for name, mel in mels.items():
            self._picture(f"mel/{name}", mel_figure({name: mel}), iteration)

    def _picture(self, name: str, figure: "Figure", iteration: int) -> None:
        self._to_tensorboard(lambda writer: writer.add_figure(name, figure, iteration))

    def close(self) -> None:
        """Flush and close the files."""
        self._table.close()
        self._to_tensorboard(lambda writer: writer.close())


class NoLog:
    """Takes what a RunLog takes and writes nothing: the log of all processes but the main one."""

    def steps(self, *_: Any) -> None:
        """Nothing, as all of them."""

    scalar = likelihood = sample = close = steps
