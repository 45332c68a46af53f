"""Top-K, step 4: one warp, one word. The recipe's warp reduction.

Idea. A warp is 32 threads that run in step, and `shfl` hands a register from one of them to another: no shared memory,
no barrier. So give a piece to one warp, and let its lanes agree once a round, not twice: value and index in one word,
in which a larger value is larger, and of equal values the lower index.

    word = key * 2^32 + (2^31 - 1 - index)

A lane first finds its own best among its registers, which costs no talk at all; then the 32 lanes' words are compared
in five exchanges, with the lane 16, 8, 4, 2 and 1 further on.

    lanes        0     1     2    ...   31
               [ a ] [ b ] [ c ]      [ z ]     its own registers: max, no exchange
    shfl 16      max with lane +16                \\
    shfl  8      max with lane  +8                 five exchanges, and every lane knows the best word
    ...                                           /

What it costs. As many comparisons as before. Of a round's two reductions over four warps (shuffles, then shared memory,
then a barrier that waits for the slowest warp) one is left, over one warp, with no barrier.

Source: "Custom operations: applications in AI models" of the Modular documentation, top-K: a block for a row, the
row in shared memory, K times a warp reduction of (value, index). Here the row is in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.steps.top_k_3_on_chip import by_pieces
from kernels.top_k.triton_select import ordered_key, value_of_key

MAX_PIECE = 2048  # elements of one warp: 64 registers of each lane
MAX_WIDTH = 128  # 4 neighbours for each of 32 lanes: one load of 16 bytes
LAST_INDEX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def take_k_maxima(key, index, values, indices, k):
    """Write the K best of a tile of keys and indices [HEIGHT, WIDTH]; a lane owns whole columns of it."""
    for rank in range(k):
        lane_key = tl.max(key, axis=0)  # [WIDTH]
        lane_index = tl.min(tl.where(key == lane_key[None, :], index, LAST_INDEX), axis=0)
        word = (lane_key.to(tl.int64) - 0x80000000) << 32 | (0x7FFFFFFF - lane_index)
        best = tl.max(word)
        best_key, best_index = ((best >> 32) + 0x80000000).to(tl.uint32), 0x7FFFFFFF - (best & 0x7FFFFFFF)
        value = tl.where(best_key == 0, float("-inf"), value_of_key(best_key))
        tl.store(values + rank, value)
        tl.store(indices + rank, best_index)
        key = tl.where(index == best_index.to(tl.int32), 0, key)


@triton.jit
def k_maxima_of_warp(
    x, values, indices, n, row_stride, num_pieces, k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One warp, one piece of a row."""
    row = (tl.program_id(0) // num_pieces).to(tl.int64)
    place = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    index = tl.program_id(0) % num_pieces * (HEIGHT * WIDTH) + place  # [HEIGHT, WIDTH]
    loaded = tl.load(x + row * row_stride + index, mask=index < n, other=0.0)
    key = tl.where(index < n, ordered_key(loaded), 0)
    first = tl.program_id(0).to(tl.int64) * k
    take_k_maxima(key, index, values + first, indices + first, k)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    return by_pieces(x, k, MAX_PIECE, k_maxima_of_warps)


def k_maxima_of_warps(x: Tensor, k: int, piece: int, num_pieces: int) -> tuple[Tensor, Tensor]:
    """The K largest of each piece of each row, and where they stand in the row: (rows, num_pieces * k) both."""
    rows, n = x.shape
    values = x.new_empty((rows, num_pieces * k))
    indices = x.new_empty((rows, num_pieces * k), dtype=torch.int64)
    width = min(MAX_WIDTH, piece)
    arguments = (x, values, indices, n, x.stride(0), num_pieces, k)
    k_maxima_of_warp[(rows * num_pieces,)](*arguments, HEIGHT=piece // width, WIDTH=width, num_warps=1)
    return values, indices
