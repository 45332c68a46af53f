"""FlashAttention-2 forward in Triton, for every card that Triton knows. (arXiv:2307.08691, algorithm 1)

For each row i of S = softmax_scale Q K^T (after softcap), with the sum over the keys that the row sees:

    lse_i = log sum_j exp(S_ij)          O_i = sum_j exp(S_ij - lse_i) V_j

One program owns BLOCK_M queries of one head and walks over the blocks of BLOCK_N keys that some of them see:

             keys ->
    queries  . M M .      M  some pairs are hidden: the scores are masked (causal diagonal, window's edge, last keys)
       |     . F F M      F  every query sees every key: no mask
       v     . F F F M    .  nobody sees anybody: never loaded

with a running maximum m and a running sum l of each row; what came before is rescaled by alpha = exp(m_old - m_new)
when the maximum grows, and the division by l is deferred to the end. Exponentials are powers of two, with log2(e)
folded into the scale. Of the scores only lse is kept, for the backward pass.

    paper     here                          shape
    Q_i       q                             [BLOCK_M, BLOCK_D]    BLOCK_D: head_dim, padded to a power of two
    K_j, V_j  k, v                          [BLOCK_N, BLOCK_D]
    S, P      s, p                          [BLOCK_M, BLOCK_N]
    O         acc                           [BLOCK_M, BLOCK_D]
    m, l      row_max, row_sum              [BLOCK_M]
    L         lse                           [BLOCK_M]

Packed documents differ in one thing: where a program's rows begin and how many there are is read from cu_seqlens.

Knows nothing of the Hopper kernels: dispatch.py chooses. Arguments were checked in op.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash_attention.op import NO_WINDOW
from kernels.flash_attention.tiles import FORWARD, Tile, launch_with_fitting_tile
from kernels.launch import launched

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_WINDOW = 2**30  # position + window_size is to fit in 32 bits
Sequences = tuple[
    Tensor | None, Tensor | None, int, int
]  # cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k (of the longest)
Options = tuple[float, bool, int, float]  # softmax_scale, causal, window_size, softcap


@triton.jit
def rows_of_sequence(cu_seqlens, sequence, seqlen, VARLEN: tl.constexpr):
    """First row and number of rows of a sequence: 0 and seqlen, or read from cu_seqlens for packed documents."""
    if VARLEN:
        start = tl.load(cu_seqlens + sequence)
        return start.to(tl.int64), tl.load(cu_seqlens + sequence + 1) - start
    else:
        return sequence * 0, seqlen


@triton.jit
def load_tile(
    x, start, length, stride_row, stride_d, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of x (length, HEAD_DIM), [ROWS, BLOCK_D]; zeros past its ends.

    WHOLE promises that all the rows are there. Offsets are 64 bits wide: strides may be anything.
    """
    rows = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    x += tl.cast(start, tl.int64) * stride_row
    pointers = x + rows.to(tl.int64)[:, None] * stride_row + offs_d.to(tl.int64)[None, :] * stride_d
    inside = (start + rows < length)[:, None]
    if HEAD_DIM == BLOCK_D:
        if WHOLE:
            return tl.load(pointers)
        return tl.load(pointers, mask=inside, other=0.0)
    if WHOLE:
        return tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers, mask=inside & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_tile(
    x, tile, start, length, stride_row, stride_d, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The opposite of load_tile, in x's dtype."""
    rows = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    x += tl.cast(start, tl.int64) * stride_row
    pointers = x + rows.to(tl.int64)[:, None] * stride_row + offs_d.to(tl.int64)[None, :] * stride_d
    inside = (start + rows < length)[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (offs_d < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def matmul(a, b, acc=None):
    """a b (+ acc) in fp32. fp32 operands are multiplied as fp32, not as tf32, and a tile's sum is made before it is
    added to acc: one chain of additions through thousands of keys would round worse than plain torch."""
    if a.dtype == tl.float32 and acc is not None:
        # A limit on imprecise accumulation, which fp32 has none of, keeps the compiler from starting the sum at acc.
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=a.shape[1])
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh to fp32 accuracy: below 1/4 a series, where the quotient would cancel."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    quotient = 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1)
    return tl.where(tl.abs(x) < 0.25, x * series, quotient)


@triton.jit
def visible_blocks(
    m_start, seqlen_q, seqlen_k, window_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys (some, full, partly, end) for the queries from m_start on: those before `some` and from `end` on nobody
    sees, those in full .. partly all see. All but `end` are multiples of BLOCK_N."""
    first = m_start + seqlen_k - seqlen_q  # position among the keys of the tile's first query, and of its last
    last = tl.minimum(m_start + BLOCK_M, seqlen_q) - 1 + seqlen_k - seqlen_q
    some = 0
    full = 0
    all_end = seqlen_k  # end of the keys that all see
    end = seqlen_k
    if CAUSAL:
        all_end = tl.minimum(all_end, first + 1)
        end = tl.minimum(end, last + 1)
    elif WINDOW:
        all_end = tl.minimum(all_end, first + window_size)
        end = tl.minimum(end, last + window_size)
    if WINDOW:
        some = tl.maximum(first - window_size + 1, 0) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(last - window_size + 1, 0), BLOCK_N) * BLOCK_N
        full = tl.minimum(full, tl.maximum(tl.cdiv(end, BLOCK_N) * BLOCK_N, some))
    partly = tl.maximum(tl.maximum(all_end, 0) // BLOCK_N * BLOCK_N, full)
    return some, full, partly, end


@triton.jit
def is_visible(positions, keys, seqlen_k, window_size, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at a position (i + seqlen_k - seqlen_q) sees a key; the two broadcast against each other."""
    visible = keys < seqlen_k
    if CAUSAL:
        visible = visible & (keys <= positions)
    elif WINDOW:
        visible = visible & (keys < positions + window_size)
    if WINDOW:
        visible = visible & (keys > positions - window_size)
    return visible


@triton.jit
def online_softmax(s, row_max, row_sum, scale_log2, MASKED: tl.constexpr):
    """Lines 9 and 10 of algorithm 1: P, the new maximum and sum, and the rescale of the old ones."""
    new_max = tl.maximum(row_max, tl.max(s, axis=1))
    shift = new_max * scale_log2
    if MASKED:
        shift = tl.where(new_max == float("-inf"), 0.0, shift)  # no key seen yet: -inf - 0, not -inf + inf
    alpha = tl.exp2(row_max * scale_log2 - shift)
    p = tl.exp2(s * scale_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
    return p, new_max, row_sum * alpha + tl.sum(p, axis=1), alpha


@triton.jit
def attend_blocks(
    acc, row_max, row_sum, q, k_ptr, v_ptr, begin, end, positions, seqlen_k,
    stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALE_FIRST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The main loop over the keys begin .. end. MASKED: some of them are hidden from some of the queries."""
    BLOCK_D: tl.constexpr = q.shape[1]
    scale_log2 = softmax_scale * LOG2_E
    for n_start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, n_start, seqlen_k, stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
        s = matmul(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            s = tanh(s * (softmax_scale / softcap)) * (softcap * LOG2_E)
        elif SCALE_FIRST:
            s = s * scale_log2
        if MASKED:
            keys = n_start + tl.arange(0, BLOCK_N)
            s = tl.where(
                is_visible(positions[:, None], keys[None, :], seqlen_k, window_size, CAUSAL, WINDOW), s, float("-inf")
            )
        p, row_max, row_sum, alpha = online_softmax(s, row_max, row_sum, 1.0 if SCALE_FIRST else scale_log2, MASKED)
        acc = acc * alpha[:, None]
        v = load_tile(v_ptr, n_start, seqlen_k, stride_vn, stride_vd, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
        acc = matmul(p.to(v.dtype), v, acc)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "heads_per_kv_head", "seqlen_q", "seqlen_k", "window_size"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    cu_seqlens_q, cu_seqlens_k,  # (documents + 1,), or not given
    stride_qb, stride_qh, stride_qm, stride_qd,  # the sequences of packed documents have stride 0
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_lb, stride_lh,  # of lse
    num_heads, heads_per_kv_head,
    seqlen_q, seqlen_k,  # of every sequence; of the longest if VARLEN
    softmax_scale, softcap, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SCALE_FIRST: tl.constexpr, VARLEN: tl.constexpr,
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
    lse_ptr += sequence * stride_lb + head * stride_lh + start_q

    offs_m = m_start + tl.arange(0, BLOCK_M)
    positions = offs_m + (seqlen_k - seqlen_q)
    q = load_tile(q_ptr, m_start, seqlen_q, stride_qm, stride_qd, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    some, full, partly, end = visible_blocks(m_start, seqlen_q, seqlen_k, window_size, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    if WINDOW:
        acc, row_max, row_sum = attend_blocks(
            acc, row_max, row_sum, q, k_ptr, v_ptr, some, full, positions, seqlen_k,
            stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
            HEAD_DIM, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, SCALE_FIRST, True,
        )  # fmt: skip
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptr, v_ptr, full, partly, positions, seqlen_k,
        stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
        HEAD_DIM, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, SCALE_FIRST, False,
    )  # fmt: skip
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptr, v_ptr, partly, end, positions, seqlen_k,
        stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
        HEAD_DIM, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, SCALE_FIRST, True,
    )  # fmt: skip

    # O / l and lse = m + log l; the row that saw no key has l = 0.
    blind = row_sum == 0.0
    acc = acc * tl.where(blind, 0.0, 1.0 / row_sum)[:, None]
    factor = 1.0 if SCALE_FIRST else softmax_scale * LOG2_E
    lse = tl.where(blind, float("-inf"), (row_max * factor + tl.log2(row_sum)) * LN_2)
    store_tile(out_ptr, acc, m_start, seqlen_q, stride_om, stride_od, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < seqlen_q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out, lse): q (batch, num_heads, seqlen_q, head_dim), k and v (batch, num_kv_heads, seqlen_k, head_dim)."""
    batch_size, num_heads, seqlen_q, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((batch_size, num_heads, seqlen_q), dtype=torch.float32, device=q.device)
    sequences = (None, None, seqlen_q, k.shape[2])
    launch(q, k, v, out, lse, sequences, (softmax_scale, causal, window_size, softcap))
    return out, lse


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse): q (total_q, num_heads, head_dim), k and v (total_k, num_kv_heads, head_dim), packed; lse
    (num_heads, total_q)."""
    out = torch.empty_like(q)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    launch(q, k, v, out, lse, sequences, (softmax_scale, causal, window_size, softcap))
    return out, lse


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    options: Options,
    tile: Tile | None = None,
) -> None:
    """Write out and lse, with the tile of the table or with a given one."""
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k = sequences
    num_pairs = count_sequences(q, cu_seqlens_q) * q.shape[1]
    if num_pairs * seqlen_q == 0:
        return
    numbers, flags = kernel_options(q.shape[-1], sequences, options)
    arguments = (
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
        *strides(q), *strides(k), *strides(v), *strides(out), *lse_strides(lse),
        q.shape[1], q.shape[1] // k.shape[1], seqlen_q, seqlen_k, *numbers,
    )  # fmt: skip

    def run(tile: Tile) -> None:
        grid = (triton.cdiv(seqlen_q, tile.block_m) * num_pairs,)
        values = (*arguments, tile.block_m, tile.block_n, *flags)
        launched(forward_kernel[grid](*values, num_warps=tile.warps, num_stages=tile.stages), grid, values)

    launch_with_fitting_tile(run, FORWARD, q, flags[0], tile)


def count_sequences(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of sequence, head, row and column; the sequences of packed documents have none."""
    if x.dim() == 4:
        return x.stride()
    row, head, column = x.stride()
    return 0, head, row, column


def lse_strides(lse: Tensor) -> tuple[int, int]:
    """Strides of sequence and head of lse, (batch, num_heads, seqlen_q) or (num_heads, total_q)."""
    return (lse.stride(0), lse.stride(1)) if lse.dim() == 3 else (0, lse.stride(0))


def kernel_options(head_dim: int, sequences: Sequences, options: Options) -> tuple[tuple, tuple[bool, ...]]:
    """The kernels' arguments softmax_scale to BLOCK_D, and CAUSAL, WINDOW, SOFTCAP, SCALE_FIRST and VARLEN.

    SCALE_FIRST: scores are scaled before their maximum is taken, not after, as softcap and a negative scale need it.
    """
    softmax_scale, causal, window_size, softcap = options
    capped = softcap > 0.0
    numbers = (softmax_scale, softcap, min(window_size, MAX_WINDOW), head_dim, padded(head_dim))
    flags = (causal, window_size != NO_WINDOW, capped, capped or softmax_scale <= 0.0, sequences[0] is not None)
    return numbers, flags


def padded(head_dim: int) -> int:
    """BLOCK_D: the power of two that holds head_dim, at least 16 as matrix units need it."""
    return max(16, triton.next_power_of_2(head_dim))
