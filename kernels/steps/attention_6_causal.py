"""Attention, step 6: do not do what need not be done, and do not wait for what can be asked for early.

Idea. Three things that belong together, because each is worth little without the others:

    skip       under a causal mask the tiles above the diagonal hold nothing but -inf: half of all. They are not
               visited. Tiles below it hide nothing: no mask, no comparison for each score. Only where the diagonal
               cuts through a tile is it masked
    size       a larger tile of queries uses each tile of K and V for more: [128, 64] with 8 warps where it fits
    pipeline   the copies of the next tiles are under way (`cp.async`) while this one is multiplied, into one of a few
               buffers in shared memory

              keys ->
    queries   M . . .      M  the diagonal cuts through: scores are masked
       |      F M . .      F  every query sees every key: no mask
       v      F F M .      .  nobody sees anybody: never loaded

    buffer 0   | load K_0 V_0 | use      | load K_2 V_2    | use      |
    buffer 1        | load K_1 V_1       | use      | load K_3 V_3    |

The last queries see the most keys: their programs go first, so that at the end none is left alone with much to do.

What it costs. Half of step 5's operations, and the products need no longer wait for memory. Predicted: 2.5 times as
fast, twice for the half and a quarter for the waiting. This is the portable kernel of this project
(kernels/flash_attention/triton_forward.py) without its options, and with its measured tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash_attention.tiles import FORWARD, Tile, launch_with_fitting_tile

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(x_ptr, rows, seqlen, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, HEAD_DIM]; zeros past the end. WHOLE: all rows are there."""
    offs_d = tl.arange(0, HEAD_DIM)
    pointers = x_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :]
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows[:, None] < seqlen, other=0.0)


@triton.jit
def online_softmax(s, row_max, row_sum, scale_log2):
    """P undivided, the new maximum and sum, and the rescale of what came before."""
    new_max = tl.maximum(row_max, tl.max(s, axis=1))  # never -inf: the first tile has key 0, which every query sees
    shift = new_max * scale_log2
    p = tl.exp2(s * scale_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
    alpha = tl.exp2(row_max * scale_log2 - shift)
    return p, new_max, row_sum * alpha + tl.sum(p, axis=1), alpha


@triton.jit
def attend_tiles(
    acc, row_max, row_sum, q, k_ptr, v_ptr, begin, end, offs_m, seqlen, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys begin .. end. MASKED: some of them are hidden from some of the queries, or are past the end."""
    for n_start in range(begin, end, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, offs_n, seqlen, HEAD_DIM, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = offs_n[None, :] < seqlen
            if CAUSAL:
                visible = visible & (offs_n[None, :] <= offs_m[:, None])
            s = tl.where(visible, s, float("-inf"))
        p, row_max, row_sum, alpha = online_softmax(s, row_max, row_sum, scale_log2)
        v = load_tile(v_ptr, offs_n, seqlen, HEAD_DIM, not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlen, scale_log2,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program, BLOCK_M queries. Grid: (blocks of queries, heads of all sequences)."""
    pair = tl.program_id(1).to(tl.int64)
    head = pair * seqlen * HEAD_DIM
    q_ptr, k_ptr, v_ptr, out_ptr = q_ptr + head, k_ptr + head, v_ptr + head, out_ptr + head
    m_block = tl.program_id(0)
    full, end = seqlen // BLOCK_N * BLOCK_N, seqlen  # the keys before `full` all queries see; from `end` on none does
    if CAUSAL:
        m_block = tl.num_programs(0) - 1 - m_block
        full = tl.minimum(m_block * BLOCK_M // BLOCK_N * BLOCK_N, full)
        end = tl.minimum((m_block + 1) * BLOCK_M, seqlen)
    offs_m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)

    q = load_tile(q_ptr, offs_m, seqlen, HEAD_DIM, False)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q, k_ptr, v_ptr, 0, full, offs_m, seqlen, scale_log2, HEAD_DIM, BLOCK_N, CAUSAL, False
    )
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q, k_ptr, v_ptr, full, end, offs_m, seqlen, scale_log2, HEAD_DIM, BLOCK_N, CAUSAL, True
    )

    offs_d = tl.arange(0, HEAD_DIM)
    out = (acc * (1.0 / row_sum)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * HEAD_DIM + offs_d[None, :], out, mask=offs_m[:, None] < seqlen)
    lse = (row_max * scale_log2 + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + pair * seqlen + offs_m, lse, mask=offs_m < seqlen)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
    """q, k, v (batch, num_heads, seqlen, head_dim), contiguous -> out, likewise, and lse (batch, num_heads, seqlen)."""
    batch, num_heads, seqlen, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((batch, num_heads, seqlen), dtype=torch.float32, device=q.device)

    def run(tile: Tile) -> None:
        attend[(triton.cdiv(seqlen, tile.block_m), batch * num_heads)](
            q, k, v, out, lse, seqlen, head_dim**-0.5 * LOG2_E.value, causal, head_dim, tile.block_m, tile.block_n,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch_with_fitting_tile(run, FORWARD, q, causal)
    return out, lse
