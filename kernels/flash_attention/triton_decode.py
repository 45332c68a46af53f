"""Attention of a few new queries over a long cache, split over the keys so that one query fills the GPU.

What it costs is reading the cache, once. A split is a stretch of one sequence's keys, of one key head:

             keys of the sequence, as many as cache_seqlens says
    head 0   |- split 0 -|- split 1 -|- split 2 -|
    head 1   |- split 0 -|- split 1 -|- split 2 -|

One program owns the keys of one split and up to BLOCK_M rows: the queries of all the query heads that share the key
head, so that these read it once together. It runs the forward pass's own loop (triton_forward.attend_blocks). With one
split that is the result. With more, its softmax is that of the split's keys alone, and a second kernel weighs
the splits' results: out = sum_s exp(lse_s) out_s / sum_s exp(lse_s). (Flash-Decoding; FlashAttention-2, section 3.2)

The number of splits follows from shapes alone, since cache_seqlens stay on the device: the host never waits. A shorter
sequence has the same number of shorter splits.

Arguments were checked in op.py.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash_attention.tiles import DECODE, DECODE_MANY, Tile, card, launch_with_fitting_tile
from kernels.flash_attention.triton_forward import (
    LOG2_E,
    attend_blocks,
    kernel_options,
    padded,
    strides,
)
from kernels.launch import launched

MAX_ROWS = 64  # of one program's tile
MAX_SPLITS = 128
# At least: below that a second kernel costs more than splitting saves. us of 1024 keys with 1024, 512, 256, 128 and 64,
# on an H200, one query of 32 heads over the keys of 8, head_dim 128: 19.8, 14.8, 12.3, 11.0 and 12.4 (cuDNN 11.8).
KEYS_PER_SPLIT = 128


@triton.jit(do_not_specialize=["num_kv_heads", "heads_per_kv_head", "seqlen_q", "num_splits", "window_size"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr,
    cache_seqlens,  # (batch,)
    out_ptr,  # strides as below; or, if SPLIT, (batch, num_heads, seqlen_q, num_splits, HEAD_DIM) fp32
    lse_ptr,  # if SPLIT: (batch, num_heads, seqlen_q, num_splits), in powers of two
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    num_kv_heads, heads_per_kv_head, seqlen_q, num_splits, softmax_scale, softcap, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SCALE_FIRST: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # the second kernel may take its place now, and wait there
    split = tl.program_id(0) % num_splits
    tile = tl.program_id(0) // num_splits
    num_row_blocks = tl.cdiv(heads_per_kv_head * seqlen_q, BLOCK_M)
    pair = tile // num_row_blocks
    sequence = (pair // num_kv_heads).to(tl.int64)
    kv_head = (pair % num_kv_heads).to(tl.int64)
    seqlen_k = tl.load(cache_seqlens + sequence)

    # Rows: the queries in order, and for each the heads of the group.
    rows = tile % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    query = rows // heads_per_kv_head
    head = kv_head * heads_per_kv_head + rows % heads_per_kv_head
    inside = query < seqlen_q
    offs_d = tl.arange(0, BLOCK_D)
    inside_d = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_rows = q_ptr + sequence * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qm
    q = tl.load(q_rows[:, None] + offs_d.to(tl.int64)[None, :] * stride_qd, mask=inside_d, other=0.0)
    positions = query + (seqlen_k - seqlen_q)

    first = tile % num_row_blocks * BLOCK_M // heads_per_kv_head + seqlen_k - seqlen_q  # the first row's position
    begin = 0
    if WINDOW:
        begin = tl.maximum(first - window_size + 1, 0) // BLOCK_N * BLOCK_N
    keys_per_split = tl.cdiv(tl.cdiv(seqlen_k - begin, BLOCK_N), num_splits) * BLOCK_N
    begin += split * keys_per_split
    end = tl.minimum(begin + keys_per_split, seqlen_k)
    partly = begin  # from here on some rows do not see every key of a block
    if not WINDOW:
        partly = tl.maximum(tl.minimum(first + 1, end) // BLOCK_N * BLOCK_N, begin)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    k_ptr += sequence * stride_kb + kv_head * stride_kh
    v_ptr += sequence * stride_vb + kv_head * stride_vh
    if not WINDOW:
        acc, row_max, row_sum = attend_blocks(
            acc, row_max, row_sum, q, k_ptr, v_ptr, begin, partly, positions, seqlen_k,
            stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
            HEAD_DIM, BLOCK_N, True, WINDOW, SOFTCAP, SCALE_FIRST, False,
        )  # fmt: skip
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptr, v_ptr, partly, end, positions, seqlen_k,
        stride_kn, stride_kd, stride_vn, stride_vd, softmax_scale, softcap, window_size,
        HEAD_DIM, BLOCK_N, True, WINDOW, SOFTCAP, SCALE_FIRST, True,
    )  # fmt: skip

    blind = row_sum == 0.0
    acc = acc * tl.where(blind, 0.0, 1.0 / row_sum)[:, None]
    if SPLIT:
        factor = 1.0 if SCALE_FIRST else softmax_scale * LOG2_E
        lse = tl.where(blind, float("-inf"), row_max * factor + tl.log2(row_sum))
        place = ((sequence * num_kv_heads * heads_per_kv_head + head) * seqlen_q + query) * num_splits + split
        tl.store(lse_ptr + place, lse, mask=inside)
        tl.store(out_ptr + place[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=inside_d)
    else:
        out_rows = out_ptr + sequence * stride_ob + head * stride_oh + query.to(tl.int64) * stride_om
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_rows[:, None] + offs_d.to(tl.int64)[None, :] * stride_od, out, mask=inside_d)


@triton.jit(do_not_specialize=["num_heads", "seqlen_q", "num_splits"])
def combine_kernel(
    partial_out_ptr,  # (batch, num_heads, seqlen_q, num_splits, HEAD_DIM) fp32
    partial_lse_ptr,  # (batch, num_heads, seqlen_q, num_splits), in powers of two
    out_ptr, stride_ob, stride_oh, stride_om, stride_od, num_heads, seqlen_q, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program, one query of one head: weigh the results of the splits."""
    if EARLY:
        tl.extra.cuda.gdc_wait()  # for the first kernel's end
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    lse = tl.load(partial_lse_ptr + row * num_splits + offs_s, mask=offs_s < num_splits, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))  # [BLOCK_S]
    total = tl.sum(weight, axis=0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    inside = (offs_s < num_splits)[:, None] & (offs_d < HEAD_DIM)[None, :]
    pointers = partial_out_ptr + (row * num_splits + offs_s[:, None]) * HEAD_DIM + offs_d[None, :]
    out = tl.sum(tl.load(pointers, mask=inside, other=0.0) * weight[:, None], axis=0)  # [BLOCK_D]
    sequence = row // seqlen_q // num_heads
    head = row // seqlen_q % num_heads
    out_row = out_ptr + sequence * stride_ob + head * stride_oh + row % seqlen_q * stride_om
    tl.store(out_row + offs_d.to(tl.int64) * stride_od, out.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    window_size: int,
    softcap: float,
) -> Tensor:
    """out as q (batch, num_heads, seqlen_q, head_dim); caches (batch, num_kv_heads, capacity, head_dim)."""
    out = torch.empty_like(q)
    launch(q, k_cache, v_cache, cache_seqlens, out, softmax_scale, window_size, softcap)
    return out


def launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    out: Tensor,
    softmax_scale: float,
    window_size: int,
    softcap: float,
    num_splits: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Run `decode_kernel`, and `combine_kernel` if there are several splits."""
    batch_size, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    heads_per_kv_head = num_heads // num_kv_heads
    num_rows = heads_per_kv_head * seqlen_q
    if batch_size * num_rows == 0:
        return
    block_m = min(max(16, triton.next_power_of_2(num_rows)), MAX_ROWS)
    num_tiles = batch_size * num_kv_heads * triton.cdiv(num_rows, block_m)
    if num_splits is None:
        num_splits = count_splits(num_tiles, capacity, q.device)
    target, lse = out, None
    if num_splits > 1:
        target = torch.empty((*q.shape[:3], num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((*q.shape[:3], num_splits), dtype=torch.float32, device=q.device)
    options = (softmax_scale, True, window_size, softcap)

    def run(tile: Tile) -> None:
        sequences = (None, None, seqlen_q, capacity)
        numbers, (_, window, capped, scale_first, _) = kernel_options(head_dim, sequences, options)
        grid = (num_splits * num_tiles,)
        values = (
            q, k_cache, v_cache, cache_seqlens, target, lse,
            *strides(q), *strides(k_cache), *strides(v_cache), *strides(out),
            num_kv_heads, heads_per_kv_head, seqlen_q, num_splits, *numbers, block_m, tile.block_n,
            window, capped, scale_first, num_splits > 1, num_splits > 1 and card(q.device) == "hopper",
        )  # fmt: skip
        launched(decode_kernel[grid](*values, num_warps=tile.warps, num_stages=tile.stages), grid, values)

    many = num_splits * num_tiles > 2 * count_processors(q.device)
    launch_with_fitting_tile(run, DECODE_MANY if many else DECODE, q, True, tile)
    if lse is not None:
        combine(target, lse, out)


def combine(partial_out: Tensor, lse: Tensor, out: Tensor) -> None:
    """Run `combine_kernel` on what `decode_kernel` left behind."""
    num_heads, seqlen_q, num_splits, head_dim = partial_out.shape[1:]
    block_s = triton.next_power_of_2(num_splits)
    grid = (out.shape[0] * num_heads * seqlen_q,)
    early = card(out.device) == "hopper"
    shape = (num_heads, seqlen_q, num_splits, head_dim, padded(head_dim), block_s)
    values = (partial_out, lse, out, *strides(out), *shape, early)
    launched(combine_kernel[grid](*values, **({"launch_pdl": True} if early else {})), grid, values)


def count_splits(num_tiles: int, capacity: int, device: torch.device) -> int:
    """As many as give every processor a program, but none of them less than KEYS_PER_SPLIT keys."""
    return max(1, min(count_processors(device) // num_tiles, MAX_SPLITS, capacity // KEYS_PER_SPLIT))


@functools.cache
def count_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a card; a few for Triton's interpreter, so that it splits too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
