"""The tiles of the portable attention kernels: one table, by kind of card, and what to do if a tile does not fit.

A card is "hopper" (compute capability 9.0), "large" (other cards with 160 KB or more of shared memory for a program:
8.0, 10.0) or "small" (the rest: 99 KB on 8.6, 8.9 and 12.0, 64 KB on 7.5). Where a tile asks for more shared memory
than a card has, the first in SMALLER_TILES that is smaller and fits takes its place, and is remembered.

Knows no kernel.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

FORWARD, BACKWARD_DQ, BACKWARD_DKDV = "forward", "backward dq", "backward dkdv"
DECODE, DECODE_MANY = "decode", "decode, many programs"


@dataclasses.dataclass(frozen=True)
class Tile:
    """block_m queries by block_n keys, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# (kernel, kind of card, head_dim) -> tile for fp16 and bf16, none of which spills registers. Measured on an H200:
# TFLOP/s at seqlen 512 / 4096 / 16384, 16384 tokens, causal; the rows without figures were compiled, not timed.
TILES = {
    (FORWARD, "hopper", 64): Tile(128, 64, 8, 3),  # 206 / 390 / 414
    (FORWARD, "hopper", 128): Tile(128, 64, 8, 3),  # not causal: 305 / 468 / 490
    (FORWARD, "hopper", 256): Tile(64, 32, 8, 2),
    (BACKWARD_DQ, "hopper", 64): Tile(128, 64, 8, 3),  # 184 / 399 / 465
    (BACKWARD_DQ, "hopper", 128): Tile(128, 64, 8, 3),  # not causal: 359 / 602 / 612
    (BACKWARD_DQ, "hopper", 256): Tile(32, 32, 4, 2),
    (BACKWARD_DKDV, "hopper", 64): Tile(32, 128, 8, 2),
    (BACKWARD_DKDV, "hopper", 128): Tile(32, 64, 8, 2),
    (BACKWARD_DKDV, "hopper", 256): Tile(16, 16, 4, 1),
    (FORWARD, "large", 64): Tile(128, 64, 8, 3),
    (FORWARD, "large", 128): Tile(64, 64, 4, 3),
    (FORWARD, "large", 256): Tile(64, 32, 8, 2),
    (BACKWARD_DQ, "large", 64): Tile(128, 64, 8, 3),
    (BACKWARD_DQ, "large", 128): Tile(64, 64, 8, 2),
    (BACKWARD_DQ, "large", 256): Tile(64, 64, 8, 2),
    (BACKWARD_DKDV, "large", 64): Tile(32, 128, 8, 2),
    (BACKWARD_DKDV, "large", 128): Tile(32, 64, 8, 1),
    (BACKWARD_DKDV, "large", 256): Tile(16, 16, 4, 1),
    (FORWARD, "small", 64): Tile(128, 64, 8, 2),
    (FORWARD, "small", 128): Tile(64, 64, 4, 1),
    (FORWARD, "small", 256): Tile(64, 32, 8, 2),
    (BACKWARD_DQ, "small", 64): Tile(128, 64, 8, 2),
    (BACKWARD_DQ, "small", 128): Tile(64, 64, 8, 2),
    (BACKWARD_DQ, "small", 256): Tile(64, 32, 8, 1),
    (BACKWARD_DKDV, "small", 64): Tile(32, 128, 8, 2),
    (BACKWARD_DKDV, "small", 128): Tile(32, 64, 8, 2),
    (BACKWARD_DKDV, "small", 256): Tile(16, 32, 4, 1),
}

# What decoding does is read the cache, on every card: BLOCK_N keys at a time, by head_dim. A program that has a
# processor to itself keeps more of them on the way; where there are many, they do so together. us on an H200, cuDNN in
# brackets, one query of 32 heads over the keys of 8, head_dim 128: 32768 keys 49.7 (49.6), 131072 136.0 (136.8), 16
# sequences of 8192 132.4 (132.0), 64 of 4096 249.4 (250.2).
DECODE_TILES = {
    DECODE: {64: Tile(16, 64, 4, 4), 128: Tile(16, 64, 4, 4), 256: Tile(16, 32, 4, 2)},
    DECODE_MANY: {64: Tile(16, 64, 2, 3), 128: Tile(16, 128, 4, 2), 256: Tile(16, 32, 4, 2)},
}

# fp32, multiplied without matrix units: by head_dim. Larger ones spill and take long to compile.
FP32_TILES = {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)}
SMALLER_TILES = (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))

_fitting: dict[tuple, Tile] = {}  # what was found to fit, where a tile of the table did not


@functools.cache
def card(device: torch.device) -> str:
    """The kind of card, "hopper", "large" or "small"; what is no CUDA device (Triton's interpreter) counts as small."""
    if device.type != "cuda":
        return "small"
    capability = torch.cuda.get_device_capability(device)
    return "hopper" if capability == (9, 0) else "large" if capability in ((8, 0), (10, 0)) else "small"


def table_tile(kernel: str, card: str, head_dim: int, dtype: torch.dtype, causal: bool) -> Tile:
    """The row of the table; a head_dim that has none shares the next larger one's."""
    block_d = max(64, triton.next_power_of_2(head_dim))
    if kernel in DECODE_TILES and dtype != torch.float32:
        return DECODE_TILES[DECODE_MANY if card == "small" else kernel][block_d]  # the one that takes less memory
    return FP32_TILES[block_d] if dtype == torch.float32 else TILES[kernel, card, block_d]


def launch_with_fitting_tile(
    run: Callable[[Tile], None], kernel: str, q: Tensor, causal: bool, tile: Tile | None = None
) -> None:
    """run(tile) with the given tile, or the table's for q (..., head_dim), or the first smaller one that fits."""
    if tile is not None:
        return run(tile)
    tile = fitting_tile(kernel, q, causal)
    candidates = [tile, *(x for x in SMALLER_TILES if x.block_m * x.block_n < tile.block_m * tile.block_n)]
    for candidate in candidates:
        try:
            run(candidate)
        except triton.runtime.errors.OutOfResources:
            if candidate == candidates[-1]:
                raise
        else:
            _fitting[kernel, q.device, q.shape[-1], q.dtype, causal] = candidate
            return


def fitting_tile(kernel: str, q: Tensor, causal: bool) -> Tile:
    """The tile that a launch begins with: the table's, unless that was found too large."""
    found = _fitting.get((kernel, q.device, q.shape[-1], q.dtype, causal))
    return found or table_tile(kernel, card(q.device), q.shape[-1], q.dtype, causal)
