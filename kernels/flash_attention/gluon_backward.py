"""FlashAttention backward on Hopper, in Triton's Gluon dialect: TMA, wgmma, warps that specialise, and no race.

With P_ij = exp(softmax_scale q_i k_j - lse_i) recomputed from lse, and delta_i = sum_d O_id dO_id - dlse_i,

    dV = P^T dO      dP = dO V^T      dS = P (dP - delta)      dQ = softmax_scale dS K      dK = softmax_scale dS^T Q

A tile is 128 keys of one head; a program walks over the queries that see them (FlashAttention-2, arXiv:2307.08691,
algorithm 2), then does the same for the next of its tiles. Everything is transposed, keys first, so that P^T and dS^T
go from the registers they are computed in straight into the products for dV and dK:

    warp group      registers   role
    consumer 0            240   keys  0 ..  63: dK and dV of them in registers, dS^T to shared memory, half of a dQ tile
    consumer 1            240   keys 64 .. 127, the other half
    producer (a warp)      24   TMA: Q, dO, lse and delta block by block, STAGES ahead; K and V once a tile
    reducers (a warp each) 24   TMA: add what was found for dQ into an fp32 tensor in device memory; store dV and dK

dQ of one block of queries is a sum over all the tiles of keys it sees. A floating-point sum depends on its order, so
they are added in a fixed one: a counter for each block of queries says whose turn it is, and a reducer waits for it;
meanwhile the consumers go on, and a second reducer with the next block. The order is that in which the programs come
to a block if all are equally fast:

    causal   the last keys first, each beginning at the queries of its own diagonal and going up, or the first keys
             first, each beginning at the last queries and going down: by turns, for as many heads as fill the GPU.
             So a short tile is followed by a long one and a long one by a short one, and all programs end together.
    full     the tiles of a long sequence spread over its queries and go round: each begins where its share of them
             does, and the one that begins at a block, or last before it, is the first to add there. Those of a short
             one all begin at the first queries, the last keys first, as do those that do not fit on the GPU together.

There are as many programs as processors, all at work at once (those whose processor another kernel holds, after its
end), and tiles are dealt to them in order: each waits only for tiles of lower numbers. Those that go round wait for
each other within a head, which fits on the GPU; they have a program each, and programs start in the order of their
numbers. So all end.

What a consumer computes in one pass over a block i of queries, and which products run meanwhile:

    head_dim 64                          head_dim 128
                                         hand dQ_{i-1} over     S_i
    P = exp(S_i - lse)     S_i, dP       P = exp(S_i - lse)     dP
    dS = P (dP - delta)    dP, dV        dS = P (dP - delta)    dP, dV
    hand dQ_i over         dQ_i, dK                             dK, then dQ_i at the beginning of the next pass

For dQ_i each needs the dS of the other: at head_dim 64 it waits for it, so that both are at the same block; at 128 it
leaves dQ_i to the next pass, by when the other has stored its dS. TFLOP/s one way and the other, of full attention at
4096 and 16384 tokens: 473, 493 and 475, 481 at head_dim 64 (causal 424, 481 and 385, 454); 543, 548 and 557, 558 at
head_dim 128. Starting S_{i+1} beside dQ_i and dK as well, both in dS_i's pass, gains where sequences are short and
causal, and loses elsewhere: 280 and 272 at head_dim 64, causal, 1024 tokens; 502 and 525 full, 8192 tokens; 443 and 521
at head_dim 128, causal, 4096 tokens.

    paper          here                          shape
    K_j, V_j       k, v                          [64, HEAD_DIM]         shared memory, a half for each consumer
    Q_i, dO_i      q, dout                       [BLOCK_M, HEAD_DIM]    shared memory
    S^T, P^T, dS^T s, p, ds                      [64, BLOCK_M]          registers
    dQ_i           dq                            [64, 64]               registers, half of [BLOCK_M, HEAD_DIM]
    dK_j, dV_j     dk, dv                        [64, HEAD_DIM]         registers
    L, D           lse (in log2 units), delta    [BLOCK_M]              shared memory

Knows no window, softcap or packed documents: `supports` sends those to the portable kernel.
"""

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.flash_attention.hopper import (
    LOG2_E,
    ROWS,
    describe,
    descriptor,
    new_barriers,
    new_tile_ring,
    refusal,
)
from kernels.launch import launched

