"""Top-K, step 2: K times the maximum, in one kernel of our own.

Idea. Do not sort. Find the maximum, write it down, find the maximum of what is left, K times over.

    best_0 = max of the row
    best_r = max of { x[i] : x[i] < best_(r-1), or x[i] = best_(r-1) at a higher index },   r = 1 .. K - 1

One program owns one row, and reads all of it again in every round: nothing is removed, what was taken in earlier rounds
is passed over because it is not below the last one taken.

    row      [ block | block | block | ... ]      read from memory K times
    round r    every lane keeps the best it has seen and its index; then the program's lanes agree,
               first on the largest value (one reduction), then on the lowest index that has it (a second one)

What it costs. n K comparisons and K n reads of 4 bytes, but no element is moved: only K are written. A sort reads
and writes every element with its index (12 bytes) once for each digit.

Keys. Numbers are compared as whole numbers in the same order (`ordered_key`): -0.0 as 0.0, NaN above all, and 0 below
all, for 'nothing'. So NaN and -inf need no case of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k.triton_select import ordered_key, power_of_2, value_of_key

MAX_BLOCK = 8192  # elements that a program looks at between two steps of its loop
LAST_INDEX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def k_maxima(x, values, indices, n, row_stride, k, BLOCK: tl.constexpr):
    """One program, one row: K rounds over all of it."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    taken_key, taken_index = tl.full((), 0xFFFFFFFF, tl.uint32), tl.full((), -1, tl.int32)
    for rank in range(k):
        best_key = tl.full((BLOCK,), 0, tl.uint32)
        best_index = tl.full((BLOCK,), LAST_INDEX, tl.int32)
        for start in range(0, n, BLOCK):
            index = start + tl.arange(0, BLOCK)
            key = ordered_key(tl.load(x + index, mask=index < n, other=0.0))  # [BLOCK]
            left = (key < taken_key) | ((key == taken_key) & (index > taken_index))
            better = (key > best_key) & left & (index < n)
            best_key = tl.where(better, key, best_key)
            best_index = tl.where(better, index, best_index)
        taken_key = tl.max(best_key)
        taken_index = tl.min(tl.where(best_key == taken_key, best_index, LAST_INDEX))
        tl.store(values + row * k + rank, value_of_key(taken_key))
        tl.store(indices + row * k + rank, taken_index.to(tl.int64))


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    rows, n = x.shape
    values, indices = x.new_empty((rows, k)), x.new_empty((rows, k), dtype=torch.int64)
    block = min(MAX_BLOCK, power_of_2(n))
    k_maxima[(rows,)](x, values, indices, n, x.stride(0), k, BLOCK=block, num_warps=num_warps(block))
    return values, indices


def num_warps(block: int) -> int:
    """Four warps, as Triton has it unless told otherwise, and more where a block gives them enough to do."""
    return max(4, min(16, block // 512))
