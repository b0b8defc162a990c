"""Three ways through the steps of a level: all activations kept, one kept per step, or none.

All give the same result and gradients; they trade time for memory in the backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from image_density_experiments.modules import BoundStep


def run_plain(steps: Sequence[BoundStep], x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C, H, W] -> z, log|det| [B]; autograd keeps what it likes."""
    log_det = x.new_zeros(len(x))
    for step in steps:
        x, step_log_det = step.forward(x)
        log_det = log_det + step_log_det
    return x, log_det


def run_checkpointed(steps: Sequence[BoundStep], x: Tensor) -> tuple[Tensor, Tensor]:
    """The same, keeping each step's input only; what is inside a step is computed again (Chen et al., 2016)."""
    log_det = x.new_zeros(len(x))
    for step in steps:
        x, step_log_det = checkpoint(step.forward, x, use_reentrant=False, preserve_rng_state=False)
        log_det = log_det + step_log_det
    return x, log_det


def run_reversible(steps: Sequence[BoundStep], x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the steps, keeping the output of the last only: each input is found again by the step's inverse.

    So memory does not grow with the number of steps (Gomez et al., 2017).
    """
    if not torch.is_grad_enabled():
        return run_plain(steps, x)
    parameters = {id(parameter): parameter for step in steps for parameter in _parameters(step)}
    return _Reversible.apply(steps, x, *parameters.values())


MEMORY_MODES = {"plain": run_plain, "checkpoint": run_checkpointed, "reversible": run_reversible}


class _Reversible(torch.autograd.Function):
    """run_plain whose backward pass walks the steps from the last to the first, inverting as it goes."""

    @staticmethod
    def forward(ctx: Any, steps: Sequence[BoundStep], x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = run_plain(steps, x)
        ctx.steps, ctx.parameters, ctx.autocast = steps, parameters, _autocast_of(x)
        ctx.save_for_backward(z)
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        sums: dict[int, Tensor] = {}
        with ctx.autocast:
            for step in reversed(ctx.steps):
                z, grad_z, grads = _step_backward(step, z, grad_z, grad_log_det)
                for parameter, grad in grads:
                    sums[id(parameter)] = sums[id(parameter)] + grad if id(parameter) in sums else grad
        return None, grad_z, *(sums.get(id(parameter)) for parameter in ctx.parameters)


def _step_backward(
    step: BoundStep, z: Tensor, grad_z: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """From a step's output and its gradient to its input, its gradient, and (parameter, gradient) pairs."""
    x = step.inverse(z).requires_grad_()
    parameters = list(_parameters(step))
    with torch.enable_grad():
        outputs = step.forward(x)
    grad_x, *grads = torch.autograd.grad(outputs, (x, *parameters), (grad_z, grad_log_det), allow_unused=True)
    pairs = [(parameter, grad) for parameter, grad in zip(parameters, grads, strict=True) if grad is not None]
    return x.detach(), grad_x, pairs


def _parameters(step: BoundStep) -> Iterator[Tensor]:
    """The tensors that gradients flow to; on a DataParallel replica `parameters()` is empty, they lie elsewhere."""
    for root in step.modules():
        for module in root.modules():
            for parameter in _own_parameters(module):
                if parameter is not None and parameter.requires_grad:
                    yield parameter


def _own_parameters(module: nn.Module) -> Iterator[Tensor | None]:
    return iter(getattr(module, "_former_parameters", module._parameters).values())


def _autocast_of(x: Tensor) -> AbstractContextManager:
    # The backward pass does not run under the forward pass's autocast, but must compute the same numbers.
    kind = x.device.type
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
