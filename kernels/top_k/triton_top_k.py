"""top_k on the GPU. The definition is reference.py's; triton_select.py says how selection works.

    rows up to 32     each thread sorts a row of its own in its registers, by a network of minima and maxima
    rows up to 128    one program sorts several whole rows
    k up to 1024      of a long row, the maximum of each group of neighbours is found first, in parallel chunks; then
                      one program per row selects from the best groups (or from a whole short row) and sorts the best k
    larger k          one program per row writes its best k out in index order; torch sorts them

A candidate is one 64-bit integer, the key of a value above the complement of its index: larger is better, no two equal.
In short rows fp32 numbers are compared as fp64, with their own bits above their index: one instruction, where 64-bit
integers take two. The keys of fp16 and bf16 leave room for the index: there 32 bits hold both.

Knows Triton; knows nothing of models. Arguments were checked in op.py.
"""

# ruff: noqa: RUF005  tuples are put together as Triton can

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
SORTED_PER_PROGRAM, SORTED_WARPS = 256, 1  # elements
PER_THREAD = tl.constexpr(32)  # elements of a row that one thread sorts
LANES = tl.constexpr(32)  # rows that one warp sorts


def merge_exchange(n: int) -> tuple[tuple[int, int], ...]:
    """The exchanges of Batcher's odd-even merge sort of n, a power of two: pairs (i, j), the larger goes to i < j.

    32 take 191 exchanges, of two instructions for 32-bit numbers; 185 is the best that is known.
    """
    pairs = []
    for p in (1 << i for i in range(n.bit_length() - 1)):  # sorted runs of p become sorted runs of 2 p
        for distance in (p >> i for i in range(p.bit_length())):
            for i in range(distance % p, n - distance):
                first_of_two = (i - distance % p) // distance % 2 == 0
                if first_of_two and i // (2 * p) == (i + distance) // (2 * p):
                    pairs.append((i, i + distance))
    return tuple(pairs)


EXCHANGES = tl.constexpr(merge_exchange(PER_THREAD.value))
NUM_EXCHANGES = tl.constexpr(len(EXCHANGES.value))


@triton.jit
def _pack(x, index, BITS: tl.constexpr):
    """Elements of a short row such that the larger one is the better one, and no two are equal: fp64, or uint32."""
    if BITS == 32:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        bits = tl.where(x != x, 0x7FEFFFFF, bits)  # above infinity, 0x7F800000, and a number in fp64
        lower = (~index ^ (bits >> 31)).to(tl.uint32, bitcast=True)  # the lower index is larger, also below zero
        return ((bits.to(tl.int64) << 32) | lower.to(tl.int64)).to(tl.float64, bitcast=True)
    else:
        LOW: tl.constexpr = (1 << (32 - BITS)) - 1
        return (ordered_key(x.to(tl.float32)) & (0xFFFFFFFF - LOW)) | (LOW - index).to(tl.uint32)


@triton.jit
def _unpack(packed, BITS: tl.constexpr):
    """The fp32 values and the indices of what was packed."""
    if BITS == 32:
        both = packed.to(tl.int64, bitcast=True)
        bits, lower = (both >> 32).to(tl.int32), both.to(tl.int32)
        return bits.to(tl.float32, bitcast=True), ~(lower ^ (bits >> 31))
    else:
        LOW: tl.constexpr = (1 << (32 - BITS)) - 1
        bits = value_of_key(packed).to(tl.int32, bitcast=True) & (-1 - LOW)
        return bits.to(tl.float32, bitcast=True), LOW - (packed & LOW).to(tl.int32)


@triton.jit
def _store_sorted(values, indices, places, value, index, wanted):
    tl.store(values + places, value.to(values.dtype.element_ty), mask=wanted)
    tl.store(indices + places, index.to(tl.int64), mask=wanted)


@triton.jit
def _exchange(columns, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Two columns of each row, the larger element first."""
    a, b = columns[FIRST], columns[SECOND]
    if a.dtype == tl.float64:  # of which the hardware has no maximum
        falling = a > b
        larger, smaller = tl.where(falling, a, b), tl.where(falling, b, a)
    else:
        larger, smaller = tl.maximum(a, b), tl.minimum(a, b)
    return columns[:FIRST] + (larger,) + columns[FIRST + 1 : SECOND] + (smaller,) + columns[SECOND + 1 :]


@triton.jit
def _side_by_side(columns, FIRST: tl.constexpr, N: tl.constexpr):
    """N of the columns, [LANES] each, as a tile [LANES, N]."""
    if N == 1:
        return tl.reshape(columns[FIRST], (LANES, 1))
    else:
        left, right = _side_by_side(columns, FIRST, N // 2), _side_by_side(columns, FIRST + N // 2, N // 2)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (LANES, N))


@triton.jit
def _top_k_lanes(x, values, indices, batch, n, row_stride, k, BITS: tl.constexpr):
    """One program of one warp, LANES rows of up to PER_THREAD elements: a thread sorts a row, none waits for another.

    A column is a tensor [LANES], of which each thread holds its row's element: so the layout is one row a thread. The
    end of a short row is -inf, which stands behind what the row itself holds.
    """
    rows = tl.program_id(0) * LANES + tl.arange(0, LANES)[:, None]
    x += rows.to(tl.int64) * row_stride
    columns = ()
    for first in tl.static_range(0, PER_THREAD, 4):  # 16 bytes of fp32 a load
        index = first + tl.arange(0, 4)[None, :]
        v = tl.load(x + index, mask=(rows < batch) & (index < n), other=float("-inf"))
        even, odd = tl.split(tl.reshape(_pack(v, index, BITS), (LANES, 2, 2)))
        columns = columns + tl.split(even) + tl.split(odd)  # in any order: an element knows its index
    for number in tl.static_range(NUM_EXCHANGES):
        columns = _exchange(columns, EXCHANGES[number][0], EXCHANGES[number][1])
    ranks = tl.arange(0, PER_THREAD)[None, :]
    value, index = _unpack(_side_by_side(columns, 0, PER_THREAD), BITS)
    _store_sorted(values, indices, rows.to(tl.int64) * k + ranks, value, index, (rows < batch) & (ranks < k))


@triton.jit
def _top_k_short(
    x, values, indices, batch, n, row_stride, k, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program, ROWS rows of up to BLOCK elements, sorted whole."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    v = tl.load(x + rows * row_stride + index, mask=(rows < batch) & (index < n), other=float("-inf"))  # [ROWS, BLOCK]
    value, order = _unpack(tl.sort(_pack(v, index, BITS), descending=True), BITS)
    _store_sorted(values, indices, rows * k + index, value, order, (rows < batch) & (index < k))


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
    key, index = key_and_index(best)
    _store_sorted(values, indices, row * k + ranks, value_of_key(key), index, ranks < k)


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
        arguments = (x, values, indices, batch, n, x.stride(0), k)
        if n <= PER_THREAD.value:
            launch(_top_k_lanes, blocks(batch, LANES.value), arguments, {"BITS": key_bits(x.dtype)}, 1)
            return values, indices
        if n <= MAX_SORTED_WHOLE:
            rows = SORTED_PER_PROGRAM // power_of_2(n)
            constants = {"BITS": key_bits(x.dtype), "ROWS": rows, "BLOCK": power_of_2(n)}
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
