"""kernels.sample: the definition, the distribution, the randomness, and what happens to rows that have no answer."""

import struct
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import kernels
from kernels.top_k import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DRAWS = 2**20
INFINITY = float("inf")


def by_reference(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None, seed, step=0):
    """The reference, on the CPU: token ids, raw and processed log-probabilities."""
    offs = (
        (temperature, 1.0, torch.float32),
        (top_k, 0, torch.int64),
        (top_p, 1.0, torch.float32),
        (min_p, 0.0, torch.float32),
        (seed, 0, torch.int64),
        (step, 0, torch.int64),
    )
    rows = [torch.as_tensor(off if p is None else p, dtype=d).cpu().expand(len(logits)) for p, off, d in offs]
    return reference.sample(logits.cpu(), *rows)


def check(logits, **options):
    """The op draws the reference's tokens, bit for bit; log-probabilities agree to fp32 rounding."""
    before = logits.clone()
    sampled = kernels.sample(logits, return_logprobs=True, **options)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    token_ids, raw, processed = by_reference(logits, **options)
    assert sampled.token_ids.tolist() == token_ids.tolist()
    assert torch.equal(kernels.sample(logits, **options), sampled.token_ids)
    torch.testing.assert_close(sampled.raw_logprobs.cpu(), raw, rtol=3e-6, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(sampled.processed_logprobs.cpu(), processed, rtol=3e-6, atol=3e-6, equal_nan=True)
    return sampled


OPTIONS = (
    {},
    {"temperature": 0.7, "top_k": 50},
    {"top_k": 1},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 1.0, "top_k": 7},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.0, "top_p": 0.3},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.0},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {"temperature": 1e-6},
    {"temperature": 1e-40, "top_p": 0.99},
    {"temperature": 100.0, "top_k": 600},
)


def make_logits(kind: str, batch: int, vocab_size: int, device, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(batch, vocab_size)
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "constant":
        x = torch.full_like(x, -3.0)
    elif kind == "peaked":
        x = 30 * x
    elif kind == "masked":
        x[torch.rand_like(x) < 0.9] = -INFINITY
        x[:, vocab_size // 2] = 0.5
    return x.to(device, dtype)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "peaked", "masked"])
@pytest.mark.parametrize(("batch", "vocab_size"), [(3, 1000), (2, 20_011)])
def test_agrees_with_the_reference(device, kind, batch, vocab_size):
    for number, options in enumerate(OPTIONS):
        check(
            make_logits(kind, batch, vocab_size, device),
            seed=number,
            step=torch.arange(batch, device=device),
            **options,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 113, 4097, 50_304])
def test_any_size_and_dtype(device, dtype, vocab_size):
    logits = make_logits("normal", 3, vocab_size, device, dtype)
    for options in ({}, {"top_k": min(50, vocab_size)}, {"top_p": 0.7}, {"top_k": vocab_size, "min_p": 0.2}):
        check(logits, seed=11, **options)


@pytest.mark.parametrize("vocab_size", [1000, 10_000])
@pytest.mark.parametrize("top_p", [0.001, 0.003, 0.1, 0.3, 0.6, 0.7, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(device, vocab_size, top_p):
    """Of equal tokens, exactly p times their number: though most such p have no exact fp32."""
    logits = torch.zeros(1, vocab_size, device=device)
    for p in (top_p, torch.tensor(top_p, device=device)):
        sampled = check(logits, seed=1, top_p=p)
        assert round(sampled.processed_logprobs.neg().exp().item(), 1) == round(top_p * vocab_size)


def test_largest_vocabulary(device):
    logits = make_logits("normal", 1, 2**20, device)
    for options in ({"top_k": 50}, {"top_p": 0.9}, {}):
        check(logits, seed=1, **options)
    with pytest.raises(ValueError, match=r"^logits: got a vocabulary of 1048577"):
        kernels.sample(torch.zeros(1, 2**20 + 1, device=device), seed=0)


@pytest.mark.parametrize("vocab_size", [300, 9000])
def test_parameters_per_row(device, vocab_size):
    logits = make_logits("normal", 6, vocab_size, device)
    on = {"device": device}
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0, 1.0], **on),
        "top_k": torch.tensor([5, 40, vocab_size, 1, 200, 64], **on),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.2, 1.0, 0.7], **on),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.01, 1.0], **on),
        "seed": torch.tensor([1, 2, 3, 4, 2**62, 5], **on),
        "step": torch.tensor([0, 0, 7, 2**40, 1, 2], **on),
    }
    sampled = check(logits, **options)
    for row in range(6):
        alone = {name: value[row].item() for name, value in options.items()}
        assert kernels.sample(logits[row : row + 1], **alone).item() == sampled.token_ids[row].item()
    check(
        logits, seed=torch.tensor(3, **on), step=torch.tensor(9, **on), top_k=torch.tensor(4, **on, dtype=torch.int32)
    )


