"""The cut of top-p over rows too long for one program's registers, in two reads of the logits and without a sort.

    chunk_curves       first read: how much mass each chunk has above each of LEVELS depths below its own maximum
    find_bracket       per row, from the curves: two values between which the cut lies, with few tokens between them
    weigh_chunks       second read: integer weights above the bracket, and a list of the tokens within it
    cut_within_bracket per row: that the cut does lie there, proven by integer sums; then the cut itself, from the list

The curves are floating-point sums and the bracket an estimate; nothing depends on either but time. What decides is
integer arithmetic over all tokens, and where it does not confirm the bracket, or the list is too short for the tokens
in it (ten thousand ties, say), the row is searched bit by bit.

A depth is a distance from a maximum in octaves of the weight: 2^-depth is a token's weight over the likeliest one's.

Knows Triton; knows nothing of how the op is launched.
"""

import triton
import triton.language as tl

from kernels.top_k.triton_select import (
    FINITE_KEYS_FROM,
    INFINITY_KEY,
    LOG2_E,
    integer_weight,
    key_reaching,
    ordered_key,
    rate_of,
    share,
    value_of_key,
)

LEVELS = tl.constexpr(16)
LEVELS_PER_MEAN = tl.constexpr(3.0)  # so many levels reach from a chunk's maximum down to the mean depth of its mass
LIST_LENGTH = tl.constexpr(8192)
LIST_WARPS = 16
WEIGH_WARPS = 8  # with 4, a thread would need 216 registers
MARGIN = tl.constexpr(2000.0)  # tokens that a bracket reaches beyond the estimated cut, to either side


@triton.jit
def parameter(value, row, stride, PER_ROW: tl.constexpr, dtype: tl.constexpr):
    """A parameter of the op: the number itself, or the row's entry of a tensor."""
    if PER_ROW:
        return tl.load(value + row * stride)
    else:
        return tl.full((), value, dtype)


@triton.jit
def load_block(logits, start, vocab_size, BLOCK: tl.constexpr):
    tokens = start + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    x = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    return tokens, x, tl.where(inside, ordered_key(x), 0)


