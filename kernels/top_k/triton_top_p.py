"""Sampling from rows too long for one program's registers, where any number of tokens may be kept.

    group_maxima   first read (triton_select.py): the maximum of each chunk, and its mass
    find_bracket   for top-p, one program per row: from a sample of the row, two values between which the cut lies
    weigh_groups   second read: integer weights, added up by groups of tokens; for top-p all of them, those above the
                   bracket, and a list of the tokens within it
    _draw_long     one program per row (triton_sample.py): the cut, from the sums and the list; the group into which the
                   random number falls, and the token in it

The sample decides on time alone. What decides on the cut is integer arithmetic over all tokens, and where it does not
confirm the bracket, or the list is too short for the tokens in it (ten thousand ties, say), `search_row` reads the row
as often as it takes.

Knows Triton; knows nothing of how the op is launched.
"""

import triton
import triton.language as tl

from kernels.top_k.triton_select import (
    FINITE_KEYS_FROM,
    INFINITY_KEY,
    integer_weight,
    ordered_key,
    parameter,
    rate_of,
    value_of_key,
)

RUN = tl.constexpr(8)  # neighbours among them: fp32 numbers in the smallest piece of memory that is read
DEVIATIONS = tl.constexpr(4.5)  # so far off is one normal deviate in 300 000
UNSEEN = tl.constexpr(10.0)  # so many are expected of what a sample holds none of, as rarely
BINS = tl.constexpr(64)
TOP = tl.constexpr(0xFFFFFFFF)
EVERY_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def load_block(logits, start, vocab_size, BLOCK: tl.constexpr):
    tokens = start + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    x = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    return tokens, x, tl.where(inside, ordered_key(x), 0)


