"""Sampling on the GPU. The definitions, bit for bit, are reference.py's; triton_select.py says how selection works.

    short rows   one program holds a whole row in registers and does everything, in one launch
    long rows    one program per row reads it several times, block by block

Knows Triton; knows nothing of models. Arguments were checked in op.py.
"""

# ruff: noqa: SIM102  an outer `if` on a constant is decided by the compiler, the inner one by the row

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k.op import empty_results
from kernels.top_k.triton_select import (
    FINITE_KEYS_FROM,
    INFINITY_KEY,
    LN_2,
    LOG2_E,
    MIN_TEMPERATURE,
    WEIGHT_ONE,
    integer_weight,
    keep_best,
    key_reaching,
    ordered_key,
    random_below,
    rate_of,
    share,
    value_of_key,
)

MAX_SHORT_ROW = 8192


@triton.jit
def _parameter(value, row, stride, PER_ROW: tl.constexpr, dtype: tl.constexpr):
    """A parameter of the op: the number itself, or the row's entry of a tensor."""
    if PER_ROW:
        return tl.load(value + row * stride)
    else:
        return tl.full((), value, dtype)


@triton.jit
def _row_parameters(
    row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    PER_ROW: tl.constexpr,
):  # fmt: skip
    """A row's parameters, made harmless where they are not allowed, and whether they were. Greedy: top_k = 1."""
    temperature = _parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32)
    k = _parameter(top_k, row, top_k_stride, PER_ROW & 2, tl.int64)
    p = _parameter(top_p, row, top_p_stride, PER_ROW & 4, tl.float32)
    min_p = _parameter(min_p, row, min_p_stride, PER_ROW & 8, tl.float32)
    seed = _parameter(seed, row, seed_stride, PER_ROW & 16, tl.int64)
    step = _parameter(step, row, step_stride, PER_ROW & 32, tl.int64)
    lowest_k: tl.constexpr = 1 if PER_ROW & 2 else 0  # as a number, 0 switches top-k off
    allowed = (temperature >= 0.0) & (temperature < float("inf")) & (k >= lowest_k) & (k <= vocab_size)
    allowed &= (p > 0.0) & (p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    greedy = temperature == 0.0
    k = tl.where(allowed & (k > 0), k, vocab_size).to(tl.int32)
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


@triton.jit(do_not_specialize=["top_k", "seed", "step"])
def _sample_short(
    logits, token_ids, logprobs, batch, vocab_size, row_stride,
    temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    PER_ROW: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, LOGPROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row of up to BLOCK tokens."""
    row = tl.program_id(0).to(tl.int64)
    allowed, greedy, temperature, k, p, least_weight, seed, step = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    tokens = tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    x = tl.load(logits + row * row_stride + tokens, mask=inside, other=float("-inf")).to(tl.float32)  # [BLOCK]
    key = tl.where(inside, ordered_key(x), 0)
    max_key = tl.max(key)
    good = allowed & (max_key >= FINITE_KEYS_FROM) & (max_key < INFINITY_KEY)
    row_max = tl.where(good, value_of_key(max_key), 0.0)
    z = tl.where(inside, tl.minimum(x - row_max, 0.0), float("-inf"))  # [BLOCK]

    weight = integer_weight(z, rate_of(temperature))  # [BLOCK]
    if TOP_K:
        if k < vocab_size:
            weight = tl.where(keep_best(key, k), weight, 0)
    if TOP_P:
        if p < 1.0:
            weight = _keep_top_p(key, weight, p)
    weight = tl.where(weight >= least_weight, weight, 0)

    running = tl.cumsum(weight, 0)
    total = tl.sum(weight)
    drawn = random_below(total, seed, step)
    token = tl.sum((running <= drawn).to(tl.int32))
    raw = 0.0
    processed = 0.0
    if LOGPROBS:
        z_token = tl.max(tl.where(tokens == token, z, float("-inf")))
        raw = z_token - tl.log2(tl.sum(tl.exp2(z * LOG2_E))) * LN_2
        processed = _processed_logprob(z_token, total, temperature, greedy)
    _store_answer(token_ids, logprobs, row, batch, good, token, raw, processed, LOGPROBS)


@triton.jit
def _keep_top_p(key, weight, p):
    """The weights with those outside the top-p set made 0. Ties at the cut are kept from the left."""
    target = tl.maximum(share(tl.sum(weight), p), 1)
    key = tl.where(weight > 0, key, 0)
    cut = key_reaching(key, weight, target)
    tie = key == cut
    before = tl.sum(tl.where(key > cut, weight, 0)) + tl.cumsum(tl.where(tie, weight, 0), 0) - weight
    return tl.where((key > cut) | (tie & (before < target)), weight, 0)


# ---- rows too long for one program's registers ----


@triton.jit
def _load_block(logits, start, vocab_size, BLOCK: tl.constexpr):
    tokens = start + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    x = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    return tokens, x, tl.where(inside, ordered_key(x), 0)


@triton.jit
def _count_from(logits, vocab_size, least_key, BLOCK: tl.constexpr):
    """How many keys of the row are >= least_key."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        _, _, key = _load_block(logits, start, vocab_size, BLOCK)
        count += (key >= least_key).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _weight_from(logits, vocab_size, row_max, rate, cut, last, least_key, BLOCK: tl.constexpr):
    """The weights of the tokens that (cut, last) keeps and whose keys are >= least_key, added up."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        tokens, x, key = _load_block(logits, start, vocab_size, BLOCK)
        kept = (key > cut) | ((key == cut) & (tokens <= last))
        total += tl.where(kept & (key >= least_key), integer_weight(tl.minimum(x - row_max, 0.0), rate), 0)
    return tl.sum(total)


@triton.jit
def _nth_tie(logits, vocab_size, cut, n, BLOCK: tl.constexpr):
    """The token at which the n-th key equal to the cut stands."""
    seen = tl.full((), 0, tl.int32)
    token = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        tokens, _, key = _load_block(logits, start, vocab_size, BLOCK)
        tie = (key == cut).to(tl.int32)
        running = seen + tl.cumsum(tie, 0)
        token = tl.maximum(token, tl.max(tl.where((tie > 0) & (running == n), tokens, 0)))
        seen += tl.sum(tie)
    return token


@triton.jit(do_not_specialize=["top_k", "seed", "step"])
def _sample_long(
    logits, token_ids, logprobs, batch, vocab_size, row_stride,
    temperature, top_k, top_p, min_p, seed, step,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride,
    PER_ROW: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, LOGPROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row of any length, read block by block for each step."""
    row = tl.program_id(0).to(tl.int64)
    allowed, greedy, temperature, k, p, least_weight, seed, step = _row_parameters(
        row, vocab_size, temperature, top_k, top_p, min_p, seed, step,
        temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride, step_stride, PER_ROW,
    )  # fmt: skip
    logits += row * row_stride
    max_keys = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, vocab_size, BLOCK):
        _, _, key = _load_block(logits, start, vocab_size, BLOCK)
        max_keys = tl.maximum(max_keys, key)
    max_key = tl.max(max_keys)
    good = allowed & (max_key >= FINITE_KEYS_FROM) & (max_key < INFINITY_KEY)
    row_max = tl.where(good, value_of_key(max_key), 0.0)
    rate = rate_of(temperature)

    # Kept are the tokens with a key above the cut, and those with this key up to the token `last`.
    cut = tl.full((), 0, tl.uint32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    if TOP_K:
        if good & (k < vocab_size):
            for bit in range(32):
                trial = cut | (tl.full((), 0x80000000, tl.uint32) >> bit)
                cut = tl.where(_count_from(logits, vocab_size, trial, BLOCK) >= k, trial, cut)
            last = _nth_tie(logits, vocab_size, cut, k - _count_from(logits, vocab_size, cut + 1, BLOCK), BLOCK)
    total = _weight_from(logits, vocab_size, row_max, rate, cut, last, FINITE_KEYS_FROM, BLOCK)
    if TOP_P:
        if good & (p < 1.0):
            target = tl.maximum(share(total, p), 1)
            p_cut = tl.full((), 0, tl.uint32)
            for bit in range(32):
                trial = p_cut | (tl.full((), 0x80000000, tl.uint32) >> bit)
                reached = _weight_from(logits, vocab_size, row_max, rate, cut, last, trial, BLOCK)
                p_cut = tl.where(reached >= target, trial, p_cut)
            missing = target - _weight_from(logits, vocab_size, row_max, rate, cut, last, p_cut + 1, BLOCK)
            each = integer_weight(value_of_key(p_cut) - row_max, rate)
            last = _nth_tie(logits, vocab_size, p_cut, (missing + each - 1) // tl.maximum(each, 1), BLOCK)
            cut = p_cut

    total = tl.full((), 0, tl.int64)
    for start in range(0, vocab_size, BLOCK):
        tokens, x, key = _load_block(logits, start, vocab_size, BLOCK)
        kept = (key > cut) | ((key == cut) & (tokens <= last))
        weight = integer_weight(tl.minimum(x - row_max, 0.0), rate)
        total += tl.sum(tl.where(kept & (weight >= least_weight), weight, 0))
    left = random_below(total, seed, step)
    before = tl.full((), 0, tl.int64)
    token = tl.full((), 0, tl.int32)
    z_token = tl.full((), 0.0, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        tokens, x, key = _load_block(logits, start, vocab_size, BLOCK)
        kept = (key > cut) | ((key == cut) & (tokens <= last))
        z = tl.minimum(x - row_max, 0.0)
        weight = integer_weight(z, rate)
        weight = tl.where(kept & (weight >= least_weight), weight, 0)
        running = before + tl.cumsum(weight, 0)
        chosen = (running > left) & (running - weight <= left)
        token = tl.maximum(token, tl.max(tl.where(chosen, tokens, 0)))
        z_token = tl.minimum(z_token, tl.min(tl.where(chosen, z, 0.0)))
        before += tl.sum(weight)
        sum_exp += tl.exp2(z * LOG2_E)
    raw = z_token - tl.log2(tl.sum(sum_exp)) * LN_2
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
    batch, vocab_size = logits.shape
    token_ids, logprobs = empty_results(logits, return_logprobs)
    if batch == 0:
        return token_ids, logprobs
    numbers = (temperature, top_k, top_p, min_p, seed, step)
    tensors = (temperatures, top_ks, top_ps, min_ps, seeds, steps)
    parameters = [number if tensor is None else tensor for number, tensor in zip(numbers, tensors, strict=True)]
    strides = [0 if tensor is None else tensor.stride(0) for tensor in tensors]
    short = vocab_size <= MAX_SHORT_ROW
    kernel = _sample_short if short else _sample_long
    block = max(32, triton.next_power_of_2(vocab_size)) if short else 4096
    with torch.cuda.device_of(logits):
        kernel[(batch,)](
            logits, token_ids, logprobs, batch, vocab_size, logits.stride(0), *parameters, *strides,
            PER_ROW=sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None),
            TOP_K=top_k != 0 or top_ks is not None or temperature == 0.0 or temperatures is not None,
            TOP_P=top_p < 1.0 or top_ps is not None,
            LOGPROBS=return_logprobs, BLOCK=block, num_warps=4 if block <= 2048 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return token_ids, logprobs
