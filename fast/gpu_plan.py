"""Twin of `Flow.inverse`'s loop over rows on an accelerator: how the layer steps of a flow are launched.

As one persistent kernel, as a kernel for each step, or in plain PyTorch. What is possible is tried in the order of
`candidates`; the fastest is taken, or the first where the same input must always give the same bits.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fast.gpu_step import State, StepFlow, finish_row, fused_steps, kernel_options, plain_step
from fast.gpu_tiles import HALF, Tile, blocks_at_once, tiles_for

try:
    from triton.runtime.errors import OutOfResources
except ImportError:  # no Triton, no kernel
    OutOfResources = MemoryError

TRIALS = 3  # of a flow, of which the fastest counts


class Plan(NamedTuple):
    """One way to launch the steps of a flow."""

    kind: str  # of its products, as `gpu_tiles` names them
    tile: Tile | None = None  # None: in plain PyTorch
    blocks: int | None = None  # of the persistent kernel; None: a kernel for each step

    def __str__(self) -> str:
        if self.tile is None:
            return "plain steps"
        sizes = "columns {}, depth {}, residual {}, warps {}, stages {}".format(*self.tile)
        return f"{self.kind}, {sizes}, {f'{self.blocks} blocks' if self.blocks else 'a kernel for each step'}"


def run_flow(flow: StepFlow, state: State, plan: Plan) -> None:
    """All layer steps of a flow: `state.noise` to `state.planes`."""
    n_layers, steps = len(flow.dilations), range(flow.n_steps)
    launch = functools.partial(_launch, flow, state, plan)
    if plan.blocks:
        state.done.zero_()
    if flow.affine:
        launch(steps)
        return
    for row in range(len(flow.folded.order)):
        launch(steps[row * n_layers : (row + 1) * n_layers])
        finish_row(flow, state, row)


def _launch(flow: StepFlow, state: State, plan: Plan, steps: range) -> Any:
    if plan.tile is not None:
        return fused_steps(flow, state, steps, _options(flow, plan), plan.tile, plan.blocks)
    for step in steps:
        row, layer = divmod(step, len(flow.dilations))
        plain_step(flow, state, layer, row)


def _options(flow: StepFlow, plan: Plan) -> dict[str, Any]:
    early = flow.front.is_cuda and torch.cuda.get_device_capability(flow.front.device) >= (9, 0)
    return kernel_options(flow, "tf32" if plan.kind == HALF else plan.kind, early)


# --- which one ---------------------------------------------------------------------------------------------------


def choose_plan(flow: StepFlow, state: State, kind: str) -> Plan:
    """The plan for a flow and those like it; without an accelerator the persistent kernel with a single block."""
    tiles = tiles_for(kind, flow.front.size(1))
    if not flow.front.is_cuda:
        return Plan(kind, tiles[0], 1)
    return quickest(candidates(flow, state, kind, tiles), lambda plan: _seconds(flow, state, plan))


def candidates(flow: StepFlow, state: State, kind: str, tiles: Sequence[Tile]) -> Iterator[Plan]:
    """Persistent kernels, then a kernel for each step, then plain steps; those that the chip cannot hold left out."""
    for tile in tiles:
        blocks = _resident_blocks(flow, state, Plan(kind, tile))
        if blocks:
            yield Plan(kind, tile, blocks)
    for tile in tiles[:1]:
        if _resident_blocks(flow, state, Plan(kind, tile)):
            yield Plan(kind, tile)
    yield Plan(kind)


def quickest(plans: Iterator[Plan], seconds: Callable[[Plan], float]) -> Plan:
    """The plan that takes the least; untimed the first, where algorithms must be deterministic: sums taken in another
    order have other last bits."""
    if torch.are_deterministic_algorithms_enabled():
        return next(plans)
    return min(plans, key=seconds)


def _resident_blocks(flow: StepFlow, state: State, plan: Plan) -> int:
    """As many blocks as the chip holds at once, no more than there are tiles; 0 where not even one fits."""
    limits = torch.cuda.get_device_properties(flow.front.device)
    state.done.zero_()
    try:  # a few steps, by one block of each multiprocessor, tell what the compiler made of the kernel
        kernel = _launch(flow, state, plan._replace(blocks=1), range(len(flow.dilations)))
    except OutOfResources:
        return 0
    each = blocks_at_once(kernel.n_regs, kernel.metadata.shared, plan.tile.warps, limits)
    return min(each * limits.multi_processor_count, state.width // plan.tile.block_n)


def _seconds(flow: StepFlow, state: State, plan: Plan) -> float:
    """Time of a flow, the fastest of some."""
    times = []
    for _ in range(TRIALS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run_flow(flow, state, plan)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return min(times)
