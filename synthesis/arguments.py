"""Arguments that users of Python give, as plain values: arrays, numbers, seeds, rates, paths.

Arrays are numpy's and PyTorch's, of any layout; any scalar or path object that means one is taken. What does not is an
InputError, and no word of numpy's or PyTorch's own.
"""

import math
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio import MAX_SAMPLES, check_length
from harness.errors import MAX_SHOWN, InputError, one_line, show

MAX_STRENGTH = 1e6  # as of the numbers of command lines
MAX_RATE = 2**31 - 1  # Hz, as of their whole numbers
SEEDS = -(2**63), 2**64 - 1  # the range of PyTorch's generators
MAX_PATH = 2**12  # characters
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# --- arrays -----------------------------------------------------------------------------------------------


def tensor_of(value: object, name: str, what: str = "numbers") -> Tensor:
    """An array as float32 on the CPU, without gradient; its memory is shared where it is that already.

    what: what errors call its numbers.
    """
    if isinstance(value, Tensor):
        return _from_tensor(value, name, what)
    if isinstance(value, np.ndarray):
        return _from_array(value, name, what)
    raise InputError(f"{name}: of type {type(value).__name__}, expected a numpy array or a tensor")


def _from_tensor(value: Tensor, name: str, what: str) -> Tensor:
    kind = _kind_without_numbers(value)
    if kind:
        raise InputError(f"{name}: a {kind} tensor, expected a dense one that holds its numbers; convert it")
    if value.dtype not in _FLOATS:
        raise _wrong_type(name, value.dtype, what)
    _check_size(name, value.numel())
    plain = value.detach().resolve_neg().cpu().float()
    try:
        return torch.from_numpy(plain.numpy())
    except (RuntimeError, TypeError):  # of the many kinds that stand for a tensor only, as in torch.func.vmap
        raise InputError(f"{name}: a {type(value).__name__} that holds no numbers; give a plain tensor") from None


def _kind_without_numbers(value: Tensor) -> str:
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return "sparse" if "sparse" in str(value.layout) else str(value.layout).removeprefix("torch._")
    return "meta" if value.is_meta else ""


def _from_array(value: np.ndarray, name: str, what: str) -> Tensor:
    if value.dtype.kind != "f" or value.dtype.itemsize > 8:  # longdouble is not a type of PyTorch's
        raise _wrong_type(name, value.dtype, what)
    if np.ma.is_masked(value):
        raise InputError(f"{name}: an array with masked values, expected numbers only; fill them")
    _check_size(name, value.size)
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite, and refused as that
        return torch.from_numpy(np.require(value, np.float32, "CAWE"))  # copied where strides or byte order ask for it


def _wrong_type(name: str, dtype: object, what: str) -> InputError:
    whole = "; divide whole numbers by their full scale" if what == "samples" else ""
    return InputError(
        f"{name}: of type {one_line(dtype, MAX_SHOWN)}, expected floating-point {what} of 16, 32 or 64 bits{whole}"
    )


def _check_size(name: str, size: int) -> None:
    if size > MAX_SAMPLES:  # few numbers may be repeated over any shape: not copied before this
        raise InputError(f"{name}: {size} numbers, expected at most {MAX_SAMPLES}; cut it up")


def recording_of(value: object, rate: int, target: int) -> Tensor:
    """Samples [T] or [1, T] of an array or a list, at `rate` Hz; of a length that can be borne at `target` Hz, too."""
    name = "audio"
    if isinstance(value, (list, tuple)):
        value = _array_of(value, name)
    samples = tensor_of(value, name, "samples")
    if samples.dim() not in (1, 2) or (samples.dim() == 2 and len(samples) != 1):
        raise InputError(
            f"{name} of shape {tuple(samples.shape)}: expected floating-point samples of shape [T]; give one channel, "
            "or the mean of all"
        )
    if not samples.numel():
        raise InputError(f"{name}: holds no samples; give a recording")
    if not samples.isfinite().all():
        raise InputError(f"{name}: holds samples that are not finite; make it again")
    check_length(name, samples.size(-1), 1, rate, target)
    return samples


def _array_of(value: list[Any] | tuple[Any, ...], name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # of rows of several lengths, or what has no numbers
        raise InputError(f"{name}: a {type(value).__name__} that is no row of numbers; give an array [T]") from None


# --- numbers ----------------------------------------------------------------------------------------------


def number(value: object, name: str, maximum: float = math.inf) -> float:
    """A finite number from 0 to `maximum`, a whole one or a scalar of numpy's or PyTorch's too."""
    plain = _scalar(value)
    is_number = hasattr(plain, "__float__") and not isinstance(plain, (bool, np.ndarray, Tensor))
    try:
        found = float(plain) if is_number else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not 0 <= found <= maximum or found == math.inf:
        expected = "a finite number of at least 0" if maximum == math.inf else f"a number from 0 to {maximum:,.0f}"
        raise InputError(f"{name} {_shown(value)}: expected {expected}")
    return found


def whole_number(value: object, name: str, minimum: int, maximum: float = math.inf) -> int:
    """A whole number from `minimum` to `maximum`, a scalar of numpy's or PyTorch's too; no bool."""
    plain = _scalar(value)
    try:
        found = None if isinstance(plain, (bool, np.ndarray, Tensor)) else operator.index(plain)
    except TypeError:
        found = None
    if found is None or not minimum <= found <= maximum:
        expected = f"of at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise InputError(f"{name} {_shown(value)}: expected a whole number {expected}")
    return found


def seed_of(value: object) -> int | None:
    """A seed as PyTorch's generators take it; None stays, and means the global generator."""
    return None if value is None else whole_number(value, "seed", *SEEDS)


def generator_of(seed: object) -> torch.Generator | None:
    """A generator of its own that begins with the seed; without a seed None."""
    return None if (seed := seed_of(seed)) is None else torch.Generator().manual_seed(seed)


def rate_of(value: object) -> int:
    """A sampling rate in Hz; 44100.0 is one."""
    plain = _scalar(value)
    plain = int(plain) if isinstance(plain, float) and plain.is_integer() else value
    return whole_number(plain, "sampling_rate", 1, MAX_RATE)


def _scalar(value: object) -> Any:
    """The number of Python's in a scalar of numpy's or PyTorch's; anything else as it is."""
    if not isinstance(value, (np.generic, np.ndarray, Tensor)) or value.ndim:
        return value
    try:
        return value.item()
    except (RuntimeError, ValueError):  # without a number, as on the meta device
        return value


def _shown(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, (np.ndarray, Tensor)) and value.ndim else show(value)


# --- others -----------------------------------------------------------------------------------------------


def items_of(value: object, name: str, expected: str) -> Iterator[Any]:
    """Iterator over any row of things; InputError where it is none, or one of letters, bytes or keys."""
    try:
        if isinstance(value, (str, bytes, bytearray, Mapping, np.ndarray, Tensor)):
            raise TypeError
        return iter(value)
    except TypeError:
        raise InputError(f"{name}: of type {type(value).__name__}, expected {expected}") from None


def path_of(value: object, name: str, expected: str) -> Path:
    """Path in a text or an object that stands for one; InputError where it is neither, empty or too long."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str) or not text:
        raise InputError(f"{name} {_shown(value)}: expected {expected}")
    if len(text) > MAX_PATH:
        raise InputError(f"{name} {show(text)}: {len(text)} characters, which no file's name has; expected {expected}")
    return Path(text)
