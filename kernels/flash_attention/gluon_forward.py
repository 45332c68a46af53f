"""FlashAttention forward on Hopper, in Triton's Gluon dialect: TMA, wgmma, and warps that specialise.

For each row i of S = softmax_scale Q K^T, with the sum over the keys that the row sees:

    lse_i = log sum_j exp(S_ij)          O_i = sum_j exp(S_ij - lse_i) V_j

computed a block of keys at a time, as in FlashAttention-2 (arXiv:2307.08691, algorithm 1): a running maximum m and a
running sum l, what came before rescaled by alpha = exp(m_old - m_new) when the maximum grows. Exponentials are powers
of two, with log2(e) in the scale.

Who does what (FlashAttention-3, arXiv:2407.08608, algorithms 1 and 2). One program owns CONSUMERS x 64 queries of one
head, and walks over that head's keys from the last visible block to the first:

    warp group      registers   role
    consumer 0            240   queries   0 ..  63: both matrix products and the softmax
    consumer 1            240   queries  64 .. 127, the same
    producer (a warp)      24   TMA: its queries once, then K and V block by block, STAGES ahead

Two overlaps keep the matrix unit busy while exponentials are computed:

    within a consumer    S_j = Q K_j^T is started before O += P_{j-1} V_{j-1}, so that softmax(S_j) runs beside the
                         latter
    between consumers    one's matrix products are queued while the other is at its softmax: left to themselves, they
                         fall into that order (barriers that hold them to it: 555 and 559 TFLOP/s for 556, full,
                         head_dim 64, 8192 tokens)

There are as many programs as processors, each works through several tiles of queries, and `tile_coordinates` deals
these out so that all programs end at about the same time.

    paper     here                          shape
    Q_i       q                             [64, HEAD_DIM]        shared memory
    K_j, V_j  k, v                          [BLOCK_N, HEAD_DIM]   shared memory
    S, P      s, p                          [64, BLOCK_N]         registers
    O         acc                           [64, HEAD_DIM]        registers
    m         row_max                       [64]                  registers
    l         row_sum                       [64, 4]               registers, a part in each thread of a row
    T_c       n_blocks                      blocks of keys that the tile sees

Knows no window, softcap or packed documents: `supports` sends those to the portable kernel.
"""

import dataclasses
import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.flash_attention.hopper import LOG2_E, ROWS, describe, new_tile_ring, refusal
from kernels.launch import launched

LN_2 = gl.constexpr(0.6931471805599453)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def tile_coordinates(turn, walk, CAUSAL: gl.constexpr):
    """Which queries the tile holds that this program is dealt in round `turn`: (m_block, head, batch).

    A pair is one head of one sequence. Without a causal mask the queries of a pair come one after the other: all of
    them share its keys. With one, `heads_per_group` pairs are walked side by side, from their last queries, which see
    the most keys, to their first; and tiles are dealt back and forth, so that who gets the heavier one in one round
    gets the lighter one in the next. The last round, which may not go round, is dealt forth.
    """
    num_m_blocks, num_heads, num_pairs, heads_per_group, _seqlen_q, _seqlen_k = walk
    programs = gl.num_programs(0)
    back = (num_m_blocks * num_pairs // programs - turn) % 2 == 1
    tile = turn * programs + gl.where(back, programs - 1 - gl.program_id(0), gl.program_id(0))
    if CAUSAL:
        group_tiles = heads_per_group * num_m_blocks
        first_pair = tile // group_tiles * heads_per_group
        pairs_here = gl.minimum(heads_per_group, num_pairs - first_pair)
        m_block = num_m_blocks - 1 - tile % group_tiles // pairs_here
        pair = first_pair + tile % group_tiles % pairs_here
    else:
        m_block = tile % num_m_blocks
        pair = tile // num_m_blocks
    return m_block, pair % num_heads, pair // num_heads


@gluon.jit
def count_n_blocks(m_block, seqlen_q, seqlen_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """How many blocks of keys some query of the tile sees, and how many of them every query sees wholly.

    At least one is counted: a tile that sees no key masks that block out, and ends with out 0 and lse -inf.
    """
    seen_by_last = seqlen_k
    seen_by_first = seqlen_k
    if CAUSAL:
        seen_by_last = gl.minimum(seqlen_k, (m_block + 1) * BLOCK_M + seqlen_k - seqlen_q)
        seen_by_first = gl.minimum(seqlen_k, gl.maximum(m_block * BLOCK_M + 1 + seqlen_k - seqlen_q, 0))
    n_blocks = gl.maximum(gl.cdiv(seen_by_last, BLOCK_N), 1)
    return n_blocks, gl.minimum(seen_by_first // BLOCK_N, n_blocks - 1)


@gluon.jit
def mask_scores(
    s, row, n_start, seqlen_q, seqlen_k, FEW_REGISTERS: gl.constexpr, CAUSAL: gl.constexpr, S_LAYOUT: gl.constexpr
):
    """-inf where the query does not see the key; causal is bottom-right aligned."""
    last = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, S_LAYOUT)) + (seqlen_k - 1)  # key that each query sees
    if CAUSAL:
        offs_m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        last = gl.minimum(last, offs_m + (seqlen_k - seqlen_q))
    if FEW_REGISTERS:
        return keep_columns(s, last - n_start)
    columns = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S_LAYOUT))
    return gl.where(columns[None, :] <= (last - n_start)[:, None], s, float("-inf"))


