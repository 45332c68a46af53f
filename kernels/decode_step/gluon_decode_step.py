"""One step of a small decoder on Hopper: few kernels, whose weights are in registers before it is their turn.

Few sequences take two kernels a layer, and a last one:

    attend   a program for each head of each sequence: q, k, v = W_qkv norm(x); k and v into the cache; softmax over it;
             W_o's columns of this head times what comes out: this head's part of what attention adds to x
    mlp      a program for each 64 hidden units: W_gate norm(x) and W_up norm(x); W_down's columns of these units times
             silu(gate) up, which is their part of what the layer adds to x
    project  a program for each 128 logits: embedding norm(x)

Whoever reads x first adds up the parts that the kernel before left. So a layer hands over twice, where a kernel for
each product hands over five times (triton_decode_step.py); one handing over takes about half a microsecond, and reading
and adding up as much again. Launches are programmatic: a kernel starts while those before it still run, loads its
weights, laid out as the matrix units take them, and begins to copy older keys and values to shared memory; only then it
waits. The first kernel of a step does the same while `kernels.sample` draws its token.

Many sequences would read these weights and parts again and again, and leave no multiprocessor free for the next
kernel's: they take five kernels a layer, each weight read once for 16 sequences, and there are no parts.

    project      128 rows of W_qkv norm(x)
    attend_many  a head of three sequences a program: as in `attend`, from q, k, v to what comes out of the softmax
    add          16 numbers of x a program: x + W_o attended
    project      64 hidden units a program: silu(gate) up
    add          x + W_down hidden

Both ways make the same sums in the same order, and what is done with a sequence does not depend on the others: its
logits are the same to the bit, alone and in any batch.

Knows torch and Triton's Gluon; knows nothing of models beyond the layer that it computes.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode_step.op import DecodeWeights

MAX_DIM = 384  # W_qkv's rows of one head then take 144 of a thread's 255 registers
MAX_PARTS = 32  # that whoever reads x adds up, each a load of its own
NUM_WARPS = 8
HEAD_DIM = gl.constexpr(64)
UNITS = gl.constexpr(64)  # hidden units of a program
ROWS = gl.constexpr(128)  # of a product: 16 a warp
COLUMNS = gl.constexpr(8)  # of a product: the matrix units take no fewer
GROUP = gl.constexpr(16)  # sequences of a product's program, where there are many
NUMBERS = gl.constexpr(16)  # of x that a program adds to
KEYS = gl.constexpr(128)  # at a time: 16 a warp
SLOTS = gl.constexpr(4)  # in shared memory of `attend`, for so many keys and values each
# Sequences of an `attend_many`, and slots for each. On an H200, nanoGPT's shape, a step of 64 texts takes, in us at
# positions 0, 128 and 255: (3, 2) 72 87 101; (3, 1) 70 90 114; (4, 1) 66 81 114. A slot alone is filled only when it
# has been read.
TOGETHER, TOGETHER_SLOTS = gl.constexpr(3), gl.constexpr(2)
LOG2_E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-1e30)  # -inf less -inf is not a number

ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[8, 1], instr_shape=[16, 8]))
PAIR = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[2, 4, 1], instr_shape=[1, 16, 8]))
EACH = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[8, 1, 1], instr_shape=[1, 16, 8]))
TILE = gl.constexpr(gl.BlockedLayout([4, 8], [4, 8], [8, 1], [1, 0]))
TILE_PAIR = gl.constexpr(gl.BlockedLayout([1, 4, 8], [1, 4, 8], [2, 4, 1], [2, 1, 0]))
TILE_EACH = gl.constexpr(gl.BlockedLayout([1, 4, 8], [1, 4, 8], [8, 1, 1], [2, 1, 0]))
HALF = gl.constexpr(gl.BlockedLayout([1, 1], [32, 1], [1, 8], [0, 1]))  # half a head, a column a warp
WARPS = gl.constexpr(gl.BlockedLayout([8, 1, 2], [1, 1, 32], [1, 8, 1], [2, 1, 0]))  # of all warps, in each thread
SUMS_OF_HALF = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
SUMS_OF_ACC = gl.constexpr(gl.BlockedLayout([2, 8], [4, 8], [1, 8], [0, 1]))
PLAIN_1D = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLAIN_2D = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SWIZZLED_2D = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))  # rows of 64 without bank conflicts
UPRIGHT = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [0, 1]))  # columns of fp32, written by rows, likewise
SWIZZLED_3D = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))


@gluon.jit
def _load_operands(at, STEP: gl.constexpr, NUMBER: gl.constexpr, PRODUCT: gl.constexpr):
    """What is `at` these places and NUMBER - 1 times STEP further on, as left operands: a tuple."""
    loaded: gl.tuple = ()
    operands: gl.tuple = ()
    for i in gl.static_range(NUMBER):
        loaded += (gl.load(at + i * STEP),)
    for i in gl.static_range(NUMBER):
        operands += (gl.convert_layout(loaded[i], gl.DotOperandLayout(0, PRODUCT, 2)),)
    return operands


@gluon.jit
def _load_rows(w_ptr, row, stride, NUMBER: gl.constexpr):
    """Rows `row` [ROWS], NUMBER times 64 columns, as left operands: a tuple of [ROWS, 64]."""
    at = w_ptr + row[:, None] * stride + gl.arange(0, 64, gl.SliceLayout(0, TILE))[None, :]
    return _load_operands(at, 64, NUMBER, ACC)


@gluon.jit
def _load_half_as_many_rows(w_ptr, row, stride, NUMBER: gl.constexpr):
    """Rows `row` [64], NUMBER times 128 columns, as left operands: a tuple of [2, 64, 64], the earlier columns and the
    later ones, of which four warps have each."""
    half = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, TILE_PAIR)))
    column = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, TILE_PAIR)))
    at = w_ptr + row[None, :, None] * stride + half[:, None, None] * 64 + column[None, None, :]
    return _load_operands(at, 128, NUMBER, PAIR)


@gluon.jit
def _copy_rows(w_ptr, slots, stride):
    """Begin to copy 64 columns of weights to shared memory [number, ROWS, 64]: those that are needed last."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    column = gl.arange(0, 64, gl.SliceLayout(0, TILE))
    NUMBER: gl.constexpr = slots.shape[0]
    for i in gl.static_range(NUMBER):
        at = w_ptr + (i * ROWS + row)[:, None] * stride + column[None, :]
        async_copy.async_copy_global_to_shared(slots.index(i), at)
    async_copy.commit_group()


