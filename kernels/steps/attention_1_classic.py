"""Attention, step 1: the formula, one launch for each of its three parts, with S and P in memory.

Idea. Compute what the formula says, in the order in which it says it. For q, k, v (seqlen, head_dim) of each head:

    S = Q K^T / sqrt(head_dim)            (seqlen, seqlen)     S_ij = -inf where query i does not see key j
    P_ij = exp(S_ij - m_i) / l_i          (seqlen, seqlen)     m_i = max_j S_ij,  l_i = sum_j exp(S_ij - m_i)
    O = P V                               (seqlen, head_dim)

Subtracting the row's maximum m_i changes nothing (it cancels between the numerator and l_i), and keeps exp from
overflowing: the largest exponent is 0. Causal: query i sees the keys j <= i.

    launch 1, `scores`      a program owns a tile of S     [BLOCK_M, BLOCK_N]     writes S
    launch 2, `softmax`     a program owns a row of S      [seqlen]               reads S, writes P over it
    launch 3, `values`      a program owns a tile of O     [BLOCK_M, HEAD_DIM]    reads P

Side by side. The threads of a warp work on neighbouring queries and keys, at the same place of head_dim. What they read
together should lie together: shared memory has 32 banks, 4 bytes wide, and threads that want different rows of one bank
take turns. Rows of head_dim numbers begin in the same bank, all of them. So Q and K are transposed before the first
launch, (head_dim, seqlen), which takes torch 0.1 ms.

What it costs. 4 seqlen^2 head_dim operations a head, in plain fp32 arithmetic, and four passes over seqlen^2 numbers of
4 bytes: S written, S read, P written, P read. For 64 heads of 4096 tokens these are 17 GB, where q, k, v and out
together are 0.27 GB. Memory grows with the square of the length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, NUM_WARPS = 64, 64, 4
SLICE_D, SLICE_N = 16, 32  # of what a product sums over, taken at a time: threads hold their operands in registers


@triton.jit
def scores(
    q_ptr, k_ptr, s_ptr, seqlen, softmax_scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE_D: tl.constexpr,
):  # fmt: skip
    """One program, one tile of S; q and k (head_dim, seqlen). Grid: (blocks of queries, blocks of keys, all heads)."""
    pair = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += pair * seqlen * HEAD_DIM
    k_ptr += pair * seqlen * HEAD_DIM
    s_ptr += pair * seqlen * seqlen
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d_start in range(0, HEAD_DIM, SLICE_D):
        offs_d = d_start + tl.arange(0, SLICE_D)
        q = tl.load(q_ptr + offs_d[:, None] * seqlen + offs_m[None, :], mask=offs_m[None, :] < seqlen, other=0.0)
        k = tl.load(k_ptr + offs_d[:, None] * seqlen + offs_n[None, :], mask=offs_n[None, :] < seqlen, other=0.0)
        # "ieee": fp32 operands are multiplied as fp32, which no matrix unit does.
        s += tl.dot(tl.trans(q.to(tl.float32)), k.to(tl.float32), input_precision="ieee")
    s *= softmax_scale
    if CAUSAL:
        s = tl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
    inside = (offs_m[:, None] < seqlen) & (offs_n[None, :] < seqlen)
    tl.store(s_ptr + offs_m.to(tl.int64)[:, None] * seqlen + offs_n[None, :], s, mask=inside)


@triton.jit
def softmax(s_ptr, seqlen, BLOCK: tl.constexpr):
    """One program, one row of S, which P takes the place of. Grid: (rows of all heads,)."""
    s_ptr += tl.program_id(0).to(tl.int64) * seqlen
    columns = tl.arange(0, BLOCK)
    s = tl.load(s_ptr + columns, mask=columns < seqlen, other=float("-inf"))  # [BLOCK]
    p = tl.exp(s - tl.max(s, axis=0))
    tl.store(s_ptr + columns, p / tl.sum(p, axis=0), mask=columns < seqlen)


@triton.jit
def values(p_ptr, v_ptr, out_ptr, seqlen, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, SLICE_N: tl.constexpr):
    """One program, one tile of O, over all keys. Grid: (blocks of queries, heads of all sequences)."""
    pair = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    p_ptr += pair * seqlen * seqlen
    v_ptr += pair * seqlen * HEAD_DIM
    out_ptr += pair * seqlen * HEAD_DIM
    rows = offs_m.to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for n_start in range(0, seqlen, SLICE_N):
        offs_n = n_start + tl.arange(0, SLICE_N)
        inside = (rows < seqlen) & (offs_n[None, :] < seqlen)
        p = tl.load(p_ptr + rows * seqlen + offs_n[None, :], mask=inside, other=0.0)  # [BLOCK_M, SLICE_N]
        v = tl.load(v_ptr + offs_n[:, None] * HEAD_DIM + offs_d[None, :], mask=offs_n[:, None] < seqlen, other=0.0)
        acc = tl.dot(p, v.to(tl.float32), acc, input_precision="ieee")
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * HEAD_DIM + offs_d[None, :], out, mask=rows < seqlen)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """q, k, v (batch, num_heads, seqlen, head_dim), contiguous -> out, likewise."""
    batch, num_heads, seqlen, head_dim = q.shape
    pairs = batch * num_heads
    q_t, k_t = q.mT.contiguous(), k.mT.contiguous()  # (batch, num_heads, head_dim, seqlen)
    s = torch.empty((pairs, seqlen, seqlen), dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    blocks_m, blocks_n = triton.cdiv(seqlen, BLOCK_M), triton.cdiv(seqlen, BLOCK_N)
    options = {"num_warps": NUM_WARPS, "num_stages": 1}
    scores[(blocks_m, blocks_n, pairs)](
        q_t, k_t, s, seqlen, head_dim**-0.5, causal, head_dim, BLOCK_M, BLOCK_N, SLICE_D, **options
    )
    softmax[(pairs * seqlen,)](s, seqlen, triton.next_power_of_2(seqlen), **options)
    values[(blocks_m, pairs)](s, v, out, seqlen, head_dim, BLOCK_M, SLICE_N, **options)
    return out
