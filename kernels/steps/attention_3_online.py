"""Attention, step 3: the online softmax. One pass over K and V.

Idea. Keep a maximum and a sum of the keys seen so far, and correct what was made with the old ones when they change.
Let m, l and O belong to the keys of the tiles before, and m', l', O' include the next tile:

    m'  =  max(m, max_j S_ij)                                    over the keys j of the tile
    l'  =  l exp(m - m')  +  sum_j exp(S_ij - m')
    O'  =  O (l exp(m - m') / l')  +  sum_j (exp(S_ij - m') / l') V_j

Proof. l = sum exp(S_ij - m) over the keys before; times exp(m - m') each term becomes exp(S_ij - m'): a sum is moved to
another maximum by one factor. O = sum exp(S_ij - m) V_j / l likewise: times l exp(m - m') it is the sum of the
exp(S_ij - m') V_j, and divided by l' it has the new denominator. So after each tile O is the attention over the keys
seen so far, and after the last one over all. It begins with m = -inf, l = 0, O = 0.

              keys ->
    queries   S S S S      a program goes over them once:  load K_j and V_j, S, m', l', O'
       |      S S S S
       v      S S S S

What it costs. S once and P V once, half of step 2's operations, and one factor for each row and tile. Predicted: twice
as fast. (Milakov and Gimelshein, arXiv:1805.02867; with O, Rabe and Staats, arXiv:2112.05682; FlashAttention,
arXiv:2205.14135.)
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
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE_D: tl.constexpr,
):  # fmt: skip
    """One program, BLOCK_M queries. Grid: (blocks of queries, heads of all sequences)."""
    head = tl.program_id(1).to(tl.int64) * seqlen * HEAD_DIM
    q_ptr, k_ptr, v_ptr, out_ptr = q_ptr + head, k_ptr + head, v_ptr + head, out_ptr + head
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for n_start in range(0, seqlen, BLOCK_N):
        offs_n = n_start + tl.arange(0, BLOCK_N)
        s = scores(q_ptr, k_ptr, offs_m, offs_n, seqlen, softmax_scale, CAUSAL, HEAD_DIM, SLICE_D)
        p, row_max, row_sum, share = online_softmax(s, row_max, row_sum)
        v = tl.load(v_ptr + offs_n[:, None] * HEAD_DIM + offs_d[None, :], mask=offs_n[:, None] < seqlen, other=0.0)
        acc = tl.dot(p, v.to(tl.float32), acc * share[:, None], input_precision="ieee")

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
