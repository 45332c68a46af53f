"""Top-K, step 3: read the row once and keep it on the chip.

Idea. The K rounds look at the same numbers: load them once, into the registers of the program's threads, and take what
was found out of them there.

    key    = row, in registers                                   read from memory once
    best_r = max of key,   then key[where it stood] = nothing    r = 0 .. K - 1

A streaming multiprocessor has 64 K registers of 4 bytes, so a row of 128256 does not fit, whatever one does. A long row
is cut into pieces, each a program of its own, and the winners of the pieces, K each, are a shorter row: the same
kernel is launched over them, until one piece is left.

    row      [ piece 0 | piece 1 | piece 2 | ... ]     one program each
                 K         K         K                 their winners, in the order of the pieces: ties stay in order
             [ one piece, or again several ]
                 K                                     the answer

What it costs. The same n K comparisons; n reads of 4 bytes in place of n K. And the pieces of one row are worked on by
as many multiprocessors as there are pieces, where before a row had one.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k.triton_select import blocks, ordered_key, power_of_2, value_of_key

MAX_PIECE = 4096  # elements of one program: 32 registers of each of its threads
NUM_WARPS = 4
LAST_INDEX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def k_maxima_of_piece(x, values, indices, n, row_stride, num_pieces, k, PIECE: tl.constexpr):
    """One program, one piece of a row: its K largest, and where they stand in the row."""
    row = (tl.program_id(0) // num_pieces).to(tl.int64)
    index = tl.program_id(0) % num_pieces * PIECE + tl.arange(0, PIECE)
    loaded = tl.load(x + row * row_stride + index, mask=index < n, other=0.0)
    key = tl.where(index < n, ordered_key(loaded), 0)  # [PIECE]
    place = tl.program_id(0).to(tl.int64) * k
    for rank in range(k):
        best = tl.max(key)
        best_index = tl.min(tl.where(key == best, index, LAST_INDEX))
        value = tl.where(best == 0, float("-inf"), value_of_key(best))  # a last piece may hold fewer than K
        tl.store(values + place + rank, value)
        tl.store(indices + place + rank, best_index.to(tl.int64))
        key = tl.where(index == best_index, 0, key)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    return by_pieces(x, k, MAX_PIECE, k_maxima_of_pieces)


def k_maxima_of_pieces(x: Tensor, k: int, piece: int, num_pieces: int) -> tuple[Tensor, Tensor]:
    """The K largest of each piece of each row, and where they stand in the row: (rows, num_pieces * k) both."""
    rows, n = x.shape
    values = x.new_empty((rows, num_pieces * k))
    indices = x.new_empty((rows, num_pieces * k), dtype=torch.int64)
    arguments = (x, values, indices, n, x.stride(0), num_pieces, k)
    k_maxima_of_piece[(rows * num_pieces,)](*arguments, PIECE=piece, num_warps=NUM_WARPS)
    return values, indices


def by_pieces(x: Tensor, k: int, max_piece: int, launch: Callable) -> tuple[Tensor, Tensor]:
    """Launch over the pieces, then over their winners, until a row is one piece.

    Winners stand in the order of their pieces, and equal ones within a piece in the order of their places: the lower
    place among the winners has the lower index in the row. Filler stands behind everything that was in the row.
    """
    piece = min(max_piece, power_of_2(x.shape[1]))
    num_pieces = blocks(x.shape[1], piece)
    values, indices = launch(x, k, piece, num_pieces)
    if num_pieces == 1:
        return values, indices
    values, places = by_pieces(values, k, max_piece, launch)
    return values, indices.gather(-1, places)