def test_rows_without_an_answer_leave_their_neighbours_alone(device):
    for vocab_size in (100, 9000):
        logits = make_logits("normal", 6, vocab_size, device)
        logits[0, 3] = float("nan")
        logits[1, vocab_size - 1] = INFINITY
        logits[2] = -INFINITY
        logits[3, 1:] = -INFINITY
        for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}, {"min_p": 0.3}):
            sampled = check(logits, seed=8, **options)
            assert sampled.token_ids[:4].tolist() == [-1, -1, -1, 0]
            assert sampled.raw_logprobs[:3].isnan().all() and sampled.processed_logprobs[:3].isnan().all()
            assert sampled.raw_logprobs[3] == 0.0
            assert torch.equal(kernels.sample(logits[3:], seed=8, **options), sampled.token_ids[3:])


def test_entries_of_parameter_tensors_outside_what_is_allowed(device):
    logits = make_logits("normal", 5, 200, device)
    nan = float("nan")
    bad = {
        "temperature": [-1.0, nan, INFINITY, 0.0, 1.0],
        "top_k": [0, -1, 201, 200, 1],
        "top_p": [0.0, nan, 1.5, 1.0, 0.1],
        "min_p": [-0.1, nan, 1.5, 1.0, 0.0],
    }
    for name, values in bad.items():
        token_ids = kernels.sample(logits, seed=1, **{name: torch.tensor(values, device=device)})
        assert token_ids[:3].tolist() == [-1, -1, -1] and (token_ids[3:] >= 0).all(), name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1.0, INFINITY, float("nan"), "hot", None]),
        ("top_k", [0, -1, 11, 2.5, True]),
        ("top_p", [0.0, -0.1, 1.1, float("nan")]),
        ("min_p", [-0.1, 1.1, float("nan")]),
        ("seed", [-1, 2**63, 1.5, None]),
        ("step", [-1, 2**63]),
    ],
)
def test_bad_numbers_are_named(device, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: got .* needs"):
            kernels.sample(torch.zeros(2, 10, device=device), **{"seed": 0, name: value})


def test_bad_tensors_are_named(device):
    logits = torch.zeros(2, 10, device=device)
    for bad in (torch.zeros(10), torch.zeros(2, 10, dtype=torch.float64), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"^logits: got"):
            kernels.sample(bad.to(device), seed=0)
    for name, bad in (("top_p", torch.ones(3)), ("seed", torch.ones(2)), ("temperature", torch.ones(2, 1))):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            kernels.sample(logits, **{"seed": 0, name: bad.to(device)})
    assert kernels.sample(torch.zeros(0, 10, device=device), seed=0).shape == (0,)


def test_a_weight_is_the_references_to_the_last_bit(device):
    """Of two tokens, the one that weighs exactly min_p is kept, and dropped by the next larger min_p."""
    z = -6.0 * torch.rand(20_000)
    temperature = 0.5 + torch.rand(20_000)
    weights = reference.integer_weights(z[:, None], temperature)[:, 0]
    min_p = (weights.double() * 2.0**-reference.WEIGHT_BITS).float()
    assert torch.equal(min_p.double() * 2.0**reference.WEIGHT_BITS, weights.double())
    logits = torch.stack((torch.zeros(20_000), z), -1).to(device)
    for limit, is_kept in ((min_p, True), (min_p.nextafter(torch.tensor(2.0)), False)):
        options = {"temperature": temperature.to(device), "min_p": limit.clamp(max=1.0).to(device)}
        sampled = kernels.sample(logits, seed=torch.arange(20_000, device=device), return_logprobs=True, **options)
        alone = (sampled.token_ids == 0) & (sampled.processed_logprobs == 0.0)
        assert ((alone == (not is_kept)) | (limit > 1.0).to(device)).all()


def test_the_reference_rounds_a_multiply_add_once():
    a, b = torch.randn(2000), torch.randn(2000)
    a[:500], b[:500] = 1.0 + 2.0**-23 * torch.arange(500), 2.0 ** (-24.0 - torch.arange(500) % 3)  # near halves
    for c in (1.0, 0.693147, -(2.0**-30)):
        got = reference._multiply_add(a, b, c)
        near = torch.stack((got.nextafter(torch.tensor(-9.0)), got, got.nextafter(torch.tensor(9.0)))).tolist()
        c = torch.tensor(c, dtype=torch.float32).item()
        for x, y, lower, rounded, upper in zip(a.tolist(), b.tolist(), *near, strict=True):
            exact = Fraction(x) * Fraction(y) + Fraction(c)
            away = [abs(exact - Fraction(number)) for number in (lower, rounded, upper)]
            assert away[1] <= min(away)
            if away.count(away[1]) > 1:  # halfway: to even
                assert struct.unpack("i", struct.pack("f", rounded))[0] % 2 == 0


# The distribution.


def exact_distribution(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """What should be drawn, in fp64: a sort, and each filter on the renormalised rest."""
    values, order = torch.sort(logits.double() / temperature, descending=True, stable=True)
    p = torch.softmax(values, -1)
    if top_k is not None:
        p[top_k:] = 0
        p /= p.sum()
    if top_p is not None:
        p[p.cumsum(-1) - p >= top_p - 1e-9] = 0  # fp64 sums of equal tokens reach p with an error of their own
        p /= p.sum()
    if min_p is not None:
        p[p < min_p * p[0]] = 0
        p /= p.sum()
    return torch.zeros_like(p).scatter(0, order, p)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The probability of counts at least so far from what p says; tokens expected less than 10 times are one class."""
    expected = p * counts.sum()
    rare = expected < 10
    observed = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def histogram(logits: torch.Tensor, seed: int, **options) -> torch.Tensor:
    """How often each token of one row comes in DRAWS draws, steps 0 to DRAWS - 1."""
    counts = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = 2**16
    for first in range(0, DRAWS, rows):
        steps = torch.arange(first, first + rows, device=logits.device)
        counts += kernels.sample(logits.expand(rows, -1), seed=seed, step=steps, **options).bincount(
            minlength=len(counts)
        )
    return counts.cpu()


def shaped(kind: str, vocab_size: int) -> torch.Tensor:
    if kind == "flat":
        return torch.zeros(vocab_size)
    if kind == "peaked":
        return -torch.arange(vocab_size) * (8.0 / min(vocab_size, 64))
    if kind == "bimodal":
        return torch.randn(vocab_size) + 5.0 * (torch.arange(vocab_size) % 3 == 1)
    x = torch.randn(vocab_size)
    x[vocab_size // 2] = 20.0  # more than p on its own
    return x


@pytest.mark.parametrize(
    ("kind", "vocab_size", "options"),
    [
        ("flat", 5, {}),
        ("peaked", 5, {"temperature": 0.7}),
        ("bimodal", 5, {"top_p": 0.9}),
        ("one", 5, {"top_p": 0.9}),
        ("one", 257, {"top_p": 0.9}),
        ("flat", 257, {"top_k": 40}),
        ("bimodal", 257, {"top_p": 0.6}),
        ("peaked", 257, {"temperature": 2.0, "top_k": 100, "top_p": 0.95, "min_p": 0.03}),
        ("flat", 32_000, {"top_k": 50}),
        ("peaked", 32_000, {"top_k": 200, "top_p": 0.9}),
        ("one", 32_000, {"top_k": 50, "top_p": 0.9}),
        ("bimodal", 32_000, {"top_k": 50}),
        ("bimodal", 151_936, {"top_k": 50, "min_p": 0.2}),
    ],
)
def test_distribution_is_exact(device, kind, vocab_size, options):
    logits = shaped(kind, vocab_size)
    p = exact_distribution(logits, **options)
    counts = histogram(logits.to(device), seed=2024, **options)
    assert counts.sum() == DRAWS
    assert counts[p == 0].sum() == 0
    assert chi_square(counts, p) > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flat", "peaked", "bimodal", "one"])
@pytest.mark.parametrize("vocab_size", [32_000, 151_936])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"min_p": 0.05}])
def test_distribution_over_large_vocabularies(kind, vocab_size, options):
    if kind == "flat" and options.get("top_p"):
        options = {"top_k": 1000, **options}  # a hundred thousand ties are searched in the row itself: right, but slow
    test_distribution_is_exact("cuda", kind, vocab_size, options)


def rows_of_every_shape(vocab_size: int) -> torch.Tensor:
    """So that on a GPU the bracket of top-p's cut is sometimes right and sometimes not."""
    ramp = torch.arange(vocab_size)
    rows = (
        torch.randn(vocab_size),
        3 * torch.randn(vocab_size),
        torch.randn(vocab_size) / torch.randn(vocab_size).abs(),
        torch.rand(vocab_size) * 0.1,
        torch.zeros(vocab_size),
        (ramp % 7).float(),
        -1.3 * (1.0 + ramp[torch.randperm(vocab_size)]).log(),
        -(ramp / 10.0),
        torch.where(ramp % 9000 == 17, 12.0, torch.randn(vocab_size)),
        torch.where(ramp % 3 == 0, torch.randn(vocab_size), -INFINITY),
    )
    return torch.stack(rows)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99, 0.999])
