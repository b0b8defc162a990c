"""The fused layer step does what the plain one does; without a GPU through Triton's interpreter (see conftest.py)."""

import pytest
import torch

from fast.folding import fold_flows
from fast.gpu_step import ENTRY_TAPS, State, arrange, can_fuse, layer_step, prepare
from tests.support.vocoders import random_vocoder

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bfloat16 as whole numbers: it needs a GPU.
PRECISIONS = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}  # of values up to 8
MODELS = {
    "channels not a power of two": {"res_channels": 20},
    "two rows of dilation": {"n_layer_per_cycle": 2},
    "one layer": {"n_layer": 1},
    "spline of many bins": {"transform": "spline", "num_bin": 12},
}


def case(dtype=torch.float32, width=256, **changes):
    """A flow and its state in the middle of things: columns of two clips and of none, an empty block at the end."""
    flow = prepare(fold_flows(random_vocoder("waveflow", **changes).to(DEVICE).flows(), dtype, arrange)[1])
    state = State(flow, 8, width)
    torch.manual_seed(5)
    state.mask[3:60] = state.mask[70 : width // 2] = 1
    state.planes[1, 2:, 1:-1] = state.mask
    for buffer in (state.noise, state.conditioning, state.params):
        buffer.normal_()
    return flow, state


def written(flow, state, index, row):
    """What a layer step leaves for others, in columns of clips; and all columns of what must be zero elsewhere."""
    inside = state.mask > 0
    last = index == len(flow.layers) - 1
    after = state.planes[0] if last else state.row_of(flow, index + 1, row)
    return after if last and flow.affine else torch.cat([after.flatten(), state.params[inside].flatten()])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_fused_step_matches_plain_step(dtype, model):
    flow, state = case(dtype, **MODELS[model])
    _, other = case(dtype, **MODELS[model])
    assert can_fuse(flow)
    for row in range(6):
        for index in range(len(flow.layers)):
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
        for index in range(len(flow.layers)):
            layer_step(flow, state, index, row, fused)
    for index in range(1, len(flow.layers)):
        assert state.rings[index].isfinite().all()
        for row in range(2, 4):
            kept = state.row_of(flow, index, row)
            assert not kept[outside].any() and kept[~outside].abs().max() > 0.5
    assert state.planes.isfinite().all() and not state.planes[0, 3:, 1:-1][:, outside].any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_needs_nothing_that_its_ring_held_before(fused):
    flow, state = case(n_layer_per_cycle=2)
    _, dirty = case(n_layer_per_cycle=2)
    for ring, layer in zip(dirty.rings[1:], flow.layers[1:], strict=True):
        ring[:, layer.dilation[1] : -layer.dilation[1]] = torch.nan
    for row in range(8):
        for index in range(len(flow.layers)):
            for buffers in (state, dirty):
                layer_step(flow, buffers, index, row, fused)
    torch.testing.assert_close(dirty.planes, state.planes, atol=0, rtol=0)


def test_padding_of_the_weights_is_zero():
    flow, _ = case(res_channels=20)
    layer = flow.layers[1]
    assert layer.gate.shape == (9 * 32, 64) and flow.layers[0].gate.shape == (ENTRY_TAPS, 64)
    taps = layer.gate.view(9, 32, 2, 32)
    assert not taps[:, 20:].any() and not taps[..., 20:].any() and taps[:, :20, :, :20].all()
    assert layer.conditioning.shape == (96, 64) and not layer.conditioning[81:].any()


def test_flows_the_kernel_does_not_take_are_left_to_plain_steps():
    assert not can_fuse(case(torch.float64)[0])
    assert not can_fuse(case(res_channels=260, n_layer=2, n_flow=2)[0])
