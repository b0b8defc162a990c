"""Arithmetic of a training step: float32, or half precision through torch.amp or NVIDIA Apex."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from config import TrainConfig
from harness.bad_steps import step_if_finite
from harness.devices import fast_bfloat16
from harness.errors import InputError


class Precision:
    """Full precision; the base of the half-precision kinds.

    Usage: `with precision.autocast(): loss = ...`, then `norm = precision.step(loss)`; or `backward` for each part of
    a batch and `update` with the loss of the whole.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm

    def autocast(self) -> AbstractContextManager:
        """The context in which the forward pass runs."""
        return nullcontext()

    def step(self, loss: Tensor) -> Tensor:
        """`backward` and `update` in one."""
        self.backward(loss)
        return self.update(loss)

    def backward(self, loss: Tensor, first: bool = True, last: bool = True) -> None:
        """Gradients of a batch, or of the first to the last of its parts, which add up."""
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        self._backward(loss, last)

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def update(self, loss: Tensor) -> Tensor:
        """Clip the gradient norm, update the weights; returns the norm before clipping.

        Where the loss or the norm is not finite, weights and optimizer state stay as they were.
        """
        norm = nn.utils.clip_grad_norm_(self._parameters(), self.max_grad_norm)
        step_if_finite(self.optimizer, loss, norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs to go on as if uninterrupted."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def _parameters(self) -> Iterable[Tensor]:
        return self.model.parameters()


class TorchAmp(Precision):
    """torch.amp: float16 with loss scaling on CUDA, bfloat16 (whose range needs no scaling) on the CPU."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        super().__init__(model, optimizer, max_grad_norm)
        self.device = next(model.parameters()).device.type
        self.dtype = torch.float16 if self.device == "cuda" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=self.dtype)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.scaler.scale(loss).backward()

    def update(self, loss: Tensor) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = super().update(loss)
        self.scaler.update()  # a lower scale where a gradient overflowed
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


class ApexAmp(Precision):
    """NVIDIA Apex at optimisation level O1, as published."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        super().__init__(model, optimizer, max_grad_norm)
        self.amp = _apex_amp()
        self.amp.initialize(model, optimizer, opt_level="O1", verbosity=0)

    def _backward(self, loss: Tensor, last: bool) -> None:
        with self.amp.scale_loss(loss, self.optimizer, delay_unscale=not last) as scaled:
            scaled.backward()

    def _parameters(self) -> Iterable[Tensor]:
        return self.amp.master_params(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return self.amp.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.amp.load_state_dict(state)


def slow_half_warning(config: TrainConfig, device: torch.device) -> str | None:
    """One line where `fp16_run` costs time instead of saving it, or None."""
    if not config.fp16_run or device.type != "cpu" or fast_bfloat16():
        return None
    return "fp16_run: this CPU has no bfloat16 products, so half precision is slower here than float32"


def make_precision(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> Precision:
    """The kind that `fp16_run` and `amp_backend` ask for."""
    kind = Precision if not config.fp16_run else ApexAmp if config.amp_backend == "apex" else TorchAmp
    if kind is ApexAmp and next(model.parameters()).device.type != "cuda":
        _apex_amp()  # a missing Apex is the first thing to mend
        raise InputError('amp_backend "apex" needs a CUDA device; "torch" also runs on the CPU')
    return kind(model, optimizer, config.max_grad_norm)


def _apex_amp() -> Any:
    remedy = 'set train_config.amp_backend to "torch", or install NVIDIA Apex from its repository at a version with amp'
    try:
        import apex
    except ImportError as error:
        raise InputError(f'amp_backend "apex": Apex is not installed ({error}); {remedy}') from None
    try:
        from apex import amp
    except ImportError:
        amp = getattr(apex, "amp", None)
    if not hasattr(amp, "scale_loss"):
        raise InputError(
            f'amp_backend "apex": the installed package {apex.__name__!r} has no amp (newer NVIDIA releases dropped '
            f"it, and the PyPI package of that name is another project); {remedy}"
        )
    return amp
