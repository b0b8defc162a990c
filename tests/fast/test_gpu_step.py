"""The fused layer step does what the plain one does; without a GPU through Triton's interpreter (see conftest.py)."""

import multiprocessing
import time

import pytest
import torch

from fast.folding import fold_flows
from fast.gpu_step import (
    ENTRY_TAPS,
    State,
    arrange,
    can_fuse,
    finish_row,
    fused_steps,
    kernel_options,
    plain_step,
    prepare,
)
from fast.gpu_tiles import TF32, TF32X3, Tile, kind_of
from tests.support.vocoders import random_vocoder

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bfloat16 as whole numbers: it needs a GPU.
PRECISIONS = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}  # of values up to 8
TILE = Tile(64, 16, 16, 4, 4)
MODELS = {
    "channels not a power of two": {"res_channels": 20},
    "two rows of dilation": {"n_layer_per_cycle": 2},
    "one layer": {"n_layer": 1},
    "spline of many bins": {"transform": "spline", "num_bin": 12},
}


def case(dtype=torch.float32, width=256, **changes):
    """A flow and its state in the middle of things: columns of two clips and of none, an empty block at the end."""
    flow = prepare(fold_flows(random_vocoder("waveflow", **changes).to(DEVICE).flows(), dtype, arrange))[1]
    state = State(flow, changes.get("n_height", 8), width)
    torch.manual_seed(5)
    state.mask[3:60] = state.mask[70 : width // 2] = 1
    state.planes[1, 2:, 1:-1] = state.mask
    for buffer in (state.noise, state.conditioning, state.params):
        buffer.normal_()
    return flow, state


def layer_step(flow, state, index, row, fused):
    """One layer of a row, by the kernel or plainly."""
    step = row * len(flow.dilations) + index
    if fused:
        fused_steps(flow, state, range(step, step + 1), kernel_options(flow, "tf32x3", overlap=False), TILE)
    else:
        plain_step(flow, state, index, row)


def written(flow, state, index, row):
    """What a layer step leaves for others, in columns of clips; and all columns of what must be zero elsewhere."""
    inside = state.mask > 0
    last = index == len(flow.dilations) - 1
    after = state.planes[0] if last else state.row_of(index + 1, row)
    return after if last and flow.affine else torch.cat([after.flatten(), state.params[inside].flatten()])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_fused_step_matches_plain_step(dtype, model):
    flow, state = case(dtype, **MODELS[model])
    _, other = case(dtype, **MODELS[model])
    assert can_fuse(flow, kind_of(dtype, tf32=False))
    for row in range(6):
        for index in range(len(flow.dilations)):
            for fused, buffers in ((False, state), (True, other)):
                layer_step(flow, buffers, index, row, fused)
            plain, kernel = (written(flow, buffers, index, row).float() for buffers in (state, other))
            assert plain.abs().max() > 0.1
            torch.testing.assert_close(kernel, plain, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_columns_of_no_clip_stay_zero_whatever_lies_there(fused):
    flow, state = case()
    outside = state.mask == 0
    for buffer in (state.noise, state.conditioning):
        buffer[:, outside] = torch.nan
    for row in range(4):
        for index in range(len(flow.dilations)):
            layer_step(flow, state, index, row, fused)
    for index in range(1, len(flow.dilations)):
        assert state.rings[index].isfinite().all()
        for row in range(2, 4):
            kept = state.row_of(index, row)
            assert not kept[outside].any() and kept[~outside].abs().max() > 0.5
    assert state.planes.isfinite().all() and not state.planes[0, 3:, 1:-1][:, outside].any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_needs_nothing_that_its_ring_held_before(fused):
    flow, state = case(n_layer_per_cycle=2)
    _, dirty = case(n_layer_per_cycle=2)
    for ring, (_, dilation_w) in zip(dirty.rings[1:], flow.dilations[1:], strict=True):
        ring[:, dilation_w:-dilation_w] = torch.nan
    for row in range(8):
        for index in range(len(flow.dilations)):
            for buffers in (state, dirty):
                layer_step(flow, buffers, index, row, fused)
    torch.testing.assert_close(dirty.planes, state.planes, atol=0, rtol=0)


def test_padding_of_the_weights_is_zero():
    flow, _ = case(res_channels=20)
    assert flow.gate.shape == (2, 64, 9 * 32) and flow.entry.shape == (64, ENTRY_TAPS)
    taps = flow.gate.view(2, 2, 32, 9, 32)
    assert not taps[..., 20:].any() and not taps[:, :, 20:].any() and taps[:, :, :20, :, :20].all()
    assert flow.conditioning.shape == (3, 64, 96) and not flow.conditioning[..., 81:].any()


def test_flows_the_kernel_does_not_take_are_left_to_plain_steps():
    assert not can_fuse(case(torch.float64)[0], TF32X3)
    wide, _ = case(res_channels=130, n_layer=2, n_flow=2)
    assert can_fuse(wide, TF32) and not can_fuse(wide, TF32X3)


# --- one launch for all steps -----------------------------------------------------------------------------------


def whole_flow(flow, state, steps=None, tile=TILE):
    """All steps in one launch of one block, which makes one task after the other."""
    options = kernel_options(flow, "tf32x3", overlap=False)
    fused_steps(flow, state, steps or range(flow.n_steps), options, tile, blocks=1)


@pytest.mark.parametrize("model", MODELS)
def test_persistent_kernel_matches_plain_steps(model):
    flow, state = case(**MODELS[model])
    _, other = case(**MODELS[model])
    for row in range(state.height):
        for index in range(len(flow.dilations)):
            plain_step(flow, state, index, row)
        if not flow.affine:
            finish_row(flow, state, row)
            whole_flow(flow, other, range(row * len(flow.dilations), (row + 1) * len(flow.dilations)))
            finish_row(flow, other, row)
    if flow.affine:
        whole_flow(flow, other)
    assert state.planes[0, 3:].abs().max() > 0.1
    torch.testing.assert_close(other.planes, state.planes, atol=1e-3, rtol=0)


def test_only_columns_in_use_are_made():
    flow, state = case(width=512)
    state.mask[60:] = 0
    state.planes[1, 2:, 1:-1] = state.mask
    state.use(60)
    state.planes[0, :, 129:] = state.params[128:] = 7
    whole_flow(flow, state)
    assert state.done[: 512 // 64].tolist().count(flow.n_steps) == 1  # 60 columns and 4 beyond: one tile
    assert (state.planes[0, :, 129:] == 7).all() and (state.params[128:] == 7).all()
    assert state.planes[0, 3:, 1:61].abs().max() > 0.1


def _one_block(flow, state, number, n_blocks):
    """What one of several blocks of the persistent kernel does, through the interpreter."""
    from triton.runtime.interpreter import interpreter_builder as builder

    dimension, place = builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim = lambda *_: dimension(n_blocks, 1, 1)
    builder.set_grid_idx = lambda *_: place(number, 0, 0)
    time.sleep(number)
    whole_flow(flow, state, tile=Tile(32, 16, 16, 4, 4))


@pytest.mark.skipif(DEVICE == "cuda", reason="blocks are processes with an interpreter each")
def test_blocks_at_work_at_the_same_time_wait_for_each_other():
    flow, state = case(width=128, n_height=4, n_layer_per_cycle=2)
    _, other = case(width=128, n_height=4, n_layer_per_cycle=2)
    for buffer in vars(other).values():
        if isinstance(buffer, torch.Tensor):
            buffer.share_memory_()
    fork = multiprocessing.get_context("fork")
    blocks = [fork.Process(target=_one_block, args=(flow, other, number, 2)) for number in range(2)]
    for block in blocks:
        block.start()
    for block in blocks:
        block.join(timeout=120)
        block.kill()
    assert [block.exitcode for block in blocks] == [0, 0]
    whole_flow(flow, state, tile=Tile(32, 16, 16, 4, 4))
    torch.testing.assert_close(other.planes, state.planes, atol=0, rtol=0)
