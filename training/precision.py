"""Arithmetic of a training step: float32, or half precision through torch.amp or NVIDIA Apex."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from config import TrainConfig
from harness.bad_steps import step_if_finite
from harness.devices import fast_bfloat16
from harness.errors import InputError


class Precision:
    """Full precision; the base of the half-precision kinds.

    Usage: `with precision.autocast(): loss = ...`, `precision.backward(loss)` for each part of a batch, then
    `norm = precision.update(loss)` with the loss of the whole.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm

    def autocast(self) -> AbstractContextManager:
        """The context in which the forward pass runs."""
        return nullcontext()

    def full(self) -> AbstractContextManager:
        """The context of evaluation and sampling, in full precision."""
        return nullcontext()

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
    """torch.amp, with loss scaling for float16, whose range needs it.

    The model enters it itself, so that the threads of nn.DataParallel, which forwards no dtype, have the same one.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, dtype: torch.dtype
    ) -> None:
        super().__init__(model, optimizer, max_grad_norm)
        self.dtype, device = dtype, next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        before = self.model.execution
        self.model.execution = replace(before, half=self.dtype)
        try:
            yield
        finally:
            self.model.execution = before

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.scaler.scale(loss).backward()

    def update(self, loss: Tensor) -> Tensor:
        """Update as in full precision; the norm is that of `_but_for_its_scale`."""
        self.scaler.unscale_(self.optimizer)
        norm = super().update(loss)
        if self.scaler.is_enabled():
            norm = _but_for_its_scale(norm, loss, self.scaler._scale > 1)  # no waiting
        self.scaler.update()
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
        # Apex looks for a cached cast of a weight in the graph that used it, and fails on weights that several flows
        # share, whose folded forms are in no graph by then.
        self.amp._amp_state.handle._enable_caching = False

    def full(self) -> AbstractContextManager:
        return self.amp.disable_casts()

    def _backward(self, loss: Tensor, last: bool) -> None:
        with self.amp.scale_loss(loss, self.optimizer, delay_unscale=not last) as scaled:
            scaled.backward()

    def update(self, loss: Tensor) -> Tensor:
        """Update as in full precision; the norm is that of `_but_for_its_scale`."""
        norm = super().update(loss)
        scale = self.amp.state_dict()["loss_scaler0"]["loss_scale"]  # after an overflow, half of what it was
        return _but_for_its_scale(norm, loss, scale >= 1)

    def _parameters(self) -> Iterable[Tensor]:
        return self.amp.master_params(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return self.amp.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.amp.load_state_dict(state)


def _but_for_its_scale(norm: Tensor, loss: Tensor, is_scaled: Tensor | bool) -> Tensor:
    """A gradient's norm, or 0 where it overflowed for its scale, of which the next is lower.

    So the scale is found; it is no fault of the batch, unless the gradient overflows unscaled too.
    """
    overflowed = torch.isfinite(loss.detach()) & ~torch.isfinite(norm) & is_scaled
    return torch.where(overflowed, 0.0, norm)


def slow_half_warning(config: TrainConfig, device: torch.device) -> str | None:
    """One line where `fp16_run` costs time instead of saving it, or None."""
    if not config.fp16_run or device.type != "cpu" or fast_bfloat16():
        return None
    return "fp16_run: this CPU has no bfloat16 products, so half precision is slower here than float32"


def make_precision(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> Precision:
    """The kind that `fp16_run` and `amp_backend` ask for."""
    device = next(model.parameters()).device
    if not config.fp16_run:
        return Precision(model, optimizer, config.max_grad_norm)
    if config.amp_backend == "torch":
        return TorchAmp(model, optimizer, config.max_grad_norm, half_dtype(config.amp_dtype, device))
    if device.type != "cuda":
        _apex_amp()  # a missing Apex is the first thing to mend
        raise InputError('amp_backend "apex" needs a CUDA device; "torch" also runs on the CPU')
    return ApexAmp(model, optimizer, config.max_grad_norm)


def half_dtype(name: str, device: torch.device) -> torch.dtype:
    """Half precision by its name in the config; auto: bfloat16, but float16 on a chip that has no bfloat16."""
    if device.type == "cuda":
        if name == "auto":
            name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "float16":
        raise InputError('amp_dtype "float16" needs a CUDA device; "auto" and "bfloat16" also run on the CPU')
    return torch.float16 if name == "float16" else torch.bfloat16


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