@gluon.jit
def _multiply(w, x):
    """w [ROWS, 64] times the transpose of x [columns, 64] in shared memory: [ROWS, columns]."""
    WIDTH: gl.constexpr = x.shape[0]
    zero = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    return mma_v2(w, x.permute((1, 0)).load(gl.DotOperandLayout(1, ACC, 2)), zero)


@gluon.jit
def _multiply_all(w, x):
    """The tuple w, side by side, times the transpose of x [columns, at least as many] in shared memory."""
    NUMBER: gl.constexpr = len(w)
    even = _multiply(w[0], x.slice(0, 64, dim=1))
    odd = _multiply(w[1], x.slice(64, 64, dim=1))
    for i in gl.static_range(2, NUMBER, 2):  # sums of sums: what is in flight does not wait for others
        even += _multiply(w[i], x.slice(i * 64, 64, dim=1))
        odd += _multiply(w[i + 1], x.slice(i * 64 + 64, 64, dim=1))
    return even + odd


@gluon.jit
def _multiply_half_as_many(w, x, rows):
    """The same sums for 64 rows: the tuple w of [2, 64, 64] times the transpose of x [64 columns each, columns, 64] in
    shared memory. Returns the sums of the earlier and of the later 32 rows. rows: room for [2 * 64, columns]."""
    NUMBER: gl.constexpr = len(w)
    WIDTH: gl.constexpr = x.shape[1]
    zero = gl.zeros([2, 64, WIDTH], gl.float32, PAIR)
    acc = zero
    for i in gl.static_range(NUMBER):
        acc += mma_v2(w[i], x.slice(2 * i, 2, dim=0).permute((0, 2, 1)).load(gl.DotOperandLayout(1, PAIR, 2)), zero)
    rows.store(gl.reshape(acc, [2 * 64, WIDTH]))
    low = rows.slice(0, 32).load(HALF) + rows.slice(64, 32).load(HALF)
    high = rows.slice(32, 32).load(HALF) + rows.slice(96, 32).load(HALF)
    return low, high


@gluon.jit
def _wait_for_x(
    token_ptr, x_ptr, parts_ptr, new_x_ptr, norm_ptr, squares, first, batch, writes, eps,
    SEQUENCES: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Wait until it is this kernel's turn. x is what x_ptr [batch, DIM] and parts_ptr [PARTS, batch, DIM] add up to, or
    if there are tokens, their rows of x_ptr; who `writes` leaves it in new_x_ptr. Returns the program's sequences of
    it times the norm's scale, bf16, each as often as makes WIDTH: [WIDTH, BLOCK]. The norm's other factor comes later,
    by `_factors` from `squares` [WIDTH, BLOCK / 64], so that the products need not wait for it."""
    WARPS_DOWN: gl.constexpr = min(SEQUENCES, 8)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS_DOWN, 8 // WARPS_DOWN], [1, 0])
    row = first + gl.arange(0, SEQUENCES, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    mask = (row < batch)[:, None] & (column < DIM)[None, :]
    at = row[:, None] * DIM + column[None, :]
    scale = gl.load(norm_ptr + column, mask=column < DIM, other=0.0).to(gl.float32)
    gdc_wait()

    if token_ptr is None:
        x = gl.load(x_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        for part in gl.static_range(PARTS):
            x += gl.load(parts_ptr + part * batch * DIM + at, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        token = gl.maximum(gl.load(token_ptr + row, mask=row < batch, other=0, cache_modifier=".cg"), 0)
        x = gl.load(x_ptr + token[:, None] * DIM + column[None, :], mask=mask, other=0.0).to(gl.float32)
    if new_x_ptr is not None:
        gl.store(new_x_ptr + at, x, mask=mask & writes)
    # 64 squares are added up by a warp, and those sums by each thread: in the same order whatever SEQUENCES is.
    squares.store(_repeated(gl.sum(gl.reshape(x * x, [SEQUENCES, BLOCK // 64, 64]), axis=2), WIDTH))
    return _repeated((x * scale[None, :]).to(gl.bfloat16), WIDTH)


@gluon.jit
def _repeated(x, WIDTH: gl.constexpr):
    """The rows of x, each as often as makes WIDTH."""
    SHAPE: gl.constexpr = [x.shape[0], WIDTH // x.shape[0], x.shape[1]]
    x = gl.reshape(x, [SHAPE[0], 1, SHAPE[2]])
    repeated, _ = gl.broadcast(x, gl.zeros(SHAPE, x.dtype, gl.AutoLayout()))
    return gl.reshape(repeated, [WIDTH, SHAPE[2]])


@gluon.jit
def _factors(squares, eps, DIM: gl.constexpr, READ: gl.constexpr, LAYOUT: gl.constexpr):
    """1 / rms(x) of each column, for products of this layout; READ: where a thread has a column's sums of squares."""
    total = gl.sum(squares.load(READ), axis=1)
    return gl.convert_layout(gl.rsqrt(total * (1.0 / DIM) + eps), gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _store(out_ptr, acc, start, size, first, batch, SEQUENCES: gl.constexpr):
    """acc [ROWS, columns]: entries `start` and on of each sequence's row of out [batch, size]."""
    WIDTH: gl.constexpr = acc.shape[1]
    REPEATED: gl.constexpr = WIDTH // SEQUENCES
    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, ACC))
    sequence = first + column // REPEATED
    mask = (column % REPEATED == 0) & (sequence < batch)
    at = out_ptr + sequence.to(gl.int64)[None, :] * size + row[:, None]
    gl.store(at, acc, mask=mask[None, :] & (row < size)[:, None])


