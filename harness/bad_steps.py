"""Steps whose loss or gradient is not finite: skipped on the device, without waiting for it, and judged later."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness import terminal
from harness.errors import InputError
from harness.processes import is_main

MAX_NAMES = 16  # of a batch, in one message


class BadSteps:
    """Judge of the results of steps: reports each whose loss or gradient was not finite, and ends a run of them.

    batch: the names of what was in a step's batch, by the step's number from 0; the data order is a function of it, so
    they are looked up only when needed. remedy: what the user can do about many bad steps, as things stand then.
    in_a_row: bad steps just before the first one judged.
    """

    def __init__(
        self, limit: int, batch: Callable[[int], Sequence[str]], remedy: Callable[[], str], in_a_row: int = 0
    ) -> None:
        self.limit, self.batch, self.remedy, self.in_a_row = limit, batch, remedy, in_a_row

    def judge(self, iteration: int, loss: float, norm: float) -> bool:
        """Tell whether the step that ended at `iteration` was good; InputError when `limit` in a row were not."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if is_main():
            names = _shown(self.batch(iteration - 1))
            terminal.say(  # on stdout: one of the reports of the run's steps
                f"warning: iteration {iteration}: loss {loss:.4g}, gradient norm {norm:.4g}; step skipped, the weights "
                f"stay. Its batch: {names}"
            )
        if self.in_a_row >= self.limit:
            steps = range(max(0, iteration - self.in_a_row), iteration)
            names = dict.fromkeys(name for step in steps for name in self.batch(step))
            raise InputError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to iteration "
                f"{iteration}; {self.remedy()}. "
                f"Their batches: {_shown(list(names))}"
            )
        return False


def _shown(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


# --- skipping ---------------------------------------------------------------------------------------------


def step_if_finite(optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor) -> None:
    """`optimizer.step()`, unless the loss or the gradient norm is not finite: then nothing of it changes.

    The host does not wait for a GPU: a fused optimizer decides there, by the switch made for GradScaler, and any
    other takes its step back there. On a CPU there is nothing to wait for.
    """
    finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    elif finite.device.type == "cpu" or not _moments_are_on_the_device(optimizer):
        if finite:
            optimizer.step()
    else:
        step_and_take_back(optimizer, finite)


def _moments_are_on_the_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be taken back there: not the first one, nor that of an optimizer that counts on the host."""
    parameters = _with_gradients(optimizer)
    return all(parameter in optimizer.state for parameter in parameters) and all(
        value.device == parameter.device for parameter in parameters for value in optimizer.state[parameter].values()
    )


@torch.no_grad()
def step_and_take_back(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step after which weights and moments are the new ones or the old ones, as a tensor on the device says."""
    parameters = _with_gradients(optimizer)
    for parameter in parameters:
        parameter.grad = torch.where(finite, parameter.grad, 0)  # so that the sum below has no 0 * nan in it
    changing = [*parameters, *(value for parameter in parameters for value in optimizer.state[parameter].values())]
    before = torch._foreach_clone(changing)
    optimizer.step()
    share = finite.to(torch.float32)
    torch._foreach_mul_(changing, share)
    torch._foreach_mul_(before, 1 - share)
    torch._foreach_add_(changing, before)


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    groups = optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
