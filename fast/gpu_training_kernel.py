# ruff: noqa: ANN001, ANN201, ANN202 -- the compiler knows the types
"""Twin of `EstimatorLayer.forward` and its backward pass in Triton, which importing this needs; see `gpu_training.py`.

Positions are [B, h, W] with channels innermost. A block makes block_n columns of one row; as in `gpu_kernel.py`
products have channels as rows and positions as columns, and their sums are in float32. Rows above a clip and columns
beside it are zero, and are never read.
"""

import triton
import triton.language as tl


@triton.jit
def _sums(
    hidden,
    conditioning,
    gate,
    gate_conditioning,
    bias,
    line,
    row,
    columns,
    width,
    dilation_h,
    dilation_w,
    n_res: tl.constexpr,
    n_conditioning: tl.constexpr,
    precision: tl.constexpr,
    block_k: tl.constexpr,
    block_c: tl.constexpr,
):
    """What the gate takes, both halves [R, N]; gate [2R, 9R] has the oldest row first, then left to right."""
    channels = tl.arange(0, n_res)
    zeros = tl.zeros((n_res, columns.shape[0]), tl.float32)
    filters = zeros + tl.load(bias + channels)[:, None]
    gates = zeros + tl.load(bias + n_res + channels)[:, None]
    inner_c = tl.arange(0, block_c)
    sound = conditioning + (line * width + columns[None, :]) * n_conditioning + inner_c[:, None]
    hearing = gate_conditioning + channels[:, None] * n_conditioning + inner_c[None, :]
    for k in range(0, n_conditioning, block_c):
        mel = tl.load(sound + k, mask=columns[None, :] < width, other=0.0)
        filters = tl.dot(tl.load(hearing + k), mel, filters, input_precision=precision)
        gates = tl.dot(tl.load(hearing + n_res * n_conditioning + k), mel, gates, input_precision=precision)
    missing = (dilation_h > row).to(tl.int32) + (2 * dilation_h > row).to(tl.int32)  # rows above row 0
    inner = tl.arange(0, block_k)
    weights = gate + channels[:, None] * (9 * n_res) + inner[None, :]
    for k in range(3 * missing * n_res, 9 * n_res, block_k):
        tap = k // n_res
        places = columns + (tap % 3 - 1) * dilation_w
        start = hidden + ((line - (2 - tap // 3) * dilation_h) * width) * n_res + k % n_res
        seen = (places >= 0) & (places < width)
        x = tl.load(start + places[None, :] * n_res + inner[:, None], mask=seen[None, :], other=0.0)
        filters = tl.dot(tl.load(weights + k), x, filters, input_precision=precision)
        gates = tl.dot(tl.load(weights + 9 * n_res * n_res + k), x, gates, input_precision=precision)
    return filters, gates


@triton.jit
def forward_kernel(
    hidden,
    params,
    conditioning,
    after,
    total,
    gate,
    gate_conditioning,
    bias,
    residual,
    residual_bias,
    skip,
    height,
    width,
    dilation_h,
    dilation_w,
    n_res: tl.constexpr,
    n_params: tl.constexpr,
    n_conditioning: tl.constexpr,
    last: tl.constexpr,
    precision: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_c: tl.constexpr,
    block_r: tl.constexpr,
):
    """total = params + skip branch [.., P], after = hidden + residual; residual [R, R] and skip [P, R] out by in."""
    line, columns = tl.program_id(1).to(tl.int64), tl.program_id(0) * block_n + tl.arange(0, block_n)
    filters, gates = _sums(
        hidden,
        conditioning,
        gate,
        gate_conditioning,
        bias,
        line,
        tl.program_id(1) % height,
        columns,
        width,
        dilation_h,
        dilation_w,
        n_res,
        n_conditioning,
        precision,
        block_k,
        block_c,
    )
    gated = ((1 - 2 * tl.sigmoid(-2 * filters)) * tl.sigmoid(gates)).to(hidden.dtype.element_ty)
    channels, param, inside = tl.arange(0, n_res), tl.arange(0, n_params), columns < width
    places = (line * width + columns) * n_params
    kept = tl.load(params + places[None, :] + param[:, None], mask=inside[None, :], other=0.0)
    skipping = tl.load(skip + param[:, None] * n_res + channels[None, :])
    kept = tl.dot(skipping, gated, kept, input_precision=precision)
    tl.store(total + places[None, :] + param[:, None], kept, mask=inside[None, :])
    if not last:
        places = (line * width + columns) * n_res
        for first in range(0, n_res, block_r):
            out = first + tl.arange(0, block_r)
            update = tl.load(hidden + places[None, :] + out[:, None], mask=inside[None, :], other=0.0).to(tl.float32)
            update += tl.load(residual_bias + out)[:, None]
            weights = tl.load(residual + out[:, None] * n_res + channels[None, :])
            update = tl.dot(weights, gated, update, input_precision=precision)
            tl.store(after + places[None, :] + out[:, None], update.to(hidden.dtype.element_ty), mask=inside[None, :])


@triton.jit
def gate_backward_kernel(
    hidden,
    conditioning,
    grad_after,
    grad_params,
    gated,
    grad_both,
    gate,
    gate_conditioning,
    bias,
    residual,
    skip,
    height,
    width,
    dilation_h,
    dilation_w,
    n_res: tl.constexpr,
    n_params: tl.constexpr,
    n_conditioning: tl.constexpr,
    last: tl.constexpr,
    precision: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_c: tl.constexpr,
):
    """gated [.., R] made again, and grad_both [.., 2R] of what the gate takes; residual and skip are in by out here."""
    line, columns = tl.program_id(1).to(tl.int64), tl.program_id(0) * block_n + tl.arange(0, block_n)
    filters, gates = _sums(
        hidden,
        conditioning,
        gate,
        gate_conditioning,
        bias,
        line,
        tl.program_id(1) % height,
        columns,
        width,
        dilation_h,
        dilation_w,
        n_res,
        n_conditioning,
        precision,
        block_k,
        block_c,
    )
    dtype = hidden.dtype.element_ty
    filters, gates = 1 - 2 * tl.sigmoid(-2 * filters), tl.sigmoid(gates)
    channels, param, inside = tl.arange(0, n_res), tl.arange(0, n_params), columns < width
    places = (line * width + columns) * n_res
    tl.store(gated + places[None, :] + channels[:, None], (filters * gates).to(dtype), mask=inside[None, :])

    from_params = grad_params + (line * width + columns[None, :]) * n_params + param[:, None]
    gradient = tl.load(from_params, mask=inside[None, :], other=0.0).to(dtype)
    weights = tl.load(skip + channels[:, None] * n_params + param[None, :])
    grad_gated = tl.dot(weights, gradient, input_precision=precision)
    if not last:
        inner = tl.arange(0, block_k)
        for k in range(0, n_res, block_k):
            weights_k = tl.load(residual + channels[:, None] * n_res + (k + inner)[None, :])
            from_after = grad_after + places[None, :] + (k + inner)[:, None]
            gradient_k = tl.load(from_after, mask=inside[None, :], other=0.0)
            grad_gated = tl.dot(weights_k, gradient_k, grad_gated, input_precision=precision)
    both = grad_both + 2 * places[None, :] + channels[:, None]
    tl.store(both, (grad_gated * gates * (1 - filters * filters)).to(dtype), mask=inside[None, :])
    tl.store(both + n_res, (grad_gated * filters * gates * (1 - gates)).to(dtype), mask=inside[None, :])


@triton.jit
def hidden_backward_kernel(
    grad_both,
    grad_after,
    grad_hidden,
    taps,
    height,
    width,
    dilation_h,
    dilation_w,
    n_res: tl.constexpr,
    last: tl.constexpr,
    precision: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """grad_hidden [.., R] from the rows at and below each, with taps [9, R, 2R]."""
    line, columns = tl.program_id(1).to(tl.int64), tl.program_id(0) * block_n + tl.arange(0, block_n)
    left = height - 1 - tl.program_id(1) % height  # rows below
    missing = (dilation_h > left).to(tl.int32) + (2 * dilation_h > left).to(tl.int32)
    channels, inner, inside = tl.arange(0, n_res), tl.arange(0, block_k), columns < width
    places = (line * width + columns) * n_res
    total = tl.zeros((n_res, block_n), tl.float32)
    for k in range(3 * missing * 2 * n_res, 9 * 2 * n_res, block_k):
        tap = k // (2 * n_res)
        seeing = columns - (tap % 3 - 1) * dilation_w
        part = tl.multiple_of(k % (2 * n_res), block_k)
        start = grad_both + ((line + (2 - tap // 3) * dilation_h) * width) * (2 * n_res) + part
        seen = (seeing >= 0) & (seeing < width)
        x = tl.load(start + seeing[None, :] * (2 * n_res) + inner[:, None], mask=seen[None, :], other=0.0)
        weights = taps + (tap * n_res + channels[:, None]) * (2 * n_res) + (part + inner)[None, :]
        total = tl.dot(tl.load(weights), x, total, input_precision=precision)
    if not last:
        total += tl.load(grad_after + places[None, :] + channels[:, None], mask=inside[None, :], other=0.0)
    to = grad_hidden + places[None, :] + channels[:, None]
    tl.store(to, total.to(grad_hidden.dtype.element_ty), mask=inside[None, :])


@triton.jit
def taps_backward_kernel(
    hidden,
    grad_both,
    partial,
    n_lines,
    height,
    width,
    dilation_h,
    dilation_w,
    n_res: tl.constexpr,
    precision: tl.constexpr,
    block_o: tl.constexpr,
    block_k: tl.constexpr,
):
    """partial [parts, 9, R, 2R]: gradients of the taps, from every so many rows; block_k columns at a time."""
    tap, part = tl.program_id(0), tl.program_id(2)
    channels, inner = tl.arange(0, n_res), tl.arange(0, block_k)
    out = tl.program_id(1) * block_o + tl.arange(0, block_o)
    above, aside = (2 - tap // 3) * dilation_h, (tap % 3 - 1) * dilation_w
    tiles, parts = tl.cdiv(width, block_k), tl.num_programs(2)
    total = tl.zeros((n_res, block_o), tl.float32)
    for task in range(0, tl.cdiv(n_lines - part, parts) * tiles):
        line, columns = (part + task // tiles * parts).to(tl.int64), task % tiles * block_k + inner
        places = columns + aside
        seen = (places >= 0) & (places < width) & (line % height >= above)
        start = hidden + (line - above) * width * n_res
        x = tl.load(start + places[None, :] * n_res + channels[:, None], mask=seen[None, :], other=0.0)
        from_both = grad_both + (line * width + columns[:, None]) * (2 * n_res) + out[None, :]
        gradient = tl.load(from_both, mask=columns[:, None] < width, other=0.0)
        total = tl.dot(x, gradient, total, input_precision=precision)
    to = partial + ((part * 9 + tap) * n_res + channels[:, None]) * (2 * n_res) + out[None, :]
    tl.store(to, total)
