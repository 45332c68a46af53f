"""Top-K on the CPU, in four steps: the ladder's main ideas in plain torch, and the C++ kernel that ships.

    1 sort      the first K of the sorted row                            n log n, every element is moved
    2 rounds    K times the maximum, each taken out when it is found     n K comparisons, nothing is moved
    3 groups    the rounds over the maxima of groups of 32, then over    n comparisons, and K rounds over
                the K best groups                                        n / 32 + 32 K
    4 shipped   kernels.top_k (kernels/top_k/cpu.cpp)                    n comparisons with a threshold that rises

A CPU has what a GPU has, in other sizes: two cores here, each with vector registers of 16 numbers in place of warps of
32 threads, and a cache that holds a row. Step 4's idea is one for few, fast threads: one pass over the row, in which a
vector of 16 is compared with the K-th best so far. Nearly always none of them is better, and the pass goes on.

Numbers are compared as whole numbers in the same order (`ordered_key`), so that -inf in a row differs from "taken out".
"""

import torch
from torch import Tensor

GROUP = 32
TAKEN = -(2**31)  # below the key of every number


def ordered_key(x: Tensor) -> Tensor:
    """fp32 as int32 in the same order; -0.0 as 0.0."""
    bits = (x + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def k_maxima(keys: Tensor, k: int) -> Tensor:
    """Where the K largest of each row stand (rows, k), largest first, ties from the left. Writes over `keys`."""
    indices = []
    for _ in range(k):
        indices.append(keys.max(dim=-1, keepdim=True).indices)  # of equal ones the first
        keys.scatter_(-1, indices[-1], TAKEN)
    return torch.cat(indices, dim=-1)


def rounds(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Step 2. x (rows, n) fp32 -> values (rows, k), indices (rows, k) int64."""
    indices = k_maxima(ordered_key(x), k)
    return x.gather(-1, indices), indices


def groups(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Step 3. The same; a row with fewer than K groups is left to step 2."""
    rows, n = x.shape
    if n < GROUP * k:
        return rounds(x, k)
    keys = torch.nn.functional.pad(ordered_key(x), (0, -n % GROUP), value=TAKEN).unflatten(-1, (-1, GROUP))
    chosen = k_maxima(keys.amax(dim=-1), k).sort(dim=-1).values  # (rows, k), in the row's order: ties from the left
    gathered = keys.gather(1, chosen[:, :, None].expand(rows, k, GROUP)).flatten(1)  # (rows, k * GROUP)
    places = k_maxima(gathered, k)
    indices = chosen.gather(-1, places // GROUP) * GROUP + places % GROUP
    return x.gather(-1, indices), indices
