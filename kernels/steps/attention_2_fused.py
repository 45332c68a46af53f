"""Attention, step 2: tiled and fused. One launch, in which S and P never leave the chip.

Idea. One program owns BLOCK_M queries from beginning to end. It computes their scores a tile at a time, uses the tile
and forgets it. A row of softmax needs its maximum before the first exponential, and its sum before the first quotient:
so the program goes over the keys three times, and computes S anew each time instead of remembering it.

              keys ->
    queries   S S S S      pass 1    m_i = max_j S_ij
       |      S S S S      pass 2    l_i = sum_j exp(S_ij - m_i)
       v      S S S S      pass 3    P_ij = exp(S_ij - m_i) / l_i,    O_i = sum_j P_ij V_j

    a program   [ S S S S ] x 3      BLOCK_M queries; a tile is [BLOCK_M, BLOCK_N], in registers
                [    O    ]          [BLOCK_M, HEAD_DIM], in registers until it is written, once

What it costs. Memory: q and k are transposed as in step 1, then q, k and v are read and out is written, 0.5 GB in place
of 17; nothing of size seqlen^2 is left, so that the length may grow. Arithmetic: S three times and P V once, twice the
operations of step 1. Which of the two counts depends on the machine: here, without matrix units, arithmetic is scarce.
Predicted: 0.6 times as fast, 33 ms of arithmetic in place of 16 and 4 of memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, NUM_WARPS = 64, 32, 4
SLICE_D = 16  # of head_dim, as in step 1


@triton.jit
def scores(
    q_ptr, k_ptr, offs_m, offs_n, seqlen, softmax_scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE_D: tl.constexpr,
):  # fmt: skip
    """A tile of S [BLOCK_M, BLOCK_N], of q and k (head_dim, seqlen); -inf where a query does not see a key."""
    s = tl.zeros([offs_m.shape[0], offs_n.shape[0]], tl.float32)
    for d_start in range(0, HEAD_DIM, SLICE_D):
        offs_d = d_start + tl.arange(0, SLICE_D)
        q = tl.load(q_ptr + offs_d[:, None] * seqlen + offs_m[None, :], mask=offs_m[None, :] < seqlen, other=0.0)
        k = tl.load(k_ptr + offs_d[:, None] * seqlen + offs_n[None, :], mask=offs_n[None, :] < seqlen, other=0.0)
        s += tl.dot(tl.trans(q.to(tl.float32)), k.to(tl.float32), input_precision="ieee")
    visible = offs_n[None, :] < seqlen
    if CAUSAL:
        visible = visible & (offs_n[None, :] <= offs_m[:, None])
    return tl.where(visible, s * softmax_scale, float("-inf"))


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen, softmax_scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE_D: tl.constexpr,
):  # fmt: skip
    """One program, BLOCK_M queries. Grid: (blocks of queries, heads of all sequences)."""
    head = tl.program_id(1).to(tl.int64) * seqlen * HEAD_DIM
    q_ptr, k_ptr, v_ptr, out_ptr = q_ptr + head, k_ptr + head, v_ptr + head, out_ptr + head
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n_start in range(0, seqlen, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        s = scores(q_ptr, k_ptr, offs_m, offs_n, seqlen, softmax_scale, CAUSAL, HEAD_DIM, SLICE_D)
        row_max = tl.maximum(row_max, tl.max(s, axis=1))

    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for n_start in range(0, seqlen, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        s = scores(q_ptr, k_ptr, offs_m, offs_n, seqlen, softmax_scale, CAUSAL, HEAD_DIM, SLICE_D)
        row_sum += tl.sum(tl.exp(s - row_max[:, None]), axis=1)

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    offs_d = tl.arange(0, HEAD_DIM)
    for n_start in range(0, seqlen, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        s = scores(q_ptr, k_ptr, offs_m, offs_n, seqlen, softmax_scale, CAUSAL, HEAD_DIM, SLICE_D)
        p = tl.exp(s - row_max[:, None]) / row_sum[:, None]  # [BLOCK_M, BLOCK_N]
        v = tl.load(v_ptr + offs_n[:, None] * HEAD_DIM + offs_d[None, :], mask=offs_n[:, None] < seqlen, other=0.0)
        acc = tl.dot(p, v.to(tl.float32), acc, input_precision="ieee")

    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * HEAD_DIM + offs_d[None, :], out, mask=offs_m[:, None] < seqlen)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """q, k, v (batch, num_heads, seqlen, head_dim), contiguous -> out, likewise."""
    batch, num_heads, seqlen, head_dim = q.shape
    q_t, k_t = q.mT.contiguous(), k.mT.contiguous()  # (batch, num_heads, head_dim, seqlen), as in step 1
    out = torch.empty_like(q)
    attend[(triton.cdiv(seqlen, BLOCK_M), batch * num_heads)](
        q_t, k_t, v, out, seqlen, head_dim**-0.5, causal, head_dim, BLOCK_M, BLOCK_N, SLICE_D,
        num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out
