"""Top-K, step 3: read the row once and keep it on the chip.

Idea. The K rounds look at the same numbers: load them once, into the registers of the program's threads, and run the
rounds over the registers.

    value = the row, in registers                                      read from memory once
    (v_r, i_r) = the best pair after (v_(r-1), i_(r-1))                r = 0 .. K - 1, as before

A streaming multiprocessor has 64 K registers of 4 bytes, so a row of 128256 does not fit, whatever one does. A long row
is cut into pieces, each a program of its own; the winners of the pieces, K each, are a shorter row, and the same
kernel is launched over them, until one piece is left.

    row      [ piece 0 | piece 1 | piece 2 | ... ]     one program each
                 K         K         K                 their winners, in the order of the pieces: ties stay in order
             [ one piece, or again several ]
                 K                                     the answer

What it costs. The same n K comparisons; reads of 4 n bytes in place of 4 n K. What is left to wait for is arithmetic:
about twelve operations for each element and round.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.steps.top_k_2_rounds import better, pairs_after
from kernels.top_k.triton_select import blocks, power_of_2

MAX_PIECE = 4096  # elements of one program: 32 registers of each of its threads
NUM_WARPS = 4


@triton.jit
def k_maxima_of_piece(x, values, indices, n, row_stride, num_pieces, k, PIECE: tl.constexpr):
    """One program, one piece of a row: its K best pairs, and "nothing" where a last piece holds fewer than K."""
    row = (tl.program_id(0) // num_pieces).to(tl.int64)
    index = tl.program_id(0) % num_pieces * PIECE + tl.arange(0, PIECE)
    loaded = tl.load(x + row * row_stride + index, mask=index < n, other=0.0)  # [PIECE]
    place = tl.program_id(0).to(tl.int64) * k
    found_value, found_index = tl.full((), float("inf"), tl.float32), tl.full((), -1, tl.int32)
    for rank in range(k):
        pairs = pairs_after(loaded, index, found_value, found_index, index < n)
        found_value, found_index = tl.reduce(pairs, 0, better)
        tl.store(values + place + rank, found_value)
        tl.store(indices + place + rank, found_index.to(tl.int64))


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    return by_pieces(x, k, k_maxima_of_piece, MAX_PIECE, NUM_WARPS)


def by_pieces(x: Tensor, k: int, kernel: Any, max_piece: int, num_warps: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel over the pieces, then over their winners, until a row is one piece.

    Equal winners stand in the order of their indices, for pieces stand in order, and so do the winners of each: the
    lower place among the winners is the lower index in the row. "Nothing" stands behind all that was in the row.
    """
    rows, n = x.shape
    piece = min(max_piece, power_of_2(n))
    num_pieces = blocks(n, piece)
    values = x.new_empty((rows, num_pieces * k))
    indices = x.new_empty((rows, num_pieces * k), dtype=torch.int64)
    arguments = (x, values, indices, n, x.stride(0), num_pieces, k)
    kernel[(rows * num_pieces,)](*arguments, PIECE=piece, num_warps=num_warps)
    if num_pieces == 1:
        return values, indices
    values, places = by_pieces(values, k, kernel, max_piece, num_warps)
    return values, indices.gather(-1, places)
