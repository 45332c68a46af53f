"""Top-K, step 4: one warp for a piece. The recipe's warp reduction.

Idea. A warp is 32 threads, its lanes, that run in step, and a shuffle (`shfl`) hands a register from one lane to
another: no shared memory, no barrier. Four warps that agree on a pair have to go through shared memory, and wait at a
barrier (`bar.sync`) for the slowest of them, several times a round. So let one warp own a piece alone.

    lanes          0     1     2    ...   31
                 [ a ] [ b ] [ c ]      [ z ]      each its own elements first: no exchange at all
    shfl 16        better of the two, 16 lanes apart
    shfl  8        ... 8 apart
    shfl  4, 2, 1                                  after five exchanges every lane knows the best pair

The kernel is step 3's to the letter: only the number of warps differs, and what the compiler makes of it.

What it costs. As many comparisons as before. A row of 32 is spread over four warps by giving each of them all of it:
three of the four do nothing but the first one's work again. For a long row there is little to win: a lane compares 64
elements of its own for every five that it exchanges.

Source: "Custom operations: applications in AI models" of the Modular documentation, top-K: a block owns a row, in
shared memory, and takes K times the maximum by a warp reduction of pairs. Here the row is in registers.
"""

from torch import Tensor

from kernels.steps.top_k_3_on_chip import by_pieces, k_maxima_of_piece

MAX_PIECE = 2048  # elements of one warp: 64 registers of each lane
NUM_WARPS = 1


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    return by_pieces(x, k, k_maxima_of_piece, MAX_PIECE, NUM_WARPS)
