"""top_k on the GPU. The definition is reference.py's; triton_select.py says how selection works.

    short rows   one program holds a whole row in registers: select, then sort what was selected
    long rows    one program per row reads it several times, block by block, and writes the best k out in index order;
                 torch sorts them

A candidate is one 64-bit integer, the key of a value above the complement of its index: larger is better, no two equal.

Knows Triton; knows nothing of models. Arguments were checked in op.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k.triton_sample import _count_from, _load_block, _nth_tie
from kernels.top_k.triton_select import ordered_key, value_of_key

MAX_SHORT_ROW = 2048


@triton.jit
def _candidate(key, index):
    return ((key.to(tl.int64) - 0x80000000) << 32) | (0x7FFFFFFF - index)


@triton.jit
def _top_k_short(x, values, indices, batch, n, row_stride, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program, ROWS rows of up to BLOCK elements, sorted whole."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = (rows < batch) & (index < n)
    v = tl.load(x + rows * row_stride + index, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    key = tl.where(inside, ordered_key(v), 0)
    candidates = tl.sort(_candidate(key, index), descending=True)
    value = value_of_key(((candidates >> 32) + 0x80000000).to(tl.uint32))
    wanted = (rows < batch) & (index < k)
    tl.store(values + rows * k + index, value.to(values.dtype.element_ty), mask=wanted)
    tl.store(indices + rows * k + index, 0x7FFFFFFF - (candidates & 0x7FFFFFFF), mask=wanted)


@triton.jit
def _top_k_long(x, candidates, n, row_stride, k, BLOCK: tl.constexpr):
    """One program, one row: its best k as candidates (batch, k), in index order."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    cut = tl.full((), 0, tl.uint32)
    for bit in range(32):
        trial = cut | (tl.full((), 0x80000000, tl.uint32) >> bit)
        cut = tl.where(_count_from(x, n, trial, BLOCK) >= k, trial, cut)
    above = tl.full((), 0, tl.int32)
    if cut != 0xFFFFFFFF:
        above = _count_from(x, n, cut + 1, BLOCK)
    last = _nth_tie(x, n, cut, k - above, BLOCK)
    written = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        index, _, key = _load_block(x, start, n, BLOCK)
        kept = (key > cut) | ((key == cut) & (index <= last))
        slot = written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(candidates + row * k + slot, _candidate(key, index), mask=kept)
        written += tl.sum(kept.to(tl.int32))


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The op `top_k` on a CUDA device."""
    batch, n = x.shape
    values, indices = x.new_empty((batch, k)), x.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return values, indices
    with torch.cuda.device_of(x):
        if n <= MAX_SHORT_ROW:
            block = max(16, triton.next_power_of_2(n))
            rows = max(1, 1024 // block)
            grid = (triton.cdiv(batch, rows),)
            _top_k_short[grid](x, values, indices, batch, n, x.stride(0), k, ROWS=rows, BLOCK=block, num_warps=4)
            return values, indices
        candidates = x.new_empty((batch, k), dtype=torch.int64)
        _top_k_long[(batch,)](x, candidates, n, x.stride(0), k, BLOCK=4096, num_warps=8)
    indices = torch.sort(candidates, dim=-1, descending=True).values.bitwise_and_(0x7FFFFFFF).neg_().add_(0x7FFFFFFF)
    return x.gather(-1, indices) + 0.0, indices