@gluon.jit
def keep_columns(s, last):
    """-inf beyond the `last` column of each row, without a register for the number of each column.

    A thread holds two of every eight columns. So split, their numbers are constants that the comparisons carry.
    """
    BLOCK_N: gl.constexpr = s.shape[1]
    split = s.reshape([ROWS, BLOCK_N // 8, 4, 2])
    LAYOUT: gl.constexpr = split.type.layout
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    EIGHTS_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    PAIRS_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    ONES_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    last = gl.convert_layout(last, ROW_LAYOUT)[:, None, None, None]
    last -= 2 * gl.arange(0, 4, layout=PAIRS_LAYOUT)[None, None, :, None]
    columns = 8 * gl.arange(0, BLOCK_N // 8, layout=EIGHTS_LAYOUT)[None, :, None, None]
    columns += gl.arange(0, 2, layout=ONES_LAYOUT)[None, None, None, :]
    kept = gl.where(columns <= last, split, float("-inf"))
    return gl.convert_layout(kept.reshape(s.shape), s.type.layout)


@gluon.jit
def thread_shares(x):
    """[rows, columns] -> [rows, columns / 8, 4, 2]: of each row, a thread holds two of every eight columns."""
    return x.reshape([ROWS, x.shape[1] // 8, 4, 2])


@gluon.jit
def rescale(s, row_max, scale_log2, MASKED: gl.constexpr):
    """Line 9 of FlashAttention-2's algorithm 1: the new maximum, as it is subtracted from the scaled scores too, and
    the factor of what came before. Maxima of pairs first: one maximum after the other would take twice as long."""
    pairs = gl.max(thread_shares(s), axis=3)
    new_max = gl.maximum(row_max, gl.convert_layout(gl.max(gl.max(pairs, axis=1), axis=1), row_max.type.layout))
    shift = new_max * scale_log2
    if MASKED:
        shift = gl.where(new_max == float("-inf"), 0.0, shift)  # no key seen yet: -inf - 0, not -inf + inf
    return new_max, shift, gl.exp2(row_max * scale_log2 - shift)


@gluon.jit
def thread_sums(p):
    """The sums of each row, [rows, 4]: what each of four threads holds of it. They are added up once, at the end."""
    return gl.sum(gl.sum(thread_shares(p), axis=3), axis=1)


@gluon.constexpr_function
def round_pair(dtype):
    """The instruction that rounds $1 and $2 to the halves of $0."""
    return f"cvt.rn.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@gluon.jit
def as_operand(p, acc, v_ring, CONSUMERS: gl.constexpr):
    """P as wgmma takes it from registers, in V's dtype.

    With three consumers it is rounded two by two: LLVM rounds one by one, and in that kernel puts some pairs together
    the wrong way round, 32 instructions more a pass (full, 8192 tokens: 564 TFLOP/s, not 590).
    """
    if CONSUMERS > 2:
        p = gl.inline_asm_elementwise(
            round_pair(v_ring.data.dtype), "=r,r,r", [p], dtype=v_ring.data.dtype, is_pure=True, pack=2
        )
    return gl.convert_layout(p.to(v_ring.data.dtype), gl.DotOperandLayout(0, acc.type.layout, k_width=2))


@gluon.jit
def exponentials(s, shift, alpha, row_sum, scale_log2):
    """Lines 9 and 10: P, and the new sums."""
    p = gl.exp2(s * scale_log2 - shift[:, None])
    sums = thread_sums(p)
    return p, row_sum * gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout))[:, None] + sums


@gluon.jit
def wait_ahead(ring, j, needed):
    """Wait for tile j of the ring, if it is needed."""
    STAGES: gl.constexpr = ring.data.shape[0]
    mbarrier.wait(ring.full.index(j % STAGES), (j // STAGES) & 1, pred=needed)


@gluon.jit
def attend_block(
    acc,
    p,
    row_max,
    row_sum,
    q,
    k_ring,
    v_ring,
    j,
    row,
    n_start,
    scale_log2,
    seqlen_q,
    seqlen_k,
    masked,
    CONSUMERS: gl.constexpr,
    CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """One pass of the main loop: S_j, beside it O += P_{j-1} V_{j-1}, then softmax(S_j), all of one consumer.

    If causal, `masked` says whether some query does not see all of these keys: such blocks take a branch, not a loop of
    their own, between which and the other loop P would be copied.

    P V ends while the maxima are found, so that O is rescaled and P rounded between the exponentials, one of which
    keeps its unit busy for eight cycles. After them they would make each pass longer (full, head_dim 64, 8192 tokens:
    555 TFLOP/s, not 590).
    """
    BLOCK_N: gl.constexpr = k_ring.data.shape[1]
    STAGES: gl.constexpr = k_ring.data.shape[0]
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    k = k_ring.data.index(j % STAGES)  # waited for in the pass before
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    v = v_ring.wait(j - 1)
    acc = warpgroup_mma(p, v, acc, is_async=True)

    s = warpgroup_mma_wait(1, deps=[s])
    k_ring.release(j)
    if CAUSAL:  # noqa: SIM102  decided by the compiler, the inner one by the block
        if masked:
            s = mask_scores(s, row, n_start, seqlen_q, seqlen_k, CONSUMERS > 2, CAUSAL, S_LAYOUT)
    row_max, shift, alpha = rescale(s, row_max, scale_log2, CAUSAL)

    # The next keys are due anyway. Waiting for them here, a branch, keeps ptxas from moving the end of P V ahead of the
    # maxima.
    wait_ahead(k_ring, j + 1, n_start > 0)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    v_ring.release(j - 1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    p, row_sum = exponentials(s, shift, alpha, row_sum, scale_log2)
    return acc, as_operand(p, acc, v_ring, CONSUMERS), row_max, row_sum


@gluon.jit
def consume(
    work,
    walk,
    consumer_id: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """A consumer warpgroup: attention of 64 queries of each of this program's tiles."""
    out_desc, lse_ptr, q_ring, k_ring, v_ring, scale_log2 = work
    num_m_blocks, num_heads, num_pairs, _heads_per_group, seqlen_q, seqlen_k = walk
    BLOCK_N: gl.constexpr = k_ring.data.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.data.shape[2]
    DTYPE: gl.constexpr = out_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)

    j = 0  # blocks of keys met so far, over all tiles
    turn = 0  # tiles met so far
    m_block, head, batch = tile_coordinates(turn, walk, CAUSAL)
    for _ in range(gl.program_id(0), num_m_blocks * num_pairs, gl.num_programs(0)):
        n_blocks, n_full = count_n_blocks(m_block, seqlen_q, seqlen_k, CONSUMERS * ROWS, BLOCK_N, CAUSAL)
        row = (m_block * CONSUMERS + consumer_id) * ROWS
        q = q_ring.wait(turn * CONSUMERS + consumer_id)

        # The first block of keys, the last in order, has no P V to run beside.
        k = k_ring.wait(j)
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        tma.store_wait(0)  # of the tile before, which leaves its buffer to the queries of the next
        q_ring.release((turn - 1) * CONSUMERS + consumer_id, turn > 0)
        turn += 1
        next_tile = tile_coordinates(turn, walk, CAUSAL)  # divisions take their time: here beside the product
        s = warpgroup_mma_wait(0, deps=[s])
        k_ring.release(j)
        j += 1
        if CAUSAL or seqlen_k % BLOCK_N != 0:
            s = mask_scores(s, row, (n_blocks - 1) * BLOCK_N, seqlen_q, seqlen_k, CONSUMERS > 2, CAUSAL, S_LAYOUT)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
        row_max, shift, alpha = rescale(s, row_max, scale_log2, True)
        wait_ahead(k_ring, j, n_blocks > 1)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, ACC_LAYOUT)
        p, row_sum = exponentials(s, shift, alpha, thread_sums(zeros), scale_log2)
        p = as_operand(p, acc, v_ring, CONSUMERS)

        for n_block in range(n_blocks - 2, -1, -1):
            acc, p, row_max, row_sum = attend_block(
                acc, p, row_max, row_sum, q, k_ring, v_ring, j, row, n_block * BLOCK_N, scale_log2,
                seqlen_q, seqlen_k, n_block >= n_full, CONSUMERS, CAUSAL, S_LAYOUT,
            )  # fmt: skip
            j += 1

        v = v_ring.wait(j - 1)
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        v_ring.release(j - 1)

        # O / l and lse = m + log l; the row that saw no key has l = 0.
        row_sum = gl.convert_layout(gl.sum(row_sum, axis=1), ROW_LAYOUT)
        blind = row_sum == 0.0
        inverse = gl.where(blind, 0.0, 1.0 / row_sum)
        out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
        q.store(out.to(DTYPE))  # the queries are used up; their buffer carries the result to TMA
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [batch, head, row, 0], q)
        lse = gl.where(blind, float("-inf"), (row_max * scale_log2 + gl.log2(row_sum)) * LN_2)
        offs_m = row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        lse_row = lse_ptr + (batch * num_heads + head).to(gl.int64) * seqlen_q
        gl.store(lse_row + offs_m, lse, mask=offs_m < seqlen_q)
        m_block, head, batch = next_tile
    tma.store_wait(0)


@gluon.jit
def produce(loads, walk, CONSUMERS: gl.constexpr, CAUSAL: gl.constexpr):
    """The producer warp: the same walk as the consumers', each tile requested as soon as its buffer is free."""
    q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, heads_per_kv_head = loads
    num_m_blocks, _num_heads, num_pairs, _heads_per_group, seqlen_q, seqlen_k = walk
    BLOCK_N: gl.constexpr = k_ring.data.shape[1]
    j = 0
    for tile in range(gl.program_id(0), num_m_blocks * num_pairs, gl.num_programs(0)):
        turn = tile // gl.num_programs(0)
        m_block, head, batch = tile_coordinates(turn, walk, CAUSAL)
        n_blocks, _n_full = count_n_blocks(m_block, seqlen_q, seqlen_k, CONSUMERS * ROWS, BLOCK_N, CAUSAL)
        kv_head = head // heads_per_kv_head
        for i in gl.static_range(CONSUMERS):
            q_ring.fill(turn * CONSUMERS + i, q_desc, [batch, head, (m_block * CONSUMERS + i) * ROWS, 0])
        for n_block in range(n_blocks - 1, -1, -1):
            k_ring.fill(j, k_desc, [batch, kv_head, n_block * BLOCK_N, 0])
            v_ring.fill(j, v_desc, [batch, kv_head, n_block * BLOCK_N, 0])
            j += 1


@gluon.jit(
    do_not_specialize=[
        "num_heads",
        "heads_per_kv_head",
        "num_m_blocks",
        "num_pairs",
        "heads_per_group",
        "seqlen_q",
        "seqlen_k",
    ]
)
def forward_kernel(
    q_desc,  # tiles [64, HEAD_DIM] of q (batch, num_heads, seqlen_q, head_dim)
    k_desc,  # tiles [BLOCK_N, HEAD_DIM] of k (batch, num_kv_heads, seqlen_k, head_dim)
    v_desc,
    out_desc,
    lse_ptr,  # (batch, num_heads, seqlen_q)
    scale_log2,  # softmax_scale * log2(e)
    num_heads,
    heads_per_kv_head,
    num_m_blocks,
    num_pairs,
    heads_per_group,
    seqlen_q,
    seqlen_k,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    q_ring = new_tile_ring(q_desc, 2 * CONSUMERS, 1)  # the next tile's queries come while the last one's result leaves
    k_ring = new_tile_ring(k_desc, STAGES, CONSUMERS)
    v_ring = new_tile_ring(v_desc, STAGES, CONSUMERS)
    fence_async_shared()  # the barriers, before TMA signals them
    walk = (num_m_blocks, num_heads, num_pairs, heads_per_group, seqlen_q, seqlen_k)
    loads = (q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, heads_per_kv_head)
    work = (out_desc, lse_ptr, q_ring, k_ring, v_ring, scale_log2)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (work, walk, gl.constexpr(0), CONSUMERS, CAUSAL)),
                (consume, (work, walk, gl.constexpr(1), CONSUMERS, CAUSAL)),
                (produce, (loads, walk, CONSUMERS, CAUSAL)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (work, walk, gl.constexpr(0), CONSUMERS, CAUSAL)),
                (consume, (work, walk, gl.constexpr(1), CONSUMERS, CAUSAL)),
                (consume, (work, walk, gl.constexpr(2), CONSUMERS, CAUSAL)),
                (produce, (loads, walk, CONSUMERS, CAUSAL)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program works on at a time: consumers x 64 queries, block_n keys, and how deep its rings are."""

    block_n: int
    consumers: int
    registers: int
    stages: int


# By (head_dim, causal); SHORT_TILES below LEAST_LONG queries. TFLOP/s on an H200, bf16, 16384 tokens in all: (64,
# False) at 512 / 1024 / 2048 / 4096 / 8192 keys 388 / 444 / 518 / 526 / 590, with two consumers 406 / 438 / 452 at the
# first three; (64, True) at 2048 / 4096 / 8192 401 / 451 / 505, with two at 512 / 1024 / 2048 252 / 353 / 425; (128,
# False) at 512 / 4096 / 8192 514 / 629 / 712, (128, True) at 512 / 4096 339 / 619.
TILES = {
    (64, False): Tile(block_n=128, consumers=3, registers=160, stages=3),
    (64, True): Tile(block_n=128, consumers=3, registers=160, stages=3),
    (128, False): Tile(block_n=128, consumers=2, registers=240, stages=2),
    (128, True): Tile(block_n=128, consumers=2, registers=240, stages=2),
}
SHORT_TILES = TILES | {
    (64, causal): Tile(block_n=128, consumers=2, registers=240, stages=3) for causal in (False, True)
}
LEAST_LONG = {False: 1024, True: 4096}  # queries, by causal
_LEAST_WORK = 1 << 28  # queries x keys x head_dim: 12 sequences of 4 heads, 64 tokens, head_dim 64 are 1 << 23.6


def supports(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: int, softcap: float
) -> str | None:
    """None if `forward` takes these arguments, else why not, in a few words."""
    reason = refusal({"q": q, "k": k, "v": v}, softmax_scale, window_size, softcap)
    if reason is None and q.numel() * k.shape[2] < _LEAST_WORK:
        return "slower than the portable kernel where there is so little to do"
    return reason


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of arguments that `supports` takes.

    q (batch, num_heads, seqlen_q, head_dim), k and v (batch, num_kv_heads, seqlen_k, head_dim), fp16 or bf16; out as q,
    lse (batch, num_heads, seqlen_q) fp32.
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles = TILES if q.shape[2] >= LEAST_LONG[causal] else SHORT_TILES
    launch(q, k, v, out, lse, softmax_scale, causal, tiles[q.shape[-1], causal])
    return out, lse


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float, causal: bool, tile: Tile
) -> None:
    """Run `forward_kernel` with a given tile."""
    rows = ROWS.value
    batch_size, num_heads, seqlen_q, _ = q.shape
    num_kv_heads, seqlen_k = k.shape[1:3]
    num_m_blocks = triton.cdiv(seqlen_q, tile.consumers * rows)
    num_pairs = batch_size * num_heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(num_m_blocks * num_pairs, processors)
    heads_per_group = min(num_pairs, programs // math.gcd(programs, num_m_blocks))  # a group takes whole rounds
    arguments = (
        describe(q, rows),
        describe(k, tile.block_n),
        describe(v, tile.block_n),
        describe(out, rows),
        lse,
        softmax_scale * LOG2_E.value,
        num_heads,
        num_heads // num_kv_heads,
        num_m_blocks,
        num_pairs,
        heads_per_group,
        seqlen_q,
        seqlen_k,
        tile.consumers,
        tile.stages,
        causal,
        tile.registers,
    )
    # Four warps are one warpgroup: the others are added by gl.warp_specialize.
    launched(forward_kernel[(programs,)](*arguments, num_warps=4), (programs,), arguments)
