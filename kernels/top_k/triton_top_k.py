"""top_k on the GPU. The definition is reference.py's; triton_select.py says how selection works.

    very short rows   one program sorts several whole rows in registers
    k up to 1024      of a long row, the maximum of each group of neighbours is found first, in parallel chunks; then
                      one program per row selects from the best groups (or from a whole short row) and sorts the best k
    larger k          one program per row writes its best k out in index order; torch sorts them

A candidate is one 64-bit integer, the key of a value above the complement of its index: larger is better, no two equal.

Knows Triton; knows nothing of models. Arguments were checked in op.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k.triton_select import (
    CHUNK,
    CHUNK_WARPS,
    MAX_GROUPS_CHOSEN,
    MAX_TILE,
    blocks,
    candidate,
    choose_group,
    gather_best_groups,
    keep_best,
    key_and_index,
    key_bits,
    launch,
    launch_group_maxima,
    ordered_key,
    power_of_2,
    tile_warps,
    value_of_key,
)
from kernels.top_k.triton_top_p import load_block, rank_cut

MAX_SORTED_WHOLE = 128  # longer rows are selected from first
SORTED_PER_PROGRAM = 256  # elements
SORTED_WARPS = 1


@triton.jit
def _top_k_short(
    x, values, indices, batch, n, row_stride, k, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program, ROWS rows of up to BLOCK elements, sorted whole.

    What is sorted first is half a candidate: the upper bits of a key above the complement of its index, in 32 bits.
    Should two different keys of some row agree in their upper bits and so have come out in the wrong order, which one
    program in a hundred sees at 32 elements, whole candidates are sorted instead.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = (rows < batch) & (index < n)
    x += rows * row_stride
    key = tl.where(inside, ordered_key(tl.load(x + index, mask=inside, other=0.0).to(tl.float32)), 0)  # [ROWS, BLOCK]
    half = tl.sort((key & (0xFFFFFFFF - (BLOCK - 1))) | (BLOCK - 1 - index).to(tl.uint32), descending=True)
    order = (BLOCK - 1) - (half & (BLOCK - 1)).to(tl.int32)
    wanted = (rows < batch) & (index < k)
    value = tl.load(x + order, mask=inside, other=float("-inf")) + 0.0  # those left out may be the better ones
    if BITS == 32:
        key_found = ordered_key(value)
        one_before = tl.broadcast_to(tl.maximum(index - 1, 0), ROWS, BLOCK)
        risen = key_found > tl.gather(key_found, one_before, 1)
        if tl.max(tl.max(risen.to(tl.int32), axis=0), axis=0) > 0:
            candidates = tl.sort(candidate(key, index), descending=True)
            key, order = key_and_index(candidates)
            value = value_of_key(key)
    tl.store(values + rows * k + index, value.to(values.dtype.element_ty), mask=wanted)
    tl.store(indices + rows * k + index, order.to(tl.int64), mask=wanted)


@triton.jit
def _top_k_tile(
    x, values, indices, n, row_stride, k, group_keys, chosen_groups, candidates, num_groups,
    BITS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program, one row: select from a tile of it in registers, then sort the K that were selected.

    GROUP = 0: the tile is the whole row. Otherwise it is the TILE / GROUP groups that hold the row's best.
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, TILE)
    if GROUP == 0:
        index = places
        inside = index < n
    else:
        chosen_groups += row * (TILE // GROUP)
        gather_best_groups(group_keys + row * num_groups, chosen_groups, num_groups, k, BITS, NUM_GROUPS)
        inside = places < tl.minimum(k, num_groups) * GROUP
        index = tl.load(chosen_groups + places // GROUP, mask=inside, other=0) * GROUP + places % GROUP
        inside = inside & (index < n)
    key = ordered_key(tl.load(x + row * row_stride + index, mask=inside, other=0.0).to(tl.float32))
    key = tl.where(inside, key, 0)  # [TILE]
    kept = keep_best(key >> (32 - BITS), k)
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    candidates += row * k
    tl.store(candidates + slot, candidate(key, index), mask=kept)
    tl.debug_barrier()  # other threads read what was written here
    ranks = tl.arange(0, K)
    best = tl.sort(tl.load(candidates + ranks, mask=ranks < k, other=-(2**63)), descending=True)
    _store_sorted(values, indices, row * k + ranks, best, ranks < k)


@triton.jit
def _store_sorted(values, indices, places, candidates, wanted):
    key, index = key_and_index(candidates)
    tl.store(values + places, value_of_key(key).to(values.dtype.element_ty), mask=wanted)
    tl.store(indices + places, index.to(tl.int64), mask=wanted)


@triton.jit
def _top_k_long(x, candidates, n, row_stride, k, BLOCK: tl.constexpr):
    """One program, one row: its best k as candidates (batch, k), in index order."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    cut, last = rank_cut(x, n, k, tl.full((), 0xFFFFFFFF, tl.uint32), BLOCK)
    written = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        index, _, key = load_block(x, start, n, BLOCK)
        kept = (key > cut) | ((key == cut) & (index <= last))
        slot = written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(candidates + row * k + slot, candidate(key, index), mask=kept)
        written += tl.sum(kept.to(tl.int32))


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The op `top_k` on a CUDA device."""
    batch, n = x.shape
    values, indices = x.new_empty((batch, k)), x.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return values, indices
    with torch.cuda.device_of(x):
        if n <= MAX_SORTED_WHOLE:
            block = max(16, power_of_2(n))
            rows = max(1, SORTED_PER_PROGRAM // block)
            arguments = (x, values, indices, batch, n, x.stride(0), k)
            constants = {"BITS": key_bits(x.dtype), "ROWS": rows, "BLOCK": block}
            launch(_top_k_short, blocks(batch, rows), arguments, constants, SORTED_WARPS)
            return values, indices
        candidates = x.new_empty((batch, k), dtype=torch.int64)
        if k <= MAX_GROUPS_CHOSEN:
            _select_and_sort(x, k, candidates, values, indices)
            return values, indices
        launch(_top_k_long, batch, (x, candidates, n, x.stride(0), k), {"BLOCK": CHUNK}, CHUNK_WARPS)
    indices = torch.sort(candidates, dim=-1, descending=True).values.bitwise_and_(0x7FFFFFFF).neg_().add_(0x7FFFFFFF)
    return x.gather(-1, indices) + 0.0, indices


def _select_and_sort(x: Tensor, k: int, candidates: Tensor, values: Tensor, indices: Tensor) -> None:
    batch, n = x.shape
    if n <= MAX_TILE:
        group, tile, num_groups = 0, power_of_2(n), 0
        group_keys = chosen_groups = None
    else:
        group, chosen = choose_group(n, k)
        group_keys, _, _, num_groups, _ = launch_group_maxima(x, group, False)
        tile, chosen_groups = chosen * group, x.new_empty((batch, chosen), dtype=torch.int32)
    arguments = (x, values, indices, n, x.stride(0), k, group_keys, chosen_groups, candidates, num_groups)
    constants = {
        "BITS": key_bits(x.dtype),
        "TILE": tile,
        "GROUP": group,
        "NUM_GROUPS": power_of_2(num_groups),
        "K": max(16, power_of_2(k)),
    }
    launch(_top_k_tile, batch, arguments, constants, tile_warps(max(tile, num_groups)))
