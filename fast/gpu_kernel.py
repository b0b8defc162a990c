# ruff: noqa: ANN001, ANN201, ANN202 -- the compiler knows the types, and no ternaries of blocks
"""Twin of `gpu_step.plain_step` in Triton, which importing this needs: layer steps of one flow, row after row.

The work is a list of tasks: layer after layer of row after row, and of each, tile after tile of block_n columns. A
task's products have the 2R outputs as rows and its columns as columns, so that few columns still fill a matrix unit;
they run over block_k channels of one tap at a time, with weights whose inner axis is the one that is summed over. Sums,
the gate and the parameters of the transform stay in float32. TRITON_INTERPRET=1 runs it on a CPU, to test it.

Persistent, one launch makes a whole flow: each of the blocks that fit the chip at once makes every so many tasks of the
list, and where a kernel would end it says how many layer steps its tile has had. Before a task it waits for the tiles
whose columns it reads, until they have had all steps before, and for those that read its columns, until they are done
with the row that it overwrites. All that a block waits for comes earlier in the list, so the block with the earliest
task never waits: with all blocks resident, as a cooperative launch makes sure of, nothing locks up. Any number of tiles
is spread evenly, since few tasks wait: when one comes up, those of the tiles beside it were over a while ago.
Else a launch is one layer step, with a block for each tile, and kernels end where tasks would wait.
"""

import triton
import triton.language as tl


