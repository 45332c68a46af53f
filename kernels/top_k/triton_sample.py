"""Sampling on the GPU. The definitions, bit for bit, are reference.py's; triton_select.py says how selection works.

    short rows           one program holds a whole row in registers and does everything, in one launch
    long rows, top-k     a first launch reads the row once, in parallel chunks, and keeps the maximum of each group of
                         neighbours; in a second, one program per row finds the best groups, which hold the best
                         tokens, and does with them what is done with a short row
    long rows otherwise  maxima; for top-p a bracket of the cut; weights of groups; the cut, the group into which the
                         random number falls, and the token in it (triton_top_p.py). Of many rows each is one program's,
                         which does all this in one launch while others wait for memory; of few, several programs'

Knows Triton; knows nothing of models. Arguments were checked in op.py.
"""
# ruff: noqa: SIM102  an outer `if` on a constant is decided by the compiler, the inner one by the row

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from kernels.top_k.op import empty_results
from kernels.top_k.triton_select import (
    CHUNK,
    CHUNK_WARPS,
    FINITE_KEYS_FROM,
    INFINITY_KEY,
    LN_2,
    LOG2_E,
    MAX_GROUPS_CHOSEN,
    MAX_TILE,
    MIN_TEMPERATURE,
    WEIGHT_ONE,
    blocks,
    choose_group,
    gather_best_groups,
    integer_weight,
    keep_best,
    key_bits,
    key_reaching,
    launch,
    launch_group_maxima,
    log_sum_exp,
    ordered_key,
    parameter,
    power_of_2,
    random_below,
    rate_of,
    share,
    tile_warps,
    value_of_key,
)
from kernels.top_k.triton_top_p import (
    EVERY_TOKEN,
    LARGEST,
    add_two,
    as_keys,
    bracket_of_cut,
    closer_bracket,
    cut_in_list,
    cut_in_row,
    find_bracket,
    kept_weight,
    load_block,
    load_bracket,
    narrow_by_list,
    rank_cut,
    read_row,
    row_maximum,
    search_row,
    weigh,
    weigh_groups,
)

GROUP = 512  # tokens whose weights a warp adds up; at most, as those of two are bits of 32 for each of 32 threads
WEIGH_GROUPS = 4
SAMPLE_PART, MAX_SAMPLE = 16, 8192  # a bracket is found from one token in so many
GUESS_SAMPLE = 1024  # tokens from which one is guessed
LIST_PART, MAX_LIST = 4, 2**16  # one token in so many may be within it: there is room for them
LIST_BLOCKS, MOST_SORTED = 32, 256  # blocks in which a full list is read; tokens left of it in the end
EARLY_ROWS = 1024  # about as many as begin at once; of more, most begin when others end
ALONE_FROM = 64  # rows, from which on one program does all of a row
LEAST_WARPS, MOST_WARPS, WARPS_AT_WORK = 4, 16, 4096  # of such a program; of all that are to be at work at once
DRAW_REGISTERS = 64  # a thread, at most, so that the programs of 1024 rows are at work at once
PER_SAMPLE_WARP, PER_GROUPS_WARP = 1024, 1024  # elements that a warp holds: few wait for many


