"""Top-K, step 2: K times the maximum, in one kernel of our own.

Idea. Do not sort. Find the largest, write it down, find the largest of what is left, K times over.

    (v_0, i_0) = the largest x[i]; of equal ones, the one with the lowest i
    (v_r, i_r) = the same, of those with x[i] < v_(r-1), or x[i] = v_(r-1) and i > i_(r-1)        r = 1 .. K - 1

One program owns one row and reads all of it again in every round. Nothing is taken out: what was found in earlier
rounds is passed over, because it does not come after the last one found.

    row       [ block | block | block | ... ]      read from memory K times
    a round    every thread keeps the best pair it has seen, block after block;
               then the threads agree on one, two by two: log2(number of threads) exchanges

What it costs. n K comparisons and reads of 4 n K bytes; but only K elements are written. A radix sort with digits of
8 bits passes four times over every element and its index, 12 bytes in and 12 bytes out: 96 n bytes. By bytes alone
the rounds win below K = 24, and lose a factor of two at K = 50.

Maths of the agreement. "The better of two pairs" is associative and commutative, so the pairs may be compared in
any order and the answer is the same: that is what lets threads do it side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k.triton_select import power_of_2

MAX_BLOCK = 4096  # elements that a program looks at between two steps of its loop
LAST_INDEX = tl.constexpr(0x7FFFFFFF)  # of "nothing", which has value -inf: worse than any pair of the row


@triton.jit
def better(value, index, other_value, other_index):
    """The better of two pairs: the larger value, of equal values the lower index."""
    other = (other_value > value) | ((other_value == value) & (other_index < index))
    return tl.where(other, other_value, value), tl.where(other, other_index, index)


@triton.jit
def pairs_after(value, index, found_value, found_index, inside):
    """What comes after the last pair found; nothing in the place of everything else."""
    after = inside & ((value < found_value) | ((value == found_value) & (index > found_index)))
    return tl.where(after, value, float("-inf")), tl.where(after, index, LAST_INDEX)


@triton.jit
def k_maxima(x, values, indices, n, row_stride, k, BLOCK: tl.constexpr):
    """One program, one row: K rounds over all of it."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    found_value, found_index = tl.full((), float("inf"), tl.float32), tl.full((), -1, tl.int32)
    for rank in range(k):
        best_value = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_index = tl.full((BLOCK,), LAST_INDEX, tl.int32)
        for start in range(0, n, BLOCK):
            index = start + tl.arange(0, BLOCK)
            loaded = tl.load(x + index, mask=index < n, other=0.0)  # [BLOCK]
            value, index = pairs_after(loaded, index, found_value, found_index, index < n)
            best_value, best_index = better(best_value, best_index, value, index)
        found_value, found_index = tl.reduce((best_value, best_index), 0, better)
        tl.store(values + row * k + rank, found_value)
        tl.store(indices + row * k + rank, found_index.to(tl.int64))


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    rows, n = x.shape
    values, indices = x.new_empty((rows, k)), x.new_empty((rows, k), dtype=torch.int64)
    block = min(MAX_BLOCK, power_of_2(n))
    num_warps = max(4, min(16, block // 256))  # 4, as Triton has it unless told otherwise, where the row is short
    k_maxima[(rows,)](x, values, indices, n, x.stride(0), k, BLOCK=block, num_warps=num_warps)
    return values, indices
