"""Sampling on the GPU. The definitions, bit for bit, are reference.py's; triton_select.py says how selection works.

    short rows           one program holds a whole row in registers and does everything, in one launch
    long rows, top-k     a first launch reads the row once, in parallel chunks, and keeps the maximum of each group of
                         neighbours; in a second, one program per row finds the best groups, which hold the best
                         tokens, and does with them what is done with a short row
    long rows otherwise  maxima of chunks; where a filter asks for it, a cut (triton_top_p.py); weights of chunks; the
                         chunk into which the random number falls, and the token in it

Knows Triton; knows nothing of models. Arguments were checked in op.py.
"""
# ruff: noqa: SIM102  an outer `if` on a constant is decided by the compiler, the inner one by the row

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    power_of_2,
    random_below,
    rate_of,
    share,
    tensor_key,
    tile_warps,
    value_of_key,
)
from kernels.top_k.triton_top_p import (
    LEVELS,
    LIST_LENGTH,
    LIST_WARPS,
    WEIGH_WARPS,
    chunk_curves,
    cut_within_bracket,
    find_bracket,
    kept_weight,
    load_block,
    mass_cut,
    parameter,
    rank_cut,
    row_maximum,
    weigh_chunks,
    weight_from,
)


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
            weight = tl.where(keep_best(key, k, BITS), weight, 0)
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
    group_keys, cuts, lasts, num_chunks,
    PER_ROW: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row: what top-k and top-p keep, as the keys above a cut, and those equal to it up to a token."""
    row = tl.program_id(0).to(tl.int64)
    allowed, _, temperature, k, p, _, _, _ = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    logits += row * row_stride
    finite, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    good = allowed & finite
    rate = rate_of(temperature)
    cut = tl.full((), 0, tl.uint32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    if good & (k < vocab_size):
        cut, last = rank_cut(logits, vocab_size, k, BLOCK)
    if good & (p < 1.0):
        total = weight_from(logits, vocab_size, row_max, rate, cut, last, FINITE_KEYS_FROM, BLOCK)
        target = tl.maximum(share(total, p), 1)
        cut, last = mass_cut(logits, vocab_size, row_max, rate, cut, last, target, BLOCK)
    tl.store(cuts + row, cut.to(tl.int32, bitcast=True))
    tl.store(lasts + row, last)


@triton.jit
def _load_cut(cuts, lasts, row, CUT: tl.constexpr):
    if CUT:
        return tl.load(cuts + row).to(tl.uint32, bitcast=True), tl.load(lasts + row)
    else:
        return tl.full((), 0, tl.uint32), tl.full((), 0x7FFFFFFF, tl.int32)


@triton.jit(do_not_specialize=["top_k", "seed", "step"])
def _chunk_weights(
    logits, batch, vocab_size, row_stride,
    temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    group_keys, cuts, lasts, chunk_sums, num_chunks,
    PER_ROW: tl.constexpr, CUT: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program, one chunk of a row: the sum of the weights of its kept tokens. chunk_sums (batch, num_chunks)."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    _, _, temperature, _, _, least_weight, _, _ = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    _, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    cut, last = _load_cut(cuts, lasts, row, CUT)
    tokens, x, key = load_block(logits + row * row_stride, chunk * CHUNK, vocab_size, CHUNK)
    weight = kept_weight(tokens, x, key, row_max, rate_of(temperature), cut, last)
    tl.store(chunk_sums + row * num_chunks + chunk, tl.sum(tl.where(weight >= least_weight, weight, 0)))


@triton.jit(do_not_specialize=["top_k", "seed", "step"])
def _draw_from_chunks(
    logits, token_ids, logprobs, batch, vocab_size, row_stride,
    temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    group_keys, partials, cuts, lasts, chunk_sums, num_chunks,
    PER_ROW: tl.constexpr, CUT: tl.constexpr, LOGPROBS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program, one row: the chunk into which the random number falls, then the token in it."""
    row = tl.program_id(0).to(tl.int64)
    allowed, greedy, temperature, _, _, least_weight, seed, step = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    finite, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    good = allowed & finite
    cut, last = _load_cut(cuts, lasts, row, CUT)
    chunks = tl.arange(0, NUM_CHUNKS)
    sums = tl.load(chunk_sums + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    total = tl.sum(sums)
    left = random_below(total, seed, step)
    chunk = tl.minimum(tl.sum((tl.cumsum(sums, 0) <= left).to(tl.int32)), num_chunks - 1)
    left -= tl.sum(tl.where(chunks < chunk, sums, 0))

    tokens, x, key = load_block(logits + row * row_stride, chunk * CHUNK, vocab_size, CHUNK)
    weight = kept_weight(tokens, x, key, row_max, rate_of(temperature), cut, last)
    running = tl.cumsum(tl.where(weight >= least_weight, weight, 0), 0)
    place = tl.sum((running <= left).to(tl.int32))
    token = chunk * CHUNK + place
    raw = 0.0
    processed = 0.0
    if LOGPROBS:
        z_token = tl.max(tl.where(tokens == token, tl.minimum(x - row_max, 0.0), float("-inf")))
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
    aligned = [tensor.data_ptr() % 16 for tensor in tensors if tensor is not None]
    job = _Job(
        logits=logits,
        outputs=(token_ids, logprobs),
        parameters=(*values, *strides),
        per_row=per_row,
        may_drop_by_rank=top_k != 0 or top_ks is not None or greedy or temperatures is not None,
        may_drop_by_mass=top_p < 1.0 or top_ps is not None,
        most_kept=1 if greedy else -1 if top_k == 0 and top_ks is None else top_k,
        logprobs=return_logprobs,
        key=(*tensor_key(logits), return_logprobs, per_row, top_k, seed >= 2**31, step >= 2**31, *strides, *aligned),
    )
    with torch.cuda.device_of(logits):
        if logits.shape[1] <= MAX_TILE:
            _whole_row(job)
        elif 0 < job.most_kept <= MAX_GROUPS_CHOSEN:
            _best_groups(job)
        else:
            _chunk_by_chunk(job)
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
    most_kept: int  # no row keeps more tokens than this; 0: not known here; -1: no row but a greedy one has a limit
    logprobs: bool
    key: tuple  # for `launch`

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
    launch(_sample_tile, batch, arguments, constants, tile_warps(tile), job.key)


def _best_groups(job: _Job) -> None:
    batch, vocab_size = job.logits.shape
    group, chosen = choose_group(vocab_size, job.most_kept)
    group_keys, partials, num_groups, num_chunks = launch_group_maxima(job.logits, group, job.logprobs, job.key)
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
    warps = tile_warps(max(chosen * group, num_groups))
    launch(_sample_tile, batch, (*job.row_arguments(with_outputs=True), *scratch), constants, warps, job.key)


def _chunk_by_chunk(job: _Job) -> None:
    logits = job.logits
    batch, vocab_size = logits.shape
    num_chunks = blocks(vocab_size, CHUNK)
    chunk_sums = logits.new_empty((batch, num_chunks), dtype=torch.int64)
    cuts, lasts = logits.new_empty((batch,), dtype=torch.int32), logits.new_empty((batch,), dtype=torch.int32)
    has_cut = job.may_drop_by_rank or job.may_drop_by_mass
    width = {"NUM_CHUNKS": power_of_2(num_chunks)}
    if has_cut and job.most_kept < 0:
        group_keys, partials = _cut_at_top_p(job, cuts, lasts, chunk_sums, num_chunks)
    else:
        group_keys, partials, _, _ = launch_group_maxima(logits, CHUNK, job.logprobs, job.key)
        scratch: tuple = (group_keys, cuts, lasts, num_chunks)
        if has_cut:
            constants = {**job.constants(), **width, "BLOCK": CHUNK}
            launch(_find_cut, batch, (*job.row_arguments(), *scratch), constants, CHUNK_WARPS, job.key)
        scratch = (group_keys, cuts, lasts, chunk_sums, num_chunks)
        constants = {**job.constants(), "CUT": has_cut, **width, "CHUNK": CHUNK}
        launch(_chunk_weights, batch * num_chunks, (*job.row_arguments(), *scratch), constants, CHUNK_WARPS, job.key)
    scratch = (group_keys, partials, cuts, lasts, chunk_sums, num_chunks)
    constants = {**job.constants(), "CUT": has_cut, "LOGPROBS": job.logprobs, **width, "CHUNK": CHUNK}
    arguments = (*job.row_arguments(with_outputs=True), *scratch)
    launch(_draw_from_chunks, batch, arguments, constants, CHUNK_WARPS, job.key)


def _cut_at_top_p(job: _Job, cuts: Tensor, lasts: Tensor, chunk_sums: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Fill cuts, lasts and chunk_sums; returns the largest keys of the chunks, and their partial sums."""
    logits = job.logits
    batch, vocab_size = logits.shape
    temperature, _, top_p, min_p, _, _, temperature_stride, _, top_p_stride, min_p_stride, _, _ = job.parameters
    group_keys = logits.new_empty((batch, num_chunks), dtype=torch.int32)
    partials = logits.new_empty((batch, num_chunks, 2) if job.logprobs else (0,), dtype=torch.float32)
    curves = logits.new_empty((batch, num_chunks, LEVELS.value), dtype=torch.float32)
    spacings = logits.new_empty((batch, num_chunks), dtype=torch.float32)
    brackets = logits.new_empty((batch, 2), dtype=torch.int32)
    counts = logits.new_empty((batch,), dtype=torch.int32)
    listed = logits.new_empty((batch, LIST_LENGTH.value), dtype=torch.int32)
    sums = logits.new_empty((2, batch, num_chunks), dtype=torch.int64)
    row = (batch, vocab_size, logits.stride(0), num_chunks)
    width = {"NUM_CHUNKS": power_of_2(num_chunks)}

    arguments: tuple = (logits, group_keys, partials, curves, spacings, *row[1:], temperature, temperature_stride)
    constants = {**job.constants(), "SUM_EXP": job.logprobs, "CHUNK": CHUNK}
    launch(chunk_curves, batch * num_chunks, arguments, constants, CHUNK_WARPS, job.key)
    arguments = (group_keys, curves, spacings, brackets, counts, vocab_size, num_chunks)
    arguments += (temperature, top_p, temperature_stride, top_p_stride)
    launch(find_bracket, batch, arguments, {**job.constants(), **width}, CHUNK_WARPS, job.key)
    arguments = (logits, group_keys, brackets, counts, listed, sums, chunk_sums, *row)
    arguments += (temperature, min_p, temperature_stride, min_p_stride)
    constants = {**job.constants(), **width, "CHUNK": CHUNK}
    launch(weigh_chunks, batch * num_chunks, arguments, constants, WEIGH_WARPS, job.key)
    arguments = (logits, group_keys, counts, listed, sums, chunk_sums, cuts, lasts, *row)
    arguments += (temperature, top_p, min_p, temperature_stride, top_p_stride, min_p_stride)
    launch(cut_within_bracket, batch, arguments, constants, LIST_WARPS, job.key)
    return group_keys, partials
