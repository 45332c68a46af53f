"""One step of a decoder on the GPU: five kernels a layer, each of which has read its weights before its turn comes.

    embed       x = embedding[token]
    linear      16 rows of W_qkv a program, times norm(x)
    attend      a (sequence, head) a program: q and k normalised and rotated; k, v into the cache; softmax over it
    add         16 numbers of x a program: x + W_o attended
    gate_up     16 hidden units a program: both products with norm(x), silu(gate) * up
    add         x + W_down hidden
    linear      16 logits a program: embedding norm(x)

At batch 1 a step is a chain of small kernels: reading a part's weights takes less time than starting it and handing its
result on. Where the card has programmatic launches (sm_90), a kernel starts while the ones before it still run, reads
what they do not write, weights and older keys and values, and only then waits for them. Only `embed` waits before it
lets others start, so that one step never overlaps the next: what one step reads early, the one before has written.

The norm needs no kernel of its own: norm(x) W = (x scale) W / rms(x). Whoever writes x also writes it scaled, rounded
to what the matrix units take, and the sums of the squares of its 16 numbers, in fp64, so that their order does not
matter; whoever multiplies adds these up.

bf16 weights meet the sequences in the matrix units, rounded to bf16, in SPLITS sums that are added up at the end; fp32
weights are multiplied without them and added up in a tree, which rounds less. (As `tl.dot` they would be a chain, and
the compiler would hang each tile's chain onto the one before: model_dim additions in a row.) Keys and values meet a
query likewise, a group of keys in each warp. Neither depends on how many sequences a tile holds, and `attend` has one
tile for any number of them: a sequence's logits do not depend on its neighbours. x and all sums are fp32.

What a step waits for is the way from one kernel to the next. On an H200, `small` at batch 1, clocks in the kernels show
about 2.2 us from one product's end to the next one's: 0.6 until it is let go, 0.4 until it has x, 0.3 in the matrix
units, 0.6 to the end of most programs and 0.3 more to that of the last; its weights have been there for 3 us and more.
Where all layers' weights lie in L2, a step is only 3 % shorter.

Knows torch and Triton; knows nothing of models beyond the layer that it computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import can_overlap

BLOCK_K = {torch.float32: 64, torch.bfloat16: 2048}  # columns of weights at a time
SPLIT = 64  # columns of a sum: four steps of the matrix units, each of which waits for the one before
ROWS = 16  # of a product, a program
HIDDEN_UNITS = {torch.float32: 8, torch.bfloat16: 16}  # of a program, each of two rows
PRODUCT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}  # what is multiplied
# More take longer to hand on what they have. A step of the preset `small` (H200, bf16, one sequence, position 200)
# takes 231 us with eight for every product, 167 with eight for W_down alone, 161 with four.
NUM_WARPS = 4
# Numbers of the keys that a warp of `attend` takes at a time: it reads twice as many before its turn. H200, `small` in
# bf16 (head_dim 64), a step in us at positions 0, 200, 300 and 400 for one sequence, and at 200 for 8 and for 64, by
# warps and keys read early: 4, 128 155 178 200 219, 213 683; 4, 256 157 163 194 200, 195 672; 8, 256 161 161 185 187,
# 198 707.
KEY_NUMBERS = {torch.float32: 512, torch.bfloat16: 2048}
LOWEST = tl.constexpr(-1e30)  # -inf less -inf is not a number


@triton.jit
def _start_next(OVERLAP: tl.constexpr):
    """Let the next kernel start, and read what this one does not write."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Until what the kernels before wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _weights(w_ptr, n, in_n, start, dim: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """Rows n, columns from start on: [ROWS, BLOCK_K]. Whole numbers below 128 are what they are in bf16 too."""
    columns = start + tl.arange(0, BLOCK_K)
    at = w_ptr + n[:, None].to(tl.int64) * dim + columns[None, :]
    return tl.load(at, mask=in_n[:, None] & (columns < dim)[None, :], other=0).to(DTYPE)


@triton.jit
def _vectors(x_ptr, batch, start, dim: tl.constexpr, BATCH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sequences of the program's tile, columns from start on: [BATCH, BLOCK_K]"""
    rows = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    columns = start + tl.arange(0, BLOCK_K)
    mask = (rows < batch)[:, None] & (columns < dim)[None, :]
    return tl.load(x_ptr + rows[:, None] * dim + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _multiply(w, x, SPLITS: tl.constexpr):
    """w [ROWS, BLOCK_K] times the transpose of x [BATCH, BLOCK_K]: [SPLITS, ROWS, BATCH] fp32, BATCH at least 8."""
    if w.dtype == tl.float32:
        return tl.sum(w[:, None, :] * x[None, :, :], axis=2)[None, :, :]
    if x.shape[0] < 8:  # the matrix units take no fewer; one sequence's numbers are cheaper read once
        x = tl.broadcast_to(x, [8, x.shape[1]])
    w = tl.permute(tl.reshape(w, [w.shape[0], SPLITS, w.shape[1] // SPLITS]), (1, 0, 2))
    x = tl.permute(tl.reshape(x, [x.shape[0], SPLITS, x.shape[1] // SPLITS]), (1, 2, 0))
    return tl.dot(w, x)


@triton.jit
def _product(
    w,  # [ROWS, BLOCK_K]: the first columns of the weights' rows
    x,  # [BATCH, BLOCK_K]: the first columns of the sequences
    w_ptr,
    n,  # the rows' numbers [ROWS]
    in_n,
    x_ptr,  # [batch, dim]
    batch,
    dim: tl.constexpr,
    BATCH: tl.constexpr,  # sequences of a tile: 1, or 8 and more
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The weights' rows times x, in sums that are still to be added up: [SPLITS, ROWS, BATCH], at least 8 columns."""
    acc = tl.zeros([SPLITS, n.shape[0], BATCH if BATCH >= 8 else 8], tl.float32)
    for start in range(0, dim, BLOCK_K):
        acc += _multiply(w, x, SPLITS)
        w = _weights(w_ptr, n, in_n, start + BLOCK_K, dim, BLOCK_K, DTYPE)
        x = _vectors(x_ptr, batch, start + BLOCK_K, dim, BATCH, BLOCK_K)
    return acc


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _row_scale(w_scale_ptr, n, in_n):
    """Of int8 rows, [ROWS, 1]; else 1."""
    if w_scale_ptr is None:
        return 1.0
    else:
        return tl.load(w_scale_ptr + n, mask=in_n, other=0.0)[:, None]


@triton.jit
def _factor(squares, eps, dim: tl.constexpr):
    """1 / rms; a division of fp64 would take longer than the product that waits for it."""
    return tl.rsqrt((squares * (1.0 / dim)).to(tl.float32) + eps)


@triton.jit
def _squares(squares_ptr, batch, dim: tl.constexpr, BATCH: tl.constexpr, SHARE: tl.constexpr):
    """Sums of squares of the program's sequences, of which there is one for each SHARE numbers: [32, BATCH], or of one
    sequence [32], to be added up. 32, so that a warp has all of a sequence."""
    part = tl.arange(0, 32)
    if BATCH == 1:
        squares = tl.zeros([32], tl.float64)
        for first in tl.static_range(0, (dim + SHARE - 1) // SHARE, 32):
            squares += tl.load(squares_ptr + first + part, mask=(first + part) * SHARE < dim, other=0.0)
    else:
        rows = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
        squares = tl.zeros([32, BATCH], tl.float64)
        for first in tl.static_range(0, (dim + SHARE - 1) // SHARE, 32):
            mask = ((first + part) * SHARE < dim)[:, None] & (rows < batch)[None, :]
            squares += tl.load(squares_ptr + (first + part)[:, None] * batch + rows[None, :], mask=mask, other=0.0)
    return squares


@triton.jit
def _sequences(BATCH: tl.constexpr):
    """The sequences of a product's columns; where BATCH is 1, the columns behind the first are its copies."""
    return tl.program_id(1) * BATCH + tl.arange(0, BATCH if BATCH >= 8 else 8)


@triton.jit
def _embed(
    token_ptr,
    embedding_ptr,
    x_ptr,
    norm_ptr,
    scaled_ptr,
    squares_ptr,
    batch,
    dim: tl.constexpr,
    TILES: tl.constexpr,
    SHARE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILES * SHARE)
    _wait(OVERLAP)  # before the next kernels start: they read keys that the step before has written
    _start_next(OVERLAP)
    scale = tl.load(norm_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    token = tl.maximum(tl.load(token_ptr + row), 0)
    x = tl.load(embedding_ptr + token * dim + columns, mask=columns < dim, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * dim + columns, x, mask=columns < dim)
    tl.store(scaled_ptr + row * dim + columns, (x * scale).to(scaled_ptr.dtype.element_ty), mask=columns < dim)
    squares = tl.sum(tl.reshape(x.to(tl.float64) * x.to(tl.float64), [TILES, SHARE]), axis=1)
    tile = tl.arange(0, TILES)
    tl.store(squares_ptr + tile * batch + row, squares, mask=tile * SHARE < dim)


@triton.jit
def _linear(
    x_ptr,  # [batch, dim], scaled
    squares_ptr,
    w_ptr,  # [size, dim]
    w_scale_ptr,
    out_ptr,  # [batch, size] fp32
    batch,
    size,
    eps,
    dim: tl.constexpr,
    SHARE: tl.constexpr,  # numbers of x for each sum of squares
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """W norm(x): queries, keys and values of a layer, or the logits."""
    _start_next(OVERLAP)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = _sequences(BATCH)
    w = _weights(w_ptr, n, n < size, 0, dim, BLOCK_K, DTYPE)
    w_scale = _row_scale(w_scale_ptr, n, n < size)
    _wait(OVERLAP)
    squares = _squares(squares_ptr, batch, dim, BATCH, SHARE)  # on their way while x is
    x = _vectors(x_ptr, batch, 0, dim, BATCH, BLOCK_K)
    acc = _product(w, x, w_ptr, n, n < size, x_ptr, batch, dim, BATCH, BLOCK_K, SPLITS, DTYPE)
    factor = _factor(tl.sum(squares, axis=0), eps, dim)  # while the matrix units are busy
    mask = (n < size)[:, None] & (rows < batch)[None, :]
    out = tl.sum(acc, axis=0) * factor * w_scale
    tl.store(out_ptr + rows[None, :].to(tl.int64) * size + n[:, None], out, mask=mask)


@triton.jit
def _rotated(low, high, low_scale, high_scale, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """A head's halves [GROUPS, BLOCK_D / 2], normalised, scaled, turned by their angles."""
    factor = _factor(tl.sum(low * low + high * high, axis=1), eps, HEAD_DIM)[:, None]
    low, high = low * factor * low_scale, high * factor * high_scale
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _side_by_side(low, high):
    """Halves [GROUPS, BLOCK_D / 2] as [GROUPS, BLOCK_D]: each thread keeps what it has."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [low.shape[0], 2 * low.shape[1]])


@triton.jit
def _keys_and_values(k_ptr, v_ptr, at, start, key, position, inside, TILE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Two tiles of keys and of values, from key number `start` on: each [GROUPS, KEYS, BLOCK_D]."""
    seen_0 = (start + key < position)[:, :, None] & inside[None, None, :]
    seen_1 = (start + TILE + key < position)[:, :, None] & inside[None, None, :]
    at_0 = at + start * HEAD_DIM
    at_1 = at_0 + TILE * HEAD_DIM
    k_0, k_1 = tl.load(k_ptr + at_0, mask=seen_0, other=0.0), tl.load(k_ptr + at_1, mask=seen_1, other=0.0)
    v_0, v_1 = tl.load(v_ptr + at_0, mask=seen_0, other=0.0), tl.load(v_ptr + at_1, mask=seen_1, other=0.0)
    return k_0, v_0, k_1, v_1


@triton.jit
def _with_tile(q, k, v, seen, group_max, group_sum, acc):
    """A softmax over scores in powers of two, which each group has by itself, with a tile of keys and values more.

    q [GROUPS, BLOCK_D]; k, v [GROUPS, KEYS, BLOCK_D]; seen [GROUPS, KEYS]; group_max, group_sum [GROUPS] and acc
    [GROUPS, BLOCK_D, QUERIES] fp32. The matrix units take 8 queries: 8 times the same; fp32 goes without them."""
    QUERIES: tl.constexpr = acc.shape[2]
    if QUERIES == 1:
        s = tl.sum(k * q[:, None, :], axis=2)
    else:
        q = tl.broadcast_to(q[:, :, None], [q.shape[0], q.shape[1], QUERIES])
        s = tl.sum(tl.dot(k, q), axis=2)  # of numbers that are alike: exact
    s = tl.where(seen, s, float("-inf"))
    new_max = tl.maximum(group_max, tl.max(s, axis=1))
    alpha, p = tl.exp2(group_max - new_max), tl.exp2(s - new_max[:, None])
    group_sum = group_sum * alpha + tl.sum(p, axis=1)
    if QUERIES == 1:
        new = tl.sum(p[:, :, None] * v, axis=1)[:, :, None]
    else:
        p = tl.broadcast_to(p.to(v.dtype)[:, :, None], [p.shape[0], p.shape[1], QUERIES])
        new = tl.dot(tl.permute(v, (0, 2, 1)), p)
    return new_max, group_sum, acc * alpha[:, None, None] + new


@triton.jit
def _join(max_0, sum_0, max_1, sum_1):
    """Two softmaxes as one."""
    new_max = tl.maximum(max_0, max_1)
    return new_max, sum_0 * tl.exp2(max_0 - new_max) + sum_1 * tl.exp2(max_1 - new_max)


@triton.jit
def _attend(
    qkv_ptr,  # [batch, (num_heads + 2 num_kv_heads) * HEAD_DIM] fp32
    k_cache_ptr,  # [batch, num_kv_heads, capacity, HEAD_DIM]
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    out_ptr,  # [batch, num_heads * HEAD_DIM] in the weights' dtype
    capacity,
    eps,
    scale,  # log2(e) / sqrt(HEAD_DIM)
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,  # half of HEAD_DIM, rounded up to a power of two
    GROUPS: tl.constexpr,  # of keys: one a warp
    KEYS: tl.constexpr,  # of a group, at a time
    OVERLAP: tl.constexpr,
):
    """Write the sequence's new key and value; attend with one head over them and what was cached before.

    The new ones lie in halves, which the rotation turns into one another: a warp has a whole head in its threads."""
    _start_next(OVERLAP)
    sequence, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    TILE: tl.constexpr = GROUPS * KEYS
    dtype = k_cache_ptr.dtype.element_ty
    position = tl.load(position_ptr + sequence)
    kv_head = head // (num_heads // num_kv_heads)
    line = (tl.cast(sequence, tl.int64) * num_kv_heads + kv_head) * capacity
    group = tl.arange(0, GROUPS)
    half = (group * 0)[:, None] + tl.arange(0, BLOCK_H)[None, :]  # once for each group
    in_half = half < HALF
    d = tl.arange(0, 2 * BLOCK_H)
    inside = d % BLOCK_H < HALF
    d = d // BLOCK_H * HALF + d % BLOCK_H
    key = group[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    at = (line + key)[:, :, None] * HEAD_DIM + d[None, None, :]
    k_0, v_0, k_1, v_1 = _keys_and_values(k_cache_ptr, v_cache_ptr, at, 0, key, position, inside, TILE, HEAD_DIM)
    cos = tl.load(cos_ptr + position * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=in_half, other=0.0)
    q_low_scale = tl.load(q_norm_ptr + half, mask=in_half, other=0.0).to(tl.float32) * scale
    q_high_scale = tl.load(q_norm_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32) * scale
    k_low_scale = tl.load(k_norm_ptr + half, mask=in_half, other=0.0).to(tl.float32)
    k_high_scale = tl.load(k_norm_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)
    _wait(OVERLAP)

    q_at = qkv_ptr + (sequence * (num_heads + 2 * num_kv_heads) + head) * HEAD_DIM + half
    k_at = q_at + (num_heads + kv_head - head) * HEAD_DIM
    v_at = qkv_ptr + (sequence * (num_heads + 2 * num_kv_heads) + num_heads + num_kv_heads + kv_head) * HEAD_DIM + d
    q_low, q_high = tl.load(q_at, mask=in_half, other=0.0), tl.load(q_at + HALF, mask=in_half, other=0.0)
    k_low, k_high = tl.load(k_at, mask=in_half, other=0.0), tl.load(k_at + HALF, mask=in_half, other=0.0)
    value = tl.load(v_at, mask=inside, other=0.0).to(dtype)
    q_low, q_high = _rotated(q_low, q_high, q_low_scale, q_high_scale, cos, sin, eps, HEAD_DIM)
    k_low, k_high = _rotated(k_low, k_high, k_low_scale, k_high_scale, cos, sin, eps, HEAD_DIM)
    q_low, q_high = q_low.to(dtype).to(tl.float32), q_high.to(dtype).to(tl.float32)  # as the other keys meet it
    k_low, k_high = k_low.to(dtype), k_high.to(dtype)
    if head % (num_heads // num_kv_heads) == 0:
        new_ptr = k_cache_ptr + (line + position) * HEAD_DIM + half
        tl.store(new_ptr, k_low, mask=in_half & (group == 0)[:, None])
        tl.store(new_ptr + HALF, k_high, mask=in_half & (group == 0)[:, None])
        tl.store(v_cache_ptr + (line + position) * HEAD_DIM + d, value, mask=inside)
    QUERIES: tl.constexpr = 1 if dtype == tl.float32 else 8
    q = _side_by_side(q_low * (1.0 / QUERIES), q_high * (1.0 / QUERIES)).to(dtype)

    # Each group has a softmax of its own, so that no warp waits for another before the last tile.
    group_max = tl.full([GROUPS], LOWEST, tl.float32)
    group_sum = tl.zeros([GROUPS], tl.float32)
    acc = tl.zeros([GROUPS, 2 * BLOCK_H, QUERIES], tl.float32)
    group_max, group_sum, acc = _with_tile(q, k_0, v_0, key < position, group_max, group_sum, acc)
    if position > TILE:
        group_max, group_sum, acc = _with_tile(q, k_1, v_1, TILE + key < position, group_max, group_sum, acc)
    for start in range(2 * TILE, position, 2 * TILE):
        k_0, v_0, k_1, v_1 = _keys_and_values(
            k_cache_ptr, v_cache_ptr, at, start, key, position, inside, TILE, HEAD_DIM
        )
        group_max, group_sum, acc = _with_tile(q, k_0, v_0, start + key < position, group_max, group_sum, acc)
        if start + TILE < position:
            seen = start + TILE + key < position
            group_max, group_sum, acc = _with_tile(q, k_1, v_1, seen, group_max, group_sum, acc)

    # The first group takes the new key and value.
    new_score = tl.sum(k_low.to(tl.float32) * q_low + k_high.to(tl.float32) * q_high, axis=1)
    new_max = tl.maximum(group_max, new_score)
    alpha, new_p = tl.exp2(group_max - new_max), tl.where(group == 0, tl.exp2(new_score - new_max), 0.0)
    total_max, total = tl.reduce((new_max, group_sum * alpha + new_p), 0, _join)
    weight = tl.exp2(new_max - total_max) / total
    out = tl.sum(acc, axis=2) * (alpha * weight / QUERIES)[:, None]
    out = tl.sum(out + value.to(tl.float32)[None, :] * (new_p * weight)[:, None], axis=0)
    tl.store(out_ptr + (sequence * num_heads + head) * HEAD_DIM + d, out.to(dtype), mask=inside)


@triton.jit
def _gate_up(
    x_ptr,  # [batch, dim], scaled
    squares_ptr,
    w_ptr,  # [2 mlp_dim, dim]
    w_scale_ptr,
    hidden_ptr,  # [batch, mlp_dim] in the weights' dtype
    batch,
    mlp_dim,
    eps,
    dim: tl.constexpr,
    SHARE: tl.constexpr,  # numbers of x for each sum of squares
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _start_next(OVERLAP)
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = unit < mlp_dim
    rows = _sequences(BATCH)
    gate_w = _weights(w_ptr, unit, inside, 0, dim, BLOCK_K, DTYPE)
    up_w = _weights(w_ptr, mlp_dim + unit, inside, 0, dim, BLOCK_K, DTYPE)
    gate_scale = _row_scale(w_scale_ptr, unit, inside)
    up_scale = _row_scale(w_scale_ptr, mlp_dim + unit, inside)
    _wait(OVERLAP)
    squares = _squares(squares_ptr, batch, dim, BATCH, SHARE)  # on their way while x is
    x = _vectors(x_ptr, batch, 0, dim, BATCH, BLOCK_K)
    gate = tl.zeros([SPLITS, ROWS, BATCH if BATCH >= 8 else 8], tl.float32)
    up = tl.zeros([SPLITS, ROWS, BATCH if BATCH >= 8 else 8], tl.float32)
    for start in range(0, dim, BLOCK_K):
        gate += _multiply(gate_w, x, SPLITS)
        up += _multiply(up_w, x, SPLITS)
        gate_w = _weights(w_ptr, unit, inside, start + BLOCK_K, dim, BLOCK_K, DTYPE)
        up_w = _weights(w_ptr, mlp_dim + unit, inside, start + BLOCK_K, dim, BLOCK_K, DTYPE)
        x = _vectors(x_ptr, batch, start + BLOCK_K, dim, BATCH, BLOCK_K)
    factor = _factor(tl.sum(squares, axis=0), eps, dim)  # while the matrix units are busy
    gate, up = tl.reduce((gate, up), 0, _add_both)  # together they wait once for the other warps
    gate, up = gate * factor * gate_scale, up * factor * up_scale
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    at = hidden_ptr + rows[None, :] * mlp_dim + unit[:, None]
    tl.store(at, hidden.to(hidden_ptr.dtype.element_ty), mask=inside[:, None] & (rows < batch)[None, :])


@triton.jit
def _add(
    v_ptr,  # [batch, dim] in the weights' dtype
    w_ptr,  # [size, dim]
    w_scale_ptr,
    x_ptr,  # [batch, size] fp32
    norm_ptr,  # of the norm that comes next
    scaled_ptr,  # [batch, size] in the weights' dtype: x times that norm's scale
    squares_ptr,  # [programs, batch] fp64: of the program's numbers of x, the sums of squares
    batch,
    size,
    dim: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x + W v: what the heads or the hidden units come to."""
    _start_next(OVERLAP)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = _sequences(BATCH)
    at, mask = rows[None, :] * size + n[:, None], (n < size)[:, None] & (rows < batch)[None, :]
    w = _weights(w_ptr, n, n < size, 0, dim, BLOCK_K, DTYPE)
    w_scale = _row_scale(w_scale_ptr, n, n < size)
    scale = tl.load(norm_ptr + n, mask=n < size, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    v = _vectors(v_ptr, batch, 0, dim, BATCH, BLOCK_K)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    acc = _product(w, v, w_ptr, n, n < size, v_ptr, batch, dim, BATCH, BLOCK_K, SPLITS, DTYPE)
    x += tl.sum(acc, axis=0) * w_scale
    tl.store(x_ptr + at, x, mask=mask)
    tl.store(scaled_ptr + at, (x * scale[:, None]).to(scaled_ptr.dtype.element_ty), mask=mask)
    x = tl.where(mask, x, 0.0).to(tl.float64)
    tl.store(squares_ptr + tl.program_id(0) * batch + rows, tl.sum(x * x, axis=0), mask=rows < batch)


def decode_step(
    token_ids: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    embedding: Tensor,
    input_norm: Tensor,
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    o: Tensor,
    post_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    final_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    qkv_scale: Tensor | None,
    o_scale: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """See `kernels.decode_step`."""
    num_layers, batch, num_kv_heads, capacity, head_dim = k_cache.shape
    (vocab_size, dim), dtype = embedding.shape, embedding.dtype
    mlp_dim, num_heads = down.shape[2], o.shape[2] // head_dim
    x = embedding.new_empty((batch, dim), dtype=torch.float32)
    scaled = embedding.new_empty((batch, dim))
    squares = embedding.new_empty((triton.cdiv(dim, ROWS), batch), dtype=torch.float64)
    projected = embedding.new_empty((batch, qkv.shape[1]), dtype=torch.float32)
    attended = embedding.new_empty((batch, o.shape[2]))
    hidden = embedding.new_empty((batch, mlp_dim))
    logits = embedding.new_empty((batch, vocab_size), dtype=torch.float32)

    overlap = can_overlap(embedding.device)
    early = {"OVERLAP": overlap, "num_warps": NUM_WARPS, "num_stages": 1, **({"launch_pdl": True} if overlap else {})}
    tiles, block_h = triton.next_power_of_2(len(squares)), max(8, triton.next_power_of_2(head_dim // 2))
    keys = max(1 if dtype == torch.float32 else 16, KEY_NUMBERS[dtype] // (2 * block_h))  # the matrix units take 16

    def product(rows: int, columns: int, tile_rows: int = ROWS) -> tuple[tuple[int, int], dict]:
        """The grid and the tile of a product with weights of this size."""
        tile = _tile(batch, dtype)
        block_k = min(BLOCK_K[dtype], triton.next_power_of_2(max(columns, 64)))
        sizes = {
            "BATCH": tile,
            "ROWS": tile_rows,
            "BLOCK_K": block_k,
            "SPLITS": block_k // SPLIT,
            "DTYPE": PRODUCT[dtype],
        }
        return (triton.cdiv(rows, tile_rows), triton.cdiv(batch, tile)), {**sizes, **early}

    def linear(w: Tensor, scale: Tensor | None, out: Tensor) -> None:
        grid, options = product(len(w), dim)
        _linear[grid](scaled, squares, w, scale, out, batch, len(w), norm_eps, dim, ROWS, **options)

    def add(v: Tensor, w: Tensor, scale: Tensor | None, next_norm: Tensor) -> None:
        grid, options = product(dim, v.shape[1])
        _add[grid](v, w, scale, x, next_norm, scaled, squares, batch, dim, v.shape[1], **options)

    _embed[(batch,)](token_ids, embedding, x, input_norm[0], scaled, squares, batch, dim, tiles, ROWS, **early)
    for layer in range(num_layers):
        scales = (scale if scale is None else scale[layer] for scale in (qkv_scale, o_scale, gate_up_scale, down_scale))
        of_qkv, of_o, of_gate_up, of_down = scales
        linear(qkv[layer], of_qkv, projected)
        _attend[(batch, num_heads)](
            projected, k_cache[layer], v_cache[layer], q_norm[layer], k_norm[layer], cos, sin, positions, attended,
            capacity, norm_eps, 1.4426950408889634 / head_dim**0.5, num_heads, num_kv_heads, HEAD_DIM=head_dim,
            BLOCK_H=block_h, GROUPS=NUM_WARPS, KEYS=keys, **early,
        )  # fmt: skip
        add(attended, o[layer], of_o, post_norm[layer])
        grid, options = product(mlp_dim, dim, HIDDEN_UNITS[dtype])
        _gate_up[grid](
            scaled, squares, gate_up[layer], of_gate_up, hidden, batch, mlp_dim, norm_eps, dim, ROWS, **options
        )
        add(hidden, down[layer], of_down, input_norm[layer + 1] if layer + 1 < num_layers else final_norm)
    linear(embedding, None, logits)
    return logits


def _tile(batch: int, dtype: torch.dtype) -> int:
    """Sequences of a tile: 1, or what the matrix units take; in fp32 always as many, so that sums keep their order."""
    if dtype == torch.float32:
        return 8
    return 1 if batch == 1 else 8 if batch <= 8 else 16
