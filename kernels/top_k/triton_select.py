"""What the GPU kernels of top_k and sample share: keys, weights, exact selection without a sort.

Selection. The k-th largest of a set of 32-bit keys lies between the smallest and the largest of them, and that range is
quartered until exactly k keys lie above, or one value is left: at most 16 times, half a dozen for ordinary data. Each
time costs three comparisons per key and two sums over the tile, whatever k is. Ties at the cut are kept from the left,
by a running count. With weights in place of ones, `key_reaching` finds the cut of top-p, a bit at a time.

Why the CPU does it otherwise. cpu.cpp lets a threshold rise while a row streams by, which is a chain of dependent
steps. A GPU has to have the whole row in flight: here every key is compared with every trial, all at once.

Every operation on a weight is one that reference.py does, in its order: the kernels are compiled with
enable_fp_fusion=False, so that no multiplication is fused with an addition but where it says so.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import can_overlap, launched
from kernels.top_k import reference

WEIGHT_ONE = tl.constexpr(2.0**reference.WEIGHT_BITS)
C5, C4, C3, C2, C1 = (tl.constexpr(c * WEIGHT_ONE.value) for c in reference.EXP2_COEFFICIENTS)  # the same mantissas
LOG2_E = tl.constexpr(reference.LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
MIN_TEMPERATURE = tl.constexpr(reference.MIN_TEMPERATURE)
ROUND = tl.constexpr(1.5 * 2.0**23)
FINITE_KEYS_FROM = tl.constexpr(0x00800000)  # the key of the lowest finite number is the first above -inf's
INFINITY_KEY = tl.constexpr(0xFF800000)  # of +inf; NaN lies above

MAX_TILE = 8192  # elements that one program holds
MAX_GROUPS_CHOSEN = 1024
CHUNK = 4096  # elements of a long row that one program reads
CHUNK_WARPS = 4


@triton.jit
def ordered_key(x):
    """fp32 as uint32 keys in the same order: -0.0 as 0.0, NaN above all. No key is 0: that stands for 'nothing'."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return tl.where(x != x, 0xFFFFFFFF, key)


def key_bits(dtype: torch.dtype) -> int:
    """How many of a key's upper bits tell the numbers of this type apart: fp16 and bf16 leave the lower ones equal."""
    return {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}[dtype]


@triton.jit
def value_of_key(key):
    """The fp32 number that `ordered_key` was given."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def candidate(key, index):
    """A key above the complement of its index, in 64 bits: larger is better, no two are equal."""
    return ((key.to(tl.int64) - 0x80000000) << 32) | (0x7FFFFFFF - index)


@triton.jit
def key_and_index(candidates):
    return ((candidates >> 32) + 0x80000000).to(tl.uint32), (0x7FFFFFFF - (candidates & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def kth_largest(key, k):
    """The k-th largest of a tile of keys, or one between it and the next; the smallest if there are fewer than k.

    Keys that are 0 do not count. The range in which it can lie is quartered until no other is left, or exactly k lie
    above: half as many waits for a sum over the tile as with halves.
    """
    low = tl.min(tl.where(key == 0, 0xFFFFFFFF, key))
    high = tl.max(key)
    while low < high:
        quarter = (high - low) >> 2
        first, second = low + quarter + 1, low + ((high - low) >> 1) + 1
        third = second + quarter
        above_second = tl.sum((key >= second).to(tl.int32))
        outer = tl.sum((key >= first).to(tl.int32) + tl.where(key >= third, 1 << 16, 0))  # two counts in one number
        above_first, above_third = outer & 0xFFFF, outer >> 16
        exact = tl.where(above_first == k, first, tl.where(above_second == k, second, third))
        if (above_first == k) | (above_second == k) | (above_third == k):
            low, high = exact, exact
        else:
            high = tl.where(above_third > k, high, third - 1)
            high = tl.where(above_second > k, high, second - 1)
            high = tl.where(above_first > k, high, first - 1)
            low = tl.where(above_first > k, first, low)
            low = tl.where(above_second > k, second, low)
            low = tl.where(above_third > k, third, low)
    return low


@triton.jit
def key_reaching(key, weight, target, BITS: tl.constexpr):
    """The largest v for which the weights of the keys >= v add up to the target or more."""
    found = tl.full((), 0, tl.uint32)
    for bit in range(BITS):
        trial = found | (tl.full((), 1 << (BITS - 1), tl.uint32) >> bit)
        enough = tl.sum(tl.where(key >= trial, weight, 0)) >= target
        found = tl.where(enough, trial, found)
    return found


@triton.jit
def keep_best(key, k):
    """Which of a tile's keys, in index order, are the best k: all above the k-th largest, and ties from the left."""
    cut = kth_largest(key, k)
    kept = key >= cut
    if tl.sum(kept.to(tl.int32)) > k:
        tie = key == cut
        room = k - tl.sum((key > cut).to(tl.int32))
        kept = (key > cut) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))
    return kept


