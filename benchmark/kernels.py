"""Registers, shared memory and spills of the accelerator's kernels, as the compiler reports them without one.

    python -m benchmark.kernels                 every tile of fast/gpu_tiles.py and the kernels of training, for
                                                compute capability 9.0
    python -m benchmark.kernels --kind half --channels 64 128
    python -m benchmark.kernels --kind training --channels 128

Needs Triton, and fails where TRITON_INTERPRET is set. `fast/gpu_tiles.py` was chosen by this table.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fast import gpu_kernel, gpu_training, gpu_training_kernel
from fast.gpu_step import CONDITIONING_BLOCK, ENTRY_TAPS
from fast.gpu_tiles import HALF, TF32X3, TILES, Tile, blocks_at_once

CAPABILITY = 90
N_LAYER, MEL_CHANNELS, N_PARAMS = 8, 96, 16  # of the published configs, padded
TRAINING = "training"
POINTERS = {  # those not of the precision of the products
    **dict.fromkeys(["planes", "mask", "noise", "params", "offset"], "*fp32"),
    **dict.fromkeys(["order", "extent", "done"], "*i32"),
    "table": "*i64",
}
NUMBERS = ("first_step", "last_step", "n_layers", "width", "height")


@dataclass(frozen=True)
class Hopper:
    """Limits of a multiprocessor of an H100."""

    regs_per_multiprocessor: int = 65_536
    shared_memory_per_multiprocessor: int = 233_472
    max_threads_per_multi_processor: int = 2048


class Resources(NamedTuple):
    """A compiled kernel."""

    registers: int  # of a thread
    spilled: int  # bytes of stack of a thread
    shared: int  # bytes of a block
    blocks: int  # at once on a multiprocessor of an H100
    warp_group_products: int  # instructions of Hopper's own kind of matrix product
    copies: int  # instructions that copy past the registers


def compile_flow_kernel(kind: str, n_res: int, tile: Tile, persistent: bool = True, affine: bool = True) -> Resources:
    """The synthesis kernel, as `gpu_step.fused_steps` would compile it."""
    constants = {
        "n_res": n_res,
        "n_params": N_PARAMS,
        "n_conditioning": MEL_CHANNELS,
        "n_taps": ENTRY_TAPS,
        "n_near": 8,
        "affine": affine,
        "precision": TF32X3 if kind == HALF else kind,
        "persistent": persistent,
        "overlap": not persistent,
        "block_n": tile.block_n,
        "block_k": tile.block_k,
        "block_c": CONDITIONING_BLOCK,
        "block_r": tile.block_r,
    }
    options = {"launch_cooperative_grid": persistent, "launch_pdl": not persistent}
    types = POINTERS | dict.fromkeys(NUMBERS, "i32")
    return compile_kernel(gpu_kernel.flow_kernel, constants, types, "*fp16" if kind == HALF else "*fp32", tile, options)


def compile_training_kernels(n_res: int) -> dict[str, Resources]:
    """Kernels of a fused training layer in half precision, by name, as `gpu_training` would compile them."""
    tile = gpu_training.Tile()
    block_k = min(tile.block_k, n_res)
    blocks = {"block_n": tile.block_n, "block_k": block_k}
    whole = {"n_params": N_PARAMS, "n_conditioning": MEL_CHANNELS, "block_c": CONDITIONING_BLOCK, **blocks}
    constants = {
        "forward": {**whole, "last": False, "block_r": min(gpu_training.BLOCK_R, n_res)},
        "gate_backward": {**whole, "last": False},
        "hidden_backward": {**blocks, "last": False},
        "taps_backward": {"block_o": min(gpu_training.BLOCK_O, 2 * n_res), "block_k": block_k},
    }
    floats = ["params", "total", "bias", "residual_bias", "grad_params", "partial"]
    numbers = ["n_lines", "height", "width", "dilation_h", "dilation_w"]
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(numbers, "i32")
    made = {}
    for name, own in constants.items():
        kernel = getattr(gpu_training_kernel, f"{name}_kernel")
        made[name] = compile_kernel(kernel, {"n_res": n_res, "precision": "tf32", **own}, types, "*fp16", tile, {})
    return made


def compile_kernel(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], weights: str, tile: Any, options: dict[str, Any]
) -> Resources:
    """Any kernel: its constants, the types of its other arguments, which are of type `weights` if none is named.

    tile: what has warps and stages. Pointers, and the argument width, are taken to be multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, weights) for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name == "width"]
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", CAPABILITY, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, **options},
    )
    registers, spilled = _usage(compiled.asm["cubin"])
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    return Resources(
        registers,
        spilled,
        shared,
        blocks_at_once(registers, shared, tile.warps, Hopper()),
        ptx.count("wgmma.mma_async"),
        ptx.count("cp.async.c"),
    )


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return int(found[1]), int(found[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [*sorted({kind for kind, _ in TILES}), TRAINING]
    parser.add_argument("--kind", nargs="+", default=kinds, choices=kinds, help="of products, or training")
    parser.add_argument("--channels", nargs="+", type=int, default=sorted({n_res for _, n_res in TILES}))
    options = parser.parse_args(arguments)
    print(f"Triton {triton.__version__}, compute capability {CAPABILITY / 10}\n")
    print("| products | R | tile or kernel | registers | spilled | shared | blocks | wgmma |")
    print("|---|---|---|---|---|---|---|---|")
    for (kind, n_res), tiles in TILES.items():
        for tile in tiles if kind in options.kind and n_res in options.channels else []:
            sizes = f"{tile.block_n} x {tile.block_k}, {tile.block_r}, {tile.warps} warps, {tile.stages} stages"
            _print_row(kind, n_res, sizes, compile_flow_kernel(kind, n_res, tile))
    for n_res in gpu_training.CHANNELS if TRAINING in options.kind else []:
        for name, made in compile_training_kernels(n_res).items() if n_res in options.channels else []:
            _print_row(TRAINING, n_res, name, made)


def _print_row(kind: str, n_res: int, what: str, made: Resources) -> None:
    cells = (kind, n_res, what, *made[:-1])
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