BLOCK_N = gl.constexpr(128)  # keys of one program: 64 for each of two consumers
ROW_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
SQUARE_LAYOUT = gl.NVMMASharedLayout.get_default_for([ROWS.value, 64], gl.float32)
SMALL_REGISTERS = gl.constexpr(24)  # of the producer and the reducer


@builtin
def async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """Start TMA's reduction: the tile at `coord` in device memory += src. Gluon has the op, but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@gluon.jit
def wait_until_added(one):
    """Wait until this warp's reductions are done, where tma.store_wait waits only until they have read their source."""
    return gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0;\nmov.b32 $0, $1;", "=r,r", [one], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tile_coordinates(tile, walk, CAUSAL: gl.constexpr):
    """Which keys a tile is made of, and whether it goes from the last queries down: (n_block, kv_head, batch, down).

    A pair is one head of one sequence. `heads_per_group` pairs are worked at side by side, the last keys of each first:
    the more there are, the fewer programs wait for one another's dQ, and the more of Q, dO and dQ is in use at once.
    With a causal mask every other group goes down, the first keys first.
    """
    num_n_blocks, _num_m_blocks, num_pairs, num_kv_heads, _heads, heads_per_group, _seqlen_q, _seqlen_k, _r = walk
    group_tiles = heads_per_group * num_n_blocks
    group = tile // group_tiles
    first_pair = group * heads_per_group
    pairs_here = gl.minimum(heads_per_group, num_pairs - first_pair)
    place = tile % group_tiles
    n_block = place // pairs_here
    down = False
    if CAUSAL:
        down = group % 2 == 1
    n_block = gl.where(down, n_block, num_n_blocks - 1 - n_block)
    pair = first_pair + place % pairs_here
    return n_block, pair % num_kv_heads, pair // num_kv_heads, down


@gluon.jit
def first_m_blocks(n_block, num_m_blocks, seqlen_q, seqlen_k, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr):
    """The first block of queries with one that sees some of these keys, and the first whose queries see all of them.

    There always is one with some: the last query sees every key.
    """
    some = 0
    full = 0
    if CAUSAL:
        offset = seqlen_k - seqlen_q
        some = gl.maximum(n_block * BLOCK_N - offset, 0) // BLOCK_M
        full = gl.minimum(gl.cdiv(gl.maximum((n_block + 1) * BLOCK_N - 1 - offset, 0), BLOCK_M), num_m_blocks)
    # Keys past the end are zeros; unmasked, exp(0 - lse) may overflow.
    full = gl.where((n_block + 1) * BLOCK_N > seqlen_k, num_m_blocks, full)
    return some, full


@gluon.jit
def m_block_of(step, m_some, n_block, down, walk):
    """The block of queries that is met in a step; steps count from `m_some`, the first block that sees the keys."""
    num_n_blocks, num_m_blocks, _pairs, _num_kv_heads, _heads, _group, _seqlen_q, _seqlen_k, ROUND = walk
    m_block = gl.where(down, m_some + num_m_blocks - 1 - step, step)
    if ROUND:
        m_block += n_block * num_m_blocks // num_n_blocks
        m_block = gl.where(m_block < num_m_blocks, m_block, m_block - num_m_blocks)
    return m_block


@gluon.jit
def mask_probabilities(p, n_start, m_start, seqlen_q, seqlen_k, CAUSAL: gl.constexpr, S_LAYOUT: gl.constexpr):
    """0 where the query does not see the key; causal is bottom-right aligned. Queries past the end have lse = inf."""
    offs_n = n_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    first = gl.where(offs_n < seqlen_k, 0, p.shape[1])  # column from which on the queries see a key
    if CAUSAL:
        first = gl.maximum(first, offs_n - (seqlen_k - seqlen_q) - m_start)
    columns = gl.arange(0, p.shape[1], layout=gl.SliceLayout(0, S_LAYOUT))
    return gl.where(columns[None, :] >= first[:, None], p, 0.0)


