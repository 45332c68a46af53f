"""Top-K, step 6: no rounds. Find the K-th largest bit by bit, keep what is not below it, sort only that.

Idea. K rounds wait for one another. To know which K are the largest, one number is enough, the K-th largest; and a
32-bit key is found from its highest bit to its lowest with one count for each bit, however large K is:

    cut = 0
    for bit = 31 .. 0:   if #{ key >= cut with that bit set } >= K:   set that bit of cut

Everything above the cut stays, and of what equals it as much as there is room for, from the left (`keep_best`). A
running count gives each survivor its place in a list of K. Only the list is sorted, by a network: compare and
exchange over fixed distances, in registers, log2(K) (log2(K) + 1) / 2 stages for all of it.

    tile       9  2  7  7  1  8  7        K = 4
    cut = 7    *     *  *     *           four survive: both above the cut, and the first two of the ties
    list       9  7  7  8                 in index order
    sorted     9  8  7  7

What it costs. 32 comparisons an element, in place of K rounds of about six operations; the sort is of K words.
A whole short row is a list already: a row of 32 is sorted in 15 stages, where 32 rounds took 5 exchanges each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.steps.top_k_5_groups import GROUP, launch_group_maxima
from kernels.top_k.triton_select import keep_best, ordered_key, power_of_2, value_of_key

MAX_LIST = 128  # rows that are sorted as they are
MAX_TILE = 8192  # elements that one program selects from


@triton.jit
def survivors(
    x, chosen, words, n, row_stride, k, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program, one row: the words of its best K (rows, k), in index order.

    GROUP = 1: of a whole row. Else of the K groups of the row whose words `chosen` (rows, k) holds, in index order.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TILE)
    inside = index < n
    if GROUP > 1:
        inside = index < k * GROUP
        word = tl.load(chosen + row * k + index // GROUP, mask=inside, other=0)
        index = index_of(word).to(tl.int32) * GROUP + index % GROUP
        inside = inside & (index < n)
    key = tl.where(inside, ordered_key(tl.load(x + row * row_stride + index, mask=inside, other=0.0)), 0)  # [TILE]
    kept = keep_best(key, k, 32)
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(words + row * k + slot, word_of(key, index), mask=kept)


@triton.jit
def sort_words(words, values, indices, k, LIST: tl.constexpr):
    """One program, one list of K words, sorted by a network."""
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, LIST)
    word = tl.load(words + row * k + ranks, mask=ranks < k, other=-(2**63))
    store_sorted(word, values + row * k, indices + row * k, ranks, k)


@triton.jit
def sort_row(x, values, indices, n, row_stride, k, LIST: tl.constexpr):
    """One program, one short row, sorted by a network."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, LIST)
    key = tl.where(index < n, ordered_key(tl.load(x + row * row_stride + index, mask=index < n, other=0.0)), 0)
    store_sorted(word_of(key, index), values + row * k, indices + row * k, index, k)


@triton.jit
def store_sorted(word, values, indices, ranks, k):
    word = tl.sort(word, descending=True)
    value = value_of_key(((word >> 32) + 0x80000000).to(tl.uint32))
    tl.store(values + ranks, value, mask=ranks < k)
    tl.store(indices + ranks, index_of(word), mask=ranks < k)


@triton.jit
def word_of(key, index):
    return (key.to(tl.int64) - 0x80000000) << 32 | (0x7FFFFFFF - index)


@triton.jit
def index_of(word):
    return 0x7FFFFFFF - (word & 0x7FFFFFFF)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    rows, n = x.shape
    values, indices = x.new_empty((rows, k)), x.new_empty((rows, k), dtype=torch.int64)
    if n <= MAX_LIST:
        sort_row[(rows,)](x, values, indices, n, x.stride(0), k, LIST=max(2, power_of_2(n)), num_warps=1)
        return values, indices
    if n <= MAX_TILE:
        words = select(x, None, k, 1, n)
    else:
        chosen = select(launch_group_maxima(x), None, k, 1, -(-n // GROUP))
        words = select(x, chosen, k, GROUP, k * GROUP)
    sort_words[(rows,)](words, values, indices, k, LIST=max(2, power_of_2(k)), num_warps=1)
    return values, indices


def select(x: Tensor, chosen: Tensor | None, k: int, group: int, size: int) -> Tensor:
    """The words (rows, k) of the best K of each row, of which `size` elements are looked at."""
    words = x.new_empty((x.shape[0], k), dtype=torch.int64)
    tile = power_of_2(size)
    arguments = (x, chosen, words, x.shape[1], x.stride(0), k)
    survivors[(x.shape[0],)](*arguments, GROUP=group, TILE=tile, num_warps=max(4, min(16, tile // 512)))
    return words