def test_top_p_over_long_rows(device, top_p):
    logits = rows_of_every_shape(40_000).to(device)
    check(logits, seed=5, top_p=top_p)
    check(logits, seed=6, top_p=top_p, min_p=0.01, temperature=1.7)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_p": 0.5, "min_p": 0.01}, {"min_p": 0.05}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_draw_what_few_do(device, options, dtype):
    """On a GPU a long row is one program's, where there are many rows, and several programs' where there are few."""
    few = rows_of_every_shape(40_001).to(device, dtype)
    few[1, 3], few[2, 40_000], few[3] = INFINITY, float("nan"), -INFINITY
    temperature = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.7, 1.3, 1.0, 1.0], device=device)
    expected = kernels.sample(few, seed=5, temperature=temperature, return_logprobs=True, **options)
    assert expected.token_ids.tolist() == by_reference(few, seed=5, temperature=temperature, **options)[0].tolist()
    many = kernels.sample(
        few.repeat(20, 1), seed=5, temperature=temperature.repeat(20), return_logprobs=True, **options
    )
    assert torch.equal(many.token_ids, expected.token_ids.repeat(20))
    for got, wanted in zip(many[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted.repeat(20), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_wrong_distribution_is_noticed(device):
    logits = shaped("bimodal", 257)
    counts = histogram(logits.to(device), seed=7, temperature=1.03)
    assert chi_square(counts, exact_distribution(logits)) < 1e-6


# The randomness.


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            product0 >> 32 ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_philox_known_answers():
    """The three vectors of Random123 (kat_vectors, philox4x32-10); its counters are longer than a step."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, words in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert philox4x32_10(counter, key) == words
    for seed, step in ((0, 0), (1, 2), (2**63 - 1, 2**62 + 17), (0x123456789ABCDEF, 0xFEDCBA987654321)):
        words = tuple(word.item() for word in reference.philox(torch.tensor([seed]), torch.tensor([step])))
        assert words == philox4x32_10((step & ones, step >> 32, 0, 0), (seed & ones, seed >> 32))


def test_random_number_in_a_range():
    """floor(total * u / 2^64), by Python's integers."""
    totals = [1, 2, 3, 2**31 - 1, 2**32, 2**40, 2**60 + 12345, 2**61 - 1]
    seed, step = torch.arange(len(totals)) + 5, torch.arange(len(totals)) * 7919
    u_high, u_low, _, _ = reference.philox(seed, step)
    got = reference.random_below(torch.tensor(totals), seed, step)
    for index, total in enumerate(totals):
        assert got[index].item() == total * (u_high[index].item() << 32 | u_low[index].item()) >> 64


@pytest.mark.parametrize("vocab_size", [500, 9000])
def test_a_row_depends_on_nothing_but_itself(device, vocab_size):
    logits = make_logits("normal", 64, vocab_size, device)
    seeds, steps = torch.arange(64, device=device) % 5, torch.arange(64, device=device) // 5
    for options in ({}, {"top_k": 50}, {"top_p": 0.8, "temperature": 1.3}):
        token_ids = kernels.sample(logits, seed=seeds, step=steps, **options)
        order = torch.randperm(64, device=device)
        shuffled = kernels.sample(logits[order], seed=seeds[order], step=steps[order], **options)
        assert torch.equal(shuffled, token_ids[order])
        for row in (0, 31, 63):
            alone = kernels.sample(logits[row : row + 1], seed=int(seeds[row]), step=int(steps[row]), **options)
            assert alone.item() == token_ids[row].item()


def test_seeds_and_steps_differ(device):
    logits = torch.zeros(1000, 1000, device=device)
    steps = torch.arange(1000, device=device)
    draws = [
        kernels.sample(logits, seed=0, step=steps),
        kernels.sample(logits, seed=1, step=steps),
        kernels.sample(logits, seed=2**32, step=steps),
        kernels.sample(logits, seed=0, step=steps + 2**32),
        kernels.sample(logits, seed=steps, step=0),
    ]
    for i, a in enumerate(draws):
        assert len(a.unique()) > 550  # 632 are expected
        for b in draws[:i]:
            assert (a == b).sum() < 20  # 1 is expected


@pytest.mark.gpu
def test_both_devices_draw_the_same():
    for vocab_size in (300, 32_000):
        for number, options in enumerate(OPTIONS):
            logits = make_logits("normal", 16, vocab_size, "cpu", DTYPES[number % 3])
            steps = torch.arange(16)
            if "top_k" in options:
                options = {**options, "top_k": min(options["top_k"], vocab_size)}
            on_cpu = kernels.sample(logits, seed=number, step=steps, **options)
            on_gpu = kernels.sample(logits.cuda(), seed=number, step=steps.cuda(), **options)
            assert torch.equal(on_cpu, on_gpu.cpu()), options


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.7, "min_p": 0.01}])
@pytest.mark.parametrize("vocab_size", [500, 32_000])
def test_graph_replay_equals_eager(options, vocab_size):
    logits, seed, step = torch.zeros(4, vocab_size).cuda(), torch.zeros(4).long().cuda(), torch.zeros(()).long().cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernels.sample(logits, seed=seed, step=step, return_logprobs=True, **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = kernels.sample(logits, seed=seed, step=step, return_logprobs=True, **options)
    for number in range(3):
        logits.copy_(torch.randn_like(logits))
        seed.copy_(torch.arange(4) + number)
        step.fill_(number)
        graph.replay()
        expected = kernels.sample(logits, seed=seed, step=number, return_logprobs=True, **options)
        for got, wanted in zip(sampled, expected, strict=True):
            assert torch.equal(got, wanted)


# As torch sees it.


SPECIAL = st.sampled_from([0.0, -0.0, INFINITY, -INFINITY, float("nan"), 1e-40, 3e38, -3e38])
ORDINARY = st.floats(-20, 20, width=32)
NUMBERS = st.one_of(ORDINARY, ORDINARY, st.integers(-3, 3).map(float), SPECIAL)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_row_and_parameters(data):
    row = data.draw(st.lists(NUMBERS, min_size=1, max_size=120))
    options = {
        "temperature": data.draw(st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1e-6, 1.0]))),
        "top_k": data.draw(st.one_of(st.none(), st.integers(1, len(row)))),
        "top_p": data.draw(st.one_of(st.none(), st.floats(0, 1, exclude_min=True, width=32))),
        "min_p": data.draw(st.one_of(st.none(), st.floats(0, 1))),
        "seed": data.draw(st.integers(0, 2**63 - 1)),
        "step": data.draw(st.integers(0, 2**63 - 1)),
    }
    logits = torch.tensor([row], dtype=torch.float32).to(data.draw(st.sampled_from(DTYPES)))
    sampled = check(logits, **options)
    if sampled.token_ids.item() >= 0:
        assert logits[0, sampled.token_ids].isfinite() and sampled.raw_logprobs.isfinite()