@gluon.jit
def multiply_dq(ds_tiles, k_halves, i, consumer_id: gl.constexpr, DQ_LAYOUT: gl.constexpr):
    """This consumer's half of dQ_i = dS_i K, [64, 64]: half the columns (head_dim 128) or half the rows (64)."""
    dq = warpgroup_mma_init(gl.zeros([ROWS, 64], gl.float32, DQ_LAYOUT))
    for half in gl.static_range(2):
        ds = ds_tiles.index((i & 1) * 2 + half)  # [64 keys, BLOCK_M]
        k = k_halves.index(half)  # [64 keys, HEAD_DIM]
        if k_halves.shape[2] == 128:
            k = k.slice(consumer_id * 64, 64, dim=1)
        else:
            ds = ds.slice(consumer_id * 64, 64, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def place_of_row(row):
    """Where a row lies in the sum of dQ: 0 .. 7 at 0 2 4 6 1 3 5 7, and so on. So the four rows that half a warp stores
    at a time, 32 bytes of each, lie in different banks of a swizzled tile; in their own order they meet in pairs."""
    return (row & -8) | (row << 1 & 6) | (row >> 2 & 1)


@gluon.jit
def hand_over_dq(dq_ring, dq, i, consumer_id: gl.constexpr):
    """Give this consumer's half of dQ_i to a reducer, its rows as `place_of_row` says."""
    dq = dq.reshape([8, 2, 2, 2, 64]).permute((0, 2, 3, 1, 4)).reshape([ROWS, 64])
    dq_ring.acquire(2 * i + consumer_id).store(dq)
    dq_ring.publish(2 * i + consumer_id)


@gluon.jit
def differentiate_block(
    dk,
    dv,
    rings,
    tiles,
    i,
    n_start,
    m_start,
    scale_log2,
    seqlen_q,
    seqlen_k,
    masked,
    first,
    turn,
    consumer_id: gl.constexpr,
    CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    DQ_LAYOUT: gl.constexpr,
):
    """One pass of the main loop; `first` says whether it is the tile's first."""
    q_ring, dout_tiles, row_tiles, dq_ring = rings
    k_halves, v_halves, ds_tiles, ds_full = tiles
    BLOCK_M: gl.constexpr = q_ring.data.shape[1]
    HEAD_DIM: gl.constexpr = q_ring.data.shape[2]
    DQ_LATER: gl.constexpr = HEAD_DIM == 128
    DTYPE: gl.constexpr = k_halves.dtype
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, k_width=2)
    COLUMN_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    STAGES: gl.constexpr = q_ring.data.shape[0]
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, S_LAYOUT)

    if DQ_LATER:  # in the first pass a product of nothing, thrown away
        mbarrier.wait(ds_full, (i - 1) & 1, pred=i > 0)
        dq = multiply_dq(ds_tiles, k_halves, i - 1, consumer_id, DQ_LAYOUT)
    q = q_ring.wait(i)
    s = warpgroup_mma(k_halves.index(consumer_id), q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if DQ_LATER:
        dq = warpgroup_mma_wait(1, deps=[dq])
        if not first:
            hand_over_dq(dq_ring, dq, i - 1 + 2 * turn, consumer_id)

    dout = dout_tiles.index(i % STAGES)
    dp = warpgroup_mma(v_halves.index(consumer_id), dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    rows = row_tiles.index(i % STAGES)
    lse = rows.slice(0, BLOCK_M).load(COLUMN_LAYOUT)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if masked:
        p = mask_probabilities(p, n_start, m_start, seqlen_q, seqlen_k, CAUSAL, S_LAYOUT)
    p_operand = gl.convert_layout(p.to(DTYPE), A_LAYOUT)
    dv = warpgroup_mma(p_operand, dout, dv, is_async=True)

    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = rows.slice(BLOCK_M, BLOCK_M).load(COLUMN_LAYOUT)
    ds = (p * (dp - delta[None, :])).to(DTYPE)
    ds_tiles.index((i & 1) * 2 + consumer_id).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full, count=1)
    ds_operand = gl.convert_layout(ds, A_LAYOUT)
    if not DQ_LATER:
        mbarrier.wait(ds_full, i & 1)
        dq = multiply_dq(ds_tiles, k_halves, i, consumer_id, DQ_LAYOUT)
    dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
    dv, p_operand = warpgroup_mma_wait(1 if DQ_LATER else 2, deps=[dv, p_operand])
    if not DQ_LATER:
        dq = warpgroup_mma_wait(1, deps=[dq])
        hand_over_dq(dq_ring, dq, i + 2 * turn, consumer_id)
    dk, ds_operand = warpgroup_mma_wait(0, deps=[dk, ds_operand])
    q_ring.release(i)
    return dk, dv


@gluon.jit
def hand_over(dq_ring, x, i, halves, consumer_id: gl.constexpr):
    """Give this consumer's half of dV or dK to a reducer, in a buffer of dQ's."""
    buffer = dq_ring.acquire(2 * i + consumer_id)
    buffer._reinterpret(x.dtype, x.shape, halves.layout).store(x)
    dq_ring.publish(2 * i + consumer_id)


@gluon.jit
def consume(softmax_scale, rings, tiles, kv_barriers, walk, consumer_id: gl.constexpr, CAUSAL: gl.constexpr):
    """A consumer warpgroup: dK and dV of 64 keys, and half of every dQ tile, of each of this program's tiles."""
    q_ring, _dout_tiles, _row_tiles, dq_ring = rings
    k_halves, _v_halves, ds_tiles, ds_full = tiles
    kv_full, kv_empty = kv_barriers
    num_n_blocks, num_m_blocks, num_pairs, _num_kv_heads, heads_per_kv_head, _group, seqlen_q, seqlen_k, _r = walk
    DTYPE: gl.constexpr = k_halves.dtype
    BLOCK_M: gl.constexpr = q_ring.data.shape[1]
    HEAD_DIM: gl.constexpr = q_ring.data.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    DKV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])

    scale_log2 = softmax_scale * LOG2_E
    i = 0  # blocks of queries met so far, over all heads of the group and all tiles
    for tile in range(gl.program_id(0), num_n_blocks * num_pairs, gl.num_programs(0)):
        turn = tile // gl.num_programs(0)  # tiles met so far: each has given two more buffers away, dV and dK
        n_block, _kv_head, _batch, down = tile_coordinates(tile, walk, CAUSAL)
        m_some, m_full = first_m_blocks(n_block, num_m_blocks, seqlen_q, seqlen_k, BLOCK_M, CAUSAL)
        n_start = n_block * BLOCK_N + consumer_id * ROWS
        dk = gl.zeros([ROWS, HEAD_DIM], gl.float32, DKV_LAYOUT)
        dv = gl.zeros([ROWS, HEAD_DIM], gl.float32, DKV_LAYOUT)
        mbarrier.wait(kv_full, turn & 1)
        first = True
        for _ in range(heads_per_kv_head):
            for step in range(m_some, num_m_blocks):
                m_block = m_block_of(step, m_some, n_block, down, walk)
                dk, dv = differentiate_block(
                    dk, dv, rings, tiles, i, n_start, m_block * BLOCK_M, scale_log2, seqlen_q, seqlen_k,
                    m_block < m_full, first, turn, consumer_id, CAUSAL, S_LAYOUT, DQ_LAYOUT,
                )  # fmt: skip
                i += 1
                first = False
        if HEAD_DIM == 128:
            mbarrier.wait(ds_full, (i - 1) & 1)
            dq = multiply_dq(ds_tiles, k_halves, i - 1, consumer_id, DQ_LAYOUT)
            dq = warpgroup_mma_wait(0, deps=[dq])
            hand_over_dq(dq_ring, dq, i - 1 + 2 * turn, consumer_id)
        mbarrier.arrive(kv_empty, count=1)
        hand_over(dq_ring, dv.to(DTYPE), i + 2 * turn, k_halves, consumer_id)
        hand_over(dq_ring, (dk * softmax_scale).to(DTYPE), i + 2 * turn + 1, k_halves, consumer_id)


