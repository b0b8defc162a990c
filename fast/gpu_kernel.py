# ruff: noqa: ANN001, ANN003, ANN201, ANN202, SIM108 -- the compiler knows the types, and no ternaries of blocks
"""Twin of `gpu_step.plain_step` in Triton, which importing this needs.

Products run over blocks of columns by all 2R outputs, block_k channels of one tap at a time; sums, the gate and the
parameters of the transform stay in float32. TRITON_INTERPRET=1 runs it on a CPU, to test it.
"""

import os

import triton
import triton.language as tl

# Columns of a block, depth of a product, warps, stages of the pipeline of loads: a clip of 6.5 s at height 16 is 9,000
# columns, so 64 of them for each of 132 multiprocessors; wide blocks read the weights less often. Of these, what the
# compiler reports for compute capability 9.0 has few or no spilled registers at 64 and 128 channels.
SHAPES = [
    (64, 32, 4, 4),
    (64, 64, 4, 4),
    (64, 32, 8, 3),
    (64, 32, 8, 4),
    (64, 64, 8, 3),
    (64, 64, 8, 4),
    (128, 64, 8, 3),
    (128, 64, 16, 3),
    (64, 16, 8, 3),
]
if os.environ.get("TRITON_INTERPRET") == "1":  # nothing can be timed
    SHAPES = [(64, 16, 4, 4)]
CONFIGS = [
    triton.Config({"block_n": columns, "block_k": depth}, num_warps=warps, num_stages=stages)
    for columns, depth, warps, stages in SHAPES
]


def _that_fit(configs, named_args, **options):
    """Configs whose products are no deeper than a tap."""
    n_res = {**named_args, **options}["n_res"]
    return [config for config in configs if config.kwargs["block_k"] <= n_res]


@triton.jit
def _product(x, weights, n_res: tl.constexpr, filters, gates, precision: tl.constexpr):
    """Add x [N, K] times weights [K, 2R] to both halves; weights are pointers to the first half."""
    filters = tl.dot(x, tl.load(weights), filters, input_precision=precision)
    gates = tl.dot(x, tl.load(weights + n_res), gates, input_precision=precision)
    return filters, gates


@triton.autotune(
    configs=CONFIGS,
    key=["width", "n_res", "first", "last", "precision"],
    restore_value=["params"],
    prune_configs_by={"early_config_prune": _that_fit},
)
@triton.jit(do_not_specialize=["row", "oldest", "middle", "newest", "first_tap", "dilation_w", "height"])
def layer_kernel(
    planes,
    mask,
    noise,
    conditioning,
    params,
    offset,
    ring,
    after,
    gate,
    gate_conditioning,
    skip,
    residual,
    bias,
    front,
    row,
    oldest,
    middle,
    newest,
    first_tap,
    dilation_w,
    width,
    height,
    n_res: tl.constexpr,
    n_params: tl.constexpr,
    n_conditioning: tl.constexpr,
    n_taps: tl.constexpr,
    block_c: tl.constexpr,
    first: tl.constexpr,
    last: tl.constexpr,
    affine: tl.constexpr,
    precision: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """One program makes block_n columns; see `plain_step`, which is the same."""
    dtype = gate.dtype.element_ty
    columns = tl.program_id(0) * block_n + tl.arange(0, block_n)
    channels = tl.arange(0, n_res)
    of_clip = tl.load(mask + columns)
    live = (tl.max(of_clip, axis=0) > 0).to(tl.int32)  # a block of padding multiplies nothing
    line = width + 2  # of planes
    filters = tl.zeros((block_n, n_res), tl.float32)
    gates = tl.zeros((block_n, n_res), tl.float32)

    if first:
        tap = tl.arange(0, n_taps)
        places = (tap // 9) * (height + 3) * line + (row + tap % 9 // 3) * line + tap % 3
        near = tl.load(planes + columns[:, None] + places[None, :], mask=tap[None, :] < 18, other=0.0)
        weights = gate + tap[:, None] * (2 * n_res) + channels[None, :]
        filters, gates = _product(near.to(dtype), weights, n_res, filters, gates, precision)
    else:
        inner = tl.arange(0, block_k)
        for k in range(first_tap * n_res, 9 * n_res * live, block_k):
            tap = k // n_res
            slot = tl.where(tap < 3, oldest, tl.where(tap < 6, middle, newest))
            start = ring + slot.to(tl.int64) * ((width + 2 * dilation_w) * n_res)
            places = (tap % 3 * dilation_w + columns) * n_res + k % n_res
            x = tl.load(start + places[:, None] + inner[None, :])
            weights = gate + (k + inner)[:, None] * (2 * n_res) + channels[None, :]
            filters, gates = _product(x, weights, n_res, filters, gates, precision)
    inner = tl.arange(0, block_c)
    for k in range(0, n_conditioning * live, block_c):
        x = tl.load(conditioning + columns[:, None] * n_conditioning + (k + inner)[None, :])
        weights = gate_conditioning + (k + inner)[:, None] * (2 * n_res) + channels[None, :]
        filters, gates = _product(x, weights, n_res, filters, gates, precision)
    gated = (tl.sigmoid(gates) * (1 - 2 * tl.sigmoid(filters))).to(dtype)

    param = tl.arange(0, n_params)
    kept = params + columns[:, None] * n_params + param[None, :]
    if first:
        total = tl.zeros((block_n, n_params), tl.float32) + tl.load(offset + param)[None, :]
    else:
        total = tl.load(kept)
    weights = tl.load(skip + channels[:, None] * n_params + param[None, :])
    total = tl.dot(gated, weights, total, input_precision=precision)
    if last and affine:
        log_s = tl.sum(tl.where(param[None, :] == 0, total, 0.0), axis=1)
        t = tl.sum(tl.where(param[None, :] == 1, total, 0.0), axis=1)
        x = (tl.load(noise + columns) - t) * tl.exp(-log_s)
        tl.store(planes + (row + 3) * line + 1 + columns, tl.where(of_clip > 0, x, 0.0))
    else:
        tl.store(kept, total)
    if not last:
        if first:
            x = tl.load(planes + (row + 2) * line + 1 + columns)
            front_x, front_mask = tl.load(front + channels), tl.load(front + n_res + channels)
            hidden = x[:, None] * front_x[None, :] + of_clip[:, None] * front_mask[None, :]
        else:
            start = ring + newest.to(tl.int64) * ((width + 2 * dilation_w) * n_res)
            places = (dilation_w + columns) * n_res
            hidden = tl.load(start + places[:, None] + channels[None, :]).to(tl.float32)
        hidden += tl.load(bias + channels)[None, :]
        weights = tl.load(residual + channels[:, None] * n_res + channels[None, :])
        hidden = tl.dot(gated, weights, hidden, input_precision=precision)
        hidden = tl.where(of_clip[:, None] > 0, hidden, 0.0)
        tl.store(after + columns[:, None] * n_res + channels[None, :], hidden.to(dtype))