@pytest.mark.parametrize("vocab_size", [37, 9001])
def test_any_rows_with_a_parameter_each(device, vocab_size):
    """Rows that repeat a few numbers, so that there are ties at every cut."""
    rows = st.lists(NUMBERS, min_size=1, max_size=37)
    parameters = {
        "temperature": (st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1e-6, 1.0])), torch.float32),
        "top_k": (st.integers(1, vocab_size), torch.int64),
        "top_p": (st.floats(0, 1, exclude_min=True, width=32), torch.float32),
        "min_p": (st.floats(0, 1), torch.float32),
        "seed": (st.integers(0, 2**63 - 1), torch.int64),
        "step": (st.integers(0, 2**63 - 1), torch.int64),
    }

    @hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
    @hypothesis.given(data=st.data())
    def run(data):
        drawn = [data.draw(rows) for _ in range(3)]
        logits = torch.stack([torch.tensor(row).repeat(vocab_size)[:vocab_size] for row in drawn])
        options = {
            name: torch.tensor([data.draw(values) for _ in range(3)], dtype=dtype, device=device)
            for name, (values, dtype) in parameters.items()
        }
        check(logits.to(device, data.draw(st.sampled_from(DTYPES))), **options)

    run()


def test_rows_at_any_distance(device):
    logits = torch.randn(3, 5, 700, device=device)
    assert torch.equal(kernels.sample(logits[:, -1], seed=3), kernels.sample(logits[:, -1].contiguous(), seed=3))
    transposed = logits[0].t().contiguous().t()
    assert torch.equal(kernels.sample(transposed, seed=3), kernels.sample(logits[0], seed=3))