@triton.jit
def gather_best_groups(group_keys, chosen, num_groups, k, BITS: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """Write the numbers of the best k groups to `chosen`, in order; returns the largest key.

    The best k elements of a row lie in the k groups with the largest maxima (ties: the group on the left): if an
    element's group is not among them, k other groups each hold a better element.
    """
    groups = tl.arange(0, NUM_GROUPS)
    key = tl.load(group_keys + groups, mask=groups < num_groups, other=0).to(tl.uint32, bitcast=True)  # [NUM_GROUPS]
    kept = keep_best(key >> (32 - BITS), k)
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(chosen + slot, groups, mask=kept)
    tl.debug_barrier()  # other threads read what was written here
    return tl.max(key)


@triton.jit
def parameter(value, row, stride, PER_ROW: tl.constexpr, dtype: tl.constexpr):
    """A parameter of the op: the number itself, or the row's entry of a tensor."""
    if PER_ROW:
        return tl.load(value + row * stride)
    else:
        return tl.full((), value, dtype)


@triton.jit
def rate_of(temperature):
    return tl.div_rn(tl.full((), LOG2_E, tl.float32), tl.maximum(temperature, MIN_TEMPERATURE))


@triton.jit
def integer_weight(z, rate):
    """reference.integer_weights, for z (fp32, at most 0).

    The lowest bits of `rounded` are the whole part of y, modulo 2^9: moved to where fp32 has its exponent and added to
    it, they multiply by that power of two, exactly. What is left is to cut off the fraction.
    """
    y = tl.maximum(z * rate, -63.0)
    rounded = y + ROUND
    fraction = y - (rounded - ROUND)
    power = tl.fma(fraction, C5, C4)
    power = tl.fma(power, fraction, C3)
    power = tl.fma(power, fraction, C2)
    power = tl.fma(power, fraction, C1)
    power = tl.fma(power, fraction, WEIGHT_ONE)
    bits = power.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def share(total, p):
    """reference._share: total * p, with p lowered by what rounding to fp32 may have added."""
    p_bits = (p * 2147483648.0).to(tl.int64)
    p_bits = tl.where(p < 1.0, p_bits - 1 - (p_bits >> 24), p_bits)
    return (total >> 31) * p_bits + (((total & 0x7FFFFFFF) * p_bits) >> 31)


@triton.jit
def _philox(seed, step):
    """The first two words of Philox4x32-10 with key seed and counter step, int64 both."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = step.to(tl.uint32), (step >> 32).to(tl.uint32)
    c2, c3 = tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)
    multiplier0, multiplier1 = tl.full((), 0xD2511F53, tl.uint32), tl.full((), 0xCD9E8D57, tl.uint32)
    weyl0, weyl1 = tl.full((), 0x9E3779B9, tl.uint32), tl.full((), 0xBB67AE85, tl.uint32)
    for _ in range(10):
        high0, low0 = tl.umulhi(multiplier0, c0), tl.mul(multiplier0, c0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(multiplier1, c2), tl.mul(multiplier1, c2, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = tl.add(k0, weyl0, sanitize_overflow=False), tl.add(k1, weyl1, sanitize_overflow=False)
    return c0, c1


@triton.jit
def random_below(total, seed, step):
    """reference.random_below: floor(total * u / 2^64) with u the first 64 bits of Philox4x32-10."""
    u_high, u_low = _philox(seed, step)
    u = (u_high.to(tl.uint64) << 32) | u_low.to(tl.uint64)
    return tl.umulhi(u, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_maxima(
    x, group_keys, partials, masses, n, row_stride, num_groups, num_chunks, temperature, temperature_stride,
    SUM_EXP: tl.constexpr, MASS: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program, CHUNK elements of a row: the largest key of each GROUP neighbours, and sums over the chunk.

    group_keys (batch, num_groups) int32
    partials (batch, num_chunks, 2) fp32, with SUM_EXP: the chunk's maximum, and the sum of exp(x - it)
    masses (batch, num_chunks) fp32, with MASS: the sum of exp((x - the chunk's maximum) / temperature)
    """
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    groups = tl.arange(0, CHUNK // GROUP)
    index = chunk * CHUNK + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [CHUNK / GROUP, GROUP]
    v = tl.load(x + row * row_stride + index, mask=index < n, other=float("-inf")).to(tl.float32)
    key = ordered_key(tl.reduce(v, 1, larger))  # [CHUNK / GROUP]
    groups += chunk * (CHUNK // GROUP)
    tl.store(group_keys + row * num_groups + groups, key.to(tl.int32, bitcast=True), mask=groups < num_groups)
    if SUM_EXP or MASS:
        largest = value_of_key(tl.max(key))
        largest = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf is not a number
        place = row * num_chunks + chunk
        if SUM_EXP:
            tl.store(partials + place * 2, largest)
            tl.store(partials + place * 2 + 1, tl.sum(tl.exp2((v - largest) * LOG2_E)))
        if MASS:
            rate = rate_of(parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32))
            tl.store(masses + place, tl.sum(tl.exp2((v - largest) * rate)))


@triton.jit
def log_sum_exp(partials, row, num_chunks, row_max, NUM_CHUNKS: tl.constexpr):
    """log(sum(exp(x - row_max))) from the partials of a row's chunks."""
    chunks = tl.arange(0, NUM_CHUNKS)
    inside = chunks < num_chunks
    partials += (row * num_chunks + chunks) * 2
    largest = tl.load(partials, mask=inside, other=float("-inf"))
    total = tl.load(partials + 1, mask=inside, other=0.0)
    return tl.log2(tl.sum(total * tl.exp2((largest - row_max) * LOG2_E))) * LN_2


def power_of_2(n: int) -> int:
    """The smallest power of two that is n or more. (triton.next_power_of_2 takes 4 us of Python, and cdiv 3.)"""
    return 1 << max(0, n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` hold n elements."""
    return -(-n // size)


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple,
    constants: dict,
    num_warps: int,
    maxnreg: int | None = None,
    early: bool = False,
) -> None:
    """kernel[(programs,)](*arguments, **constants), reported to `kernels.launch`; constants are the last parameters.

    early: where kernels may overlap, this one is launched while the one before still runs, for whose end it waits.
    """
    options = {"num_warps": num_warps, "maxnreg": maxnreg, "enable_fp_fusion": False}
    if early and can_overlap(arguments[0].device):
        options["launch_pdl"] = True
    compiled = kernel[(programs,)](*arguments, **constants, **options)
    launched(compiled, (programs,), (*arguments, *constants.values()))


def tile_warps(tile: int, per_warp: int = 512) -> int:
    """Warps for a program that holds so many elements."""
    return min(16, max(1, power_of_2(tile) // per_warp))


@functools.lru_cache(maxsize=1024)
def choose_group(n: int, k: int) -> tuple[int, int]:
    """The size of a group, and how many of them are chosen at most, such that both steps look at few elements."""
    chosen = power_of_2(k)
    sizes = (8, 16, 32, 64, 128)
    return min(sizes, key=lambda size: power_of_2(blocks(n, size)) + chosen * size), chosen


def launch_group_maxima(
    x: Tensor, group: int, sum_exp: bool, mass_at: tuple | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
    """Run `group_maxima`: keys (batch, num_groups), partials, masses, and how many groups and chunks a row has.

    mass_at   temperature, its stride, and which parameters are tensors; None: no masses
    """
    batch, n = x.shape
    num_groups, num_chunks = blocks(n, group), blocks(n, CHUNK)
    temperature, temperature_stride, per_row = mass_at or (1.0, 0, 0)
    group_keys = x.new_empty((batch, num_groups), dtype=torch.int32)
    partials = x.new_empty((batch, num_chunks, 2), dtype=torch.float32) if sum_exp else None
    masses = x.new_empty((batch, num_chunks), dtype=torch.float32) if mass_at else None
    arguments: tuple = (x, group_keys, partials, masses, n, x.stride(0), num_groups, num_chunks)
    arguments += (temperature, temperature_stride)
    constants = {
        "SUM_EXP": sum_exp,
        "MASS": mass_at is not None,
        "PER_ROW": per_row & 1,
        "GROUP": group,
        "CHUNK": CHUNK,
    }
    launch(group_maxima, batch * num_chunks, arguments, constants, CHUNK_WARPS)
    return group_keys, partials, masses, num_groups, num_chunks
