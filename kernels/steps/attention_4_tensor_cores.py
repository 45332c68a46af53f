"""Attention, step 4: tensor cores.

Idea. Most of what a program does is to multiply small matrices, and for those the card has a unit of its own: a tensor
core multiplies tiles of bf16 or fp16 numbers and adds them up in fp32, in one instruction of a whole warp or of four.

    fma        a b + c, of one number each                      32 of them in an instruction of a warp
    mma.sync   [16, 16] x [16, 8] + [16, 8]                     2048, in an instruction of a warp            (Ampere)
    wgmma      [64, 16] x [16, 64] + [64, 64], and larger       65536, in an instruction of four warps       (Hopper)

In Triton it is the same `tl.dot`. What differs is what it is given: bf16 tiles as they come from memory, P rounded to
the dtype of V. The unit reads its operands from shared memory, so that
whole tiles can be multiplied, and Q need not be loaded again for every tile of keys. The sums remain fp32: what is
rounded is P, with a relative error of 2^-9 in bf16, as torch's own bf16 attention rounds it. Nothing is transposed
first: the compiler lays tiles out in shared memory in the order that keeps this unit's reads out of one another's way.

              keys ->
    queries   S S S S      S = dot(Q, K_j^T)      [BLOCK_M, HEAD_DIM] x [HEAD_DIM, BLOCK_N]
       |      S S S S      O += dot(P, V_j)       [BLOCK_M, BLOCK_N]  x [BLOCK_N, HEAD_DIM]
       v      S S S S

What it costs. As many operations as step 3, but an H200 does 0.75 P of them a second in place of 67 T. Predicted: eight
times as fast, from half of the lower ceiling to a third of the higher one, because a program waits for each tile before
it multiplies. fp32 inputs go the old way: rounding them would not compute the same function.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, NUM_WARPS = 64, 32, 4


@triton.jit
def load_tile(x_ptr, rows, seqlen, HEAD_DIM: tl.constexpr):
    """[rows, HEAD_DIM]; zeros past the end."""
    offs_d = tl.arange(0, HEAD_DIM)
    return tl.load(x_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask=rows[:, None] < seqlen, other=0.0)


@triton.jit
def online_softmax(s, row_max, row_sum):
    """P so far, the new maximum and sum, and the share of the new sum that what came before has."""
    new_max = tl.maximum(row_max, tl.max(s, axis=1))  # never -inf: the first tile has key 0, which every query sees
    p = tl.exp(s - new_max[:, None])  # [BLOCK_M, BLOCK_N]
    carried = row_sum * tl.exp(row_max - new_max)
    new_sum = carried + tl.sum(p, axis=1)
    return p / new_sum[:, None], new_max, new_sum, carried / new_sum


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen, softmax_scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program, BLOCK_M queries. Grid: (blocks of queries, heads of all sequences)."""
    head = tl.program_id(1).to(tl.int64) * seqlen * HEAD_DIM
    q_ptr, k_ptr, v_ptr, out_ptr = q_ptr + head, k_ptr + head, v_ptr + head, out_ptr + head
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)

    q = load_tile(q_ptr, offs_m, seqlen, HEAD_DIM)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for n_start in range(0, seqlen, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, offs_n, seqlen, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale  # "ieee" says something of fp32 alone
        visible = offs_n[None, :] < seqlen
        if CAUSAL:
            visible = visible & (offs_n[None, :] <= offs_m[:, None])
        s = tl.where(visible, s, float("-inf"))
        p, row_max, row_sum, share = online_softmax(s, row_max, row_sum)
        v = load_tile(v_ptr, offs_n, seqlen, HEAD_DIM)
        acc = tl.dot(p.to(v.dtype), v, acc * share[:, None], input_precision="ieee")

    offs_d = tl.arange(0, HEAD_DIM)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * HEAD_DIM + offs_d[None, :], out, mask=offs_m[:, None] < seqlen)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """q, k, v (batch, num_heads, seqlen, head_dim), contiguous -> out, likewise."""
    batch, num_heads, seqlen, head_dim = q.shape
    out = torch.empty_like(q)
    attend[(triton.cdiv(seqlen, BLOCK_M), batch * num_heads)](
        q, k, v, out, seqlen, head_dim**-0.5, causal, head_dim, BLOCK_M, BLOCK_N,
        num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out