def test_logprobs_are_log_softmax_at_the_token(device):
    logits = make_logits("normal", 8, 3000, device)
    token_ids, raw, processed = kernels.sample(logits, temperature=0.8, top_k=30, seed=4, return_logprobs=True)
    expected = torch.log_softmax(logits.double(), -1).gather(-1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(raw.double(), expected, rtol=0, atol=2e-6)
    for row in range(8):
        p = exact_distribution(logits[row], temperature=0.8, top_k=30)
        assert abs(p[token_ids[row]].log().item() - processed[row].item()) < 2e-6


def test_registered_as_torch_asks(device):
    kernels.load(device)
    logits = torch.randn(3, 50, device=device)
    row_of = {"device": device}
    none = (None,) * 6
    tensors = (torch.ones(3, **row_of), torch.full((3,), 5, **row_of), None, None, torch.arange(3, **row_of), None)
    for arguments in (
        (logits, 1.0, 5, 1.0, 0.0, 3, 4, *none, True),
        (logits.t().contiguous().t(), 0.5, 0, 0.9, 0.1, 3, 4, *none, False),
        (logits, 1.0, 0, 1.0, 0.0, 0, 4, *tensors, True),
    ):
        if arguments[0].stride(-1) == 1:
            torch.library.opcheck(torch.ops.kernels.sample.default, arguments)


def test_compiles_whole(device):
    @torch.compile(fullgraph=True)
    def compiled(x, seed, step):
        return kernels.sample(x * 2.0, seed=seed, step=step, top_k=7, return_logprobs=True)

    logits, seed = torch.randn(4, 200, device=device), torch.arange(4, device=device)
    for step in range(12):  # more steps than recompilations are allowed
        expected = kernels.sample(logits * 2.0, seed=seed, step=step, top_k=7, return_logprobs=True)
        for got, wanted in zip(compiled(logits, seed, step), expected, strict=True):
            torch.testing.assert_close(got, wanted)
