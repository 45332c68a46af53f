"""Sampling from rows too long for one program's registers, where any number of tokens may be kept.

A row is read twice: its weights need its maximum first. Two ways lead to the cut of top-p, by what is at work on a row:

    one program       bracket_of_cut   from a sample of the row, a guess of two values between which the cut lies
                      read_row         first read: the maximum, and the masses above those two and above their middle
                      closer_bracket   by these masses, two values that are much closer to each other
                      weigh            second read: integer weights, added up by groups of tokens; for top-p all of
                                       them, those above the bracket, and a list of the tokens within it
    several programs  group_maxima     first read (triton_select.py): the maximum of each chunk, and its mass
                      find_bracket     one program: bracket_of_cut, from a larger sample and the row's whole mass
                      weigh_groups     second read: weigh

and then one program (`_draw_long` in triton_sample.py) finds the cut, from the sums and the list; the group into which
the random number falls; and the token in it.

Samples and masses decide on time alone. What decides on the cut is integer arithmetic over all tokens, and where it
does not confirm the bracket, or the list is too short for the tokens in it (ten thousand ties, say), `search_row` reads
the row as often as it takes.

Knows Triton; knows nothing of how the op is launched.
"""

import triton
import triton.language as tl

from kernels.top_k.triton_select import (
    FINITE_KEYS_FROM,
    INFINITY_KEY,
    LOG2_E,
    WEIGHT_ONE,
    candidate,
    integer_weight,
    key_and_index,
    larger,
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
LARGEST = tl.constexpr(3.4028235e38)
EVERY_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def load_block(logits, start, vocab_size, BLOCK: tl.constexpr):
    tokens = start + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    x = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    return tokens, x, tl.where(inside, ordered_key(x), 0)


@triton.jit
def row_maximum(group_keys, row, num_chunks, NUM_CHUNKS: tl.constexpr):
    """Whether a row's largest logit is finite, its key, and the logit itself, from its chunks' maxima; in place of one
    that is not finite the largest number, beside which nothing has weight."""
    chunks = tl.arange(0, NUM_CHUNKS)
    keys = tl.load(group_keys + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    max_key = tl.max(keys.to(tl.uint32, bitcast=True))
    good = (max_key >= FINITE_KEYS_FROM) & (max_key < INFINITY_KEY)
    return good, max_key, tl.where(good, value_of_key(max_key), LARGEST)


@triton.jit
def kept_weight(tokens, x, key, row_max, rate, cut, last):
    """The weights of a block, 0 where (cut, last) keeps a token out."""
    kept = (key > cut) | ((key == cut) & (tokens <= last))
    return tl.where(kept, integer_weight(tl.minimum(x - row_max, 0.0), rate), 0)


# ---- the cut, from the row itself: what always works ----


@triton.jit
def _key_at(low, high, part, by_value):
    """A key in (low, high], part of the way from one to the other: by values, if these are numbers, or as keys."""
    value = value_of_key(low) + (value_of_key(high) - value_of_key(low)) * part
    key = low + ((high - low).to(tl.float32) * part).to(tl.uint32)
    return tl.minimum(tl.maximum(tl.where(by_value & (value == value), ordered_key(value), key), low + 1), high)


@triton.jit
def _part_to(target, reached, above):
    """Where between two keys the target is reached if values have equal shares."""
    part = (reached - target).to(tl.float32) / tl.maximum(reached - above, 1).to(tl.float32)
    return tl.minimum(tl.maximum(part, 0.0), 1.0)


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
        halve = step % 4 == 3
        trial = _key_at(low, high, tl.where(halve, 0.5, _part_to(target, reached, above)), halve == 0)
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
def add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _min_max(min0, max0, min1, max1):
    return tl.minimum(min0, min1), tl.maximum(max0, max1)


@triton.jit
def _narrow(
    y, low, high, mass_below, square_below, mass, squares, wanted_below, wanted_above, unseen_part, SAMPLE: tl.constexpr
):  # fmt: skip
    """A bracket of the cut within (low, high): two edges of the bins of a histogram. y [SAMPLE] <= 0; mass_below and
    square_below are the sums of w and w^2 of the sampled tokens below low, mass and squares those of all, or None."""
    width = tl.maximum((high - low) / (BINS - 2), 1e-6) * 1.0001  # the first and the last bin hold what lies outside
    bins = tl.arange(0, BINS)
    edge = low + (bins - 1) * width  # [BINS]
    inside = (bins > 0) & (bins < BINS - 1)
    weight = tl.where(inside, tl.exp2(tl.minimum(edge + 0.5 * width, 0.0)), 0.0)
    bin = tl.minimum(tl.maximum((y - low) * (1.0 / width) + 1.0, 0.0), BINS - 1.0).to(tl.int32)  # [SAMPLE]
    own = tl.histogram(bin, BINS).to(tl.float32) * weight
    below, below_square = tl.associative_scan((own, own * weight), 0, add_two)
    if mass is None:
        mass, squares = tl.reduce((own, own * weight), 0, add_two)
    below, below_square = mass_below + below - own, square_below + below_square - own * weight
    above, above_square = mass - below, squares - below_square
    off_below = DEVIATIONS * tl.sqrt(tl.maximum(below_square - below * below / SAMPLE, 0.0) * unseen_part)
    off_above = DEVIATIONS * tl.sqrt(tl.maximum(above_square - above * above / SAMPLE, 0.0) * unseen_part)
    cut_is_above = (below + off_below + UNSEEN * weight <= wanted_below) | (above - off_above > wanted_above)
    cut_is_below = (below - off_below > wanted_below) | (above + off_above + UNSEEN <= wanted_above)
    highest, lowest = tl.reduce(
        (tl.where(cut_is_below & inside, bins, BINS - 1), tl.where(cut_is_above & inside, bins, 1)), 0, _min_max
    )
    highest = tl.maximum(highest, lowest)
    at_low = bins == lowest
    mass_below, square_below = tl.reduce(
        (tl.where(at_low, below, 0.0), tl.where(at_low, below_square, 0.0)), 0, add_two
    )
    high = tl.where(highest == BINS - 1, high, low + (highest - 1) * width)
    return low + (lowest - 1) * width, high, mass_below, square_below, mass, squares, width


@triton.jit
def bracket_of_cut(logits, vocab_size, row_max, rate, p, row_mass, SAMPLE: tl.constexpr):
    """(low, high): values between which the cut of a row lies.

    The row's largest logit and its mass are known, as no sample may hold its largest; or None: a guess by the sample's,
    and with wider bins.

    With F and Q the sums of w and w^2 over the n sampled tokens below a value, the mass below it in the whole row is
    taken to lie within F +- DEVIATIONS sqrt(Q - F^2 / n); the mass above likewise. A value of which one of the two says
    that the cut lies above it, or below, bounds the bracket. The values tried are the edges of the bins of a histogram.
    """
    places = tl.arange(0, SAMPLE)
    tokens = places // RUN * (vocab_size // (SAMPLE // RUN)) // RUN * RUN + places % RUN
    x = tl.load(logits + tokens).to(tl.float32)  # [SAMPLE]
    if row_mass is None:
        row_max = tl.max(x)
    # y is the logarithm to base 2 of a token's weight over the likeliest one's; a NaN, of a row without answer, is -64.
    y = tl.maximum(tl.minimum(x - row_max, 0.0) * rate, -64.0)  # [SAMPLE]
    total = tl.sum(tl.exp2(y)) if row_mass is None else row_mass * SAMPLE / vocab_size  # in units of the sample's
    wanted_below, wanted_above = total * (1.0 - p), total * p
    least, most = tl.reduce((y, y), 0, _min_max)
    unseen_part = 1.0 - SAMPLE / vocab_size.to(tl.float32)
    low, high, mass_below, square_below, mass, squares, width = _narrow(
        y, least, most, 0.0, 0.0, None, None, wanted_below, wanted_above, unseen_part, SAMPLE
    )
    if row_mass is not None:
        low, high, _, _, _, _, width = _narrow(
            y, low, high, mass_below, square_below, mass, squares, wanted_below, wanted_above, unseen_part, SAMPLE
        )
    low = tl.where(low == least, -LARGEST, row_max + (low - 0.5 * width) / rate)
    high = tl.where(high == most, LARGEST, row_max + (high + 0.5 * width) / rate)
    return low, high


@triton.jit
def as_keys(low, high, p):
    """A bracket's keys; nothing is below it where everything is kept."""
    high = tl.where(p < 1.0, high, float("-inf"))
    return tl.maximum(ordered_key(low), FINITE_KEYS_FROM), tl.minimum(ordered_key(high), INFINITY_KEY - 1)


# ---- the first read, by one program ----


@triton.jit
def read_row(
    logits, vocab_size, rate, low, middle, high,
    SUM_EXP: tl.constexpr, MASS: tl.constexpr, WARPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(largest, total, mass, and the masses above low, middle and high): a row's largest logit, NaN if any is NaN, the
    sums of exp(x - largest), and of exp((x - largest) / temperature) over all tokens and over those above a value."""
    RUNS: tl.constexpr = GROUP // 32
    TILE: tl.constexpr = WARPS * GROUP
    columns = tl.arange(0, 32 * WARPS)
    place = columns // 32 * GROUP + columns % 32
    zero = tl.zeros((32 * WARPS,), tl.float32)
    largest = tl.full((32 * WARPS,), float("-inf"), tl.float32)  # of what a thread has read, and its sums
    total, mass, above_low, above_middle, above_high = zero, zero, zero, zero, zero
    for tile in range(tl.cdiv(vocab_size, TILE)):
        runs = _load_tile(logits, place, TILE, tile, vocab_size, RUNS)
        before = largest
        for run in tl.static_range(RUNS):
            largest = larger(largest, runs[run])
        base = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf is not a number
        if SUM_EXP:
            total *= tl.exp2((before - base) * LOG2_E)
            for run in tl.static_range(RUNS):
                total += tl.exp2((runs[run] - base) * LOG2_E)
        if MASS:
            scale = tl.exp2((before - base) * rate)
            mass, above_low = mass * scale, above_low * scale
            above_middle, above_high = above_middle * scale, above_high * scale
            for run in tl.static_range(RUNS):
                x = runs[run]  # [32 WARPS]
                weight = tl.exp2((x - base) * rate)
                mass += weight
                above_low = tl.where(x > low, above_low + weight, above_low)
                above_middle = tl.where(x > middle, above_middle + weight, above_middle)
                above_high = tl.where(x > high, above_high + weight, above_high)
    row_max = tl.reduce(largest, 0, larger)
    below = largest - tl.where(row_max == float("-inf"), 0.0, row_max)
    total, scale = total * tl.exp2(below * LOG2_E), tl.exp2(below * rate)
    total, mass, above_low, above_middle, above_high = tl.reduce(
        (total, mass * scale, above_low * scale, above_middle * scale, above_high * scale), 0, _add_five
    )
    return row_max, total, mass, above_low, above_middle, above_high


@triton.jit
def _add_five(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def closer_bracket(low, high, above_low, above_middle, above_high, row_max, rate, target):
    """(low, high, found): the part of a guessed bracket in which the cut lies. The masses above its ends and above its
    middle are known; so how many there are in either half, and how steeply they rise.

    Of n tokens spread over a half, the mass up to a value strays from that curve by half a standard deviation of n at
    most, DEVIATIONS of which are allowed, and a little because the curve is another.
    """
    half = 0.5 * high - 0.5 * low
    in_upper = target <= above_middle
    rise = tl.log2((above_middle - above_high) / (above_low - above_middle))
    start, most = tl.where(in_upper, low + half, low), tl.where(in_upper, above_middle, above_low)
    mass = tl.where(in_upper, above_middle - above_high, above_low - above_middle)
    n = tl.maximum(mass / tl.exp2((start + 0.5 * half - row_max) * rate), 1.0)  # about
    part, off = (most - target) / mass, 0.5 * DEVIATIONS / tl.sqrt(n) + 5.0 / n + 0.005
    lower, upper = _rising_to(part - off, rise), _rising_to(part + off, rise)
    known = (half < 0.25 * LARGEST) & (tl.abs(rise) < 20.0)  # neither end is at infinity, neither half is empty
    low, high = tl.where(known, start + half * lower, low), tl.where(known, start + half * upper, high)
    return low, high, (target <= above_low) & (target > above_high)


@triton.jit
def _rising_to(part, rise):
    """Up to where in [0, 1] there is this part of a mass that rises by 2^rise from 0 to 1."""
    part = tl.minimum(tl.maximum(part, 0.0), 1.0)
    return tl.where(tl.abs(rise) < 0.01, part, tl.log2(1.0 + (tl.exp2(rise) - 1.0) * part) / rise)


@triton.jit
def find_bracket(
    logits, group_keys, masses, brackets, counts, vocab_size, row_stride, num_chunks,
    temperature, top_p, temperature_stride, top_p_stride,
    PER_ROW: tl.constexpr, NUM_CHUNKS: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """One program, one row: brackets (batch, 2), the lowest and the highest key within; sets counts (batch, 4) to 0."""
    row = tl.program_id(0).to(tl.int64)
    temperature = parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32)
    p = parameter(top_p, row, top_p_stride, PER_ROW & 4, tl.float32)
    p = tl.where(temperature == 0.0, 0.0, p)  # greedy
    rate = rate_of(temperature)
    good, _, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    chunks = tl.arange(0, NUM_CHUNKS)
    inside = (chunks < num_chunks) & good
    keys = tl.load(group_keys + row * num_chunks + chunks, mask=inside, other=0).to(tl.uint32, bitcast=True)
    mass = tl.load(masses + row * num_chunks + chunks, mask=inside, other=0.0)
    offset = tl.where(keys >= FINITE_KEYS_FROM, tl.minimum(value_of_key(keys) - row_max, 0.0), float("-inf"))
    mass = tl.sum(mass * tl.exp2(offset * rate))
    low, high = bracket_of_cut(logits + row * row_stride, vocab_size, row_max, rate, p, mass, SAMPLE)
    low, high = as_keys(low, high, p)
    tl.store(brackets + row * 2, low.to(tl.int32, bitcast=True))
    tl.store(brackets + row * 2 + 1, high.to(tl.int32, bitcast=True))
    tl.store(counts + row * 4 + tl.arange(0, 4), tl.zeros((4,), tl.int64))


@triton.jit
def load_bracket(brackets, row):
    low = tl.load(brackets + row * 2).to(tl.uint32, bitcast=True)
    return low, tl.load(brackets + row * 2 + 1).to(tl.uint32, bitcast=True)


# ---- the second read ----


@triton.jit
def _load_runs(logits, first, end, RUNS: tl.constexpr, MASKED: tl.constexpr):
    runs = ()
    for run in tl.static_range(RUNS):
        token = first + 32 * run
        x = tl.load(logits + token, mask=token < end, other=float("-inf")) if MASKED else tl.load(logits + token)
        runs += (x.to(tl.float32),)  # type: ignore[assignment]
    return runs


@triton.jit
def _load_tile(logits, place, TILE: tl.constexpr, tile, vocab_size, RUNS: tl.constexpr):
    """A tile of a row as RUNS tensors: logits 32 apart, from each thread's `place` on; -inf behind the row's end."""
    if (tile + 1) * TILE <= vocab_size:
        runs = _load_runs(logits, tile * TILE + place, vocab_size, RUNS, False)
    else:
        runs = _load_runs(logits, tile * TILE + place, vocab_size, RUNS, True)
    return runs


@triton.jit
def weigh(
    logits, own, listed, counts, first_tile, end_tile, vocab_size, num_groups, row_max, rate, low, high, least_weight,
    CUT: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, LIST: tl.constexpr, ALONE: tl.constexpr,
    WARPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(number, everything, above): tiles of WARPS groups of a row, GROUP tokens each, are weighed, and the sums of the
    groups' weights stored in `own` (num_groups): of tokens that may be drawn; for top-p, those above the bracket alone.

    For top-p, tokens within the bracket go to `listed`, logit above token, in any order. `number` is how many they are,
    where one program weighs the whole row, ALONE; several count them in `counts`. `everything` and `above`
    [32 WARPS] int64 add up to the sums of all weights and of those above the bracket.

    A group is in one warp's registers, 32 neighbours a load, so that little here waits for another warp. Which of a
    thread's tokens are within the bracket is kept as bits, of two tiles: a few in a hundred are, and only they are
    read again.
    """
    RUNS: tl.constexpr = GROUP // 32
    TILE: tl.constexpr = WARPS * GROUP
    columns = tl.arange(0, 32 * WARPS)
    place = columns // 32 * GROUP + columns % 32  # of a thread's first token in a tile
    zero = tl.zeros((32 * WARPS,), tl.int64)
    everything, above = zero, zero
    bits = tl.zeros((32 * WARPS,), tl.int32)
    number = tl.full((), 0, tl.int32)
    for tile in range(first_tile, end_tile):
        second = (tile - first_tile) % 2
        runs = _load_tile(logits, place, TILE, tile, vocab_size, RUNS)
        all_kept, all_bits = zero, bits * 0
        for run in tl.static_range(RUNS):
            x = runs[run]  # [32 WARPS]
            weight = integer_weight(x - row_max, rate)
            if CUT:
                key, token = ordered_key(x), tile * TILE + place + 32 * run
                weight = tl.where((key > low) | ((key == low) & (token <= high.to(tl.int32))), weight, 0)
            kept = weight
            if MIN_P:
                kept = tl.where(weight >= least_weight, weight, 0)
            if TOP_P:
                everything += weight
                is_above = x > value_of_key(high)
                all_kept = tl.where(is_above, all_kept + kept, all_kept)
                if MIN_P:
                    above = tl.where(is_above, above + weight, above)
                inside = (x >= value_of_key(low)) & ~is_above
                all_bits = tl.where(inside, all_bits | (1 << run), all_bits)
            else:
                all_kept += kept
        if TOP_P:
            if not MIN_P:
                above += all_kept
            bits |= all_bits << (second * RUNS)
            if (second == 1) | (tile + 1 == end_tile):
                own_number = _count_bits(bits)
                more, most = tl.reduce((own_number, own_number), 0, _sum_max)
                first = number if ALONE else tl.atomic_add(counts, more.to(tl.int64), sem="relaxed").to(tl.int32)
                number += more
                slot = first + tl.cumsum(own_number, 0) - own_number
                for _ in range(most):
                    lowest = (bits & -bits).to(tl.uint32, bitcast=True).to(tl.float32)  # its exponent: the bit's number
                    bit = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
                    token = (tile - second + bit // RUNS) * TILE + place + bit % RUNS * 32
                    again = tl.load(logits + token, mask=bits != 0, other=0.0).to(tl.float32)
                    entry = (again.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token.to(tl.int64)
                    tl.store(listed + slot, entry, mask=(bits != 0) & (slot < LIST))
                    slot += 1
                    bits &= bits - 1
        groups = tile * WARPS + tl.arange(0, WARPS)
        tl.store(own + groups, _sums_of_groups(all_kept, WARPS), mask=groups < num_groups)
    return number, everything, above


@triton.jit(do_not_specialize_on_alignment=["logits"])
def weigh_groups(
    logits, group_keys, brackets, counts, listed, group_sums,
    batch, vocab_size, row_stride, num_chunks, num_groups,
    temperature, min_p, temperature_stride, min_p_stride,
    PER_ROW: tl.constexpr, CUT: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    LIST: tl.constexpr, LIST_ROOM: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program of one warp weighs GROUPS groups of a row: `weigh` with group_sums (batch, num_groups) int64 and
    listed (batch, LIST_ROOM); counts (batch, 4) int64 gets how many are listed, the sum of the row's weights, and of
    those above the bracket."""
    steps = tl.cdiv(num_groups, GROUPS)
    row = (tl.program_id(0) // steps).to(tl.int64)
    first_group = tl.program_id(0) % steps * GROUPS
    rate = rate_of(parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32))
    least_weight = (parameter(min_p, row, min_p_stride, PER_ROW & 8, tl.float32) * WEIGHT_ONE).to(tl.int64)
    _, _, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    low, high = row_max, row_max
    if CUT | TOP_P:
        low, high = load_bracket(brackets, row)
    if TOP_P:
        listed += row * LIST_ROOM
        counts += row * 4
    _, everything, above = weigh(
        logits + row * row_stride, group_sums + row * num_groups, listed, counts,
        first_group, tl.minimum(first_group + GROUPS, num_groups), vocab_size, num_groups,
        row_max, rate, low, high, least_weight, CUT, TOP_P, MIN_P, LIST, False, 1, GROUP,
    )  # fmt: skip
    if TOP_P:
        tl.atomic_add(counts + 1, tl.sum(everything), sem="relaxed")
        tl.atomic_add(counts + 2, tl.sum(above), sem="relaxed")


@triton.jit
def _sum_max(sum0, max0, sum1, max1):
    return sum0 + sum1, tl.maximum(max0, max1)


@triton.jit
def _count_bits(bits):
    """How many of 32 bits are set."""
    bits = bits.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    return ((bits + (bits >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _sums_of_groups(each, WARPS: tl.constexpr):
    """The sums [WARPS] over warps of [32 WARPS] numbers below 2^47; of 32 bits such a sum is one instruction."""
    low, high = tl.reshape((each & 0xFFFFFF).to(tl.int32), (WARPS, 32)), tl.reshape(each >> 24, (WARPS, 32))
    return (tl.sum(high.to(tl.int32), axis=1).to(tl.int64) << 24) + tl.sum(low, axis=1)


# ---- the cut, from the list ----


@triton.jit
def _sums_min_max(a0, a1, a2, min0, max0, b0, b1, b2, min1, max1):
    return a0 + b0, a1 + b1, a2 + b2, tl.minimum(min0, min1), tl.maximum(max0, max1)


@triton.jit
def _load_entries(listed, start, count, row_max, rate, BLOCK: tl.constexpr):
    """A block of the tokens within a row's bracket: keys, weights, token ids; 0 where there is none."""
    slots = start + tl.arange(0, BLOCK)
    entry = tl.load(listed + slots, mask=slots < count, other=0)
    x, tokens = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True), entry.to(tl.int32)
    key = tl.where(slots < count, ordered_key(x), 0)
    return key, tl.where(slots < count, integer_weight(tl.minimum(x - row_max, 0.0), rate), 0), tokens


@triton.jit
def narrow_by_list(listed, count, row_max, rate, target, low, high, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """(low, high, above, number): a narrower bracket with MOST tokens in it or fewer, unless they are all equal; of the
    tokens listed, those above it have the sum `above`. number = 0: it is not known whether the cut is among them.

    Listed are the tokens from key `low` to key `high`. If values have about equal shares, the cut lies where it should
    within 2 / sqrt(number): the first read of the list tries the two values that far to both sides, the second the two
    in a quarter and in three quarters, and so on. Each also finds the smallest and the largest key of the bracket it
    began with, so that few values need few reads.
    """
    reached, above = target * 0, target * 0
    middle_value = value_of_key(_key_at(low, high, 0.5, True))
    all_listed = count * integer_weight(tl.minimum(middle_value - row_max, 0.0), rate)  # about
    number, over = count, count * 0  # how many are from low on; how many above high
    step = tl.full((), 0, tl.int32)
    while (number - over > MOST) & (low < high):
        guess = step % 2 == 0
        middle = tl.where(guess, _part_to(target, tl.where(reached > 0, reached, all_listed), above), 0.5)
        off = tl.where(guess, 2.0 / tl.sqrt((number - over).to(tl.float32)), 0.25)
        lower, upper = _key_at(low, high, middle - off, guess), _key_at(low, high, middle + off, guess)
        lower = tl.where(middle <= off, low, lower)
        from_lower, from_upper = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
        numbers = tl.zeros((BLOCK,), tl.int64)  # from the lower key on; times 2^32, from the upper key on
        smallest, largest = tl.full((BLOCK,), TOP, tl.uint32), tl.full((BLOCK,), 0, tl.uint32)
        for start in range(0, count, BLOCK):
            key, weight, _ = _load_entries(listed, start, count, row_max, rate, BLOCK)
            from_lower += tl.where(key >= lower, weight, 0)
            from_upper += tl.where(key >= upper, weight, 0)
            numbers += (key >= lower).to(tl.int64) + ((key >= upper).to(tl.int64) << 32)
            smallest = tl.minimum(smallest, tl.where(key >= low, key, TOP))
            largest = tl.maximum(largest, tl.where(key <= high, key, 0))
        from_lower, from_upper, numbers, smallest, largest = tl.reduce(
            (from_lower, from_upper, numbers, smallest, largest), 0, _sums_min_max
        )
        if from_upper >= target:
            low, reached, number = upper, from_upper, (numbers >> 32).to(tl.int32)
        else:
            high, above, over = upper - 1, from_upper, (numbers >> 32).to(tl.int32)
            if from_lower >= target:
                low, reached, number = lower, from_lower, numbers.to(tl.int32)
            else:
                high, above, over = lower - 1, from_lower, numbers.to(tl.int32)
        low, high = tl.maximum(low, smallest), tl.minimum(high, largest)
        step += 1
    known = (number - over <= MOST) | (reached > 0)  # or all may lie above the cut
    return low, high, above, tl.where(known, number - over, 0)


@triton.jit
def cut_in_list(
    listed, own, count, row_max, rate, target, low, high, least_weight,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, LIST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """(cut, last, found), from a list of which at most MOST lie from key `low` to key `high`: these are sorted, in the
    room behind the list. The weights of the tokens kept are added to their groups' sums. found: the cut is among them.
    """
    written = tl.full((), 0, tl.int32)
    for start in range(0, count, BLOCK):
        key, weight, tokens = _load_entries(listed, start, count, row_max, rate, BLOCK)
        kept = (key > high) & (weight > 0) & (weight >= least_weight)
        tl.atomic_add(own + tokens // GROUP, weight, mask=kept, sem="relaxed")
        between = (key >= low) & (key <= high)
        slot = written + tl.cumsum(between.to(tl.int32), 0) - 1
        tl.store(listed + LIST + slot, candidate(key, tokens), mask=between)
        written += tl.sum(between.to(tl.int32))
    tl.debug_barrier()  # other threads read what was written here
    slots = tl.arange(0, MOST)
    best = tl.sort(tl.load(listed + LIST + slots, mask=slots < written, other=-(2**63)), descending=True)
    key, tokens = key_and_index(best)
    weight = integer_weight(tl.minimum(value_of_key(key) - row_max, 0.0), rate)
    weight = tl.where(slots < written, weight, 0)
    before = tl.cumsum(weight, 0) - weight
    kept = (before < target) & (slots < written)
    tl.atomic_add(own + tokens // GROUP, weight, mask=kept & (weight >= least_weight), sem="relaxed")
    here = slots == tl.sum(kept.to(tl.int32)) - 1
    found = (target > 0) & (tl.sum(weight) >= target)
    return tl.max(tl.where(here, key, 0)), tl.max(tl.where(here, tokens, 0)), found


@triton.jit
def cut_in_row(
    logits, own, vocab_size, num_groups, row_max, rate, target, low, high, reached, above, least_weight,
    GROUP: tl.constexpr,
):  # fmt: skip
    """(cut, last) of top-p, where no list helps; the sums of each group's kept tokens are written anew."""
    zero, every = tl.full((), 0, tl.uint32), tl.full((), EVERY_TOKEN, tl.int32)
    cut, last = search_row(
        logits, vocab_size, row_max, rate, zero, every, target, low, high, reached, above, True, GROUP
    )
    for group in range(num_groups):
        tokens, x, key = load_block(logits, group * GROUP, vocab_size, GROUP)
        weight = kept_weight(tokens, x, key, row_max, rate, cut, last)
        tl.store(own + group, tl.sum(tl.where(weight >= least_weight, weight, 0)))
    return cut, last
