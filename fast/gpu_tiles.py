"""Weights of `gpu_kernel.py`'s products, cut into tiles: their sizes for each precision and number of channels.

They follow from what the compiler makes of the kernel for compute capability 9.0, which `python -m benchmark.kernels`
prints: none spills registers, all fit shared memory, and as many blocks as possible are on a multiprocessor at once.
The first of a list is what is taken where results must not depend on timing; the others are tried beside it.
"""

from typing import NamedTuple, Protocol

import torch


class Tile(NamedTuple):
    """Sizes of the kernel's products, and how many warps and loads in flight it has for them."""

    block_n: int  # columns of a tile
    block_k: int  # depth of a product
    block_r: int  # channels of the residual update at a time
    warps: int
    stages: int  # of the pipeline of loads


HALF, TF32, TF32X3 = "half", "tf32", "tf32x3"  # the last: three products in TF32, as near as float32's own

# From 64 channels on these are Hopper's own products. At 64 channels in half precision two blocks of the first tile
# share a multiprocessor; wide tiles read the weights less often, which pays where there are columns for all of them.
TILES = {
    (HALF, 16): [Tile(64, 16, 16, 4, 4)],
    (HALF, 32): [Tile(64, 32, 32, 4, 4)],
    (HALF, 64): [Tile(64, 64, 32, 4, 4), Tile(128, 64, 64, 8, 4), Tile(32, 64, 64, 4, 4)],
    (HALF, 128): [Tile(64, 64, 64, 8, 3), Tile(128, 32, 64, 8, 3), Tile(64, 32, 64, 4, 3), Tile(32, 64, 64, 4, 3)],
    (HALF, 256): [Tile(32, 64, 64, 8, 3), Tile(64, 32, 64, 8, 3)],
    (TF32, 16): [Tile(64, 16, 16, 4, 3)],
    (TF32, 32): [Tile(64, 32, 32, 4, 3)],
    (TF32, 64): [Tile(64, 32, 64, 4, 3), Tile(128, 32, 64, 8, 3), Tile(32, 32, 64, 4, 4)],
    (TF32, 128): [Tile(64, 32, 32, 8, 3), Tile(128, 32, 64, 8, 3)],
    (TF32, 256): [Tile(32, 32, 32, 8, 2)],
    (TF32X3, 16): [Tile(64, 16, 16, 4, 3)],
    (TF32X3, 32): [Tile(32, 32, 32, 4, 3)],
    (TF32X3, 64): [Tile(32, 32, 32, 4, 3), Tile(32, 16, 16, 8, 2)],
    (TF32X3, 128): [Tile(32, 32, 16, 8, 2), Tile(32, 16, 16, 8, 3)],
}


class Multiprocessor(Protocol):
    """Limits of a multiprocessor, as `torch.cuda.get_device_properties` names them."""

    regs_per_multiprocessor: int
    shared_memory_per_multiprocessor: int
    max_threads_per_multi_processor: int


def kind_of(dtype: torch.dtype, tf32: bool) -> str:
    """Arithmetic of products in a precision; tf32: whether it was asked for."""
    if dtype in (torch.float16, torch.bfloat16):
        return HALF
    return TF32 if tf32 else TF32X3


def tiles_for(kind: str, n_res: int) -> list[Tile]:
    """Tiles for this many channels; the first is the one to take untried; none where registers do not suffice."""
    return TILES.get((kind, n_res), [])


def blocks_at_once(registers: int, shared: int, warps: int, limits: Multiprocessor) -> int:
    """Blocks of a kernel that a multiprocessor holds: registers of a thread, bytes of shared memory of a block."""
    per_warp = -(-registers * 32 // 256) * 256  # registers come in such units
    by_registers = limits.regs_per_multiprocessor // per_warp // warps
    by_shared = limits.shared_memory_per_multiprocessor // (shared + 1024)  # the system takes 1 KB of each block
    return min(by_registers, by_shared, limits.max_threads_per_multi_processor // (32 * warps))
