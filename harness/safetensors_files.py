"""Weights as safetensors: tensors and a few texts about them, in a format that cannot hold code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.errors import show
from harness.files import RefusedFile, open_file, written_whole

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 2**22  # the names, shapes and texts of a vocoder take some 100 kB
MAX_DIMENSIONS = 8
KINDS = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")  # of numbers


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and texts about them, whole or not at all; OSError where the disk refuses."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(contiguous, dict(metadata))
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def load_safetensors(path: str | Path, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file, on the CPU. Raises RefusedFile, or OSError if it cannot be read at all."""
    with open_file(path, max_bytes) as file:  # a pipe would be waited for
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise RefusedFile(f"{length} bytes of names and texts, at most {MAX_HEADER_BYTES} are accepted")
        try:
            with safe_open(_utf8_name(path, file), framework="pt") as content:
                for name in content.keys():  # noqa: SIM118
                    _check_form(name, content.get_slice(name), max_bytes)
                return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise RefusedFile(f"damaged ({' '.join(str(error).split())[:80]})") from None


def _utf8_name(path: str | Path, file: BinaryIO) -> str | Path:
    """The path, or where that is not UTF-8, which the library insists on, another name of the open file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{file.fileno()}"
    return path


def _check_form(name: str, tensor: Any, max_bytes: int) -> None:
    """RefusedFile where torch has no arithmetic for such numbers, or where no weights have such a shape."""
    kind, shape = tensor.get_dtype(), tensor.get_shape()
    if kind not in KINDS:
        raise RefusedFile(f"{name} is of type {kind}, expected one of {', '.join(KINDS)}; convert it to F32")
    if len(shape) > MAX_DIMENSIONS or max(shape, default=0) > max_bytes:
        raise RefusedFile(f"{name} has the shape {show(shape)}, which no weights have")