@gluon.jit
def produce(loads, rings, tiles, kv_barriers, walk, CAUSAL: gl.constexpr):
    """The producer warp: of each tile K and V, when those before are used up, then the consumers' walk over queries.

    To load the first queries before K and V, while the tile before is still at its last, gains nothing: 272, 434 and
    334 TFLOP/s for 272, 428 and 339 at 1024 tokens, head_dim 64 causal and full, 128 causal.
    """
    q_desc, k_desc, v_desc, dout_desc, row_desc = loads
    q_ring, dout_tiles, row_tiles, _dq_ring = rings
    k_halves, v_halves, _ds_tiles, _ds_full = tiles
    kv_full, kv_empty = kv_barriers
    num_n_blocks, num_m_blocks, num_pairs, num_kv_heads, heads_per_kv_head, _group, seqlen_q, seqlen_k, _r = walk
    STAGES: gl.constexpr = q_ring.data.shape[0]
    BLOCK_M: gl.constexpr = q_ring.data.shape[1]
    i = 0
    for tile in range(gl.program_id(0), num_n_blocks * num_pairs, gl.num_programs(0)):
        turn = tile // gl.num_programs(0)
        n_block, kv_head, batch, down = tile_coordinates(tile, walk, CAUSAL)
        m_some, _m_full = first_m_blocks(n_block, num_m_blocks, seqlen_q, seqlen_k, BLOCK_M, CAUSAL)
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        mbarrier.expect(kv_full, 4 * k_desc.block_type.nbytes)
        for half in gl.static_range(2):
            coord = [batch, kv_head, n_block * BLOCK_N + half * ROWS, 0]
            tma.async_copy_global_to_shared(k_desc, coord, kv_full, k_halves.index(half))
            tma.async_copy_global_to_shared(v_desc, coord, kv_full, v_halves.index(half))
        for group_head in range(heads_per_kv_head):
            head = kv_head * heads_per_kv_head + group_head
            first_row_block = (batch * num_kv_heads * heads_per_kv_head + head) * num_m_blocks
            for step in range(m_some, num_m_blocks):
                m_block = m_block_of(step, m_some, n_block, down, walk)
                q = q_ring.acquire(i)
                full = q_ring.full.index(i % STAGES)
                mbarrier.expect(full, 2 * q_desc.block_type.nbytes + row_desc.block_type.nbytes)
                coord = [batch, head, m_block * BLOCK_M, 0]
                tma.async_copy_global_to_shared(q_desc, coord, full, q)
                row = (first_row_block + m_block) * 2 * BLOCK_M
                tma.async_copy_global_to_shared(row_desc, [row], full, row_tiles.index(i % STAGES))
                tma.async_copy_global_to_shared(dout_desc, coord, full, dout_tiles.index(i % STAGES))
                i += 1