@triton.jit
def _wait(done, tile, n_tiles, step, n_layers, dilation_w, block_n: tl.constexpr, n_near: tl.constexpr):
    """Until what a task needs is there; done counts the steps of each tile, with n_near / 2 more on either side."""
    away = tl.arange(0, n_near) - n_near // 2
    apart = (tl.abs(away) - 1) * block_n  # columns between the tiles
    needed = tl.where(apart < 2 * dilation_w, step - n_layers + 2, 0)  # the next layer of the row above
    needed = tl.where(apart < dilation_w, step, needed)
    needed = tl.where((tile + away >= 0) & (tile + away < n_tiles), needed, 0)
    waiting = 1
    while waiting > 0:
        theirs = tl.atomic_add(done + tile + n_near // 2 + away, 0, sem="acquire", scope="gpu")
        waiting = tl.sum((theirs < needed).to(tl.int32), axis=0)


@triton.jit
def _product(weights, half, x, filters, gates, precision: tl.constexpr):
    """Add weights [2R, K] times x [K, N] to both halves; weights are pointers to the first, half an offset."""
    filters = tl.dot(tl.load(weights), x, filters, input_precision=precision)
    gates = tl.dot(tl.load(weights + half), x, gates, input_precision=precision)
    return filters, gates


@triton.jit
def _near(planes, columns, tap, row, line, height, dtype: tl.constexpr):
    """Nine taps of x and nine of the mask, and zeros: [n_taps, N]."""
    places = (tap // 9) * (height + 3) * line + (row + tap % 9 // 3) * line + tap % 3
    near = tl.load(planes + places[:, None] + columns[None, :], mask=tap[:, None] < 18, other=0.0)
    return near.to(dtype)


@triton.jit(do_not_specialize=["first_step", "last_step", "n_layers", "height"])
def flow_kernel(
    planes,
    mask,
    noise,
    conditioning,
    order,
    params,
    offset,
    rings,
    table,
    extent,
    done,
    front,
    entry,
    gate,
    gate_conditioning,
    skip,
    residual,
    bias,
    first_step,
    last_step,
    n_layers,
    width,
    height,
    n_res: tl.constexpr,
    n_params: tl.constexpr,
    n_conditioning: tl.constexpr,
    n_taps: tl.constexpr,
    n_near: tl.constexpr,
    affine: tl.constexpr,
    precision: tl.constexpr,
    persistent: tl.constexpr,
    overlap: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_c: tl.constexpr,
    block_r: tl.constexpr,
):
    """Steps [first_step, last_step), of which step row * n_layers + layer is a layer of a row.

    extent [1]: columns in use, and some beyond them that must be zero. table [L, 4]: where a layer's ring starts, its
    slots, the two dilations. overlap: the next launch may start early, and waits at its beginning for this one.
    """
    if overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype = gate.dtype.element_ty
    line = width + 2  # of planes
    n_tiles = tl.cdiv(tl.load(extent), block_n)
    for task in range(first_step * n_tiles + tl.program_id(0), last_step * n_tiles, tl.num_programs(0)):
        step, tile = task // n_tiles, task % n_tiles
        row, layer = step // n_layers, step % n_layers
        place, last = table + 4 * layer, layer == n_layers - 1
        slots, dilation_h, dilation_w = tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
        slot_size = (width + 2 * dilation_w) * n_res
        ring = rings + tl.multiple_of(tl.load(place), 16)  # whole vectors at a time
        if persistent:
            _wait(done, tile, n_tiles, step, n_layers, dilation_w, block_n, n_near)

        of_clip = tl.load(mask + tile * block_n + tl.arange(0, block_n))
        live = (tl.max(of_clip, axis=0) > 0).to(tl.int32)  # a tile of padding multiplies nothing
        # Never but zero, which the compiler cannot know: else it would work out all places before the first task, and
        # keep them in registers that the sums need.
        zero = (tl.max(of_clip, axis=0) < 0).to(tl.int32) * 16
        columns = tile * block_n + tl.arange(0, block_n) + zero
        channels, param = tl.arange(0, n_res) + zero, tl.arange(0, n_params) + zero
        inner, inner_c = tl.arange(0, block_k) + zero, tl.arange(0, block_c) + zero
        filters = tl.zeros((n_res, block_n), tl.float32)
        gates = tl.zeros((n_res, block_n), tl.float32)
        if layer == 0:
            tap = tl.arange(0, n_taps) + zero
            near = _near(planes, columns, tap, row, line, height, dtype)
            entering = entry + channels[:, None] * n_taps + tap[None, :]
            filters, gates = _product(entering, n_res * n_taps, near, filters, gates, precision)
        sound = conditioning + tl.load(order + row).to(tl.int64) * width * n_conditioning
        hearing = gate_conditioning + (layer * 2 * n_res + channels[:, None]) * n_conditioning + inner_c[None, :]
        for k in range(0, n_conditioning * live, block_c):
            mel = tl.load(sound + columns[None, :] * n_conditioning + (k + inner_c)[:, None])
            filters, gates = _product(hearing + k, n_res * n_conditioning, mel, filters, gates, precision)
        missing = (dilation_h > row).to(tl.int32) + (2 * dilation_h > row).to(tl.int32)  # rows above row 0
        end = tl.where(layer > 0, 9 * n_res * live, 0)
        weights = gate + (tl.maximum(layer - 1, 0) * 2 * n_res + channels[:, None]) * (9 * n_res) + inner[None, :]
        for k in range(3 * missing * n_res, end, block_k):
            tap = k // n_res
            slot = tl.maximum(row - (2 - tap // 3) * dilation_h, 0) % slots
            start = ring + tl.multiple_of(slot * slot_size + tap % 3 * dilation_w * n_res + k % n_res, 16)
            x = tl.load(start + columns[None, :] * n_res + inner[:, None])
            filters, gates = _product(weights + k, n_res * 9 * n_res, x, filters, gates, precision)
        gated = (tl.sigmoid(gates) * (1 - 2 * tl.sigmoid(filters))).to(dtype)

        kept = params + columns[None, :] * n_params + param[:, None]
        if layer == 0:
            total = tl.zeros((n_params, block_n), tl.float32) + tl.load(offset + param)[:, None]
        else:
            total = tl.load(kept)
        skipping = skip + (layer * n_params + param[:, None]) * n_res + channels[None, :]
        total = tl.dot(tl.load(skipping), gated, total, input_precision=precision)
        if last and affine:
            log_s = tl.sum(tl.where(param[:, None] == 0, total, 0.0), axis=0)
            t = tl.sum(tl.where(param[:, None] == 1, total, 0.0), axis=0)
            sample = (tl.load(noise + row * width + columns) - t) * tl.exp(-log_s)
            tl.store(planes + (row + 3) * line + 1 + columns, tl.where(of_clip > 0, sample, 0.0))
        else:
            tl.store(kept, total)
        if not last:
            below = tl.load(place + 7)  # dilation_w of the next layer
            following = rings + tl.multiple_of(tl.load(place + 4), 16)
            following += (row % tl.load(place + 5)) * ((width + 2 * below) * n_res)
            above = tl.load(planes + (row + 2) * line + 1 + columns)
            for first in range(0, n_res, block_r):
                out = first + tl.arange(0, block_r) + zero
                if layer == 0:
                    front_x, front_mask = tl.load(front + out), tl.load(front + n_res + out)
                    hidden = front_x[:, None] * above[None, :] + front_mask[:, None] * of_clip[None, :]
                else:
                    ours = ring + (row % slots) * slot_size + (dilation_w + columns) * n_res
                    hidden = tl.load(ours[None, :] + out[:, None]).to(tl.float32)
                hidden += tl.load(bias + layer * n_res + out)[:, None]
                remaining = residual + (layer * n_res + out[:, None]) * n_res + channels[None, :]
                hidden = tl.dot(tl.load(remaining), gated, hidden, input_precision=precision)
                hidden = tl.where(of_clip[None, :] > 0, hidden, 0.0)
                after = following + (below + columns) * n_res
                tl.store(after[None, :] + out[:, None], hidden.to(dtype))
        if persistent:
            tl.debug_barrier()  # every thread's part is written
            tl.atomic_xchg(done + tile + n_near // 2, step + 1, sem="release", scope="gpu")
