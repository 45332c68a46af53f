"""One step of a small decoder on Hopper: two kernels a layer, whose weights are in registers before it is their turn.

    attend   a program for each head: q, k, v = W_qkv norm(x); k and v into the cache; softmax over it; W_o's columns of
             this head times what comes out, which is this head's part of what attention adds to x
    mlp      a program for each 64 hidden units: W_gate norm(x) and W_up norm(x); W_down's columns of these units times
             silu(gate) up, which is their part of what the layer adds to x
    logits   a program for each 128 logits: embedding norm(x)

Whoever reads x first adds up the parts that the kernel before left. So a layer hands over twice, where a kernel for
each product hands over five times (triton_decode_step.py); one handing over takes about half a microsecond, and reading
and adding up as much again. Launches are programmatic: a kernel starts while those before it still run, loads its
weights, laid out as the matrix units take them, and begins to copy older keys and values to shared memory; only then it
waits. The first kernel of a step does the same while `kernels.sample` draws its token.

A program takes a few sequences, the columns of its products. What is done with a column does not depend on the others,
nor on how many there are: a sequence's logits do not depend on its neighbours.

Knows torch and Triton's Gluon; knows nothing of models beyond the layer that it computes.
"""

import functools

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
KEYS = gl.constexpr(128)  # at a time: 16 a warp
SLOTS = gl.constexpr(4)  # in shared memory, for so many keys and values each
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
def _load_half_as_many_rows(w_ptr, first, stride, NUMBER: gl.constexpr):
    """64 rows from `first` on, NUMBER times 128 columns, as left operands: a tuple of [2, 64, 64], the earlier columns
    and the later ones, of which four warps have each."""
    half = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, TILE_PAIR)))
    row = first + gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, TILE_PAIR)))
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
    acc = _multiply(w[0], x.slice(0, 64, dim=1))
    for i in gl.static_range(1, NUMBER):
        acc += _multiply(w[i], x.slice(i * 64, 64, dim=1))  # a sum of sums: what is in flight does not wait for others
    return acc