@gluon.jit
def _copy_keys(k_ptr, v_ptr, k_slots, v_slots, slot, lines, positions, start, most):
    """Begin to copy KEYS older keys and values of each sequence, from `start` on, if any has so many, to its slots
    [8, 16, 64]. lines, positions: tuples, of each sequence where its first key lies and how many keys there are."""
    SEQUENCES: gl.constexpr = len(lines)
    if start < most:
        sixteen = gl.arange(0, KEYS // 16, gl.SliceLayout(1, gl.SliceLayout(2, TILE_EACH)))
        key = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, TILE_EACH)))
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(1, TILE_EACH)))
        key = start + sixteen[:, None, None] * 16 + key[None, :, None]
        for s in gl.static_range(SEQUENCES):
            at = (lines[s] + key) * HEAD_DIM + d[None, None, :]
            mask = (key < positions[s]) & (d >= 0)[None, None, :]  # what is masked becomes zero
            async_copy.async_copy_global_to_shared(k_slots.index(slot * SEQUENCES + s), k_ptr + at, mask=mask)
            async_copy.async_copy_global_to_shared(v_slots.index(slot * SEQUENCES + s), v_ptr + at, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _rotated(low, high, factor, cos, sin):
    """A head's halves [32, COLUMNS], times a factor for each column, turned by their angles."""
    low, high = low * factor[None, :], high * factor[None, :]
    return (low * cos - high * sin).to(gl.bfloat16), (high * cos + low * sin).to(gl.bfloat16)


@gluon.jit
def _side_by_side(low, high):
    """Halves [32, COLUMNS] as [COLUMNS, 64]."""
    return gl.reshape(gl.permute(gl.join(low, high), (1, 2, 0)), [COLUMNS, HEAD_DIM])


@gluon.jit
def _first_half(x):
    """Of [8, 16, ...], where the second half of the 16 is not used: [8, 8, ...]. Rows 8 apart are in one thread."""
    if len(x.shape) == 3:
        return gl.split(gl.permute(gl.reshape(x, [8, 2, COLUMNS, HEAD_DIM]), (0, 2, 3, 1)))[0]
    else:
        return gl.split(gl.permute(gl.reshape(x, [8, 2, COLUMNS]), (0, 2, 1)))[0]


@gluon.jit
def _copy_first_keys(
    position_ptr, k_ptr, v_ptr, k_slots, v_slots, kv_head, num_kv_heads, capacity, first, batch,
    SEQUENCES: gl.constexpr,
):  # fmt: skip
    """Begin to copy as many older keys and values as there are slots for. Returns lines and positions as `_copy_keys`
    takes them, and the highest position."""
    lines: gl.tuple = ()
    positions: gl.tuple = ()
    most = 0
    for s in gl.static_range(SEQUENCES):
        lines += ((gl.to_tensor(first + s).to(gl.int64) * num_kv_heads + kv_head) * capacity,)
        positions += (gl.load(position_ptr + first + s, mask=first + s < batch, other=0),)
        most = gl.maximum(most, positions[s])
    NUMBER: gl.constexpr = k_slots.shape[0] // SEQUENCES
    for slot in gl.static_range(NUMBER):
        _copy_keys(k_ptr, v_ptr, k_slots, v_slots, slot, lines, positions, slot * KEYS, most)
    return lines, positions, most


@gluon.jit
def _load_angles(position, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr):
    """For halves [32, COLUMNS] of heads at `position` [COLUMNS]: cosines and sines, scales of q and of k; a tuple."""
    half = gl.arange(0, 32, gl.SliceLayout(1, HALF))
    angle = position[None, :] * 32 + half[:, None]
    cos, sin = gl.load(cos_ptr + angle), gl.load(sin_ptr + angle)
    q_low, q_high = gl.load(q_norm_ptr + half).to(gl.float32), gl.load(q_norm_ptr + 32 + half).to(gl.float32)
    k_low, k_high = gl.load(k_norm_ptr + half).to(gl.float32), gl.load(k_norm_ptr + 32 + half).to(gl.float32)
    return cos, sin, q_low[:, None], q_high[:, None], k_low[:, None], k_high[:, None]


@gluon.jit
def _attend(
    q0, q1, k0, k1, v0, v1, angles, eps, scale, k_ptr, v_ptr, newest, writes, k_slots, v_slots, lines, positions, most
):
    """Softmax over the older keys, which `_copy_first_keys` began to copy, and the newest one: [COLUMNS, 64] bf16.

    q0 to v1 [32, COLUMNS]: halves of the newest queries, keys and values, a column for each sequence, or several that
    say the same, of which one `writes` keys and values as number `newest` [COLUMNS] of the cache's."""
    SEQUENCES: gl.constexpr = len(lines)
    SLOTS: gl.constexpr = k_slots.shape[0] // SEQUENCES
    queries = gl.allocate_shared_memory(gl.bfloat16, [16, HEAD_DIM], SWIZZLED_2D)  # one a column; 8 rows are not used
    new_values = gl.allocate_shared_memory(gl.float32, [COLUMNS, HEAD_DIM], PLAIN_2D)
    new_scores = gl.allocate_shared_memory(gl.float32, [COLUMNS], PLAIN_1D)
    maxima = gl.allocate_shared_memory(gl.float32, [8, COLUMNS], PLAIN_2D)
    sums = gl.allocate_shared_memory(gl.float32, [8, COLUMNS], PLAIN_2D)

    cos, sin, q_low, q_high, k_low, k_high = angles
    q_factor = gl.rsqrt(gl.sum(q0 * q0 + q1 * q1, axis=0) * (1.0 / HEAD_DIM) + eps)
    k_factor = gl.rsqrt(gl.sum(k0 * k0 + k1 * k1, axis=0) * (1.0 / HEAD_DIM) + eps)
    q0, q1, k0, k1 = q0 * q_low, q1 * q_high, k0 * k_low, k1 * k_high
    new_score = gl.sum(q0 * k0 + q1 * k1, axis=0) * q_factor * k_factor * scale  # both are turned by the same angle
    q0, q1 = _rotated(q0, q1, q_factor, cos, sin)
    k0, k1 = _rotated(k0, k1, k_factor, cos, sin)
    v0, v1 = v0.to(gl.bfloat16), v1.to(gl.bfloat16)
    half = gl.arange(0, 32, gl.SliceLayout(1, HALF))
    at = newest[None, :] * HEAD_DIM + half[:, None]
    writes = writes[None, :] & (half >= 0)[:, None]
    gl.store(k_ptr + at, k0, mask=writes)
    gl.store(k_ptr + at + 32, k1, mask=writes)
    gl.store(v_ptr + at, v0, mask=writes)
    gl.store(v_ptr + at + 32, v1, mask=writes)
    queries.slice(0, COLUMNS).store(_side_by_side(q0, q1))
    new_values.store(_side_by_side(v0, v1).to(gl.float32))
    new_scores.store(new_score)

    # Each warp has 16 keys of every 128, and all columns' queries, of which those of one sequence see these keys.
    q_tile = queries.load(gl.SliceLayout(0, gl.DotOperandLayout(0, EACH, 2)))[None, :, :]
    q_tile, _ = gl.broadcast(q_tile, gl.zeros([8, 16, HEAD_DIM], gl.bfloat16, gl.DotOperandLayout(0, EACH, 2)))
    warp = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, EACH)))
    owner = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, EACH))) % COLUMNS // (COLUMNS // SEQUENCES)
    key = warp[:, None, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, EACH)))[None, None, :]
    row_max = gl.full([8, 16], LOWEST, gl.float32, gl.SliceLayout(2, EACH))
    row_sum = gl.zeros([8, 16], gl.float32, gl.SliceLayout(2, EACH))
    acc = gl.zeros([8, 16, HEAD_DIM], gl.float32, EACH)
    for start in range(0, most, KEYS):
        slot = start // KEYS % SLOTS * SEQUENCES
        async_copy.wait_group(SLOTS - 1)
        scores: gl.tuple = ()
        new_max = row_max
        for s in gl.static_range(SEQUENCES):
            k_tile = k_slots.index(slot + s).permute((0, 2, 1)).load(gl.DotOperandLayout(1, EACH, 2))
            score = mma_v2(q_tile, k_tile, gl.zeros([8, 16, 16], gl.float32, EACH)) * scale  # in powers of two
            seen = (start + key < positions[s]) & (owner[None, :, None] == s)
            score = gl.where(seen, score, float("-inf"))
            new_max = gl.maximum(new_max, gl.max(score, axis=2))
            scores += (score,)
        alpha = gl.exp2(row_max - new_max)
        acc = acc * alpha[:, :, None]
        p_sum = gl.zeros_like(row_sum)
        for s in gl.static_range(SEQUENCES):  # to a row, other sequences add nothing
            p = gl.exp2(scores[s] - new_max[:, :, None])
            p_sum += gl.sum(p, axis=2)
            p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, EACH, 2))
            acc = mma_v2(p, v_slots.index(slot + s).load(gl.DotOperandLayout(1, EACH, 2)), acc)
        row_sum = row_sum * alpha + p_sum
        row_max = new_max
        next_start = start + SLOTS * KEYS
        _copy_keys(k_ptr, v_ptr, k_slots, v_slots, slot // SEQUENCES, lines, positions, next_start, most)

    # What the warps have, and the newest key and value.
    accs = gl.allocate_shared_memory(gl.float32, [8, COLUMNS, HEAD_DIM], SWIZZLED_3D)
    accs.store(_first_half(acc))
    maxima.store(_first_half(row_max))
    sums.store(_first_half(row_sum))
    COLUMN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, WARPS))
    row_max, row_sum = maxima.load(gl.SliceLayout(2, WARPS)), sums.load(gl.SliceLayout(2, WARPS))
    new_score = new_scores.load(gl.SliceLayout(0, gl.SliceLayout(2, WARPS)))
    total_max = gl.maximum(gl.max(row_max, axis=0), new_score)
    alpha, new_p = gl.exp2(row_max - total_max[None, :]), gl.exp2(new_score - total_max)
    total = gl.convert_layout(gl.sum(row_sum * alpha, axis=0) + new_p, COLUMN)
    out = gl.sum(accs.load(WARPS) * alpha[:, :, None], axis=0)
    out += gl.convert_layout(new_p, COLUMN)[:, None] * new_values.load(gl.SliceLayout(0, WARPS))
    return (out / total[:, None]).to(gl.bfloat16)


