"""The steps of the top-K ladder, what was expected of each before it was measured, and why.

Predictions are for the headline sizes, a model's logits: 256 rows of 128256 with K = 50 on a GPU (an H200 copies
4.3 TB/s and does some 15 T operations a second on whole numbers), 64 rows of 50304 with K = 50 on a CPU.

All steps take x (rows, n) fp32, contiguous rows, no NaN, and k up to MAX_K; step 7 alone takes anything.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kernels
from kernels.steps import Compilation, Step, top_k_1_sort, top_k_cpu

MAX_K = 128
GROUP = 32
_PAIR = 12  # bytes of a value and its index in an answer


def steps(device: torch.device) -> Sequence[Step]:
    """The seven steps of a GPU, or the four of a CPU."""
    return _gpu_steps() if device.type == "cuda" else _cpu_steps()


def checked(function: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """The same function; raises ValueError for what the steps do not take."""

    @functools.wraps(function)
    def run(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if x.dim() != 2 or x.dtype != torch.float32 or x.stride(1) != 1:
            raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}, needs rows of float32 side by side, (rows, n)")
        if not 1 <= k <= min(MAX_K, x.shape[1]):
            raise ValueError(f"k: got {k}, needs 1 to {min(MAX_K, x.shape[1])}")
        return function(x, k)

    return run


def _no_flops(rows: int, n: int, k: int) -> float:
    return 0.0  # comparisons are not counted


def _sort_bytes(rows: int, n: int, k: int) -> float:
    """Short rows are sorted on the chip; else a radix sort with digits of 8 bits, four passes: number and index in and
    out, and once before that the numbers, to count their digits.
    """
    return rows * n * (4 + _PAIR if n <= 4096 else 4 * (2 * _PAIR + 4))


def _rounds_bytes(rows: int, n: int, k: int) -> float:
    return rows * k * (4 * n + _PAIR)


def _pieces_bytes(max_piece: int) -> Callable[[int, int, int], float]:
    """The row once; the winners of each level written, their values read again, their indices gathered."""

    def bytes_moved(rows: int, n: int, k: int) -> float:
        total = 0
        while n > max_piece:
            winners = -(-n // max_piece) * k
            total += 4 * n + _PAIR * winners + 3 * 8 * k
            n = winners
        return rows * (total + 4 * n + _PAIR * k)

    return bytes_moved


def _groups_bytes(max_piece: int) -> Callable[[int, int, int], float]:
    """The row once, a maximum for each group, top-K of the maxima, and the chosen groups once more."""

    def bytes_moved(rows: int, n: int, k: int) -> float:
        if n <= max_piece:
            return _pieces_bytes(max_piece)(rows, n, k)
        num_groups = -(-n // GROUP)
        chosen = _pieces_bytes(max_piece)(rows, num_groups, k)
        return rows * (4 * n + 4 * num_groups + 8 * k + 4 * GROUP * k + _PAIR * k) + chosen

    return bytes_moved


def _shipped_bytes(rows: int, n: int, k: int) -> float:
    """What is short is read once; else the row, a key for each group twice, the best groups, a list of K twice."""
    if n <= 8192:
        return rows * (4 * n + _PAIR * k)
    return rows * (4 * n + 8 * -(-n // GROUP) + 8 * k + 4 * GROUP * k + 16 * k + _PAIR * k)


def _gpu_steps() -> Sequence[Step]:
    """Triton is imported here, where the steps of a GPU are asked for."""
    from kernels.steps import (
        top_k_2_rounds,
        top_k_3_on_chip,
        top_k_4_warp,
        top_k_5_redux,
        top_k_6_groups,
    )

    return (
        Step(
            number=1,
            name="sort everything",
            idea="The largest K are the first K of the sorted row.",
            predicted_gain=None,
            why="torch's sort: where the ladder starts.",
            run=checked(top_k_1_sort.top_k),
            bytes_moved=_sort_bytes,
            flops=_no_flops,
        ),
        Step(
            number=2,
            name="K times the maximum",
            idea="Do not sort: find the largest, then the largest of what is left, K times over.",
            predicted_gain=0.56,
            why="Fifty reads of 4 bytes an element in place of a sort's 112 bytes: by bytes alone a loss.",
            run=checked(top_k_2_rounds.top_k),
            bytes_moved=_rounds_bytes,
            flops=_no_flops,
            kernels=lambda: [_row_kernel(top_k_2_rounds.k_maxima, {"BLOCK": top_k_2_rounds.MAX_BLOCK}, 16)],
        ),
        Step(
            number=3,
            name="the row on the chip",
            idea="Read the row once, into registers, and run the rounds there; a long row is cut into pieces.",
            predicted_gain=1.2,
            why="The reads shrink fifty-fold, but 50 x 33 M elements x 12 operations at 15 T/s stay: 1.3 ms.",
            run=checked(top_k_3_on_chip.top_k),
            bytes_moved=_pieces_bytes(top_k_3_on_chip.MAX_PIECE),
            flops=_no_flops,
            kernels=lambda: [
                _row_kernel(
                    top_k_3_on_chip.k_maxima_of_piece,
                    {"PIECE": top_k_3_on_chip.MAX_PIECE},
                    top_k_3_on_chip.NUM_WARPS,
                )
            ],
        ),
        Step(
            number=4,
            name="one warp",
            idea="Give a piece to one warp, whose lanes agree by shuffles: no shared memory, no barrier.",
            predicted_gain=1.0,
            why="A lane compares 64 elements of its own for every five it exchanges; at 32 a row it is the other way.",
            run=checked(top_k_4_warp.top_k),
            bytes_moved=_pieces_bytes(top_k_4_warp.MAX_PIECE),
            flops=_no_flops,
            kernels=lambda: [
                _row_kernel(
                    top_k_3_on_chip.k_maxima_of_piece, {"PIECE": top_k_4_warp.MAX_PIECE}, top_k_4_warp.NUM_WARPS
                )
            ],
        ),
        Step(
            number=5,
            name="whole numbers",
            idea="Turn floats into whole numbers of the same order: `redux` reduces those in one instruction.",
            predicted_gain=2.0,
            why="Six operations an element and round in place of twelve.",
            run=checked(top_k_5_redux.top_k),
            bytes_moved=_pieces_bytes(top_k_5_redux.MAX_PIECE),
            flops=_no_flops,
            kernels=lambda: [
                _row_kernel(top_k_5_redux.k_maxima_of_keys, {"PIECE": top_k_5_redux.MAX_PIECE}, top_k_5_redux.NUM_WARPS)
            ],
        ),
        Step(
            number=6,
            name="only the best groups",
            idea="The K best lie in the K groups of 32 neighbours with the largest maxima: look nowhere else.",
            predicted_gain=10.0,
            why="The rounds look at 5608 elements in place of 128256 (25 us in place of 570), after one read (31 us).",
            applies=lambda rows, n, k: "a row of one piece is not cut into groups" if n <= 2048 else None,
            run=checked(top_k_6_groups.top_k),
            bytes_moved=_groups_bytes(top_k_5_redux.MAX_PIECE),
            flops=_no_flops,
            kernels=lambda: [
                _row_kernel(
                    top_k_6_groups.group_maxima,
                    {"GROUP": top_k_6_groups.GROUP, "CHUNK": top_k_6_groups.CHUNK},
                    top_k_6_groups.NUM_WARPS,
                ),
                _row_kernel(top_k_6_groups.k_maxima_of_groups, {"GROUP": top_k_6_groups.GROUP, "TILE": 2048}, 1),
            ],
        ),
        Step(
            number=7,
            name="the cut, bit by bit (kernels.top_k)",
            idea="No rounds: find the K-th largest with one count for each of its 32 bits, sort what is above.",
            predicted_gain=1.9,
            why="After the read, 32 counts of one comparison in place of 50 rounds of six operations: a third.",
            run=kernels.top_k,
            bytes_moved=_shipped_bytes,
            flops=_no_flops,
            kernels=_shipped_kernels,
        ),
    )


def _cpu_steps() -> Sequence[Step]:
    return (
        Step(
            number=1,
            name="sort everything",
            idea="The largest K are the first K of the sorted row.",
            predicted_gain=None,
            why="torch's sort: where the ladder starts.",
            run=checked(top_k_1_sort.top_k),
            bytes_moved=lambda rows, n, k: rows * n * 2 * _PAIR,
            flops=_no_flops,
        ),
        Step(
            number=2,
            name="K times the maximum",
            idea="Find the largest, take it out, K times over.",
            predicted_gain=2.0,
            why="50 n comparisons, 16 at once, against n log2(n) = 16 n of a sort, one by one and each with a move.",
            run=checked(top_k_cpu.rounds),
            bytes_moved=_rounds_bytes,
            flops=_no_flops,
        ),
        Step(
            number=3,
            name="only the best groups",
            idea="The rounds over the maxima of groups of 32, then over the K best groups.",
            predicted_gain=10.0,
            why="Rounds over 1572 + 1600 elements in place of 50304 (16 times fewer), after one pass over all.",
            run=checked(top_k_cpu.groups),
            bytes_moved=lambda rows, n, k: rows * 12.0 * n,
            applies=lambda rows, n, k: "a row of fewer than K groups is not cut" if n < GROUP * k else None,
            flops=_no_flops,
        ),
        Step(
            number=4,
            name="a rising threshold (kernels.top_k)",
            idea="One pass in C++: 16 numbers at once against the K-th best so far; nearly always none is better.",
            predicted_gain=5.0,
            why="One read at the speed of memory, no tensor written in between.",
            run=kernels.top_k,
            bytes_moved=lambda rows, n, k: rows * (4.0 * n + _PAIR * k),
            flops=_no_flops,
        ),
    )


_TYPES = {
    **dict.fromkeys(("x", "values", "maxima"), "*fp32:16"),
    **dict.fromkeys(("indices", "chosen", "candidates"), "*i64:16"),
    **dict.fromkeys(("group_keys", "chosen_groups"), "*i32:16"),
    **dict.fromkeys(("partials", "masses"), "*fp32:16"),
    **{"temperature": "fp32", "temperature_stride": "i32"},
    **dict.fromkeys(("n", "row_stride"), "i32:16"),
    **dict.fromkeys(("k", "batch", "num_pieces", "num_groups", "num_chunks"), "i32"),
}


def _row_kernel(kernel, constants: dict, num_warps: int) -> Compilation:
    types = {name: _TYPES[name] for name in kernel.arg_names if name in _TYPES}
    return Compilation(kernel=kernel, types=types, constants=constants, num_warps=num_warps)


def _shipped_kernels() -> Sequence[Compilation]:
    """At the headline size: groups of 32, the best 64 of them, a list of up to 64."""
    from kernels.top_k import triton_select, triton_top_k

    chunk = {"SUM_EXP": False, "MASS": False, "PER_ROW": 0, "GROUP": GROUP, "CHUNK": triton_select.CHUNK}
    tile = {"BITS": 32, "TILE": 64 * GROUP, "GROUP": GROUP, "NUM_GROUPS": 4096, "K": 64}
    return [
        _row_kernel(triton_select.group_maxima, chunk, triton_select.CHUNK_WARPS),
        _row_kernel(triton_top_k._top_k_tile, tile, triton_select.tile_warps(4096)),
    ]