@gluon.jit
def _wait_for_x(
    token_ptr, x_ptr, parts_ptr, new_x_ptr, norm_ptr, squares, first, batch, writes, eps,
    SEQUENCES: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Wait until it is this kernel's turn. x is what x_ptr [batch, DIM] and parts_ptr [PARTS, batch, DIM] add up to, or
    if there are tokens, their rows of x_ptr; who `writes` leaves it in new_x_ptr. Returns the norm of the program's
    sequences of it, bf16, each as often as makes WIDTH: [WIDTH, BLOCK]. squares: room for [SEQUENCES, BLOCK / 64]."""
    WARPS_DOWN: gl.constexpr = min(SEQUENCES, 8)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS_DOWN, 8 // WARPS_DOWN], [1, 0])
    SUMS: gl.constexpr = gl.BlockedLayout([1, 2, BLOCK // 64], [1, 32, 1], [WARPS_DOWN, 8 // WARPS_DOWN, 1], [2, 1, 0])
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
    squares.store(gl.sum(gl.reshape(x * x, [SEQUENCES, BLOCK // 64, 64]), axis=2))
    total = gl.sum(squares.load(gl.SliceLayout(1, SUMS)), axis=1)
    factor = gl.convert_layout(gl.rsqrt(total * (1.0 / DIM) + eps), gl.SliceLayout(1, LAYOUT))
    normed = (x * factor[:, None] * scale[None, :]).to(gl.bfloat16)
    SHAPE: gl.constexpr = [SEQUENCES, WIDTH // SEQUENCES, BLOCK]
    normed = gl.reshape(normed, [SEQUENCES, 1, BLOCK])
    normed, _ = gl.broadcast(normed, gl.zeros(SHAPE, gl.bfloat16, gl.AutoLayout()))
    return gl.reshape(normed, [WIDTH, BLOCK])


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
def _with_older_keys(position_ptr, first, batch, s, start, position, SEQUENCES: gl.constexpr):
    """(s, start, position), or where sequence s has no key from `start` on, the next one that has any."""
    while (start >= position) & (s < SEQUENCES):
        s += 1
        start = 0
        position = gl.load(position_ptr + first + s, mask=(s < SEQUENCES) & (first + s < batch), other=0)
    return s, start, position


@gluon.jit
def _copy_keys(
    k_ptr, v_ptr, k_slot, v_slot, position_ptr, kv_head, num_kv_heads, capacity, first, batch, s, start, position,
    SEQUENCES: gl.constexpr,
):  # fmt: skip
    """Begin to copy the next KEYS older keys and values, if there are any, to slots [8, 16, 64]. Returns what comes
    after them: a sequence, its first key, its position."""
    s, start, position = _with_older_keys(position_ptr, first, batch, s, start, position, SEQUENCES)
    if s < SEQUENCES:
        line = (gl.to_tensor(first + s).to(gl.int64) * num_kv_heads + kv_head) * capacity
        sixteen = gl.arange(0, KEYS // 16, gl.SliceLayout(1, gl.SliceLayout(2, TILE_EACH)))
        key = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, TILE_EACH)))
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(1, TILE_EACH)))
        key = start + sixteen[:, None, None] * 16 + key[None, :, None]
        at = (line + key) * HEAD_DIM + d[None, None, :]
        mask = (key < position) & (d >= 0)[None, None, :]  # what is masked becomes zero
        async_copy.async_copy_global_to_shared(k_slot, k_ptr + at, mask=mask)
        async_copy.async_copy_global_to_shared(v_slot, v_ptr + at, mask=mask)
        start += KEYS
    async_copy.commit_group()
    return s, start, position


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
    SEQUENCES: gl.constexpr,  # of a program: 1, 2, 4 or 8
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,  # DIM, rounded up to a power of two
):
    gdc_launch_dependents()
    REPEATED: gl.constexpr = COLUMNS // SEQUENCES
    head, first = gl.program_id(0), gl.program_id(1) * SEQUENCES
    kv_head = head // (num_heads // num_kv_heads)

    # Side by side, not one in place of another: that would take more barriers.
    o_slots = gl.allocate_shared_memory(gl.bfloat16, [DIM // ROWS, ROWS, HEAD_DIM], SWIZZLED_2D)
    k_slots = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, KEYS // 16, 16, HEAD_DIM], SWIZZLED_3D)
    v_slots = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, KEYS // 16, 16, HEAD_DIM], SWIZZLED_3D)
    x = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, BLOCK], SWIZZLED_2D)
    x_pairs = gl.allocate_shared_memory(gl.bfloat16, [BLOCK // 64, COLUMNS, 64], SWIZZLED_3D)
    qk_rows = gl.allocate_shared_memory(gl.float32, [ROWS, COLUMNS], UPRIGHT)
    v_rows = gl.allocate_shared_memory(gl.float32, [ROWS, COLUMNS], UPRIGHT)  # two sums of 64
    queries = gl.allocate_shared_memory(gl.bfloat16, [16, HEAD_DIM], SWIZZLED_2D)  # one a column; 8 rows are not used
    new_values = gl.allocate_shared_memory(gl.float32, [COLUMNS, HEAD_DIM], PLAIN_2D)
    new_scores = gl.allocate_shared_memory(gl.float32, [COLUMNS], PLAIN_1D)
    maxima = gl.allocate_shared_memory(gl.float32, [8, COLUMNS], PLAIN_2D)
    sums = gl.allocate_shared_memory(gl.float32, [8, COLUMNS], PLAIN_2D)
    attended = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, HEAD_DIM], SWIZZLED_2D)
    squares = gl.allocate_shared_memory(gl.float32, [SEQUENCES, BLOCK // 64], PLAIN_2D)

    # Before it is this kernel's turn: weights, older keys and values.
    _copy_rows(o_ptr + head * HEAD_DIM, o_slots, num_heads * HEAD_DIM)
    num_copies = 0
    for i in gl.static_range(SEQUENCES):
        older = gl.load(position_ptr + first + i, mask=first + i < batch, other=0)
        num_copies += (older + KEYS - 1) // KEYS
    next_s, next_start, next_position = 0, 0, gl.load(position_ptr + first)  # what is copied next
    for i in gl.static_range(SLOTS):
        next_s, next_start, next_position = _copy_keys(
            k_ptr, v_ptr, k_slots.index(i), v_slots.index(i), position_ptr, kv_head, num_kv_heads, capacity,
            first, batch, next_s, next_start, next_position, SEQUENCES,
        )  # fmt: skip
    r = gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    qk_row = gl.where(r < HEAD_DIM, head * HEAD_DIM + r, (num_heads + kv_head - 1) * HEAD_DIM + r)
    qk_w = _load_rows(qkv_ptr, qk_row, DIM, DIM // 64)
    v_w = _load_half_as_many_rows(qkv_ptr, (num_heads + num_kv_heads + kv_head) * HEAD_DIM, DIM, DIM // 128)
    half = gl.arange(0, 32, gl.SliceLayout(1, HALF))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, HALF))
    sequence = first + column // REPEATED
    position = gl.load(position_ptr + sequence, mask=sequence < batch, other=0)
    angle = position[None, :] * 32 + half[:, None]
    cos, sin = gl.load(cos_ptr + angle), gl.load(sin_ptr + angle)
    q_low, q_high = gl.load(q_norm_ptr + half).to(gl.float32), gl.load(q_norm_ptr + 32 + half).to(gl.float32)
    k_low, k_high = gl.load(k_norm_ptr + half).to(gl.float32), gl.load(k_norm_ptr + 32 + half).to(gl.float32)

    h = _wait_for_x(
        token_ptr, x_ptr, parts_ptr, new_x_ptr, norm_ptr, squares, first, batch, head == 0, eps,
        SEQUENCES, COLUMNS, PARTS, DIM, BLOCK,
    )  # fmt: skip
    x.store(h)
    x_pairs.store(gl.permute(gl.reshape(h, [COLUMNS, BLOCK // 64, 64]), (1, 0, 2)))
    qk = _multiply_all(qk_w, x)
    zero = gl.zeros([2, 64, COLUMNS], gl.float32, PAIR)
    v = zero
    for i in gl.static_range(DIM // 128):
        pair = x_pairs.slice(2 * i, 2, dim=0).permute((0, 2, 1)).load(gl.DotOperandLayout(1, PAIR, 2))
        v += mma_v2(v_w[i], pair, zero)
    qk_rows.store(qk)
    v_rows.store(gl.reshape(v, [ROWS, COLUMNS]))

    q0, q1 = qk_rows.slice(0, 32).load(HALF), qk_rows.slice(32, 32).load(HALF)
    k0, k1 = qk_rows.slice(64, 32).load(HALF), qk_rows.slice(96, 32).load(HALF)
    v0 = (v_rows.slice(0, 32).load(HALF) + v_rows.slice(64, 32).load(HALF)).to(gl.bfloat16)
    v1 = (v_rows.slice(32, 32).load(HALF) + v_rows.slice(96, 32).load(HALF)).to(gl.bfloat16)
    q_factor = gl.rsqrt(gl.sum(q0 * q0 + q1 * q1, axis=0) * (1.0 / HEAD_DIM) + eps)
    k_factor = gl.rsqrt(gl.sum(k0 * k0 + k1 * k1, axis=0) * (1.0 / HEAD_DIM) + eps)
    q0, q1, k0, k1 = q0 * q_low[:, None], q1 * q_high[:, None], k0 * k_low[:, None], k1 * k_high[:, None]
    new_score = gl.sum(q0 * k0 + q1 * k1, axis=0) * q_factor * k_factor * scale  # both are turned by the same angle
    q0, q1 = _rotated(q0, q1, q_factor, cos, sin)
    k0, k1 = _rotated(k0, k1, k_factor, cos, sin)
    at = ((sequence.to(gl.int64) * num_kv_heads + kv_head) * capacity + position)[None, :] * HEAD_DIM + half[:, None]
    writes = (column % REPEATED == 0) & (sequence < batch) & (head % (num_heads // num_kv_heads) == 0)
    writes = writes[None, :] & (half >= 0)[:, None]
    gl.store(k_ptr + at, k0, mask=writes)
    gl.store(k_ptr + at + 32, k1, mask=writes)
    gl.store(v_ptr + at, v0, mask=writes)
    gl.store(v_ptr + at + 32, v1, mask=writes)
    queries.slice(0, COLUMNS).store(_side_by_side(q0, q1))
    new_values.store(_side_by_side(v0, v1).to(gl.float32))
    new_scores.store(new_score)

    # Each warp has 16 keys of each copy, and all columns' queries, of which those of one sequence see these keys.
    q_tile = queries.load(gl.SliceLayout(0, gl.DotOperandLayout(0, EACH, 2)))[None, :, :]
    q_tile, _ = gl.broadcast(q_tile, gl.zeros([8, 16, HEAD_DIM], gl.bfloat16, gl.DotOperandLayout(0, EACH, 2)))
    warp = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, EACH)))
    owner = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, EACH))) % COLUMNS // REPEATED
    key = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, EACH)))
    row_max = gl.full([8, 16], LOWEST, gl.float32, gl.SliceLayout(2, EACH))
    row_sum = gl.zeros([8, 16], gl.float32, gl.SliceLayout(2, EACH))
    acc = gl.zeros([8, 16, HEAD_DIM], gl.float32, EACH)
    s, start, older = 0, 0, gl.load(position_ptr + first)
    for copy in range(num_copies):
        s, start, older = _with_older_keys(position_ptr, first, batch, s, start, older, SEQUENCES)
        slot = copy % SLOTS
        async_copy.wait_group(SLOTS - 1)
        k_tile = k_slots.index(slot).permute((0, 2, 1)).load(gl.DotOperandLayout(1, EACH, 2))
        scores = mma_v2(q_tile, k_tile, gl.zeros([8, 16, 16], gl.float32, EACH)) * scale  # in powers of two
        seen = (start + warp[:, None, None] * 16 + key[None, None, :] < older) & (owner == s)[None, :, None]
        scores = gl.where(seen, scores, float("-inf"))
        new_max = gl.maximum(row_max, gl.max(scores, axis=2))
        alpha = gl.exp2(row_max - new_max)
        p = gl.exp2(scores - new_max[:, :, None])
        row_sum = row_sum * alpha + gl.sum(p, axis=2)
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, EACH, 2))
        acc = mma_v2(p, v_slots.index(slot).load(gl.DotOperandLayout(1, EACH, 2)), acc * alpha[:, :, None])
        row_max = new_max
        start += KEYS
        next_s, next_start, next_position = _copy_keys(
            k_ptr, v_ptr, k_slots.index(slot), v_slots.index(slot), position_ptr, kv_head, num_kv_heads, capacity,
            first, batch, next_s, next_start, next_position, SEQUENCES,
        )  # fmt: skip

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
    attended.store((out / total[:, None]).to(gl.bfloat16))
    async_copy.wait_group(0)
    for i in gl.static_range(DIM // ROWS):
        part = _multiply(o_slots.index(i).load(gl.DotOperandLayout(0, ACC, 2)), attended)
        _store(out_ptr + head * batch * DIM, part, i * ROWS, DIM, first, batch, SEQUENCES)


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
    SEQUENCES: gl.constexpr,  # of a program: 1, 8 or 16
    WIDTH: gl.constexpr,  # of its products: at least 8
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,
):
    gdc_launch_dependents()
    chunk, first = gl.program_id(0), gl.program_id(1) * SEQUENCES
    down_slots = gl.allocate_shared_memory(gl.bfloat16, [DIM // ROWS, ROWS, UNITS], SWIZZLED_2D)
    x = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, BLOCK], SWIZZLED_2D)
    units = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, UNITS], SWIZZLED_2D)
    squares = gl.allocate_shared_memory(gl.float32, [SEQUENCES, BLOCK // 64], PLAIN_2D)
    _copy_rows(down_ptr + chunk * UNITS, down_slots, MLP_DIM)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    # A gate is 8 rows from its up: where one thread has both.
    gate_up_row = chunk * UNITS + r // 16 * 8 + r % 8 + gl.where(r % 16 >= 8, MLP_DIM, 0)
    gate_up_w = _load_rows(gate_up_ptr, gate_up_row, DIM, DIM // 64)

    h = _wait_for_x(
        None, x_ptr, parts_ptr, new_x_ptr, norm_ptr, squares, first, batch, chunk == 0, eps,
        SEQUENCES, WIDTH, PARTS, DIM, BLOCK,
    )  # fmt: skip
    x.store(h)
    gate_up = gl.reshape(_multiply_all(gate_up_w, x), [8, 2, 8, WIDTH])
    gate, up = gl.split(gl.permute(gate_up, (0, 2, 3, 1)))
    hidden = gl.reshape((gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16), [UNITS, WIDTH])
    units.store(gl.permute(hidden, (1, 0)))
    async_copy.wait_group(0)
    for i in gl.static_range(DIM // ROWS):
        part = _multiply(down_slots.index(i).load(gl.DotOperandLayout(0, ACC, 2)), units)
        _store(out_ptr + chunk * batch * DIM, part, i * ROWS, DIM, first, batch, SEQUENCES)


@gluon.jit
def logits(
    x_ptr,  # [batch, DIM] fp32
    parts_ptr,  # [PARTS, batch, DIM] fp32: of the last layer's hidden units
    norm_ptr,
    embedding_ptr,  # [vocab_size, DIM]
    out_ptr,  # [batch, vocab_size] fp32
    batch,
    vocab_size,
    eps,
    SEQUENCES: gl.constexpr,  # of a program: 1 or 8
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """No other kernel starts before this one's turn: the next step reads the keys that this step's kernels wrote."""
    start, first = gl.program_id(0) * ROWS, gl.program_id(1) * SEQUENCES
    x = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, BLOCK], SWIZZLED_2D)
    squares = gl.allocate_shared_memory(gl.float32, [SEQUENCES, BLOCK // 64], PLAIN_2D)
    row = gl.minimum(start + gl.arange(0, ROWS, gl.SliceLayout(1, TILE)), vocab_size - 1)
    w = _load_rows(embedding_ptr, row.to(gl.int64), DIM, DIM // 64)
    h = _wait_for_x(
        None,
        x_ptr,
        parts_ptr,
        None,
        norm_ptr,
        squares,
        first,
        batch,
        False,
        eps,
        SEQUENCES,
        COLUMNS,
        PARTS,
        DIM,
        BLOCK,
    )
    gdc_launch_dependents()
    x.store(h)
    _store(out_ptr, _multiply_all(w, x), start, vocab_size, first, batch, SEQUENCES)


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
    w, embedding = weights, weights.embedding
    num_layers, batch, num_kv_heads, capacity, head_dim = k_cache.shape
    (vocab_size, dim), num_heads = embedding.shape, w.o.shape[2] // head_dim
    mlp_dim, num_chunks = w.down.shape[2], w.down.shape[2] // UNITS.value
    x, after_attention = embedding.new_empty((2, batch, dim), dtype=torch.float32)
    of_heads = embedding.new_empty((num_heads, batch, dim), dtype=torch.float32)
    of_units = embedding.new_empty((num_chunks, batch, dim), dtype=torch.float32)
    out = embedding.new_empty((batch, vocab_size), dtype=torch.float32)

    # As few sequences a program as leave every program a multiprocessor: they share its weights, but take turns. On an
    # H200, nanoGPT's shape, a step at position 128 takes, by the sequences of an `attend` and an `mlp`, in us:
    # of 64 texts (2, 8) 150, (4, 8) 107, (8, 8) 120, (8, 16) 106; of 256 (4, 8) 364, (8, 8) 327, (8, 16) 289.
    num_processors = _num_processors(embedding.device)
    sequences = next((n for n in (1, 2, 4) if num_heads * triton.cdiv(batch, n) <= num_processors), 8)
    columns = 1 if batch == 1 else 8 if num_chunks * triton.cdiv(batch, 8) <= num_processors else 16
    width = max(columns, COLUMNS.value)
    options = {"DIM": dim, "BLOCK": triton.next_power_of_2(dim), "num_warps": NUM_WARPS, "launch_pdl": True}
    for layer in range(num_layers):
        before = (None, x, of_units) if layer else (token_ids, embedding, None)
        attend[(num_heads, triton.cdiv(batch, sequences))](
            *before, after_attention, w.input_norm[layer], w.qkv[layer], w.q_norm[layer], w.k_norm[layer], w.cos, w.sin,
            positions, k_cache[layer], v_cache[layer], w.o[layer], of_heads, batch, capacity, norm_eps,
            LOG2_E.value / head_dim**0.5, num_heads, num_kv_heads, sequences, num_chunks if layer else 0, **options,
        )  # fmt: skip
        mlp[(num_chunks, triton.cdiv(batch, columns))](
            after_attention, of_heads, x, w.post_norm[layer], w.gate_up[layer], w.down[layer], of_units, batch,
            norm_eps, mlp_dim, columns, width, num_heads, **options,
        )  # fmt: skip
    columns = min(columns, COLUMNS.value)
    logits[(triton.cdiv(vocab_size, ROWS.value), triton.cdiv(batch, columns))](
        x, of_units, w.final_norm, embedding, out, batch, vocab_size, norm_eps, columns, num_chunks, **options
    )
    return out


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
