"""Top-K, step 5: numbers that the hardware can reduce: whole ones.

Idea. Since Ampere a GPU reduces one 32-bit whole number from each of a warp's lanes to the largest, or the least, of
all in a single instruction, `redux.sync`. It knows no floating-point numbers and no pairs. So turn each number into a
whole one that stands in the same order (its key), and a round into two reductions of one number each:

    key(x) = bits of x, with the sign bit flipped if x >= 0, and all bits flipped if x < 0
    v_r    = max of key
    i_r    = min of { index : key = v_r }
    key[where index = i_r] = 0                         below every key: taken out

    key:    -inf -> 0x007FFFFF    -1.0 -> 0x407FFFFF    0.0 -> 0x80000000    1.0 -> 0xBF800000    +inf -> 0xFF800000

What it costs. Six operations for each element and round in place of twelve: a pair takes three comparisons and two
selections, `max` of a whole number is one instruction. Between the lanes, two instructions in place of ten shuffles
with a comparison of pairs after every second one.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.steps.top_k_3_on_chip import by_pieces
from kernels.steps.top_k_4_warp import MAX_PIECE, NUM_WARPS
from kernels.top_k.triton_select import ordered_key, value_of_key

LAST_INDEX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def take_k_maxima(key, index, values, indices, k):
    """Write the K best of a tile of keys, largest first; "nothing" (key 0) is written as -inf."""
    for rank in range(k):
        best = tl.max(key)
        best_index = tl.min(tl.where(key == best, index, LAST_INDEX))
        tl.store(values + rank, tl.where(best == 0, float("-inf"), value_of_key(best)))
        tl.store(indices + rank, best_index.to(tl.int64))
        key = tl.where(index == best_index, 0, key)


@triton.jit
def k_maxima_of_keys(x, values, indices, n, row_stride, num_pieces, k, PIECE: tl.constexpr):
    """One warp, one piece of a row."""
    row = (tl.program_id(0) // num_pieces).to(tl.int64)
    index = tl.program_id(0) % num_pieces * PIECE + tl.arange(0, PIECE)
    loaded = tl.load(x + row * row_stride + index, mask=index < n, other=0.0)
    key = tl.where(index < n, ordered_key(loaded), 0)  # [PIECE]
    place = tl.program_id(0).to(tl.int64) * k
    take_k_maxima(key, index, values + place, indices + place, k)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    return by_pieces(x, k, k_maxima_of_keys, MAX_PIECE, NUM_WARPS)
