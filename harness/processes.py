"""Processes that work together. On one process every function is a no-op, so the loops have no branches.

Several processes, one for each device, are started by torchrun, which tells each its place in RANK, WORLD_SIZE and
LOCAL_RANK. They compute the same things except where `share` divides them; the main one, rank 0, writes and speaks.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness import terminal
from harness.errors import InputError
from harness.stopping import StopRequest

TIMEOUT = timedelta(minutes=30)  # for a process that hangs; one that dies is noticed at once
_LOST = ("gloo", "nccl", "connection closed", "connection reset")  # in what torch says when a process is gone

Result = TypeVar("Result")


class SaidByMain(InputError):
    """An error of the main process, raised in the others too; it has said what it is."""


# --- processes --------------------------------------------------------------------------------------------


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this is the process that writes and speaks."""
    return rank() == 0


@contextmanager
def process_group(
    device: torch.device,
    backend: str = "nccl",
    url: str = "",
    meet: str = "start them with torchrun",
    resume: str = "start it again",
) -> Iterator[None]:
    """Be one of the processes that torchrun started, if it did; only the main one prints to stdout inside.

    backend: how CUDA devices talk; CPUs do through gloo. url: where to meet; empty: where torchrun says.
    InputError where they do not meet, which ends with the remedy `meet`, or where one is lost, with `resume`.
    """
    own_rank, n_ranks = place()
    if n_ranks == 1:
        yield
        return
    backends, own_device = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backends, own_device = f"cpu:gloo,cuda:{backend}", device  # named, it need not be guessed from the rank
    url = _meeting_place(url)
    try:
        dist.init_process_group(
            backends, init_method=url, rank=own_rank, world_size=n_ranks, timeout=TIMEOUT, device_id=own_device
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{n_ranks} processes did not meet at {url} ({_first_line(error)}); {meet}") from None
    with ExitStack() as stack:
        if own_rank:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            raise InputError(
                f"another process of this run died or cannot be reached ({_first_line(error)}); {resume}"
            ) from None
    dist.destroy_process_group()


def report_error(error: Exception) -> None:
    """Say one line on stderr, with the process's number unless it is the main one, whose errors are not repeated."""
    if not isinstance(error, SaidByMain):
        number = os.environ.get("RANK", "0")
        terminal.error(f"{'' if number == '0' else f'process {number}: '}{error}")


def place() -> tuple[int, int]:
    """Rank and number of processes, as the environment says; InputError where that makes no sense."""
    n_ranks = _number("WORLD_SIZE", 1)
    if n_ranks < 2:
        return 0, 1
    own_rank = _number("RANK")
    if own_rank >= n_ranks:
        raise InputError(f"environment: RANK {own_rank} of WORLD_SIZE {n_ranks}; start the processes with torchrun")
    return own_rank, n_ranks


def local_rank() -> int:
    """The number of this process among those of its machine, as the environment says."""
    return _number("LOCAL_RANK")


def _number(variable: str, default: int | None = None) -> int:
    text = os.environ.get(variable, "" if default is None else str(default))
    if not text.isdecimal():
        raise InputError(f"environment: {variable} {text!r}: expected a number; start the processes with torchrun")
    return int(text)


def _meeting_place(url: str) -> str:
    # The published configs meet at a port of localhost, which processes on several machines cannot.
    here_only = any(name in url for name in ("localhost", "127.0.0.1", "[::1]"))
    several_machines = _number("WORLD_SIZE", 1) > _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE", 1))
    return "env://" if not url or (here_only and several_machines) else url


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)


def _first_line(error: Exception) -> str:
    """The first sentence of what torch says, without the place in its source."""
    text = re.sub(r"^\[\S*\] ", "", str(error).strip()).split("\n")[0].split(". ")[0]
    return text[:200].rstrip(". ") or type(error).__name__


# --- work divided and results put together ----------------------------------------------------------------


def share(items: Sequence[Result]) -> list[Result]:
    """Part of a list that is this process's: every item is in exactly one part."""
    return list(items[rank() :: world_size()])


def share_of_batch(batch: Tensor) -> Tensor:
    """Rows of a whole batch [B, ...] that are this process's, as the loaders share it."""
    return batch.chunk(world_size())[rank()]


def gather(part: list[Result] | None) -> list[Result] | None:
    """The results of all processes for their `share`, in the order of the whole list; None where one gave None."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    if any(part is None for part in parts):
        return None
    whole: list[Any] = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        whole[number :: len(parts)] = part
    return whole


def on_main(work: Callable[[], Result]) -> Result:
    """Result of `work`, done by the main process only; its InputError or OSError is raised in all."""
    if world_size() == 1:
        return work()
    answer: list[Any] = [None, None]
    error = None
    if is_main():
        try:
            answer[0] = work()
        except (InputError, OSError) as raised:
            error, answer[1] = raised, str(raised)
    dist.broadcast_object_list(answer, src=0)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise SaidByMain(answer[1])
    return answer[0]


@contextmanager
def held_by_main(context: AbstractContextManager) -> Iterator[None]:
    """A `with` that only the main process enters, such as a lock; what it refuses is raised in all."""
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(context) and None)
        yield


def mean(values: Tensor) -> Tensor:
    """The mean over processes of a tensor, which is overwritten; on the device, without waiting for it."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def agree(stop: StopRequest, finally_: bool = False, at_first: bool = False) -> bool:
    """Agree on stopping: where one process is to stop, all are, for the same reason.

    A signal that comes while they agree is kept for the next time. finally_: there is none, and what comes later is
    too late; so all end with the same status. at_first: before the first step, which hours allow in any case.
    """
    wanted = stop.signal is not None if at_first else bool(stop)
    if world_size() > 1:
        asked = torch.tensor([stop.signal or 0, wanted])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        number, wanted = asked.tolist()
        if finally_:
            stop.settle(number or None)
        elif number:
            stop.signal = number
    return bool(wanted)
