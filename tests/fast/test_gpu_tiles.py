"""Tiles of the fused kernel: what fits a multiprocessor, and that the compiler spills nothing for capability 9.0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast.gpu_tiles import HALF, TF32, TF32X3, TILES, blocks_at_once, tiles_for

ROOT = Path(__file__).parents[2]


class Hopper:
    regs_per_multiprocessor = 65_536
    shared_memory_per_multiprocessor = 233_472
    max_threads_per_multi_processor = 2048


@pytest.mark.parametrize(
    "registers, shared, warps, blocks",
    [(255, 98_304, 4, 2), (128, 1_000, 8, 2), (129, 1_000, 8, 1), (32, 120_000, 4, 1), (32, 240_000, 4, 0)],
)
def test_blocks_that_a_multiprocessor_holds(registers, shared, warps, blocks):
    assert blocks_at_once(registers, shared, warps, Hopper) == blocks
    assert blocks_at_once(16, 0, 32, Hopper) == 2  # threads


def test_tiles_suit_their_channels():
    for (_, n_res), tiles in TILES.items():
        assert tiles
        for tile in tiles:
            assert n_res % tile.block_k == n_res % tile.block_r == 0 and tile.block_n <= 128
    assert {n_res for kind, n_res in TILES if kind in (HALF, TF32)} == {16, 32, 64, 128, 256}
    assert not tiles_for(TF32X3, 256)


@pytest.mark.parametrize(
    "kind, n_res, n_rows",
    [
        *((kind, n_res, len(TILES[kind, n_res])) for kind, n_res in [(HALF, 64), (HALF, 128), (TF32X3, 128)]),
        ("training", 128, 4),
    ],
)
def test_the_compiler_spills_nothing_and_every_tile_fits(kind, n_res, n_rows):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmark.kernels", "--kind", kind, "--channels", str(n_res)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    rows = [line.split("|") for line in made.splitlines() if line.startswith(f"| {kind}")]
    assert len(rows) == n_rows
    for row in rows:
        spilled, blocks = int(row[5]), int(row[7])
        assert spilled == 0 and blocks >= 1
