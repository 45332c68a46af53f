"""FlashAttention-2 backward in Triton, for every card that Triton knows. (arXiv:2307.08691, algorithm 2)

With P_ij = exp(S_ij - lse_i) recomputed from lse, and delta_i = sum_d O_id dO_id - dlse_i (the paper's D, and the
gradient that comes in through lse),

    dV = P^T dO      dP = dO V^T      dS = P (dP - delta)      dQ = softmax_scale dS K      dK = softmax_scale dS^T Q

Two kernels, one after the other, so that every sum is made by one program in one order: no atomics, the same bits
every time.

    dq_kernel      one program owns BLOCK_M queries, walks over the keys that they see as the forward pass does, and
                   writes dQ and delta
    dkdv_kernel    one program owns BLOCK_N keys of one key head, walks over the queries that see them, of all the query
                   heads that share it, and writes dK and dV. Scores are transposed here, [BLOCK_N, BLOCK_M], so that
                   P^T and dS^T stand on the left of their products

    paper          here                         shape
    Q_i, dO_i      q, dout                      [BLOCK_M, BLOCK_D]
    K_j, V_j       k, v                         [BLOCK_N, BLOCK_D]
    S, P, dP, dS   s, p, dp, ds                 [BLOCK_M, BLOCK_N], or transposed
    dQ             dq                           [BLOCK_M, BLOCK_D]
    dK, dV         dk, dv                       [BLOCK_N, BLOCK_D]
    L, D           lse, delta                   [BLOCK_M]

Knows nothing of the Hopper kernels: dispatch.py chooses. Arguments were checked in op.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash_attention.tiles import BACKWARD_DKDV, BACKWARD_DQ, Tile, launch_with_fitting_tile
from kernels.flash_attention.triton_forward import (
    LOG2_E,
    Options,
    Sequences,
    count_sequences,
    is_visible,
    kernel_options,
    load_tile,
    lse_strides,
    matmul,
    rows_of_sequence,
    store_tile,
    strides,
    tanh,
    visible_blocks,
)
from kernels.launch import launched


@triton.jit
def differentiate_scores(
    s, dp, lse_log2, delta, visible, softmax_scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):
    """(P, dS) of one tile, lse_log2 and delta shaped to broadcast against it; the scale of dS is left to the end."""
    if SOFTCAP:
        t = tanh(s * (softmax_scale / softcap))
        p = tl.exp2(t * (softcap * LOG2_E) - lse_log2)
    else:
        p = tl.exp2(s * (softmax_scale * LOG2_E) - lse_log2)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * (1 - t * t)
    return p, ds


@triton.jit
def load_rows(x, offs_m, seqlen_q, other):
    return tl.load(x + offs_m, mask=offs_m < seqlen_q, other=other)


@triton.jit
def in_powers_of_two(lse):
    """lse for use in exp2; a row that sees no key, lse = -inf, gets +inf, so that its P is 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def add_dq_of_blocks(
    dq, q, dout, lse_log2, delta, k_ptr, v_ptr, begin, end, positions, seqlen_k,
    stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dq_kernel's main loop over the keys begin .. end. MASKED: some of them are hidden from some of the queries."""
    BLOCK_D: tl.constexpr = q.shape[1]
    for n_start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, n_start, seqlen_k, stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
        v = load_tile(v_ptr, n_start, seqlen_k, stride_vn, stride_vd, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
        s = matmul(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        dp = matmul(dout, tl.trans(v))
        keys = n_start + tl.arange(0, BLOCK_N)
        visible = is_visible(positions[:, None], keys[None, :], seqlen_k, window_size, CAUSAL, WINDOW)
        _, ds = differentiate_scores(
            s, dp, lse_log2[:, None], delta[:, None], visible, softmax_scale, softcap, SOFTCAP, MASKED
        )
        dq = matmul(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["num_heads", "heads_per_kv_head", "seqlen_q", "seqlen_k", "window_size"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr,
    dlse_ptr,  # strides as lse, or not given
    dq_ptr, delta_ptr,  # delta: strides as lse
    cu_seqlens_q, cu_seqlens_k,  # (documents + 1,), or not given
    stride_qb, stride_qh, stride_qm, stride_qd,  # the sequences of packed documents have stride 0
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_lb, stride_lh,
    num_heads, heads_per_kv_head,
    seqlen_q, seqlen_k,  # of every sequence; of the longest if VARLEN
    softmax_scale, softcap, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    num_m_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pair = tl.program_id(0) // num_m_blocks
    m_start = tl.program_id(0) % num_m_blocks * BLOCK_M
    if CAUSAL:  # the last queries see the most keys: they go first
        m_start = (num_m_blocks - 1) * BLOCK_M - m_start
    sequence = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    kv_head = head // heads_per_kv_head
    start_q, seqlen_q = rows_of_sequence(cu_seqlens_q, sequence, seqlen_q, VARLEN)
    start_k, seqlen_k = rows_of_sequence(cu_seqlens_k, sequence, seqlen_k, VARLEN)
    if m_start >= seqlen_q:
        return
    q_ptr += sequence * stride_qb + head * stride_qh + start_q * stride_qm
    k_ptr += sequence * stride_kb + kv_head * stride_kh + start_k * stride_kn
    v_ptr += sequence * stride_vb + kv_head * stride_vh + start_k * stride_vn
    out_ptr += sequence * stride_ob + head * stride_oh + start_q * stride_om
    dout_ptr += sequence * stride_dob + head * stride_doh + start_q * stride_dom
    dq_ptr += sequence * stride_dqb + head * stride_dqh + start_q * stride_dqm
    row_offset = sequence * stride_lb + head * stride_lh + start_q

    offs_m = m_start + tl.arange(0, BLOCK_M)
    positions = offs_m + (seqlen_k - seqlen_q)
    out = load_tile(out_ptr, m_start, seqlen_q, stride_om, stride_od, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    dout = load_tile(dout_ptr, m_start, seqlen_q, stride_dom, stride_dod, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)  # [BLOCK_M]
    if dlse_ptr is not None:
        delta -= load_rows(dlse_ptr + row_offset, offs_m, seqlen_q, 0.0)
    tl.store(delta_ptr + row_offset + offs_m, delta, mask=offs_m < seqlen_q)

    lse_log2 = in_powers_of_two(load_rows(lse_ptr + row_offset, offs_m, seqlen_q, float("inf")))
    q = load_tile(q_ptr, m_start, seqlen_q, stride_qm, stride_qd, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    some, full, partly, end = visible_blocks(m_start, seqlen_q, seqlen_k, window_size, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    if WINDOW:
        dq = add_dq_of_blocks(
            dq, q, dout, lse_log2, delta, k_ptr, v_ptr, some, full, positions, seqlen_k,
            stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
            HEAD_DIM, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True,
        )  # fmt: skip
    dq = add_dq_of_blocks(
        dq, q, dout, lse_log2, delta, k_ptr, v_ptr, full, partly, positions, seqlen_k,
        stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
        HEAD_DIM, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, False,
    )  # fmt: skip
    dq = add_dq_of_blocks(
        dq, q, dout, lse_log2, delta, k_ptr, v_ptr, partly, end, positions, seqlen_k,
        stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
        HEAD_DIM, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True,
    )  # fmt: skip
    store_tile(dq_ptr, dq * softmax_scale, m_start, seqlen_q, stride_dqm, stride_dqd, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def seeing_blocks(
    n_start, seqlen_q, seqlen_k, window_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Queries (some, full, partly, end) for the keys from n_start on: those before `some` and from `end` on see none,
    those in full .. partly see all."""
    first = n_start - (seqlen_k - seqlen_q)  # the query that stands at the first key, and at the last
    last = tl.minimum(n_start + BLOCK_N, seqlen_k) - 1 - (seqlen_k - seqlen_q)
    some = 0
    full = 0
    end = seqlen_q
    if CAUSAL:
        some = tl.maximum(first, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(last, 0), BLOCK_M) * BLOCK_M
    elif WINDOW:
        some = tl.maximum(first - window_size + 1, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(last - window_size + 1, 0), BLOCK_M) * BLOCK_M
    partly = end
    if WINDOW:
        end = tl.minimum(end, last + window_size)
        full = tl.minimum(full, tl.maximum(tl.cdiv(end, BLOCK_M) * BLOCK_M, some))
        partly = tl.maximum(tl.maximum(tl.minimum(partly, first + window_size), 0) // BLOCK_M * BLOCK_M, full)
    return some, full, partly, end


@triton.jit
def add_dkdv_of_blocks(
    dk, dv, k, v, keys, q_ptr, dout_ptr, lse_ptr, delta_ptr, begin, end, seqlen_q, seqlen_k,
    stride_qm, stride_qd, stride_dom, stride_dod, softmax_scale, softcap, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dkdv_kernel's main loop over the queries begin .. end. MASKED: some do not see some of the keys. Queries past
    the end need no mask, their P is 0; keys past the end neither, they give rows of dK and dV that nobody stores."""
    BLOCK_D: tl.constexpr = k.shape[1]
    for m_start in range(begin, end, BLOCK_M):
        q = load_tile(q_ptr, m_start, seqlen_q, stride_qm, stride_qd, BLOCK_M, HEAD_DIM, BLOCK_D, False)
        dout = load_tile(dout_ptr, m_start, seqlen_q, stride_dom, stride_dod, BLOCK_M, HEAD_DIM, BLOCK_D, False)
        offs_m = m_start + tl.arange(0, BLOCK_M)
        lse_log2 = in_powers_of_two(load_rows(lse_ptr, offs_m, seqlen_q, float("inf")))
        delta = load_rows(delta_ptr, offs_m, seqlen_q, 0.0)
        s = matmul(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
        dp = matmul(v, tl.trans(dout))
        positions = offs_m + (seqlen_k - seqlen_q)
        visible = is_visible(positions[None, :], keys[:, None], seqlen_k, window_size, CAUSAL, WINDOW)
        p, ds = differentiate_scores(
            s, dp, lse_log2[None, :], delta[None, :], visible, softmax_scale, softcap, SOFTCAP, MASKED
        )
        dv = matmul(p.to(dout.dtype), dout, dv)
        dk = matmul(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["num_kv_heads", "heads_per_kv_head", "seqlen_q", "seqlen_k", "window_size"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q, cu_seqlens_k,  # (documents + 1,), or not given
    stride_qb, stride_qh, stride_qm, stride_qd,  # the sequences of packed documents have stride 0
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_lb, stride_lh,
    num_kv_heads, heads_per_kv_head,
    seqlen_q, seqlen_k,  # of every sequence; of the longest if VARLEN
    softmax_scale, softcap, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    num_n_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    pair = tl.program_id(0) // num_n_blocks
    n_start = tl.program_id(0) % num_n_blocks * BLOCK_N  # the first keys are seen by the most queries: they go first
    sequence = (pair // num_kv_heads).to(tl.int64)
    kv_head = (pair % num_kv_heads).to(tl.int64)
    start_q, seqlen_q = rows_of_sequence(cu_seqlens_q, sequence, seqlen_q, VARLEN)
    start_k, seqlen_k = rows_of_sequence(cu_seqlens_k, sequence, seqlen_k, VARLEN)
    if n_start >= seqlen_k:
        return
    k_ptr += sequence * stride_kb + kv_head * stride_kh + start_k * stride_kn
    v_ptr += sequence * stride_vb + kv_head * stride_vh + start_k * stride_vn
    dk_ptr += sequence * stride_dkb + kv_head * stride_dkh + start_k * stride_dkn
    dv_ptr += sequence * stride_dvb + kv_head * stride_dvh + start_k * stride_dvn

    keys = n_start + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, n_start, seqlen_k, stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    v = load_tile(v_ptr, n_start, seqlen_k, stride_vn, stride_vd, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    some, full, partly, end = seeing_blocks(n_start, seqlen_q, seqlen_k, window_size, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for head in range(kv_head * heads_per_kv_head, (kv_head + 1) * heads_per_kv_head):
        q_head = q_ptr + sequence * stride_qb + head * stride_qh + start_q * stride_qm
        dout_head = dout_ptr + sequence * stride_dob + head * stride_doh + start_q * stride_dom
        row_offset = sequence * stride_lb + head * stride_lh + start_q
        if CAUSAL or WINDOW:
            dk, dv = add_dkdv_of_blocks(
                dk, dv, k, v, keys, q_head, dout_head, lse_ptr + row_offset, delta_ptr + row_offset, some, full,
                seqlen_q, seqlen_k, stride_qm, stride_qd, stride_dom, stride_dod, softmax_scale, softcap, window_size,
                HEAD_DIM, BLOCK_M, CAUSAL, WINDOW, SOFTCAP, True,
            )  # fmt: skip
        dk, dv = add_dkdv_of_blocks(
            dk, dv, k, v, keys, q_head, dout_head, lse_ptr + row_offset, delta_ptr + row_offset, full, partly,
            seqlen_q, seqlen_k, stride_qm, stride_qd, stride_dom, stride_dod, softmax_scale, softcap, window_size,
            HEAD_DIM, BLOCK_M, CAUSAL, WINDOW, SOFTCAP, False,
        )  # fmt: skip
        if WINDOW:
            dk, dv = add_dkdv_of_blocks(
                dk, dv, k, v, keys, q_head, dout_head, lse_ptr + row_offset, delta_ptr + row_offset, partly, end,
                seqlen_q, seqlen_k, stride_qm, stride_qd, stride_dom, stride_dod, softmax_scale, softcap, window_size,
                HEAD_DIM, BLOCK_M, CAUSAL, WINDOW, SOFTCAP, True,
            )  # fmt: skip
    store_tile(dk_ptr, dk * softmax_scale, n_start, seqlen_k, stride_dkn, stride_dkd, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr, dv, n_start, seqlen_k, stride_dvn, stride_dvd, BLOCK_N, HEAD_DIM, BLOCK_D)


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
    """(dq, dk, dv), laid out as q, k and v, which are shaped as in triton_forward.forward; dout and out as q."""
    sequences = (None, None, q.shape[2], k.shape[2])
    return differentiate(dout, dlse, q, k, v, out, lse, sequences, (softmax_scale, causal, window_size, softcap))


def varlen_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), laid out as q, k and v, which are shaped as in triton_forward.varlen_forward; dout and out as q."""
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return differentiate(dout, dlse, q, k, v, out, lse, sequences, (softmax_scale, causal, window_size, softcap))


def differentiate(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both kernels."""
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    launch_dq(dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse, dq, delta, sequences, options)
    launch_dkdv(dout, q, k, v, lse, delta, dk, dv, sequences, options)
    return dq, dk, dv


def launch_dq(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    delta: Tensor,
    sequences: Sequences,
    options: Options,
    tile: Tile | None = None,
) -> None:
    """Write dq and delta, with the tile of the table or with a given one; dlse and delta are laid out as lse."""
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k = sequences
    num_pairs = count_sequences(q, cu_seqlens_q) * q.shape[1]
    if num_pairs * seqlen_q == 0:
        return
    numbers, (causal, window, capped, _, varlen) = kernel_options(q.shape[-1], sequences, options)
    arguments = (
        q, k, v, out, dout, lse, dlse, dq, delta, cu_seqlens_q, cu_seqlens_k,
        *strides(q), *strides(k), *strides(v), *strides(out), *strides(dout), *strides(dq), *lse_strides(lse),
        q.shape[1], q.shape[1] // k.shape[1], seqlen_q, seqlen_k, *numbers,
    )  # fmt: skip

    def run(tile: Tile) -> None:
        grid = (triton.cdiv(seqlen_q, tile.block_m) * num_pairs,)
        values = (*arguments, tile.block_m, tile.block_n, causal, window, capped, varlen)
        launched(dq_kernel[grid](*values, num_warps=tile.warps, num_stages=tile.stages), grid, values)

    launch_with_fitting_tile(run, BACKWARD_DQ, q, causal, tile)


def launch_dkdv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    sequences: Sequences,
    options: Options,
    tile: Tile | None = None,
) -> None:
    """Write dk and dv, once delta is there."""
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k = sequences
    num_pairs = count_sequences(q, cu_seqlens_q) * k.shape[1]
    if num_pairs * seqlen_k == 0:
        return
    numbers, (causal, window, capped, _, varlen) = kernel_options(q.shape[-1], sequences, options)
    arguments = (
        q, k, v, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k,
        *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dk), *strides(dv), *lse_strides(lse),
        k.shape[1], q.shape[1] // k.shape[1], seqlen_q, seqlen_k, *numbers,
    )  # fmt: skip

    def run(tile: Tile) -> None:
        grid = (triton.cdiv(seqlen_k, tile.block_n) * num_pairs,)
        values = (*arguments, tile.block_m, tile.block_n, causal, window, capped, varlen)
        launched(dkdv_kernel[grid](*values, num_warps=tile.warps, num_stages=tile.stages), grid, values)

    launch_with_fitting_tile(run, BACKWARD_DKDV, q, causal, tile)