@triton.jit
def _row_parameters(
    row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    PER_ROW: tl.constexpr,
):  # fmt: skip
    """A row's parameters, made harmless where they are not allowed, and whether they were. Greedy: top_k = 1."""
    temperature = parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32)
    k = parameter(top_k, row, top_k_stride, PER_ROW & 2, tl.int64)
    p = parameter(top_p, row, top_p_stride, PER_ROW & 4, tl.float32)
    min_p = parameter(min_p, row, min_p_stride, PER_ROW & 8, tl.float32)
    seed = parameter(seed, row, seed_stride, PER_ROW & 16, tl.int64)
    step = parameter(step, row, step_stride, PER_ROW & 32, tl.int64)
    lowest_k: tl.constexpr = 1 if PER_ROW & 2 else 0  # as a number, 0 switches top-k off
    allowed = (temperature >= 0.0) & (temperature < float("inf")) & (k >= lowest_k) & (k <= vocab_size)
    allowed &= (p > 0.0) & (p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    greedy = temperature == 0.0
    k = tl.where((k > 0) & (k <= vocab_size), k, vocab_size).to(tl.int32)
    k = tl.where(greedy, 1, k)
    temperature = tl.where(allowed & (temperature > 0.0), temperature, 1.0)
    p = tl.where(allowed, p, 1.0)
    least_weight = (tl.where(allowed, min_p, 0.0) * WEIGHT_ONE).to(tl.int64)
    return allowed, greedy, temperature, k, p, least_weight, seed, step


@triton.jit
def _processed_logprob(z, total, temperature, greedy):
    scaled = tl.div_rn(z, tl.maximum(temperature, MIN_TEMPERATURE))
    return tl.where(greedy, 0.0, scaled - (tl.log2(total.to(tl.float32)) - 40.0) * LN_2)


@triton.jit
def _store_answer(token_ids, logprobs, row, batch, good, token, raw, processed, LOGPROBS: tl.constexpr):
    tl.store(token_ids + row, tl.where(good, token, -1))
    if LOGPROBS:
        nan = float("nan")
        tl.store(logprobs + row, tl.where(good, raw, nan))
        tl.store(logprobs + batch + row, tl.where(good, processed, nan))


@triton.jit
def _keep_top_p(key, weight, p, BITS: tl.constexpr):
    """The weights with those outside the top-p set made 0. Ties at the cut are kept from the left."""
    target = tl.maximum(share(tl.sum(weight), p), 1)
    key = tl.where(weight > 0, key, 0)
    cut = key_reaching(key, weight, target, BITS)
    tie = key == cut
    before = tl.sum(tl.where(key > cut, weight, 0)) + tl.cumsum(tl.where(tie, weight, 0), 0) - weight
    return tl.where((key > cut) | (tie & (before < target)), weight, 0)


@triton.jit(do_not_specialize=["top_k", "seed", "step"])
def _sample_tile(
    logits, token_ids, logprobs, batch, vocab_size, row_stride,
    temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    group_keys, partials, chosen_groups, num_groups, num_chunks,
    PER_ROW: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, LOGPROBS: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, NUM_CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program, one row: filters and draw over a tile of it in registers, in token order.

    GROUP = 0: the tile is the whole row. Otherwise it is the TILE / GROUP groups that hold the row's best.
    """
    if cuda_capability_geq(9):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # what comes next may load its weights meanwhile, if it is made to
    row = tl.program_id(0).to(tl.int64)
    allowed, greedy, temperature, k, p, least_weight, seed, step = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    logits += row * row_stride
    places = tl.arange(0, TILE)
    if GROUP == 0:
        tokens = places
        inside = tokens < vocab_size
    else:
        chosen_groups += row * (TILE // GROUP)
        max_key = gather_best_groups(group_keys + row * num_groups, chosen_groups, num_groups, k, BITS, NUM_GROUPS)
        inside = places < tl.minimum(k, num_groups) * GROUP
        tokens = tl.load(chosen_groups + places // GROUP, mask=inside, other=0) * GROUP + places % GROUP
        inside = inside & (tokens < vocab_size)
    x = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)  # [TILE]
    key = tl.where(inside, ordered_key(x), 0)
    if GROUP == 0:
        max_key = tl.max(key)
    good = allowed & (max_key >= FINITE_KEYS_FROM) & (max_key < INFINITY_KEY)
    row_max = tl.where(good, value_of_key(max_key), 0.0)
    z = tl.where(inside, tl.minimum(x - row_max, 0.0), float("-inf"))  # [TILE]

    key = key >> (32 - BITS)
    weight = integer_weight(z, rate_of(temperature))  # [TILE]
    if TOP_K:
        if k < vocab_size:
            weight = tl.where(keep_best(key, k), weight, 0)
    if TOP_P:
        if p < 1.0:
            weight = _keep_top_p(key, weight, p, BITS)
    weight = tl.where(weight >= least_weight, weight, 0)

    running = tl.cumsum(weight, 0)
    total = tl.sum(weight)
    drawn = random_below(total, seed, step)
    here = places == tl.sum((running <= drawn).to(tl.int32))
    token = tl.max(tl.where(here, tokens, 0))
    raw = 0.0
    processed = 0.0
    if LOGPROBS:
        z_token = tl.max(tl.where(here, z, float("-inf")))
        if GROUP == 0:
            raw = z_token - tl.log2(tl.sum(tl.exp2(z * LOG2_E))) * LN_2
        else:
            raw = z_token - log_sum_exp(partials, row, num_chunks, row_max, NUM_CHUNKS)
        processed = _processed_logprob(z_token, total, temperature, greedy)
    _store_answer(token_ids, logprobs, row, batch, good, token, raw, processed, LOGPROBS)


# ---- rows too long for one program's registers, of which any number of tokens may be kept ----


@triton.jit(do_not_specialize=["top_k", "seed", "step"])
def _find_cut(
    logits, batch, vocab_size, row_stride,
    temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    group_keys, cuts, num_chunks,
    PER_ROW: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row: what top-k and top-p keep, as the keys above a cut, and those equal to it up to a token:
    cuts (batch, 2)."""
    row = tl.program_id(0).to(tl.int64)
    allowed, _, temperature, k, p, _, _, _ = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    logits += row * row_stride
    finite, max_key, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    good = allowed & finite
    rate = rate_of(temperature)
    cut = tl.full((), 0, tl.uint32)
    last = tl.full((), EVERY_TOKEN, tl.int32)
    if good & (k < vocab_size):
        cut, last = rank_cut(logits, vocab_size, k, max_key, BLOCK)
    if good & (p < 1.0):
        total = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab_size, BLOCK):
            tokens, x, key = load_block(logits, start, vocab_size, BLOCK)
            total += kept_weight(tokens, x, key, row_max, rate, cut, last)
        reached = tl.sum(total)
        target = tl.maximum(share(reached, p), 1)
        low = tl.full((), 1, tl.uint32)
        cut, last = search_row(
            logits, vocab_size, row_max, rate, cut, last, target, low, max_key, reached, reached * 0, True, BLOCK
        )
    tl.store(cuts + row * 2, cut.to(tl.int32, bitcast=True))
    tl.store(cuts + row * 2 + 1, last)


@triton.jit(do_not_specialize=["top_k", "seed", "step"], do_not_specialize_on_alignment=["logits"])
def _draw_long(
    logits, token_ids, logprobs, batch, vocab_size, row_stride,
    temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    group_keys, partials, brackets, counts, listed, group_sums, num_chunks, num_groups,
    PER_ROW: tl.constexpr, CUT: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, LOGPROBS: tl.constexpr,
    ALONE: tl.constexpr, SAMPLE: tl.constexpr,
    LIST: tl.constexpr, LIST_ROOM: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program, one row: the cut, the group into which the random number falls, then the token in it.

    ALONE: the program does before what otherwise several do in three launches.
    """
    row = tl.program_id(0).to(tl.int64)
    allowed, greedy, temperature, _, p, least_weight, seed, step = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    logits += row * row_stride
    rate = rate_of(temperature)
    p = tl.where(greedy, 0.0, p)
    own = group_sums + row * num_groups
    if TOP_P:
        listed += row * LIST_ROOM
        counts += row * 4
    if ALONE:
        low, high = rate, rate
        if TOP_P:
            low, high = bracket_of_cut(logits, vocab_size, None, rate, p, None, SAMPLE)
        row_max, total_exp, mass, above_low, above_middle, above_high = read_row(
            logits, vocab_size, rate, low, 0.5 * low + 0.5 * high, high, LOGPROBS, TOP_P, WARPS, GROUP
        )
        finite = (row_max > float("-inf")) & (row_max < float("inf"))
        row_max = tl.where(finite, row_max, LARGEST)
        max_key = ordered_key(row_max)
        if TOP_P:
            low, high, close = closer_bracket(low, high, above_low, above_middle, above_high, row_max, rate, mass * p)
            if close == 0:
                low, high = bracket_of_cut(logits, vocab_size, row_max, rate, p, mass, SAMPLE)
            low, high = as_keys(low, high, p)
        number, everything, above = weigh(
            logits, own, listed, counts, 0, tl.cdiv(num_groups, WARPS), vocab_size, num_groups,
            row_max, rate, low, high, least_weight, CUT, TOP_P, MIN_P, LIST, True, WARPS, GROUP,
        )  # fmt: skip
        everything, above = tl.reduce((everything, above), 0, add_two)
        tl.debug_barrier()  # other threads read what was written here
    else:
        finite, max_key, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
        if CUT | TOP_P:
            low, high = load_bracket(brackets, row)
        if TOP_P:
            number = tl.load(counts).to(tl.int32)
            everything, above = tl.load(counts + 1), tl.load(counts + 2)
    good = allowed & finite
    cut = tl.full((), 0, tl.uint32)
    last = tl.full((), EVERY_TOKEN, tl.int32)
    if CUT:
        cut, last = low, high.to(tl.int32)
    if TOP_P:
        if good & (p < 1.0):
            target = tl.maximum(share(everything, p), 1)
            high = tl.minimum(high, max_key)
            between = number * 0
            if (number <= LIST) & (above < target):
                low, high, more, between = narrow_by_list(
                    listed, number, row_max, rate, target - above, low, high, BLOCK, MOST
                )
                above += more
            found = between < 0
            if (between > 0) & (between <= MOST):
                cut, last, found = cut_in_list(
                    listed, own, number, row_max, rate, target - above, low, high, least_weight,
                    BLOCK, GROUP, LIST, MOST,
                )  # fmt: skip
            if found == 0:
                if between <= MOST:  # not one value with many ties: no bracket, or too many tokens within it
                    low, high, above = tl.full((), 1, tl.uint32), max_key, target * 0
                cut, last = cut_in_row(
                    logits, own, vocab_size, num_groups, row_max, rate, target, low, high, everything, above,
                    least_weight, GROUP,
                )  # fmt: skip
            tl.debug_barrier()  # the sums are read by other threads than have changed them

    # The group in whose share of the running total, in order, the random number falls.
    groups = tl.arange(0, NUM_GROUPS)
    there = groups < num_groups
    sums = tl.load(own + groups, mask=there, other=0, cache_modifier=".cg")  # [NUM_GROUPS]
    total = tl.sum(sums)
    left = random_below(total, seed, step)
    passed = (tl.cumsum(sums, 0) <= left) & there
    group = tl.minimum(tl.sum(passed.to(tl.int32)), num_groups - 1)
    left -= tl.sum(tl.where(groups < group, sums, 0))

    tokens, x, key = load_block(logits, group * GROUP, vocab_size, GROUP)
    weight = kept_weight(tokens, x, key, row_max, rate, cut, last)
    running = tl.cumsum(tl.where(weight >= least_weight, weight, 0), 0)
    token = group * GROUP + tl.sum((running <= left).to(tl.int32))
    raw = 0.0
    processed = 0.0
    if LOGPROBS:
        z_token = tl.max(tl.where(tokens == token, tl.minimum(x - row_max, 0.0), float("-inf")))
        if ALONE:
            raw = z_token - tl.log2(total_exp) * LN_2
        else:
            raw = z_token - log_sum_exp(partials, row, num_chunks, row_max, NUM_CHUNKS)
        processed = _processed_logprob(z_token, total, temperature, greedy)
    _store_answer(token_ids, logprobs, row, batch, good, token, raw, processed, LOGPROBS)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    step: int,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    return_logprobs: bool,
) -> tuple[Tensor, Tensor]:
    """The op `sample` on a CUDA device."""
    token_ids, logprobs = empty_results(logits, return_logprobs)
    if logits.shape[0] == 0:
        return token_ids, logprobs
    numbers = (temperature, top_k, top_p, min_p, seed, step)
    tensors = (temperatures, top_ks, top_ps, min_ps, seeds, steps)
    values = [number if tensor is None else tensor for number, tensor in zip(numbers, tensors, strict=True)]
    strides = [0 if tensor is None else tensor.stride(0) for tensor in tensors]
    greedy = temperature == 0.0 and temperatures is None
    per_row = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)
    job = _Job(
        logits=logits,
        outputs=(token_ids, logprobs),
        parameters=(*values, *strides),
        per_row=per_row,
        may_drop_by_rank=top_k != 0 or top_ks is not None or greedy or temperatures is not None,
        may_drop_by_mass=top_p < 1.0 or top_ps is not None,
        may_drop_light=min_p > 0.0 or min_ps is not None,
        most_kept=1 if greedy else -1 if top_k == 0 and top_ks is None else top_k,
        logprobs=return_logprobs,
    )
    with torch.cuda.device_of(logits):
        if logits.shape[1] <= MAX_TILE:
            _whole_row(job)
        elif 0 < job.most_kept <= MAX_GROUPS_CHOSEN:
            _best_groups(job)
        else:
            _group_by_group(job)
    return token_ids, logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """One call of the op, as the launchers below pass it on to the kernels."""

    logits: Tensor
    outputs: tuple[Tensor, Tensor]
    parameters: tuple  # six numbers or tensors, then the six distances between a tensor's rows
    per_row: int  # bit i: parameter i is a tensor
    may_drop_by_rank: bool
    may_drop_by_mass: bool
    may_drop_light: bool
    most_kept: int  # no row keeps more tokens than this; 0: not known here; -1: no row but a greedy one has a limit
    logprobs: bool

    def row_arguments(self, with_outputs: bool = False) -> tuple:
        """What the kernels that handle rows begin with."""
        batch, vocab_size = self.logits.shape
        outputs = self.outputs if with_outputs else ()
        return (self.logits, *outputs, batch, vocab_size, self.logits.stride(0), *self.parameters)

    def constants(self) -> dict:
        return {"PER_ROW": self.per_row}


def _whole_row(job: _Job) -> None:
    batch, vocab_size = job.logits.shape
    tile = max(32, power_of_2(vocab_size))
    arguments = (*job.row_arguments(with_outputs=True), None, None, None, 0, 0)
    constants = {
        **job.constants(),
        "TOP_K": job.may_drop_by_rank,
        "TOP_P": job.may_drop_by_mass,
        "LOGPROBS": job.logprobs,
        "BITS": key_bits(job.logits.dtype),
        "TILE": tile,
        "GROUP": 0,
        "NUM_GROUPS": 0,
        "NUM_CHUNKS": 0,
    }
    launch(_sample_tile, batch, arguments, constants, tile_warps(tile), early=batch <= EARLY_ROWS)


def _best_groups(job: _Job) -> None:
    batch, vocab_size = job.logits.shape
    group, chosen = choose_group(vocab_size, job.most_kept)
    group_keys, partials, _, num_groups, num_chunks = launch_group_maxima(job.logits, group, job.logprobs)
    chosen_groups = job.logits.new_empty((batch, chosen), dtype=torch.int32)
    scratch = (group_keys, partials, chosen_groups, num_groups, num_chunks)
    constants = {
        **job.constants(),
        "TOP_K": True,
        "TOP_P": job.may_drop_by_mass,
        "LOGPROBS": job.logprobs,
        "BITS": key_bits(job.logits.dtype),
        "TILE": chosen * group,
        "GROUP": group,
        "NUM_GROUPS": power_of_2(num_groups),
        "NUM_CHUNKS": power_of_2(num_chunks),
    }
    warps = tile_warps(max(chosen * group, num_groups), PER_GROUPS_WARP)
    launch(_sample_tile, batch, (*job.row_arguments(with_outputs=True), *scratch), constants, warps)


def _group_by_group(job: _Job) -> None:
    logits = job.logits
    batch, vocab_size = logits.shape
    cut_by_rank = job.most_kept >= 0
    cut_by_mass = (job.may_drop_by_rank or job.may_drop_by_mass) and not cut_by_rank
    alone = batch >= ALONE_FROM and not cut_by_rank
    num_groups = blocks(vocab_size, GROUP)
    list_length = min(power_of_2(vocab_size) // LIST_PART, MAX_LIST)
    if alone:
        warps = min(max(WARPS_AT_WORK // power_of_2(batch), LEAST_WARPS), MOST_WARPS)
        block = 64 * warps
    else:
        block = min(max(256, list_length // LIST_BLOCKS), 1024)
        warps = max(4, block // 128) if cut_by_mass else 4
    constants: dict[str, Any] = {
        **job.constants(),
        "CUT": cut_by_rank,
        "TOP_P": cut_by_mass,
        "MIN_P": job.may_drop_light,
        "LOGPROBS": job.logprobs,
        "ALONE": alone,
        "SAMPLE": GUESS_SAMPLE if alone else max(1, min(power_of_2(vocab_size) // SAMPLE_PART, MAX_SAMPLE)),
        "LIST": list_length,
        "LIST_ROOM": list_length + MOST_SORTED,
        "BLOCK": block,
        "MOST": MOST_SORTED,
        "NUM_GROUPS": power_of_2(num_groups),
        "GROUP": GROUP,
        "GROUPS": WEIGH_GROUPS,
        "WARPS": warps,
    }
    counts = logits.new_empty((batch, 4), dtype=torch.int64) if cut_by_mass else None
    listed = logits.new_empty((batch, constants["LIST_ROOM"]), dtype=torch.int64) if cut_by_mass else None
    group_sums = logits.new_empty((batch, num_groups), dtype=torch.int64)
    group_keys = partials = brackets = None
    num_chunks = 0
    if not alone:
        group_keys, partials, brackets, num_chunks = _in_chunks(job, counts, listed, group_sums, constants)
    scratch = (group_keys, partials, brackets, counts, listed, group_sums, num_chunks, num_groups)
    constants = _those_of(_draw_long, {**constants, "NUM_CHUNKS": power_of_2(num_chunks)})
    launch(_draw_long, batch, (*job.row_arguments(with_outputs=True), *scratch), constants, warps, DRAW_REGISTERS)


def _in_chunks(
    job: _Job, counts: Tensor | None, listed: Tensor | None, group_sums: Tensor, constants: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor, int]:
    """What comes before `_draw_long` where a row is for several programs: chunks' keys, partials, brackets, chunks."""
    logits = job.logits
    batch, vocab_size = logits.shape
    num_groups = group_sums.shape[1]
    temperature, _, top_p, min_p, _, _, temperature_stride, _, top_p_stride, min_p_stride, _, _ = job.parameters
    mass_at = (temperature, temperature_stride, job.per_row) if constants["TOP_P"] else None
    group_keys, partials, masses, _, num_chunks = launch_group_maxima(logits, CHUNK, job.logprobs, mass_at)
    brackets = logits.new_empty((batch, 2), dtype=torch.int32)
    constants = {**constants, "NUM_CHUNKS": power_of_2(num_chunks)}
    if constants["CUT"]:
        arguments: tuple = (*job.row_arguments(), group_keys, brackets, num_chunks)
        launch(_find_cut, batch, arguments, _those_of(_find_cut, {**constants, "BLOCK": CHUNK}), CHUNK_WARPS)
    if constants["TOP_P"]:
        arguments = (logits, group_keys, masses, brackets, counts, vocab_size, logits.stride(0), num_chunks)
        arguments += (temperature, top_p, temperature_stride, top_p_stride)
        warps = blocks(constants["SAMPLE"], PER_SAMPLE_WARP)
        launch(find_bracket, batch, arguments, _those_of(find_bracket, constants), warps)
    arguments = (logits, group_keys, brackets, counts, listed, group_sums, batch, vocab_size, logits.stride(0))
    arguments += (num_chunks, num_groups, temperature, min_p, temperature_stride, min_p_stride)
    programs = batch * blocks(num_groups, WEIGH_GROUPS)
    launch(weigh_groups, programs, arguments, _those_of(weigh_groups, constants), 1)
    return group_keys, partials, brackets, num_chunks


def _those_of(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """The constants that a kernel has, in its order."""
    return {name: constants[name] for name in kernel.arg_names if name in constants}
