"""Top-K and sampling as the definitions say them: a stable sort, integer weights, one inverse-CDF draw.

The kernels agree with this file bit for bit on every device. What makes that possible is that nothing which decides on
a token is a floating-point sum: each token's weight is computed by a fixed sequence of correctly rounded operations in
fp32 and then made an integer, and integers add up to the same total in whatever order they are added.

    weight     W = floor(2^40 * 2^y), y = (x - row max) * (log2(e) / temperature), an int64; the likeliest has 2^40.
               2^20 of them stay below 2^61. Cut off is less than 2^-40 of the likeliest token's probability per token.
    draw       the token in whose share of the running total, in token order, the random number falls

Knows torch; knows nothing of tiles, devices or how the op is registered.
"""

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
WEIGHT_BITS = 40  # the likeliest token of a row weighs 2^40
MIN_TEMPERATURE = 2.0**-64  # a positive temperature below this counts as this: log2(e) / temperature stays finite

# 2^f on [-1/2, 1/2] as 1 + c1 f + ... + c5 f^5, from c5 to c1, relative error 1.1e-7, about what fp32 rounds.
EXP2_COEFFICIENTS = (0.0013264727, 0.009671513, 0.055507336, 0.24022242, 0.693147)
_ROUND = 1.5 * 2.0**23  # adding and subtracting it rounds a small fp32 number to an integer

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, by a stable sort: ties go to the lower index, NaN counts as the largest.

    x (batch, n); returns values (batch, k) and int64 indices (batch, k). A zero comes back as +0.0.
    """
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[:, :k] + 0.0, indices[:, :k].contiguous()


def philox(seed: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11) with key seed and counter step: four 32-bit words, each in an int64.

    seed, step (batch,) int64, taken as 64 bits; the counter's upper 64 bits are 0.
    """
    key = [seed & _LOW, (seed >> 32) & _LOW]
    counter = [step & _LOW, (step >> 32) & _LOW, torch.zeros_like(step), torch.zeros_like(step)]
    for _ in range(10):
        # The product of two 32-bit numbers wraps around in an int64; its 64 bits are right all the same.
        product0, product1 = _PHILOX_MULTIPLIERS[0] * counter[0], _PHILOX_MULTIPLIERS[1] * counter[2]
        high0, high1 = (product0 >> 32) & _LOW, (product1 >> 32) & _LOW
        counter = [high1 ^ counter[1] ^ key[0], product1 & _LOW, high0 ^ counter[3] ^ key[1], product0 & _LOW]
        key = [(key[0] + _PHILOX_WEYL[0]) & _LOW, (key[1] + _PHILOX_WEYL[1]) & _LOW]
    return counter[0], counter[1], counter[2], counter[3]