@gluon.jit
def hand_on(results, turn_ptr, rings, walk, which: gl.constexpr, CAUSAL: gl.constexpr):
    """A reducer warp, one of two that take by turns what the consumers hand over: adds dQ tiles to those of the
    programs before it, when these have, and stores dV and dK."""
    dq_desc, dk_desc, dv_desc = results
    q_ring, _dout_tiles, _row_tiles, dq_ring = rings
    num_n_blocks, num_m_blocks, num_pairs, num_kv_heads, heads_per_kv_head, _group, seqlen_q, seqlen_k, ROUND = walk
    BLOCK_M: gl.constexpr = q_ring.data.shape[1]
    HEAD_DIM: gl.constexpr = q_ring.data.shape[2]
    i = 0
    for tile in range(gl.program_id(0), num_n_blocks * num_pairs, gl.num_programs(0)):
        n_block, kv_head, batch, down = tile_coordinates(tile, walk, CAUSAL)
        m_some, _m_full = first_m_blocks(n_block, num_m_blocks, seqlen_q, seqlen_k, BLOCK_M, CAUSAL)
        for group_head in range(heads_per_kv_head):
            pair = (batch * num_kv_heads + kv_head) * heads_per_kv_head + group_head
            for step in range(m_some, num_m_blocks):
                if i % 2 == which:
                    m_block = m_block_of(step, m_some, n_block, down, walk)
                    first = num_n_blocks - 1  # the keys whose program adds first
                    if CAUSAL:
                        last_key = (m_block + 1) * BLOCK_M - 1 + seqlen_k - seqlen_q
                        first = gl.minimum(first, last_key // BLOCK_N)
                    if ROUND:
                        first = ((m_block + 1) * num_n_blocks - 1) // num_m_blocks
                    place = gl.where(first >= n_block, first - n_block, first - n_block + num_n_blocks)
                    place = gl.where(down, n_block, place)
                    turn = turn_ptr + pair * num_m_blocks + m_block
                    while gl.atomic_add(turn, 0, sem="acquire", scope="gpu") < place:
                        pass
                    for half in gl.static_range(2):
                        dq = dq_ring.wait(2 * i + half)
                        row = m_block * BLOCK_M + (0 if HEAD_DIM == 128 else half * 64)
                        column = half * 64 if HEAD_DIM == 128 else 0
                        if place == 0:
                            tma.async_copy_shared_to_global(dq_desc, [pair, row, column], dq)
                        else:
                            async_add_shared_to_global(dq_desc, [pair, row, column], dq)
                    tma.store_wait(0)
                    for half in gl.static_range(2):
                        dq_ring.release(2 * i + half)
                    gl.atomic_add(turn, wait_until_added(1), sem="release", scope="gpu")
                i += 1
        for result in gl.static_range(2):
            if i % 2 == which:
                desc = dk_desc if result == 1 else dv_desc
                for half in gl.static_range(2):
                    tile_half = dq_ring.wait(2 * i + half)._reinterpret(desc.dtype, [ROWS, HEAD_DIM], desc.layout)
                    coord = [batch, kv_head, n_block * BLOCK_N + half * ROWS, 0]
                    tma.async_copy_shared_to_global(desc, coord, tile_half)
                tma.store_wait(0)
                for half in gl.static_range(2):
                    dq_ring.release(2 * i + half)
            i += 1


@gluon.jit(
    do_not_specialize=[
        "num_n_blocks",
        "num_m_blocks",
        "num_pairs",
        "num_kv_heads",
        "heads_per_kv_head",
        "heads_per_group",
        "seqlen_q",
        "seqlen_k",
    ]
)
def backward_kernel(
    q_desc,  # tiles [BLOCK_M, HEAD_DIM] of q (batch, num_heads, seqlen_q, head_dim)
    k_desc,  # tiles [64, HEAD_DIM] of k (batch, num_kv_heads, seqlen_k, head_dim)
    v_desc,
    dout_desc,  # as q_desc
    row_desc,  # tiles [2 * BLOCK_M]: lse and delta of a block of queries
    dq_desc,  # tiles [64, 64] of the sum (batch * num_heads, padded seqlen_q, head_dim) in fp32
    dk_desc,  # as k_desc
    dv_desc,
    turn_ptr,  # (batch * num_heads, num_m_blocks) int32: how many programs have added to a block's dQ
    softmax_scale,
    num_n_blocks,
    num_m_blocks,
    num_pairs,
    num_kv_heads,
    heads_per_kv_head,
    heads_per_group,
    seqlen_q,
    seqlen_k,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    ROUND: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = q_desc.dtype
    BLOCK_M: gl.constexpr = q_desc.block_shape[2]
    HEAD_DIM: gl.constexpr = q_desc.block_shape[3]
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_halves = gl.allocate_shared_memory(DTYPE, [2, ROWS, HEAD_DIM], k_desc.layout)
    v_halves = gl.allocate_shared_memory(DTYPE, [2, ROWS, HEAD_DIM], v_desc.layout)
    ds_tiles = gl.allocate_shared_memory(DTYPE, [2 * 2, ROWS, BLOCK_M], DS_LAYOUT)  # two passes x two consumers
    q_ring = new_tile_ring(q_desc, STAGES, 2)
    dout_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, HEAD_DIM], dout_desc.layout)
    row_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], row_desc.layout)
    dq_ring = new_tile_ring(dq_desc, 2 * 2, 1)  # two halves for each of two reducers
    kv_barriers = (new_barriers(1, 1).index(0), new_barriers(1, 2).index(0))  # full and empty
    ds_full = new_barriers(1, 2).index(0)
    fence_async_shared()  # the barriers, before TMA signals them
    rings = (q_ring, dout_tiles, row_tiles, dq_ring)  # q's barriers speak for dout and the rows too
    tiles = (k_halves, v_halves, ds_tiles, ds_full)
    walk = (
        num_n_blocks,
        num_m_blocks,
        num_pairs,
        num_kv_heads,
        heads_per_kv_head,
        heads_per_group,
        seqlen_q,
        seqlen_k,
        ROUND,
    )
    results = (dq_desc, dk_desc, dv_desc)
    loads = (q_desc, k_desc, v_desc, dout_desc, row_desc)
    gl.warp_specialize(
        [
            (consume, (softmax_scale, rings, tiles, kv_barriers, walk, gl.constexpr(0), CAUSAL)),
            (consume, (softmax_scale, rings, tiles, kv_barriers, walk, gl.constexpr(1), CAUSAL)),
            (produce, (loads, rings, tiles, kv_barriers, walk, CAUSAL)),
            (hand_on, (results, turn_ptr, rings, walk, gl.constexpr(0), CAUSAL)),
            (hand_on, (results, turn_ptr, rings, walk, gl.constexpr(1), CAUSAL)),
        ],
        [4, 1, 1, 1],
        [REGISTERS, SMALL_REGISTERS, SMALL_REGISTERS, SMALL_REGISTERS],
    )