@gluon.jit
def attend(
    token_ptr,  # [batch]; None but in the first layer
    x_ptr,  # [batch, DIM] fp32, in the first layer the embedding
    parts_ptr,  # [PARTS, batch, DIM] fp32: of the hidden units of the layer before
    new_x_ptr,  # [batch, DIM] fp32
    norm_ptr,
    qkv_ptr,  # [(num_heads + 2 num_kv_heads) * 64, DIM]
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    k_ptr,  # [batch, num_kv_heads, capacity, 64]
    v_ptr,
    o_ptr,  # [DIM, num_heads * 64]
    out_ptr,  # [num_heads, batch, DIM] fp32: the heads' parts
    batch,
    capacity,
    eps,
    scale,  # log2(e) / sqrt(64)
    num_heads: gl.constexpr,
    num_kv_heads: gl.constexpr,
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,  # DIM, rounded up to a power of two
):
    gdc_launch_dependents()
    head, sequence = gl.program_id(0), gl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)

    # Side by side, not one in place of another: that would take more barriers.
    o_slots = gl.allocate_shared_memory(gl.bfloat16, [DIM // ROWS, ROWS, HEAD_DIM], SWIZZLED_2D)
    k_slots = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, KEYS // 16, 16, HEAD_DIM], SWIZZLED_3D)
    v_slots = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, KEYS // 16, 16, HEAD_DIM], SWIZZLED_3D)
    x = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, BLOCK], SWIZZLED_2D)
    x_pairs = gl.allocate_shared_memory(gl.bfloat16, [BLOCK // 64, COLUMNS, 64], SWIZZLED_3D)
    qk_rows = gl.allocate_shared_memory(gl.float32, [ROWS, COLUMNS], UPRIGHT)
    v_rows = gl.allocate_shared_memory(gl.float32, [ROWS, COLUMNS], UPRIGHT)
    attended = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, HEAD_DIM], SWIZZLED_2D)
    squares = gl.allocate_shared_memory(gl.float32, [COLUMNS, BLOCK // 64], PLAIN_2D)

    # Before it is this kernel's turn: weights, older keys and values.
    _copy_rows(o_ptr + head * HEAD_DIM, o_slots, num_heads * HEAD_DIM)
    lines, positions, most = _copy_first_keys(
        position_ptr, k_ptr, v_ptr, k_slots, v_slots, kv_head, num_kv_heads, capacity, sequence, batch, 1
    )
    r = gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    qk_row = gl.where(r < HEAD_DIM, head * HEAD_DIM + r, (num_heads + kv_head - 1) * HEAD_DIM + r)
    qk_w = _load_rows(qkv_ptr, qk_row, DIM, DIM // 64)
    v_row = (num_heads + num_kv_heads + kv_head) * HEAD_DIM
    v_row += gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(2, TILE_PAIR)))
    v_w = _load_half_as_many_rows(qkv_ptr, v_row, DIM, DIM // 128)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, HALF))
    angles = _load_angles(column * 0 + most, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr)

    h = _wait_for_x(
        token_ptr, x_ptr, parts_ptr, new_x_ptr, norm_ptr, squares, sequence, batch, head == 0, eps,
        1, COLUMNS, PARTS, DIM, BLOCK,
    )  # fmt: skip
    x.store(h)
    x_pairs.store(gl.permute(gl.reshape(h, [COLUMNS, BLOCK // 64, 64]), (1, 0, 2)))
    qk_rows.store(_multiply_all(qk_w, x))
    v0, v1 = _multiply_half_as_many(v_w, x_pairs, v_rows)
    factor = _factors(squares, eps, DIM, SUMS_OF_HALF, HALF)
    q0, q1 = qk_rows.slice(0, 32).load(HALF) * factor, qk_rows.slice(32, 32).load(HALF) * factor
    k0, k1 = qk_rows.slice(64, 32).load(HALF) * factor, qk_rows.slice(96, 32).load(HALF) * factor
    v0, v1 = v0 * factor, v1 * factor
    newest = lines[0] + most + column
    writes = (column == 0) & (head % (num_heads // num_kv_heads) == 0)
    out = _attend(
        q0, q1, k0, k1, v0, v1, angles, eps, scale, k_ptr, v_ptr, newest, writes, k_slots, v_slots, lines, positions,
        most,
    )  # fmt: skip
    attended.store(out)
    async_copy.wait_group(0)
    for i in gl.static_range(DIM // ROWS):
        part = _multiply(o_slots.index(i).load(gl.DotOperandLayout(0, ACC, 2)), attended)
        _store(out_ptr + head * batch * DIM, part, i * ROWS, DIM, sequence, batch, 1)


@gluon.jit
def _load_gate_up(gate_up_ptr, start, MLP_DIM, DIM: gl.constexpr):
    """The gates and ups of 64 units, as left operands; a gate is 8 rows from its up: where one thread has both."""
    r = gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    return _load_rows(gate_up_ptr, start + r // 16 * 8 + r % 8 + gl.where(r % 16 >= 8, MLP_DIM, 0), DIM, DIM // 64)


@gluon.jit
def _hidden(gate_up):
    """silu(gate) up [columns, 64], bf16, of products as `_load_gate_up` orders them."""
    WIDTH: gl.constexpr = gate_up.shape[1]
    gate, up = gl.split(gl.permute(gl.reshape(gate_up, [8, 2, 8, WIDTH]), (0, 2, 3, 1)))
    hidden = gl.reshape((gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16), [UNITS, WIDTH])
    return gl.permute(hidden, (1, 0))


@gluon.jit
def mlp(
    x_ptr,  # [batch, DIM] fp32
    parts_ptr,  # [PARTS, batch, DIM] fp32: of the heads
    new_x_ptr,  # [batch, DIM] fp32
    norm_ptr,
    gate_up_ptr,  # [2 MLP_DIM, DIM]
    down_ptr,  # [DIM, MLP_DIM]
    out_ptr,  # [MLP_DIM / 64, batch, DIM] fp32: the hidden units' parts
    batch,
    eps,
    MLP_DIM: gl.constexpr,
    SEQUENCES: gl.constexpr,  # of a program: 1 or 8
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,
):
    gdc_launch_dependents()
    chunk, first = gl.program_id(0), gl.program_id(1) * SEQUENCES
    down_slots = gl.allocate_shared_memory(gl.bfloat16, [DIM // ROWS, ROWS, UNITS], SWIZZLED_2D)
    x = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, BLOCK], SWIZZLED_2D)
    units = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, UNITS], SWIZZLED_2D)
    squares = gl.allocate_shared_memory(gl.float32, [COLUMNS, BLOCK // 64], PLAIN_2D)
    _copy_rows(down_ptr + chunk * UNITS, down_slots, MLP_DIM)
    gate_up_w = _load_gate_up(gate_up_ptr, chunk * UNITS, MLP_DIM, DIM)

    h = _wait_for_x(
        None, x_ptr, parts_ptr, new_x_ptr, norm_ptr, squares, first, batch, chunk == 0, eps,
        SEQUENCES, COLUMNS, PARTS, DIM, BLOCK,
    )  # fmt: skip
    x.store(h)
    units.store(_hidden(_multiply_all(gate_up_w, x) * _factors(squares, eps, DIM, SUMS_OF_ACC, ACC)))
    async_copy.wait_group(0)
    for i in gl.static_range(DIM // ROWS):
        part = _multiply(down_slots.index(i).load(gl.DotOperandLayout(0, ACC, 2)), units)
        _store(out_ptr + chunk * batch * DIM, part, i * ROWS, DIM, first, batch, SEQUENCES)


@gluon.jit
def project(
    token_ptr,  # [batch] or None
    x_ptr,  # [batch, DIM] fp32, or if there are tokens, the embedding
    parts_ptr,  # [PARTS, batch, DIM] fp32
    new_x_ptr,  # [batch, DIM] fp32 or None
    norm_ptr,
    w_ptr,  # [size, DIM], with GATED [2 size, DIM]
    out_ptr,  # [batch, size]
    batch,
    size,
    eps,
    GATED: gl.constexpr,
    LAST: gl.constexpr,
    SEQUENCES: gl.constexpr,  # of a program: 1, 8 or 16; GATED: 16
    WIDTH: gl.constexpr,  # of its products: at least 8
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """128 rows of w norm(x); with GATED, where these are gates and ups, 64 hidden units. After the LAST of a step's
    kernels no other one starts before that one's turn: the next step reads the keys that this step's kernels wrote."""
    if not LAST:
        gdc_launch_dependents()
    NUMBER: gl.constexpr = UNITS if GATED else ROWS
    start, first = gl.program_id(0) * NUMBER, gl.program_id(1) * SEQUENCES
    x = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, BLOCK], SWIZZLED_2D)
    squares = gl.allocate_shared_memory(gl.float32, [WIDTH, BLOCK // 64], PLAIN_2D)
    if GATED:
        w = _load_gate_up(w_ptr, start, size, DIM)
    else:
        row = gl.minimum(start + gl.arange(0, ROWS, gl.SliceLayout(1, TILE)), size - 1)
        w = _load_rows(w_ptr, row.to(gl.int64), DIM, DIM // 64)
    h = _wait_for_x(
        token_ptr, x_ptr, parts_ptr, new_x_ptr, norm_ptr, squares, first, batch, start == 0, eps,
        SEQUENCES, WIDTH, PARTS, DIM, BLOCK,
    )  # fmt: skip
    if LAST:
        gdc_launch_dependents()
    x.store(h)
    out = _multiply_all(w, x) * _factors(squares, eps, DIM, SUMS_OF_ACC, ACC)
    if GATED:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
        sequence = first + gl.arange(0, WIDTH, gl.SliceLayout(1, LAYOUT))
        unit = start + gl.arange(0, UNITS, gl.SliceLayout(0, LAYOUT))
        mask = (sequence < batch)[:, None] & (unit < size)[None, :]
        gl.store(out_ptr + sequence[:, None] * size + unit[None, :], gl.convert_layout(_hidden(out), LAYOUT), mask=mask)
    else:
        _store(out_ptr, out, start, size, first, batch, SEQUENCES)


@gluon.jit
def attend_many(
    projected_ptr,  # [batch, (num_heads + 2 num_kv_heads) * 64] fp32
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    k_ptr,  # [batch, num_kv_heads, capacity, 64]
    v_ptr,
    out_ptr,  # [batch, num_heads * 64]
    batch,
    capacity,
    eps,
    scale,  # log2(e) / sqrt(64)
    num_heads: gl.constexpr,
    num_kv_heads: gl.constexpr,
):
    gdc_launch_dependents()
    REPEATED: gl.constexpr = COLUMNS // TOGETHER
    head, first = gl.program_id(0), gl.program_id(1) * TOGETHER
    kv_head = head // (num_heads // num_kv_heads)
    k_slots = gl.allocate_shared_memory(gl.bfloat16, [TOGETHER_SLOTS * TOGETHER, KEYS // 16, 16, HEAD_DIM], SWIZZLED_3D)
    v_slots = gl.allocate_shared_memory(gl.bfloat16, [TOGETHER_SLOTS * TOGETHER, KEYS // 16, 16, HEAD_DIM], SWIZZLED_3D)
    lines, positions, most = _copy_first_keys(
        position_ptr, k_ptr, v_ptr, k_slots, v_slots, kv_head, num_kv_heads, capacity, first, batch, TOGETHER
    )
    half = gl.arange(0, 32, gl.SliceLayout(1, HALF))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, HALF))
    sequence = first + column // REPEATED
    there = (column < TOGETHER * REPEATED) & (sequence < batch)
    position = gl.load(position_ptr + sequence, mask=there, other=0)
    angles = _load_angles(position, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr)
    newest = (sequence.to(gl.int64) * num_kv_heads + kv_head) * capacity + position
    writes = there & (column % REPEATED == 0) & (head % (num_heads // num_kv_heads) == 0)
    sequence = gl.minimum(sequence, batch - 1)
    row = sequence[None, :] * ((num_heads + 2 * num_kv_heads) * HEAD_DIM) + half[:, None]
    q_at = projected_ptr + row + head * HEAD_DIM
    k_at = projected_ptr + row + (num_heads + kv_head) * HEAD_DIM

    gdc_wait()
    q0, q1 = gl.load(q_at, cache_modifier=".cg"), gl.load(q_at + 32, cache_modifier=".cg")
    k0, k1 = gl.load(k_at, cache_modifier=".cg"), gl.load(k_at + 32, cache_modifier=".cg")
    v_at = k_at + num_kv_heads * HEAD_DIM
    v0, v1 = gl.load(v_at, cache_modifier=".cg"), gl.load(v_at + 32, cache_modifier=".cg")
    out = _attend(
        q0, q1, k0, k1, v0, v1, angles, eps, scale, k_ptr, v_ptr, newest, writes, k_slots, v_slots, lines, positions,
        most,
    )  # fmt: skip
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, gl.SliceLayout(0, WARPS)))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(0, WARPS)))
    sequence = first + column // REPEATED
    mask = (column < TOGETHER * REPEATED) & (column % REPEATED == 0) & (sequence < batch)
    at = out_ptr + (sequence * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    gl.store(at, out, mask=mask[:, None] & (d >= 0)[None, :])


@gluon.jit
def add(
    in_ptr,  # [batch, K] bf16
    w_ptr,  # [DIM, K]
    x_ptr,  # [batch, DIM] fp32
    batch,
    K: gl.constexpr,
    CHUNKS: gl.constexpr,  # of 64: K, rounded up to a power of two, at least 8
    DIM: gl.constexpr,
):
    """x + w in. A warp has every eighth 64 columns of w; what they add up to is added to x in order, as parts are."""
    gdc_launch_dependents()
    start, first = gl.program_id(0) * NUMBERS, gl.program_id(1) * GROUP
    tile = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, GROUP, 64], SWIZZLED_3D)
    parts = gl.allocate_shared_memory(gl.float32, [CHUNKS * NUMBERS, GROUP], UPRIGHT)
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(1, gl.SliceLayout(2, TILE_EACH)))
    row = gl.arange(0, NUMBERS, gl.SliceLayout(0, gl.SliceLayout(2, TILE_EACH)))
    sequence = first + gl.arange(0, GROUP, gl.SliceLayout(0, gl.SliceLayout(2, TILE_EACH)))
    column = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, TILE_EACH)))
    column = chunk[:, None, None] * 64 + column[None, None, :]
    w = gl.load(w_ptr + (start + row)[None, :, None] * K + column, mask=column < K, other=0.0)
    w = gl.convert_layout(w, gl.DotOperandLayout(0, EACH, 2))
    mask = (sequence < batch)[None, :, None] & (column < K)
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, 8], [0, 1])
    out_row = start + gl.arange(0, NUMBERS, gl.SliceLayout(1, OUT))
    out_sequence = first + gl.arange(0, GROUP, gl.SliceLayout(0, OUT))
    at = x_ptr + out_sequence[None, :] * DIM + out_row[:, None]
    out_mask = (out_sequence < batch)[None, :] & (out_row >= 0)[:, None]

    gdc_wait()
    async_copy.async_copy_global_to_shared(tile, in_ptr + sequence[None, :, None] * K + column, mask=mask)
    async_copy.commit_group()
    x = gl.load(at, mask=out_mask, other=0.0, cache_modifier=".cg")
    async_copy.wait_group(0)
    zero = gl.zeros([CHUNKS, NUMBERS, GROUP], gl.float32, EACH)
    products = mma_v2(w, tile.permute((0, 2, 1)).load(gl.DotOperandLayout(1, EACH, 2)), zero)
    parts.store(gl.reshape(products, [CHUNKS * NUMBERS, GROUP]))
    for i in gl.static_range(K // 64):
        x += parts.slice(i * NUMBERS, NUMBERS).load(OUT)
    gl.store(at, x, mask=out_mask)


def supports(weights: DecodeWeights, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether a program's registers hold its weights, the matrix units take them as they are, and what is copied to
    shared memory lies at multiples of 16 bytes."""
    dim, mlp_dim, head_dim = weights.embedding.shape[1], weights.down.shape[2], k_cache.shape[-1]
    return (
        weights.qkv.dtype == torch.bfloat16
        and head_dim == HEAD_DIM.value
        and dim % ROWS.value == 0
        and dim <= MAX_DIM
        and mlp_dim % UNITS.value == 0
        and max(mlp_dim // UNITS.value, weights.o.shape[2] // head_dim) <= MAX_PARTS
        and all(x.data_ptr() % 16 == 0 for x in (weights.o, weights.down, k_cache, v_cache))
    )


def decode_step(
    token_ids: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, weights: DecodeWeights, norm_eps: float
) -> Tensor:
    """See `kernels.decode_step`; takes what `supports` says."""
    (vocab_size, dim), batch = weights.embedding.shape, len(token_ids)
    out = weights.embedding.new_empty((batch, vocab_size), dtype=torch.float32)
    num_programs = weights.o.shape[2] // HEAD_DIM.value * batch
    num_programs += weights.down.shape[2] // UNITS.value * triton.cdiv(batch, COLUMNS.value)
    # Where every program has a multiprocessor of its own, each is loaded while others work.
    launch = _few if num_programs <= _num_processors(weights.embedding.device) else _many
    options = {"DIM": dim, "BLOCK": triton.next_power_of_2(dim), "num_warps": NUM_WARPS, "launch_pdl": True}
    launch(token_ids, positions, k_cache, v_cache, weights, norm_eps, out, options)
    return out


def _few(
    token_ids: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    w: DecodeWeights,
    norm_eps: float,
    out: Tensor,
    options: dict[str, Any],
) -> None:
    """Two kernels a layer."""
    num_layers, batch, num_kv_heads, capacity, head_dim = k_cache.shape
    (vocab_size, dim), num_heads = w.embedding.shape, w.o.shape[2] // head_dim
    mlp_dim, num_chunks = w.down.shape[2], w.down.shape[2] // UNITS.value
    x, after_attention = w.embedding.new_empty((2, batch, dim), dtype=torch.float32)
    of_heads = w.embedding.new_empty((num_heads, batch, dim), dtype=torch.float32)
    of_units = w.embedding.new_empty((num_chunks, batch, dim), dtype=torch.float32)
    columns = 1 if batch == 1 else COLUMNS.value
    for layer in range(num_layers):
        before = (None, x, of_units) if layer else (token_ids, w.embedding, None)
        attend[(num_heads, batch)](
            *before, after_attention, w.input_norm[layer], w.qkv[layer], w.q_norm[layer], w.k_norm[layer], w.cos, w.sin,
            positions, k_cache[layer], v_cache[layer], w.o[layer], of_heads, batch, capacity, norm_eps,
            LOG2_E.value / head_dim**0.5, num_heads, num_kv_heads, num_chunks if layer else 0, **options,
        )  # fmt: skip
        mlp[(num_chunks, triton.cdiv(batch, columns))](
            after_attention, of_heads, x, w.post_norm[layer], w.gate_up[layer], w.down[layer], of_units, batch,
            norm_eps, mlp_dim, columns, num_heads, **options,
        )  # fmt: skip
    project[(triton.cdiv(vocab_size, ROWS.value), triton.cdiv(batch, columns))](
        None, x, of_units, None, w.final_norm, w.embedding, out, batch, vocab_size, norm_eps, False, True,
        columns, COLUMNS.value, num_chunks, **options,
    )  # fmt: skip


def _many(
    token_ids: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    w: DecodeWeights,
    norm_eps: float,
    out: Tensor,
    options: dict[str, Any],
) -> None:
    """Five kernels a layer."""
    num_layers, batch, num_kv_heads, capacity, head_dim = k_cache.shape
    (vocab_size, dim), attended_dim, mlp_dim = w.embedding.shape, w.o.shape[2], w.down.shape[2]
    num_heads, qkv_dim, groups = attended_dim // head_dim, w.qkv.shape[1], triton.cdiv(batch, GROUP.value)
    x = w.embedding.new_empty((batch, dim), dtype=torch.float32)
    qkv = w.embedding.new_empty((batch, qkv_dim), dtype=torch.float32)
    attended, hidden = w.embedding.new_empty((batch, attended_dim)), w.embedding.new_empty((batch, mlp_dim))
    wide = options | {"SEQUENCES": GROUP.value, "WIDTH": GROUP.value, "PARTS": 0}
    plain = {"num_warps": NUM_WARPS, "launch_pdl": True}
    for layer in range(num_layers):
        before = (None, x, None, None) if layer else (token_ids, w.embedding, None, x)
        project[(triton.cdiv(qkv_dim, ROWS.value), groups)](
            *before, w.input_norm[layer], w.qkv[layer], qkv, batch, qkv_dim, norm_eps, False, False, **wide
        )
        attend_many[(num_heads, triton.cdiv(batch, TOGETHER.value))](
            qkv, w.q_norm[layer], w.k_norm[layer], w.cos, w.sin, positions, k_cache[layer], v_cache[layer], attended,
            batch, capacity, norm_eps, LOG2_E.value / head_dim**0.5, num_heads, num_kv_heads, **plain,
        )  # fmt: skip
        add[(dim // NUMBERS.value, groups)](
            attended, w.o[layer], x, batch, attended_dim, _num_chunks(attended_dim), dim, **plain
        )
        project[(mlp_dim // UNITS.value, groups)](
            None, x, None, None, w.post_norm[layer], w.gate_up[layer], hidden, batch, mlp_dim, norm_eps, True, False,
            **wide,
        )  # fmt: skip
        add[(dim // NUMBERS.value, groups)](
            hidden, w.down[layer], x, batch, mlp_dim, _num_chunks(mlp_dim), dim, **plain
        )
    project[(triton.cdiv(vocab_size, ROWS.value), groups)](
        None, x, None, None, w.final_norm, w.embedding, out, batch, vocab_size, norm_eps, False, True, **wide
    )


def _num_chunks(size: int) -> int:
    return max(NUM_WARPS, triton.next_power_of_2(size // 64))


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