def random_below(total: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """floor(total * u / 2^64) with u the first 64 random bits of (seed, step); total (batch,) int64, below 2^61."""
    u_high, u_low, _, _ = philox(seed, step)
    total_high, total_low = total >> 32, total & _LOW
    low, middle, cross = u_low * total_low, u_high * total_low, u_low * total_high
    carry = ((low >> 32) & _LOW) + (middle & _LOW) + (cross & _LOW)
    return u_high * total_high + ((middle >> 32) & _LOW) + (cross >> 32) + (carry >> 32)


def integer_weights(z: Tensor, temperature: Tensor) -> Tensor:
    """floor(2^40 * exp(z / temperature)) for z (batch, vocab_size) fp32, at most 0, and temperature (batch,) fp32.

    The kernels repeat these operations one by one: the polynomial in fused multiply-adds, which every device has, and
    nothing else fused.
    """
    rate = torch.full_like(temperature, LOG2_E) / temperature.clamp(min=MIN_TEMPERATURE)
    y = (z * rate[:, None]).clamp(min=-63.0)
    whole = (y + _ROUND) - _ROUND
    fraction = y - whole  # exact
    power = torch.full_like(y, EXP2_COEFFICIENTS[0])
    for coefficient in (*EXP2_COEFFICIENTS[1:], 1.0):
        power = _multiply_add(power, fraction, coefficient)  # in [0.7, 1.42] at the end: a multiple of 2^-24
    mantissa = (power * 2.0**24).to(torch.int64)  # exact
    return (mantissa << (WEIGHT_BITS - 24)) >> (-whole).to(torch.int64)


def _multiply_add(a: Tensor, b: Tensor, c: float) -> Tensor:
    """a * b + c of fp32 numbers, rounded once.

    In fp64 the product is exact, and what the sum loses is known. Rounded to that neighbour whose last bit is 1, it is
    on the same side as the exact sum of every number at which fp32 may round up or down (Boldo and Melquiond).
    """
    product, summand = a.double() * b.double(), torch.tensor(c, dtype=torch.float32).double()
    total = product + summand
    of_summand = total - product
    lost = (product - (total - of_summand)) + (summand - of_summand)
    is_even = total.view(torch.int64) % 2 == 0
    return torch.where((lost != 0) & is_even, torch.nextafter(total, lost.sign() * torch.inf), total).float()


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, raw and processed log-probabilities, each (batch,), as `kernels.sample` defines them.

    logits (batch, vocab_size); temperature, top_p, min_p (batch,) fp32; top_k, seed, step (batch,) int64; top_k = 0,
    top_p = 1 and min_p = 0 switch a filter off.
    """
    x = logits.float()
    vocab_size = x.shape[-1]
    row_max = x.amax(dim=-1)
    valid = row_max.isfinite() & (temperature >= 0) & (temperature < float("inf"))  # NaN in a row makes its maximum NaN
    valid &= (top_k >= 0) & (top_k <= vocab_size) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
    greedy = temperature == 0
    # Rows without an answer, and greedy ones, go through the same steps with harmless numbers.
    x = torch.where(valid[:, None], x, 0.0)
    z = x - torch.where(valid, row_max, 0.0)[:, None]
    temperature = torch.where(valid & ~greedy, temperature, 1.0)
    weights = integer_weights(z, temperature)  # (batch, vocab_size)

    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    rank = torch.arange(vocab_size, device=x.device)
    limit = torch.where(greedy, 1, torch.where(top_k == 0, vocab_size, top_k))
    descending = torch.where(rank < limit[:, None], weights.gather(-1, order), 0)  # top-k
    target = _share(descending.sum(dim=-1), torch.where(valid, top_p, 1.0))
    before = descending.cumsum(dim=-1) - descending
    kept = (before < target[:, None]) | (rank == 0)  # top-p
    least = (torch.where(valid, min_p, 0.0) * 2.0**WEIGHT_BITS).to(torch.int64)
    kept &= (rank < limit[:, None]) & (descending >= least[:, None])  # min-p

    kept_weights = torch.zeros_like(weights).scatter_(-1, order, torch.where(kept, descending, 0))
    running = kept_weights.cumsum(dim=-1)
    drawn = random_below(running[:, -1], seed, step)
    token_ids = (running <= drawn[:, None]).sum(dim=-1)

    is_kept = torch.zeros_like(kept).scatter_(-1, order, kept)
    scaled = z / temperature.clamp(min=MIN_TEMPERATURE)[:, None]
    processed = torch.log_softmax(scaled.masked_fill(~is_kept, float("-inf")), dim=-1)
    chosen = token_ids[:, None]
    raw, processed = (y.gather(-1, chosen)[:, 0] for y in (torch.log_softmax(x, dim=-1), processed))
    nan = float("nan")
    return torch.where(valid, token_ids, -1), torch.where(valid, raw, nan), torch.where(valid, processed, nan)


def _share(total: Tensor, p: Tensor) -> Tensor:
    """The mass that has to be reached: total * p in integers; p fp32, at most 1; total below 2^61.

    p is cut to a multiple of 2^-31 and lowered by what rounding to fp32 may have added, so that 600 of 1000 equal
    tokens reach 0.6, which in fp32 is 0.60000002. 1 stays 1.
    """
    p_bits = (p * 2.0**31).to(torch.int64)
    p_bits = torch.where(p < 1, p_bits - 1 - (p_bits >> 24), p_bits)
    return (total >> 31) * p_bits + (((total & 0x7FFFFFFF) * p_bits) >> 31)
