"""Weights as safetensors: tensors and a few texts about them, in a format that cannot hold code."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.files import RefusedFile, open_file, written_whole

SUFFIX = ".safetensors"


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and texts about them, whole or not at all; OSError where the disk refuses."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(contiguous, dict(metadata))
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def load_safetensors(path: str | Path, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file, on the CPU. Raises RefusedFile, or OSError if it cannot be read at all."""
    open_file(path, max_bytes).close()  # a pipe would be waited for
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise RefusedFile(f"damaged ({' '.join(str(error).split())[:80]})") from None
