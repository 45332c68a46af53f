"""Top-K, step 5: look for the best only where they can be.

Idea. Cut the row into groups of 32 neighbours and take the maximum of each. The K largest elements all lie in the K
groups with the largest maxima: if an element's group is not among these, K other groups each hold a better one.

    m[g]      = max of group g                       one pass over the row, nothing but reading
    chosen    = the K groups with the largest m      top-K of n / 32 numbers: step 4
    the best  = top-K of the chosen groups' 32 K     step 4 again, on elements gathered from memory

    row      [ ........ | ........ | ........ | ........ | ........ ]      n
    maxima        7          2          9          4          8            n / 32
    chosen        *                     *                     *            K, and their elements: 32 K

What it costs. n comparisons for the maxima, then K rounds over n / 32 and over 32 K numbers, not over n: at
n = 128256, K = 50 that is 50 * (4008 + 1600) = 0.28 M in place of 50 * 128256 = 6.4 M. The first pass has no rounds and
should run as fast as memory delivers. 32 K more elements are read a second time.

Ties: of groups with equal maxima the one on the left is chosen, and a word holds the index in the row.
Rows that step 4 holds in one piece gain nothing, and are left to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.steps import top_k_4_warp
from kernels.steps.top_k_4_warp import take_k_maxima
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
    largest = tl.reduce(loaded, 1, _larger)
    groups += chunk * (CHUNK // GROUP)
    tl.store(maxima + row * num_groups + groups, largest, mask=groups < num_groups)


@triton.jit
def _larger(a, b):
    """The maximum, in which NaN is above all."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def k_maxima_of_groups(
    x, chosen, values, indices, n, row_stride, k, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program, one row: the K largest of the chosen groups (rows, k)."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [HEIGHT, WIDTH]
    inside = place < k * GROUP
    group = tl.load(chosen + row * k + place // GROUP, mask=inside, other=0).to(tl.int32)
    index = group * GROUP + place % GROUP
    inside = inside & (index < n)
    key = tl.where(inside, ordered_key(tl.load(x + row * row_stride + index, mask=inside, other=0.0)), 0)
    index = tl.where(inside, index, -1)
    take_k_maxima(key, index, values + row * k, indices + row * k, k)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    rows, n = x.shape
    if n <= top_k_4_warp.MAX_PIECE:
        return top_k_4_warp.top_k(x, k)
    _, chosen = top_k_4_warp.top_k(launch_group_maxima(x), k)  # (rows, k)
    values, indices = x.new_empty((rows, k)), x.new_empty((rows, k), dtype=torch.int64)
    width = top_k_4_warp.MAX_WIDTH
    constants = {"GROUP": GROUP, "HEIGHT": power_of_2(k) * GROUP // width, "WIDTH": width}
    k_maxima_of_groups[(rows,)](x, chosen, values, indices, n, x.stride(0), k, **constants, num_warps=1)
    return values, indices


def launch_group_maxima(x: Tensor) -> Tensor:
    """The largest of each group of a row: (rows, num_groups) fp32."""
    rows, n = x.shape
    num_groups, num_chunks = blocks(n, GROUP), blocks(n, CHUNK)
    maxima = x.new_empty((rows, num_groups))
    arguments = (x, maxima, n, x.stride(0), num_groups, num_chunks)
    group_maxima[(rows * num_chunks,)](*arguments, GROUP=GROUP, CHUNK=CHUNK, num_warps=NUM_WARPS)
    return maxima