@triton.jit
def row_maximum(group_keys, row, num_chunks, NUM_CHUNKS: tl.constexpr):
    """Whether a row's largest logit is finite, its key, and the logit itself (0 if not), from its chunks' maxima."""
    chunks = tl.arange(0, NUM_CHUNKS)
    keys = tl.load(group_keys + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    max_key = tl.max(keys.to(tl.uint32, bitcast=True))
    good = (max_key >= FINITE_KEYS_FROM) & (max_key < INFINITY_KEY)
    return good, max_key, tl.where(good, value_of_key(max_key), 0.0)


@triton.jit
def kept_weight(tokens, x, key, row_max, rate, cut, last):
    """The weights of a block, 0 where (cut, last) keeps a token out."""
    kept = (key > cut) | ((key == cut) & (tokens <= last))
    return tl.where(kept, integer_weight(tl.minimum(x - row_max, 0.0), rate), 0)


# ---- the cut, from the row itself: what always works ----


@triton.jit
def _next_trial(low, high, reached, above, target, step):
    """A key in (low, high] to try next: in turn halfway, and where it should be if keys had equal shares."""
    part = (reached - target).to(tl.float32) / tl.maximum(reached - above, 1).to(tl.float32)
    part = tl.where(step % 2 == 0, tl.minimum(tl.maximum(part, 0.0), 1.0), 0.5)
    width = high - low
    return low + tl.minimum((width.to(tl.float32) * part).to(tl.uint32), width - 1) + 1


@triton.jit
def search_row(
    logits, vocab_size, row_max, rate, cut, last, target, low, high, reached, above,
    WEIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(cut, last) such that, of the tokens which a given (cut, last) keeps, the fewest best are kept whose weights, or
    whose number, reach the target.

    The cut lies from key `low`, above which and at which there is `reached`, to key `high`, above which is `above`.
    Each read of the row moves one of the two to a key that occurs in it, so that few values need few reads.
    """
    step = tl.full((), 0, tl.int32)
    while low < high:
        trial = _next_trial(low, high, reached, above, target, step)
        sums = tl.zeros((BLOCK,), tl.int64)
        upper = tl.full((BLOCK,), TOP, tl.uint32)
        lower = tl.full((BLOCK,), 0, tl.uint32)
        for start in range(0, vocab_size, BLOCK):
            tokens, x, key = load_block(logits, start, vocab_size, BLOCK)
            kept = (key > cut) | ((key == cut) & (tokens <= last))
            kept &= key > 0
            share_of = integer_weight(tl.minimum(x - row_max, 0.0), rate) if WEIGH else 1
            sums += tl.where(kept & (key >= trial), share_of, 0)
            upper = tl.minimum(upper, tl.where(kept & (key >= trial), key, TOP))
            lower = tl.maximum(lower, tl.where(kept & (key < trial), key, 0))
        found = tl.sum(sums)
        if found >= target:
            low, reached = tl.min(upper), found
        else:
            high, above = tl.max(lower), found
        step += 1
    each = tl.maximum(integer_weight(tl.minimum(value_of_key(low) - row_max, 0.0), rate), 1) if WEIGH else 1
    wanted = (target - above + each - 1) // each
    return low, _nth_tie(logits, vocab_size, low, wanted, BLOCK)


@triton.jit
def _nth_tie(logits, vocab_size, cut, n, BLOCK: tl.constexpr):
    """The token at which the n-th key equal to the cut stands."""
    seen = tl.full((), 0, tl.int32)
    token = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        tokens, _, key = load_block(logits, start, vocab_size, BLOCK)
        tie = (key == cut).to(tl.int32)
        running = seen + tl.cumsum(tie, 0)
        token = tl.maximum(token, tl.max(tl.where((tie > 0) & (running == n), tokens, 0)))
        seen += tl.sum(tie)
    return token


@triton.jit
def rank_cut(logits, vocab_size, k, max_key, BLOCK: tl.constexpr):
    """(cut, last): a row's best k are the keys above the cut, and those equal to it up to the token `last`."""
    low, cut = tl.full((), 1, tl.uint32), tl.full((), 0, tl.uint32)
    reached, above = tl.full((), 0, tl.int64) + vocab_size, tl.full((), 0, tl.int64)
    last = tl.full((), EVERY_TOKEN, tl.int32)
    k = k.to(tl.int64)
    return search_row(logits, vocab_size, 0.0, 1.0, cut, last, k, low, max_key, reached, above, False, BLOCK)


# ---- the bracket ----


@triton.jit
def _at(bins, bin, values):
    return tl.sum(tl.where(bins == bin, values, 0.0))


@triton.jit
def _narrow(
    y, low, high, mass_below, square_below, mass_above, square_above, wanted_below, wanted_above, unseen_part,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """A bracket of the cut within (low, high): two edges of the bins of a histogram. y [SAMPLE] <= 0; mass_ and square_
    are the sums of w and w^2 of the sampled tokens outside of (low, high)."""
    width = tl.maximum((high - low) / (BINS - 2), 1e-6) * 1.0001  # the first and the last bin hold what lies outside
    bins = tl.arange(0, BINS)
    edge = low + (bins - 1) * width  # [BINS]
    inside = (bins > 0) & (bins < BINS - 1)
    weight = tl.where(inside, tl.exp2(tl.minimum(edge + 0.5 * width, 0.0)), 0.0)
    bin = tl.minimum(tl.maximum((y - low) * (1.0 / width) + 1.0, 0.0), BINS - 1.0).to(tl.int32)  # [SAMPLE]
    mass = tl.histogram(bin, BINS).to(tl.float32) * weight
    square = mass * weight
    below, below_square = mass_below + tl.cumsum(mass, 0) - mass, square_below + tl.cumsum(square, 0) - square
    above = mass_below + tl.sum(mass) + mass_above - below
    above_square = square_below + tl.sum(square) + square_above - below_square
    off_below = DEVIATIONS * tl.sqrt(tl.maximum(below_square - below * below / SAMPLE, 0.0) * unseen_part)
    off_above = DEVIATIONS * tl.sqrt(tl.maximum(above_square - above * above / SAMPLE, 0.0) * unseen_part)
    cut_is_above = (below + off_below + UNSEEN * weight <= wanted_below) | (above - off_above > wanted_above)
    cut_is_below = (below - off_below > wanted_below) | (above + off_above + UNSEEN <= wanted_above)
    lowest = tl.max(tl.where(cut_is_above & inside, bins, 1))
    highest = tl.min(tl.where(cut_is_below & inside, bins, BINS - 1))
    highest = tl.maximum(highest, lowest)
    return (
        low + (lowest - 1) * width,
        tl.where(highest == BINS - 1, high, low + (highest - 1) * width),
        _at(bins, lowest, below),
        _at(bins, lowest, below_square),
        _at(bins, highest, above),
        _at(bins, highest, above_square),
        width,
    )


@triton.jit
def find_bracket(
    logits, group_keys, masses, brackets, counts, vocab_size, row_stride, num_chunks,
    temperature, top_p, temperature_stride, top_p_stride,
    PER_ROW: tl.constexpr, NUM_CHUNKS: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """One program, one row: brackets (batch, 2), the lowest and the highest key within; sets the list's length to 0.

    With F and Q the sums of w and w^2 over the n sampled tokens below a value, the mass below it in the whole row is
    taken to lie within F +- DEVIATIONS sqrt(Q - F^2 / n); the mass above likewise. A value of which one of the two says
    that the cut lies above it, or below, bounds the bracket. The values tried are the edges of the bins of a histogram.
    The row's whole mass is known: no sample may hold its largest.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32)
    p = parameter(top_p, row, top_p_stride, PER_ROW & 4, tl.float32)
    p = tl.where(temperature == 0.0, 0.0, p)  # greedy
    rate = rate_of(temperature)
    good, _, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)

    places = tl.arange(0, SAMPLE)
    tokens = places // RUN * (vocab_size // (SAMPLE // RUN)) // RUN * RUN + places % RUN
    x = tl.load(logits + row * row_stride + tokens).to(tl.float32)  # [SAMPLE]

    chunks = tl.arange(0, NUM_CHUNKS)
    inside = (chunks < num_chunks) & good
    keys = tl.load(group_keys + row * num_chunks + chunks, mask=inside, other=0).to(tl.uint32, bitcast=True)
    mass = tl.load(masses + row * num_chunks + chunks, mask=inside, other=0.0)
    offset = tl.where(keys >= FINITE_KEYS_FROM, tl.minimum(value_of_key(keys) - row_max, 0.0), float("-inf"))
    total = tl.sum(mass * tl.exp2(offset * rate)) * SAMPLE / vocab_size  # in units of the sample's
    wanted_below, wanted_above = total * (1.0 - p), total * p

    # y is the logarithm to base 2 of a token's weight over the likeliest one's; a NaN, of a row without answer, is -64.
    y = tl.maximum(tl.minimum(x - row_max, 0.0) * rate, -64.0)  # [SAMPLE]
    least, most = tl.min(y), tl.max(y)
    low, high, unseen_part = least, most, 1.0 - SAMPLE / vocab_size.to(tl.float32)
    mass_below, square_below, mass_above, square_above, width = 0.0, 0.0, 0.0, 0.0, 0.0
    for _ in tl.static_range(2):
        low, high, mass_below, square_below, mass_above, square_above, width = _narrow(
            y, low, high, mass_below, square_below, mass_above, square_above, wanted_below, wanted_above, unseen_part,
            SAMPLE,
        )  # fmt: skip
    low = tl.where(low == least, float("-inf"), row_max + (low - 0.5 * width) / rate)
    high = tl.where(high == most, row_max, row_max + tl.minimum(high + 0.5 * width, 0.0) / rate)
    high = tl.where(p < 1.0, high, float("-inf"))
    tl.store(brackets + row * 2, tl.maximum(ordered_key(low), FINITE_KEYS_FROM).to(tl.int32, bitcast=True))
    tl.store(brackets + row * 2 + 1, tl.minimum(ordered_key(high), INFINITY_KEY - 1).to(tl.int32, bitcast=True))
    tl.store(counts + row, 0)


@triton.jit
def load_bracket(brackets, row):
    low = tl.load(brackets + row * 2).to(tl.uint32, bitcast=True)
    return low, tl.load(brackets + row * 2 + 1).to(tl.uint32, bitcast=True)


# ---- the second read ----


@triton.jit(do_not_specialize_on_alignment=["logits"])
def weigh_groups(
    logits, group_keys, brackets, counts, listed, group_sums,
    batch, vocab_size, row_stride, num_chunks, num_groups,
    temperature, min_p, temperature_stride, min_p_stride,
    PER_ROW: tl.constexpr, CUT: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, LIST: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program, GROUPS groups of a row, GROUP tokens each: the sums of their weights.

    group_sums (3 or 1, batch, num_groups) int64: of the tokens that may be drawn; for top-p of those above the bracket
    alone, then of all, and of those above the bracket with those that min-p drops. Tokens within the bracket go to
    listed (batch, LIST + GROUP), logit above token, in any order, and are counted in counts (batch,).

    A group is in one warp's registers, 32 neighbours a load, so that nothing here waits for another warp. (Loads of
    four neighbours a thread would have to be turned round through shared memory for the list.)
    """
    steps = tl.cdiv(num_groups, GROUPS)
    row = (tl.program_id(0) // steps).to(tl.int64)
    groups = tl.program_id(0) % steps * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    rate = rate_of(parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32))
    _, _, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    places = (tl.arange(0, GROUP // 32) * 32)[None, :, None] + tl.arange(0, 32)[None, None, :]
    tokens = groups[:, None, None] * GROUP + places  # [GROUPS, GROUP / 32, 32]
    x = tl.load(logits + row * row_stride + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    weight = integer_weight(x - row_max, rate)
    place = row * num_groups + groups
    there = groups < num_groups
    kept = weight
    if CUT:
        cut, last = load_bracket(brackets, row)
        key = ordered_key(x)
        kept = tl.where((key > cut) | ((key == cut) & (tokens <= last.to(tl.int32))), weight, 0)
    if TOP_P:
        low, high = load_bracket(brackets, row)
        low, high = value_of_key(low), value_of_key(high)
        above = x > high
        kept = tl.where(above, weight, 0)
        if MIN_P:
            tl.store(group_sums + 2 * batch * num_groups + place, _sums(kept), mask=there)
        tl.store(group_sums + batch * num_groups + place, _sums(weight), mask=there)
        inside = (x >= low) & (above == 0)
        within = inside.to(tl.int32)
        across = tl.sum(within, axis=1)  # [GROUPS, 32]
        number = tl.sum(across, axis=1)  # [GROUPS]
        first = tl.atomic_add(counts + row + groups * 0, number, mask=number > 0, sem="relaxed")
        first = tl.minimum(first, LIST)  # behind the list there is room for what no longer fits
        slot = (first[:, None] + tl.cumsum(across, axis=1) - across)[:, None, :] + tl.cumsum(within, axis=1) - 1
        slot = tl.max_contiguous(slot, [1, 1, 2])  # untrue, but the layout of the store follows from it
        entry = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tokens.to(tl.uint32).to(tl.int64)
        tl.store(listed + row * (LIST + GROUP) + slot, entry, mask=inside)
    if MIN_P:
        least_weight = (parameter(min_p, row, min_p_stride, PER_ROW & 8, tl.float32) * 1099511627776.0).to(tl.int64)
        kept = tl.where(kept >= least_weight, kept, 0)
    tl.store(group_sums + place, _sums(kept), mask=there)


@triton.jit
def _sums(x):
    return tl.sum(tl.sum(x, axis=1), axis=1)


# ---- the cut, from the list ----


@triton.jit
def _sum_max_min(sum0, max0, min0, sum1, max1, min1):
    return sum0 + sum1, tl.maximum(max0, max1), tl.minimum(min0, min1)


@triton.jit
def search_list(key, weight, tokens, target, low, high, reached):
    """`search_row` for a tile of keys, 0 where there is none, with positive weights."""
    step = tl.full((), 0, tl.int32)
    above = target * 0
    while low < high:
        trial = _next_trial(low, high, reached, above, target, step)
        upper = key >= trial
        found, below, beyond = tl.reduce(
            (tl.where(upper, weight, 0), tl.where(upper, 0, key), tl.where(upper, key, TOP)), 0, _sum_max_min
        )
        if found >= target:
            low, reached = beyond, found
        else:
            high, above = below, found
        step += 1
    tie = key == low
    each = tl.max(tl.where(tie, weight, 1))
    wanted = ((target - above + each - 1) // each).to(tl.int32)
    last = tl.full((), EVERY_TOKEN, tl.int32)
    if tl.sum(tie.to(tl.int32)) > wanted:
        last = last * 0  # the smallest token up to which there are as many ties as wanted
        for bit in range(20):
            trial_token = last + (tl.full((), 1 << 19, tl.int32) >> bit)
            fewer = tl.sum((tie & (tokens < trial_token)).to(tl.int32)) < wanted
            last = tl.where(fewer, trial_token, last)
    return low, last


@triton.jit
def _sum_groups(logits, own, vocab_size, num_groups, row_max, rate, cut, last, least_weight, GROUP: tl.constexpr):
    """The weights of each group's kept tokens, added up."""
    for group in range(num_groups):
        tokens, x, key = load_block(logits, group * GROUP, vocab_size, GROUP)
        weight = kept_weight(tokens, x, key, row_max, rate, cut, last)
        tl.store(own + group, tl.sum(tl.where(weight >= least_weight, weight, 0)))


@triton.jit
def load_list(listed, counts, row, row_max, rate, LIST: tl.constexpr, GROUP: tl.constexpr):
    """The tokens within a row's bracket, [LIST] each: keys, weights, token ids; 0 where there is none."""
    slots = tl.arange(0, LIST)
    count = tl.load(counts + row)
    entry = tl.load(listed + row * (LIST + GROUP) + slots, mask=slots < count, other=0)
    x, tokens = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True), entry.to(tl.int32)
    weight = tl.where(slots < count, integer_weight(x - row_max, rate), 0)
    return tl.where(weight > 0, ordered_key(x), 0), weight, tokens


@triton.jit
def cut_in_row(
    logits, own, vocab_size, num_groups, max_key, row_max, rate, target, high, everything, above, least_weight,
    GROUP: tl.constexpr,
):  # fmt: skip
    """(cut, last) of top-p, where no list helps; the sums of each group's kept tokens are written anew."""
    if above >= target:
        high, above = max_key, above * 0
    low, zero = tl.full((), 1, tl.uint32), tl.full((), 0, tl.uint32)
    every = tl.full((), EVERY_TOKEN, tl.int32)
    cut, last = search_row(
        logits, vocab_size, row_max, rate, zero, every, target, low, high, everything, above, True, 4 * GROUP
    )
    _sum_groups(logits, own, vocab_size, num_groups, row_max, rate, cut, last, least_weight, GROUP)
    tl.debug_barrier()  # the sums are read again, by other threads
    return cut, last
