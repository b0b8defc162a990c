"""The judge of steps whose loss or gradient is not finite."""

import math
from collections.abc import Callable, Sequence

from harness.errors import InputError

MAX_NAMES = 16  # of files in one message


class BadSteps:
    """Judges the results of steps: reports each whose loss or gradient was not finite, and ends a run of them.

    files: the names of the training files of a step's batch, by the step's number from 0; the data order is a
    function of it, so they are looked up only when needed. in_a_row: bad steps just before the first one judged.
    """

    def __init__(
        self, limit: int, files: Callable[[int], Sequence[str]], say: Callable[[str], None], in_a_row: int = 0
    ) -> None:
        self.limit, self.files, self.say, self.in_a_row = limit, files, say, in_a_row

    def judge(self, iteration: int, loss: float, norm: float) -> bool:
        """Whether the step that ended at `iteration` was good; InputError when `limit` in a row were not."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.say(
            f"warning: iteration {iteration}: loss {loss:.4g}, gradient norm {norm:.4g}; step skipped, the weights "
            f"stay. Its files: {_shown(self.files(iteration - 1))}"
        )
        if self.in_a_row >= self.limit:
            steps = range(max(0, iteration - self.in_a_row), iteration)
            names = dict.fromkeys(name for step in steps for name in self.files(step))
            raise InputError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to iteration "
                f"{iteration}; the checkpoints before them are intact: look at the files with --check_data, or go on "
                f"from a checkpoint with a lower learning rate. Files: {_shown(list(names))}"
            )
        return False


def _shown(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