@gluon.jit(do_not_specialize=["num_heads", "seqlen_q"])
def prepare_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    row_ptr,  # (batch * num_heads, num_m_blocks, 2, BLOCK_M)
    turn_ptr,  # (batch * num_heads, num_m_blocks)
    stride_out_b,
    stride_out_h,
    stride_out_m,
    stride_dout_b,
    stride_dout_h,
    stride_dout_m,
    num_heads,
    seqlen_q,
    HAS_DLSE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """delta = rowsum(out * dout) - dlse, and lse in log2 units; where no key is seen, or no row is, +inf: P = 0. And
    nobody has added to dQ yet."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    m_block = gl.program_id(0)
    pair = gl.program_id(1)
    batch = (pair // num_heads).to(gl.int64)
    head = (pair % num_heads).to(gl.int64)
    offs = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    offs_m = (m_block * BLOCK_M + offs).to(gl.int64)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    inside = offs_m < seqlen_q
    out_row = out_ptr + batch * stride_out_b + head * stride_out_h
    dout_row = dout_ptr + batch * stride_dout_b + head * stride_dout_h
    out = gl.load(out_row + offs_m[:, None] * stride_out_m + offs_d[None, :], mask=inside[:, None], other=0.0)
    dout = gl.load(dout_row + offs_m[:, None] * stride_dout_m + offs_d[None, :], mask=inside[:, None], other=0.0)
    delta = gl.sum(out.to(gl.float32) * dout.to(gl.float32), axis=1)
    lse = gl.load(lse_ptr + pair.to(gl.int64) * seqlen_q + offs_m, mask=inside, other=float("-inf"))
    if HAS_DLSE:
        delta -= gl.load(dlse_ptr + pair.to(gl.int64) * seqlen_q + offs_m, mask=inside, other=0.0)
    lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    block = pair * gl.num_programs(0) + m_block
    row = row_ptr + block.to(gl.int64) * (2 * BLOCK_M) + offs
    gl.store(row, lse)
    gl.store(row + BLOCK_M, delta)
    gl.store(turn_ptr + block, 0)


@gluon.jit(do_not_specialize=["num_heads", "seqlen_q", "seqlen_k"])
def finish_kernel(
    sum_ptr,  # (batch * num_heads, num_m_blocks * BLOCK_M, HEAD_DIM) fp32, its rows as `place_of_row` says
    dq_ptr,
    softmax_scale,
    stride_dq_b,
    stride_dq_h,
    stride_dq_m,
    num_heads,
    seqlen_q,
    seqlen_k,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """dq = softmax_scale * sum, rounded to dq's dtype; 0 where no key is seen and so none was summed."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // HEAD_DIM, HEAD_DIM // 4], [4, 1], [1, 0])
    pair = gl.program_id(1)
    batch = (pair // num_heads).to(gl.int64)
    head = (pair % num_heads).to(gl.int64)
    offs_m = (gl.program_id(0) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))).to(gl.int64)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    inside = (offs_m < seqlen_q)[:, None]
    summed = inside
    if CAUSAL:
        summed = inside & (offs_m >= seqlen_q - seqlen_k)[:, None]
    sum_row = sum_ptr + pair.to(gl.int64) * (gl.num_programs(0) * BLOCK_M * HEAD_DIM)
    dq = gl.load(sum_row + place_of_row(offs_m)[:, None] * HEAD_DIM + offs_d[None, :], mask=summed, other=0.0)
    dq_row = dq_ptr + batch * stride_dq_b + head * stride_dq_h
    gl.store(
        dq_row + offs_m[:, None] * stride_dq_m + offs_d[None, :],
        (dq * softmax_scale).to(dq_ptr.dtype.element_ty),
        mask=inside,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program multiplies by its 128 keys at a time: block_m queries, and how deep their ring is."""

    block_m: int
    stages: int
    registers: int


# By (head_dim, causal). TFLOP/s on an H200 in bf16, 16384 tokens in all, and in brackets those of a program for each
# tile, with a ring each for Q, dO and the rows, in the same run: (64, True) at 1024 and 4096 tokens 272 (256) and 443
# (420), (64, False) at 1024 and 8192 432 (392) and 525 (497), (128, True) at 1024 and 4096 342 (330) and 521 (516),
# (128, False) at 1024 494 (464). Persistent programs alone, at 512 tokens: 178 (165) and 331 (310), 226 (214) and 389
# (369), the causal ones first.
TILES = {
    (64, False): Tile(block_m=128, stages=2, registers=240),
    (64, True): Tile(block_m=128, stages=2, registers=240),
    (128, False): Tile(block_m=64, stages=2, registers=240),
    (128, True): Tile(block_m=64, stages=2, registers=240),
}


# Elements of Q that all programs walk over at a time, if not causal: with more of them programs wait less for one
# another, with fewer Q, dO and dQ stay in the L2 cache. At head_dim 128, 512 / 1024 / 2048 / 4096 tokens the best
# number of heads is 16 / 8 / 4 / 2: 347 / 430 / 474 / 502 TFLOP/s, where one at a time gives 323 / 387 / 435 / 462.
MAX_IN_USE = 1 << 20
# Blocks of queries from which on programs go round. TFLOP/s at 512 to 16384 tokens, all going round: head_dim 128 330 /
# 424 / 491 / 532 / 525 / 531, head_dim 64 273 / 350 / 404 / 441 / 443 / 450. Beginning together, in another run: 346 /
# 416 / 482 / 475 / 491 / 512 and 283 / 363 / 417 / 440 / 429 / 440.
LEAST_ROUND = 32


def supports(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: int, softcap: float
) -> str | None:
    """None if `backward` takes these arguments, else why not, in a few words."""
    return refusal({"q": q, "k": k, "v": v}, softmax_scale, window_size, softcap)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), shaped as q, k and v, of arguments that `supports` takes. The same arguments give the same bits.

    dout and out (batch, num_heads, seqlen_q, head_dim); lse and dlse (batch, num_heads, seqlen_q) fp32.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    like_q = dout.stride() == q.stride() and dout.data_ptr() % 16 == 0
    if not like_q and refusal({"q": q, "dout": dout}, softmax_scale, window_size, softcap):
        dout = torch.empty_like(q).copy_(dout)  # its layout is autograd's choice, not the caller's
    dlse = None if dlse is None else dlse.contiguous()
    launch(dout, dlse, q, k, v, out, lse, dq, dk, dv, softmax_scale, causal, TILES[q.shape[-1], causal])
    return dq, dk, dv


def launch(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    causal: bool,
    tile: Tile,
) -> None:
    """Run the three kernels with a given tile."""
    batch_size, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1:3]
    num_m_blocks = triton.cdiv(seqlen_q, tile.block_m)
    num_n_blocks = triton.cdiv(seqlen_k, BLOCK_N.value)
    num_pairs = batch_size * num_heads
    rows = torch.empty(num_pairs * num_m_blocks * 2 * tile.block_m, dtype=torch.float32, device=q.device)
    dq_sum = torch.empty(num_pairs, num_m_blocks * tile.block_m, head_dim, dtype=torch.float32, device=q.device)
    turn = torch.empty(num_pairs, num_m_blocks, dtype=torch.int32, device=q.device)
    queries = seqlen_q * head_dim * (num_heads // num_kv_heads)  # elements of Q that one program walks over
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    wanted = processors // num_n_blocks if causal else MAX_IN_USE // queries
    heads_per_group = min(batch_size * num_kv_heads, max(1, wanted))
    go_round = not causal and num_m_blocks >= LEAST_ROUND and num_n_blocks <= processors
    if go_round:
        heads_per_group = 1

    num_tiles = num_n_blocks * batch_size * num_kv_heads

    def run(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
        # Four warps are one warpgroup: the others are added by gl.warp_specialize.
        launched(kernel[grid](*arguments, num_warps=4), grid, arguments)

    run(
        prepare_kernel,
        (num_m_blocks, num_pairs),
        *(out, dout, lse, lse if dlse is None else dlse, rows, turn),
        *(*out.stride()[:3], *dout.stride()[:3], num_heads, seqlen_q, dlse is not None, tile.block_m, head_dim),
    )
    run(
        backward_kernel,
        (num_tiles if go_round else min(num_tiles, processors),),
        describe(q, tile.block_m),
        describe(k, ROWS.value),
        describe(v, ROWS.value),
        describe(dout, tile.block_m),
        descriptor(rows, [2 * tile.block_m], ROW_LAYOUT),
        descriptor(dq_sum, [1, ROWS.value, 64], SQUARE_LAYOUT),
        describe(dk, ROWS.value),
        describe(dv, ROWS.value),
        turn,
        softmax_scale,
        num_n_blocks,
        num_m_blocks,
        batch_size * num_kv_heads,
        num_kv_heads,
        num_heads // num_kv_heads,
        heads_per_group,
        seqlen_q,
        seqlen_k,
        tile.stages,
        causal,
        go_round,
        tile.registers,
    )
    run(
        finish_kernel,
        (num_m_blocks, num_pairs),
        *(dq_sum, dq),
        *(softmax_scale, *dq.stride()[:3], num_heads, seqlen_q, seqlen_k, causal, tile.block_m, head_dim),
    )
