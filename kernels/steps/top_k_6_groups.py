"""Top-K, step 6: look for the best only where they can be.

Idea. Cut the row into groups of 32 neighbours and take the maximum of each. The K largest elements all lie in the K
groups with the largest maxima: if an element's group is not among these, K other groups each hold a better one.

    m[g]      = max of group g                       one pass over the row, nothing but reading
    chosen    = the K groups with the largest m      top-K of n / 32 numbers: step 5
    the best  = top-K of the chosen groups' 32 K     the rounds of step 5, over elements gathered from memory

    row      [ ........ | ........ | ........ | ........ | ........ ]      n
    maxima        7          2          9          4          8            n / 32
    chosen        *                     *                     *            K groups, 32 K elements

What it costs. n comparisons for the maxima, then K rounds over n / 32 and over 32 K numbers, not over n: at n = 128256,
K = 50 that is 50 * (4008 + 1600) = 0.28 million in place of 50 * 128256 = 6.4 million. The first pass waits for
memory alone. 32 K elements are read a second time.

Ties: of groups with equal maxima the one on the left is chosen; among the elements the lower index in the row wins.
A row that is one piece gains nothing: it is left to step 5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.steps import top_k_5_redux
from kernels.steps.top_k_5_redux import take_k_maxima
from kernels.top_k.triton_select import blocks, ordered_key, power_of_2

GROUP = 32
CHUNK = 4096  # elements of which one program finds the group maxima
NUM_WARPS = 4


@triton.jit
def group_maxima(x, maxima, n, row_stride, num_groups, num_chunks, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """One program, CHUNK elements of a row: the largest of each group. maxima (rows, num_groups) fp32."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    groups = tl.arange(0, CHUNK // GROUP)
    index = chunk * CHUNK + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [CHUNK / GROUP, GROUP]
    loaded = tl.load(x + row * row_stride + index, mask=index < n, other=float("-inf"))
    groups += chunk * (CHUNK // GROUP)
    tl.store(maxima + row * num_groups + groups, tl.max(loaded, axis=1), mask=groups < num_groups)


@triton.jit
def k_maxima_of_groups(x, chosen, values, indices, n, row_stride, k, GROUP: tl.constexpr, TILE: tl.constexpr):
    """One warp, one row: the K best of the groups whose numbers `chosen` (rows, k) holds."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    inside = place < k * GROUP
    index = tl.load(chosen + row * k + place // GROUP, mask=inside, other=0).to(tl.int32) * GROUP + place % GROUP
    inside = inside & (index < n)
    loaded = tl.load(x + row * row_stride + index, mask=inside, other=0.0)
    key = tl.where(inside, ordered_key(loaded), 0)  # [TILE]
    take_k_maxima(key, index, values + row * k, indices + row * k, k)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    rows, n = x.shape
    num_groups, num_chunks = blocks(n, GROUP), blocks(n, CHUNK)
    if n <= top_k_5_redux.MAX_PIECE or num_groups < k:
        return top_k_5_redux.top_k(x, k)
    maxima = x.new_empty((rows, num_groups))
    sizes = (n, x.stride(0), num_groups, num_chunks)
    group_maxima[(rows * num_chunks,)](x, maxima, *sizes, GROUP=GROUP, CHUNK=CHUNK, num_warps=NUM_WARPS)
    _, chosen = top_k_5_redux.top_k(maxima, k)  # (rows, k)
    values, indices = x.new_empty((rows, k)), x.new_empty((rows, k), dtype=torch.int64)
    arguments = (x, chosen, values, indices, n, x.stride(0), k)
    tile = power_of_2(k) * GROUP
    num_warps = max(top_k_5_redux.NUM_WARPS, tile // top_k_5_redux.MAX_PIECE)
    k_maxima_of_groups[(rows,)](*arguments, GROUP=GROUP, TILE=tile, num_warps=num_warps)
    return values, indices