@triton.jit
def chunk_curves(
    logits, group_keys, partials, curves, spacings, vocab_size, row_stride, num_chunks,
    temperature, temperature_stride,
    PER_ROW: tl.constexpr, SUM_EXP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program, one chunk: curves (batch, num_chunks, LEVELS) fp32, the mass down to a number of spacings below the
    chunk's maximum, last the whole mass; spacings (batch, num_chunks) in octaves; the rest as in `group_maxima`."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    rate = rate_of(parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32))
    _, x, key = load_block(logits + row * row_stride, chunk * CHUNK, vocab_size, CHUNK)
    place = row * num_chunks + chunk
    tl.store(group_keys + place, tl.max(key).to(tl.int32, bitcast=True))
    largest = tl.max(x)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    z = tl.minimum(x - largest, 0.0)
    if SUM_EXP:
        tl.store(partials + place * 2, largest)
        tl.store(partials + place * 2 + 1, tl.sum(tl.exp2(z * LOG2_E)))
    depth = -z * rate
    mass = tl.exp2(-depth)
    total = tl.sum(mass)
    mean_depth = tl.sum(tl.where(mass > 0.0, depth * mass, 0.0)) / tl.maximum(total, 1.0)
    spacing = tl.minimum(tl.maximum(mean_depth / LEVELS_PER_MEAN, 1e-6), 4.0)
    tl.store(spacings + place, spacing)
    for level in tl.static_range(LEVELS - 1):
        tl.store(curves + place * LEVELS + level, tl.sum(tl.where(depth <= level * spacing, mass, 0.0)))
    tl.store(curves + place * LEVELS + (LEVELS - 1), total)


@triton.jit
def _at_level(curve, level):
    """curve[c, level[c]] for each chunk c; 0 above the curve, the whole mass below it."""
    levels = tl.arange(0, LEVELS)[None, :]
    picked = tl.sum(tl.where(levels == tl.minimum(level, LEVELS - 1)[:, None], curve, 0.0), axis=1)
    return tl.where(level < 0, 0.0, picked)


@triton.jit
def _mass_above(curve, spacing, offset, depth):
    """About how much mass there is down to a depth below the row's maximum. curve [chunks, LEVELS]."""
    local = (depth - offset) / spacing  # [chunks], below the chunk's own maximum
    level = tl.floor(local)
    part = local - level
    level = tl.minimum(tl.maximum(level, -2.0), 64.0).to(tl.int32)
    before, lower = _at_level(curve, level - 1), _at_level(curve, level)
    upper, after = _at_level(curve, level + 1), _at_level(curve, level + 2)
    # A cubic through the four (Catmull and Rom), between the two in the middle.
    slope0, slope1 = 0.5 * (upper - before), 0.5 * (after - lower)
    step = upper - lower
    cubic = lower + part * (slope0 + part * (3 * step - 2 * slope0 - slope1 + part * (slope0 + slope1 - 2 * step)))
    return tl.sum(tl.minimum(tl.maximum(cubic, lower), upper))


@triton.jit
def _depth_of(curve, spacing, offset, mass):
    """The depth, from 0 to 64, down to which there is so much mass."""
    depth = tl.full((), 0.0, tl.float32)
    step = tl.full((), 32.0, tl.float32)
    for _ in range(20):
        depth = tl.where(_mass_above(curve, spacing, offset, depth + step) < mass, depth + step, depth)
        step = 0.5 * step
    return depth


@triton.jit
def find_bracket(
    group_keys, curves, spacings, brackets, counts, vocab_size, num_chunks,
    temperature, top_p, temperature_stride, top_p_stride,
    PER_ROW: tl.constexpr, NUM_CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program, one row: brackets (batch, 2), the highest and the lowest key within; sets the list's length to 0."""
    row = tl.program_id(0).to(tl.int64)
    temperature = parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32)
    p = parameter(top_p, row, top_p_stride, PER_ROW & 4, tl.float32)
    p = tl.where(temperature == 0.0, 0.0, p)  # greedy
    rate = rate_of(temperature)
    chunks = tl.arange(0, NUM_CHUNKS)
    inside = chunks < num_chunks
    keys = tl.load(group_keys + row * num_chunks + chunks, mask=inside, other=0).to(tl.uint32, bitcast=True)
    maxima = tl.where(keys >= FINITE_KEYS_FROM, value_of_key(keys), float("-inf"))
    row_max = tl.max(maxima)
    offset = tl.minimum((row_max - maxima) * rate, 1e6)  # [NUM_CHUNKS]
    at = ((row * num_chunks + chunks) * LEVELS)[:, None] + tl.arange(0, LEVELS)[None, :]
    curve = tl.load(curves + at, mask=inside[:, None], other=0.0) * tl.exp2(-offset)[:, None]  # [NUM_CHUNKS, LEVELS]
    spacing = tl.load(spacings + row * num_chunks + chunks, mask=inside, other=1.0)
    total = tl.sum(tl.max(curve, axis=1))
    target = p * total

    depth = _depth_of(curve, spacing, offset, target)
    margin = MARGIN * tl.exp2(-depth)  # in mass: a token at the cut weighs 2^-depth
    top = _depth_of(curve, spacing, offset, target - margin)
    end = _depth_of(curve, spacing, offset, target + tl.minimum(margin, 0.5 * (total - target))) + 1e-4
    end = tl.minimum(end, depth + 3.0)  # lighter tokens may be far more than the margin's

    highest = tl.where(top > 0.0, ordered_key(row_max - top / rate), 0xFFFFFFFF)
    lowest = tl.where(end < 60.0, ordered_key(row_max - end / rate), 0)
    tl.store(brackets + row * 2, highest.to(tl.int32, bitcast=True))
    tl.store(brackets + row * 2 + 1, lowest.to(tl.int32, bitcast=True))
    tl.store(counts + row, 0)


@triton.jit
def row_maximum(group_keys, row, num_chunks, NUM_CHUNKS: tl.constexpr):
    """Whether a row's largest logit is finite, and the logit (0 if not), from the largest keys of its chunks."""
    chunks = tl.arange(0, NUM_CHUNKS)
    keys = tl.load(group_keys + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    max_key = tl.max(keys.to(tl.uint32, bitcast=True))
    good = (max_key >= FINITE_KEYS_FROM) & (max_key < INFINITY_KEY)
    return good, tl.where(good, value_of_key(max_key), 0.0)


@triton.jit
def weigh_chunks(
    logits, group_keys, brackets, counts, listed, sums, chunk_sums, batch, vocab_size, row_stride, num_chunks,
    temperature, min_p, temperature_stride, min_p_stride,
    PER_ROW: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program, one chunk: sums (2, batch, num_chunks) of all weights and of those above the bracket; the same as
    the latter without what min-p drops in chunk_sums (batch, num_chunks); tokens within the bracket in
    listed (batch, LIST_LENGTH), their number in counts (batch,)."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    rate = rate_of(parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32))
    least_weight = (parameter(min_p, row, min_p_stride, PER_ROW & 8, tl.float32) * 1099511627776.0).to(tl.int64)
    highest = tl.load(brackets + row * 2).to(tl.uint32, bitcast=True)
    lowest = tl.load(brackets + row * 2 + 1).to(tl.uint32, bitcast=True)
    _, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    tokens, x, key = load_block(logits + row * row_stride, chunk * CHUNK, vocab_size, CHUNK)
    weight = integer_weight(tl.minimum(x - row_max, 0.0), rate)
    above = tl.where(key > highest, weight, 0)
    place = row * num_chunks + chunk
    tl.store(sums + place, tl.sum(weight))
    tl.store(sums + batch * num_chunks + place, tl.sum(above))
    tl.store(chunk_sums + place, tl.sum(tl.where(weight >= least_weight, above, 0)))
    within = (key >= lowest) & (key <= highest) & (key > 0)
    number = tl.sum(within.to(tl.int32))
    if number > 0:
        slot = tl.atomic_add(counts + row, number) + tl.cumsum(within.to(tl.int32), 0) - 1
        tl.store(listed + row * LIST_LENGTH + slot, tokens, mask=within & (slot < LIST_LENGTH))


@triton.jit
def cut_within_bracket(
    logits, group_keys, counts, listed, sums, chunk_sums, cuts, lasts, batch, vocab_size, row_stride, num_chunks,
    temperature, top_p, min_p, temperature_stride, top_p_stride, min_p_stride,
    PER_ROW: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program, one row: the cut of top-p (cuts, lasts as in `find_cut`), and chunk_sums made complete."""
    row = tl.program_id(0).to(tl.int64)
    temperature = parameter(temperature, row, temperature_stride, PER_ROW & 1, tl.float32)
    p = parameter(top_p, row, top_p_stride, PER_ROW & 4, tl.float32)
    p = tl.where(temperature == 0.0, 0.0, tl.minimum(tl.maximum(p, 0.0), 1.0))
    least_weight = (parameter(min_p, row, min_p_stride, PER_ROW & 8, tl.float32) * 1099511627776.0).to(tl.int64)
    rate = rate_of(temperature)
    good, row_max = row_maximum(group_keys, row, num_chunks, NUM_CHUNKS)
    logits += row * row_stride
    chunks = tl.arange(0, NUM_CHUNKS)
    at = row * num_chunks + chunks
    total = tl.sum(tl.load(sums + at, mask=chunks < num_chunks, other=0))
    above = tl.sum(tl.load(sums + batch * num_chunks + at, mask=chunks < num_chunks, other=0))
    target = tl.maximum(share(total, p), 1)

    count = tl.load(counts + row)
    slots = tl.arange(0, LIST_LENGTH)
    inside = slots < count
    tokens = tl.load(listed + row * LIST_LENGTH + slots, mask=inside, other=0)
    x = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)  # [LIST_LENGTH]
    key = tl.where(inside, ordered_key(x), 0)
    weight = tl.where(inside, integer_weight(tl.minimum(x - row_max, 0.0), rate), 0)
    confirmed = (count <= LIST_LENGTH) & (above < target) & (above + tl.sum(weight) >= target)
    cut = tl.full((), 0, tl.uint32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    if confirmed:
        cut = key_reaching(key, weight, target - above, 32)
        missing = target - above - tl.sum(tl.where(key > cut, weight, 0))
        each = tl.maximum(integer_weight(value_of_key(cut) - row_max, rate), 1)
        wanted = ((missing + each - 1) // each).to(tl.int32)
        last = tl.full((), 0, tl.int32)  # the smallest token up to which there are as many ties as wanted
        for bit in range(20):
            trial = last + (tl.full((), 1 << 19, tl.int32) >> bit)
            last = tl.where(tl.sum(((key == cut) & (tokens < trial)).to(tl.int32)) < wanted, trial, last)
        kept = (key > cut) | ((key == cut) & (tokens <= last))
        kept &= (weight >= least_weight) & (weight > 0)
        tl.atomic_add(chunk_sums + row * num_chunks + tokens // CHUNK, weight, mask=kept)
    elif good:
        cut, last = mass_cut(logits, vocab_size, row_max, rate, 0, 0x7FFFFFFF, target, CHUNK)
        chunk_sums += row * num_chunks
        _sum_chunks(logits, chunk_sums, vocab_size, num_chunks, row_max, rate, cut, last, least_weight, CHUNK)
    tl.store(cuts + row, cut.to(tl.int32, bitcast=True))
    tl.store(lasts + row, last)


# ---- bit by bit, reading the row each time: what always works ----


@triton.jit
def kept_weight(tokens, x, key, row_max, rate, cut, last):
    """The weights of a block, 0 where (cut, last) keeps a token out."""
    kept = (key > cut) | ((key == cut) & (tokens <= last))
    return tl.where(kept, integer_weight(tl.minimum(x - row_max, 0.0), rate), 0)


@triton.jit
def weight_from(logits, vocab_size, row_max, rate, cut, last, least_key, BLOCK: tl.constexpr):
    """The weights of the tokens that (cut, last) keeps and whose keys are >= least_key, added up."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        tokens, x, key = load_block(logits, start, vocab_size, BLOCK)
        total += tl.where(key >= least_key, kept_weight(tokens, x, key, row_max, rate, cut, last), 0)
    return tl.sum(total)


@triton.jit
def _sum_chunks(
    logits, chunk_sums, vocab_size, num_chunks, row_max, rate, cut, last, least_weight, CHUNK: tl.constexpr
):  # fmt: skip
    """The weights of each chunk's kept tokens, added up."""
    for chunk in range(num_chunks):
        tokens, x, key = load_block(logits, chunk * CHUNK, vocab_size, CHUNK)
        weight = kept_weight(tokens, x, key, row_max, rate, cut, last)
        tl.store(chunk_sums + chunk, tl.sum(tl.where(weight >= least_weight, weight, 0)))


@triton.jit
def nth_tie(logits, vocab_size, cut, n, BLOCK: tl.constexpr):
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
def mass_cut(logits, vocab_size, row_max, rate, cut, last, target, BLOCK: tl.constexpr):
    """(cut, last) such that, of the tokens a given (cut, last) keeps, the fewest are kept that weigh the target."""
    found = tl.full((), 0, tl.uint32)
    for bit in range(32):
        trial = found | (tl.full((), 0x80000000, tl.uint32) >> bit)
        reached = weight_from(logits, vocab_size, row_max, rate, cut, last, trial, BLOCK)
        found = tl.where(reached >= target, trial, found)
    missing = target - weight_from(logits, vocab_size, row_max, rate, cut, last, found + 1, BLOCK)
    each = tl.maximum(integer_weight(value_of_key(found) - row_max, rate), 1)
    return found, nth_tie(logits, vocab_size, found, ((missing + each - 1) // each).to(tl.int32), BLOCK)


@triton.jit
def count_from(logits, vocab_size, least_key, BLOCK: tl.constexpr):
    """How many keys of the row are >= least_key."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        _, _, key = load_block(logits, start, vocab_size, BLOCK)
        count += (key >= least_key).to(tl.int32)
    return tl.sum(count)


@triton.jit
def rank_cut(logits, vocab_size, k, BLOCK: tl.constexpr):
    """(cut, last): a row's best k are the keys above the cut, and those equal to it up to the token `last`."""
    cut = tl.full((), 0, tl.uint32)
    for bit in range(32):
        trial = cut | (tl.full((), 0x80000000, tl.uint32) >> bit)
        cut = tl.where(count_from(logits, vocab_size, trial, BLOCK) >= k, trial, cut)
    above = tl.full((), 0, tl.int32)
    if cut != 0xFFFFFFFF:
        above = count_from(logits, vocab_size, cut + 1, BLOCK)
    return cut, nth_tie(logits, vocab_size, cut, k - above, BLOCK)
