"""Top-K, step 7: no rounds. The kernel that this project ships, `kernels.top_k`.

Idea. K rounds wait for one another. To know which K are the largest, one number is enough, the K-th largest; and each
count, however large K is, settles one bit of it:

    low, high = the smallest key, the largest key
    while low < high:    middle = halfway;   if #{ key >= middle } >= K:  low = middle   else:  high = middle - 1

Once a count is K exactly there is nothing left to ask.

Everything above the cut stays, and of what equals it as much as there is room for, from the left. A running count gives
each survivor its place in a list of K. Only the list is sorted, by a network: compare and exchange over fixed
distances, in registers, log2(K) (log2(K) + 1) / 2 stages for all of it.

    tile       9  2  7  7  1  8  7        K = 4
    cut = 7    *     *  *     *           four survive: those above the cut, and the first two of the ties
    list       9  7  7  8                 in index order
    sorted     9  8  7  7

A short row is a list already: 32 elements are sorted in 15 stages, where 32 rounds took two reductions each; and one
program sorts several of them, so that its four warps have something to do.

What it costs. A dozen comparisons an element, 32 at worst, whatever K is, in place of K rounds of six operations, and
the groups are chosen by the same cut in the same launch as the elements.

The code is kernels/top_k/triton_top_k.py and triton_select.py: any dtype, any K, NaN, and `sample` on top of it.
"""

from kernels import top_k

__all__ = ["top_k"]
