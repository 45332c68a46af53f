"""Attention on every device: right to the last row, for any length, width, stride and option.

What is right is `classic_attention` in fp64 and its automatic derivatives. How right: at most twice the error of plain
torch in the same dtype, and one rounding. What the kernels allocate is filled with NaN before they write it.
"""

import contextlib
import itertools
import math

import pytest
import torch

import kernels
from kernels.flash_attention.reference import classic_attention_varlen, classic_decode

LENGTHS = (1, 2, 7, 15, 16, 17, 63, 65, 127, 129, 1000, 1025)
HEAD_DIMS = (1, 3, 8, 16, 24, 32, 40, 64, 80, 96, 128, 160, 192, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty holds NaN inside, so that an element that no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def randn(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, device=device).to(dtype)


def check_error(ours, plain, exact, what="", num_terms=1.0):
    """num_terms: how many rows were summed into one of x's."""
    assert not exact.isnan().any()
    ours_error, plain_error = ((x.double() - exact).norm().item() for x in (ours, plain))
    allowed = 2 * plain_error + torch.finfo(ours.dtype).eps * exact.norm().item()
    # Terms of size 1 that cancel to nothing (the gradient through a softmax over one key) leave their fp32 rounding.
    allowed += 5e-7 * math.sqrt(exact.numel() * max(num_terms, 1.0))
    assert ours_error <= allowed, (
        f"{what}: error {ours_error:.2e}, allowed {allowed:.2e}, plain torch {plain_error:.2e}"
    )


def differentiate(attention, inputs, dout, dlse, **options):
    """(out, lse, gradients of the inputs) for the loss sum(out dout) + sum(lse dlse), over the rows that see a key."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = attention(*inputs, return_lse=True, **options)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse.isinf(), 0.0, lse) * dlse.to(lse.dtype)).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, inputs)


def check_attention(q, k, v, *, dout=None, dlse=None, fused=None, classic=kernels.classic_attention, **options):
    """Forward and backward of the fused op against fp64; returns (out, lse, gradients)."""
    fused = fused or kernels.flash_attention
    dout = torch.randn_like(q) if dout is None else dout
    with poisoned_memory():
        ours = differentiate(fused, (q, k, v), dout, dlse, **options)
    plain = differentiate(classic, (q, k, v), dout, dlse, **options)
    exact = differentiate(classic, (q.double(), k.double(), v.double()), dout, dlse, **options)
    check_error(ours[0], plain[0], exact[0], "out")
    blind = exact[1].isinf()
    assert torch.equal(ours[1].isinf(), blind)
    seen_lse = (torch.where(blind, 0.0, lse) for lse in (ours[1], plain[1], exact[1]))
    check_error(*seen_lse, "lse")
    for name, *gradients in zip(("dq", "dk", "dv"), ours[2], plain[2], exact[2], strict=True):
        check_error(*gradients, name, num_terms=1.0 if name == "dq" else q.numel() / max(k.numel(), 1))
    return ours


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", LENGTHS)
def test_every_pair_of_lengths(device, seqlen_q, causal):
    for seqlen_k in LENGTHS[(LENGTHS.index(seqlen_q) + causal) % 2 :: 2]:
        q = randn(1, 2, seqlen_q, 16, device=device)
        k, v = randn(2, 1, 1, seqlen_k, 16, device=device)
        check_attention(q, k, v, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_and_dtype(device, head_dim, dtype, causal):
    q = randn(1, 2, 113, head_dim, device=device, dtype=dtype)
    k, v = randn(2, 1, 1, 131, head_dim, device=device, dtype=dtype)
    check_attention(q, k, v, causal=causal, dlse=randn(1, 2, 113, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size, softcap", [(None, 3.0), (1, 0.0), (5, 0.0), (70, 2.0), (1000, 0.0)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(257, 257), (64, 150), (150, 64)])
def test_window_and_softcap(device, seqlen_q, seqlen_k, window_size, softcap, causal, dtype):
    q = randn(1, 2, seqlen_q, 32, device=device, dtype=dtype)
    k, v = randn(2, 1, 1, seqlen_k, 32, device=device, dtype=dtype)
    dlse = randn(1, 2, seqlen_q, device=device)
    check_attention(q, k, v, dlse=dlse, causal=causal, window_size=window_size, softcap=softcap, softmax_scale=0.5)


@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 1e-3, 3.0])
def test_any_scale(device, softmax_scale):
    q, k, v = randn(3, 1, 2, 70, 16, device=device)
    check_attention(q, k, v, causal=True, softmax_scale=softmax_scale)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (4, 2), (4, 1), (8, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_query_heads(device, num_heads, num_kv_heads, causal):
    q = randn(2, num_heads, 130, 64, device=device, dtype=torch.float16)
    k, v = randn(2, 2, num_kv_heads, 130, 64, device=device, dtype=torch.float16)
    check_attention(q, k, v, causal=causal)


@pytest.mark.parametrize("window_size", [None, 3])
def test_rows_that_see_no_key(device, window_size):
    q = randn(1, 2, 100, 32, device=device)
    k, v = randn(2, 1, 2, 40, 32, device=device)
    dlse = randn(1, 2, 100, device=device)
    out, lse, (dq, _, _) = check_attention(q, k, v, causal=True, window_size=window_size, dlse=dlse)
    assert (out[:, :, :60] == 0).all() and (dq[:, :, :60] == 0).all()
    assert (lse[:, :, :60] == -math.inf).all() and lse[:, :, 60:].isfinite().all()


def test_large_scores_do_not_overflow(device):
    q, k, v = randn(3, 1, 1, 70, 16, device=device)
    q, k = 10 * q, 10 * k
    out, lse = kernels.flash_attention(q, k, v, causal=True, return_lse=True)
    exact = kernels.classic_attention(q.double(), k.double(), v.double(), causal=True)
    check_error(out, kernels.classic_attention(q, k, v, causal=True), exact)
    assert lse.isfinite().all() and lse.max() > 200  # exp(89) is infinite in fp32


def layouts(batch, heads, seqlen, head_dim, device, dtype):
    """(name, q, k, v) in every memory layout that callers have been seen with."""
    shape = (batch, heads, seqlen, head_dim)
    base = randn(batch, seqlen, 3, heads, head_dim, device=device, dtype=dtype)
    yield "interleaved qkv", *(base[:, :, i].transpose(1, 2) for i in range(3))
    yield (
        "heads after positions",
        *(randn(batch, seqlen, heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)),
    )
    yield "sliced", *(randn(batch, heads, 2 * seqlen, head_dim + 3, device=device, dtype=dtype)[
        :, :, seqlen:, 1 : head_dim + 1] for _ in range(3))  # fmt: skip
    yield (
        "head_dim not last in memory",
        *(randn(batch, heads, head_dim, seqlen, device=device, dtype=dtype).transpose(2, 3) for _ in range(3)),
    )
    yield (
        "every second element",
        *(randn(batch, heads, seqlen, 2 * head_dim, device=device, dtype=dtype)[..., ::2] for _ in range(3)),
    )
    yield (
        "expanded keys",
        randn(*shape, device=device, dtype=dtype),
        *(randn(1, 1, seqlen, head_dim, device=device, dtype=dtype).expand(shape) for _ in range(2)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(device, dtype):
    for name, q, k, v in layouts(2, 3, 65, 24, device, dtype):
        wide = randn(2, 3, 65, 48, device=device, dtype=dtype)
        dout = torch.ones(1, device=device, dtype=dtype).expand(2, 3, 65, 24) if "heads" in name else wide[..., 24:]
        out, _, _ = check_attention(q, k, v, causal=True, dout=dout)
        assert out.stride() == torch.empty_like(q).stride(), name


def test_out_is_laid_out_as_q(device):
    q = randn(2, 5, 3, 8, device=device).transpose(1, 2)
    assert kernels.flash_attention(q, q, q).transpose(1, 2).is_contiguous()


def test_nothing_to_do(device):
    for batch, seqlen_q, seqlen_k in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        q = randn(batch, 2, seqlen_q, 8, device=device).requires_grad_()
        k, v = (randn(batch, 2, seqlen_k, 8, device=device).requires_grad_() for _ in range(2))
        out, lse = kernels.flash_attention(q, k, v, causal=True, return_lse=True)
        out.sum().backward()
        assert (out == 0).all() and (lse == -math.inf).all()
        assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in (q, k, v))


def cumulative(lengths, device):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


DOCUMENTS = [  # lengths of queries, lengths of keys
    ((5, 0, 130, 1, 64), (5, 0, 130, 1, 64)),
    ((7, 30, 3), (90, 0, 3)),
    ((40, 0, 2), (20, 9, 65)),
    ((0,), (0,)),
    ((), ()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size, softcap", [(None, 0.0), (6, 4.0)])
@pytest.mark.parametrize("lengths_q, lengths_k", DOCUMENTS[:3])
def test_packed_documents(device, lengths_q, lengths_k, window_size, softcap, causal, dtype):
    q = randn(sum(lengths_q), 4, 40, device=device, dtype=dtype)
    k, v = randn(2, sum(lengths_k), 2, 40, device=device, dtype=dtype)
    starts = cumulative(lengths_q, device), cumulative(lengths_k, device)

    def fused(q, k, v, **options):
        longest = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k) + 3}  # more is allowed
        return kernels.flash_attention_varlen(q, k, v, *starts, **longest, **options)

    def classic(q, k, v, **options):
        return classic_attention_varlen(q, k, v, *starts, **options)

    dlse = randn(4, sum(lengths_q), device=device)
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    check_attention(q, k, v, fused=fused, classic=classic, dlse=dlse, **options)


@pytest.mark.parametrize("lengths_q, lengths_k", DOCUMENTS[3:])
def test_no_documents(device, lengths_q, lengths_k):
    q = randn(0, 4, 40, device=device).requires_grad_()
    starts = cumulative(lengths_q, device), cumulative(lengths_k, device)
    out = kernels.flash_attention_varlen(q, q, q, *starts, max_seqlen_q=0, max_seqlen_k=0)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_see_each_other(device, dtype):
    lengths = (70, 0, 33, 128)
    q, dout = randn(2, sum(lengths), 4, 32, device=device, dtype=dtype)
    k, v = randn(2, sum(lengths), 2, 32, device=device, dtype=dtype)
    starts = cumulative(lengths, device)

    def run(q, k, v, dout):
        def fused(q, k, v, **options):
            return kernels.flash_attention_varlen(
                q, k, v, starts, starts, max_seqlen_q=128, max_seqlen_k=128, **options
            )

        out, lse, gradients = differentiate(fused, (q, k, v), dout, None, causal=True)
        return out, lse.T, *gradients

    before = run(q, k, v, dout)
    q, k, v, dout = (x.clone() for x in (q, k, v, dout))
    for x in (q, k, v, dout):
        x[70:103] = randn(*x[70:103].shape, device=device, dtype=dtype)
    for old, new in zip(before, run(q, k, v, dout), strict=True):
        assert torch.equal(old[:70], new[:70]) and torch.equal(old[103:], new[103:])
        assert not torch.equal(old[70:103], new[70:103])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [3, 64, 80, 256])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(3, 3), (16, 2)])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_decode_is_the_end_of_the_full_forward(device, seqlen_q, num_heads, num_kv_heads, head_dim, dtype):
    lengths = torch.tensor([0, 1, 7, 64, 129, 300], dtype=torch.int32, device=device)
    q = randn(6, num_heads, seqlen_q, head_dim, device=device, dtype=dtype)
    k, v = randn(2, 6, num_kv_heads, 300, head_dim, device=device, dtype=dtype)
    for options in ({}, {"window_size": 17, "softcap": 3.0, "softmax_scale": 0.3}):
        with poisoned_memory():
            ours = kernels.decode_attention(q, k, v, lengths, **options)
        plain = classic_decode(q, k, v, lengths, **options)
        exact = classic_decode(q.double(), k.double(), v.double(), lengths, **options)
        check_error(ours, plain, exact)
        assert (ours[0] == 0).all() and ours.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_reads_nothing_behind_the_length_and_writes_nothing(device, dtype):
    lengths = torch.tensor([33, 1000], dtype=torch.int32, device=device)
    q = randn(2, 4, 1, 64, device=device, dtype=dtype)
    guarded = torch.full((2, 2, 3000, 2, 64), math.nan, device=device, dtype=dtype)
    guarded[:, 0, :33] = randn(2, 33, 2, 64, device=device, dtype=dtype)
    guarded[:, 1, :1000] = randn(2, 1000, 2, 64, device=device, dtype=dtype)
    before = guarded.clone()
    exact = None
    for capacity in (1000, 1001, 2048, 3000):
        k, v = guarded[:, :, :capacity].transpose(2, 3)  # (batch, num_kv_heads, capacity, head_dim), strided
        out = kernels.decode_attention(q, k, v, lengths)
        if exact is None:
            exact = classic_decode(q.double(), k.double(), v.double(), lengths)
            plain = classic_decode(q, k, v, lengths)
        check_error(out, plain, exact, f"capacity {capacity}")
    assert torch.equal(guarded.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_same_input_same_bits(device, head_dim, causal, dtype):
    q = randn(2, 4, 300, head_dim, device=device, dtype=dtype)
    k, v = randn(2, 2, 2, 300, head_dim, device=device, dtype=dtype)
    dout = torch.randn_like(q)
    first = differentiate(kernels.flash_attention, (q, k, v), dout, None, causal=causal)
    for _ in range(19):
        again = differentiate(kernels.flash_attention, (q, k, v), dout, None, causal=causal)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(torch.equal(x, y) for x, y in zip(first[2], again[2], strict=True))


def test_opcheck(device):
    kernels.load(device)
    options = (0.25, True, 0, 0.0)
    dense = randn(2, 4, 9, 16, device=device)
    permuted = randn(2, 9, 4, 16, device=device).transpose(1, 2)
    grouped = randn(2, 2, 9, 16, device=device)
    ops = torch.ops.kernels
    for q, k in ((dense, dense), (permuted, permuted), (dense, grouped)):
        q, k, v = (x.clone().requires_grad_() for x in (q, k, k))
        torch.library.opcheck(ops.flash_attention_forward.default, (q, k, v, *options))
        out, lse = ops.flash_attention_forward(q, k, v, *options)
        arguments = [x.detach() for x in (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)]
        torch.library.opcheck(ops.flash_attention_backward.default, (*arguments, *options))
    starts = cumulative((4, 5), device)
    q = randn(9, 4, 16, device=device).requires_grad_()
    packed = (starts, starts, 5, 5, *options)
    torch.library.opcheck(ops.flash_attention_varlen_forward.default, (q, q, q, *packed))
    lengths = torch.tensor([3, 9], dtype=torch.int32, device=device)
    arguments = (randn(2, 4, 1, 16, device=device), grouped, grouped, lengths, 0.25, 0, 0.0)
    torch.library.opcheck(ops.decode_attention.default, arguments)


def test_trains_under_torch_compile(device):
    def loss(q, k, v):
        out, lse = kernels.flash_attention(q * 2, k, v.transpose(1, 2), causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (17, 33, 48):
        inputs = [randn(2, 4, seqlen, 16, device=device).requires_grad_() for _ in range(2)]
        inputs.append(randn(2, seqlen, 4, 16, device=device).requires_grad_())
        expected = torch.autograd.grad(loss(*inputs), inputs)
        for got, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_gradients_agree_with_differences_in_fp64():
    inputs = [torch.randn(1, heads, seqlen, 3, dtype=torch.float64, requires_grad=True)
              for heads, seqlen in ((2, 4), (1, 5), (1, 5))]  # fmt: skip
    for options in ({}, {"causal": True}, {"causal": True, "window_size": 2, "softcap": 1.5}):
        assert torch.autograd.gradcheck(
            lambda q, k, v, options=options: kernels.flash_attention(q, k, v, return_lse=True, **options), inputs
        )


def test_second_derivative_is_refused_by_name(device):
    q = randn(1, 1, 5, 8, device=device).requires_grad_()
    loss = kernels.flash_attention(q, q, q).sum()
    with pytest.raises(RuntimeError, match="classic_attention"):
        torch.autograd.grad(loss, q, create_graph=True)


def test_classic_attention_has_second_derivatives():
    inputs = [torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(lambda q, k, v: kernels.classic_attention(q, k, v, causal=True), inputs)


BAD_CALLS = [
    ({"q": (2, 4, 16)}, {}, r"q: got 3 dimensions \(2, 4, 16\), needs \(batch, heads, seqlen, head_dim\)"),
    ({"k": (2, 3, 5, 16), "v": (2, 3, 5, 16)}, {}, "k: got 3 heads, needs a divisor of q's 4"),
    ({"k": (3, 4, 5, 16), "v": (3, 4, 5, 16)}, {}, "k: got batch 3, q has batch 2"),
    ({"v": (2, 4, 6, 16)}, {}, "v: got shape"),
    ({"k": (2, 4, 5, 8)}, {}, "k: got head_dim 8, q has 16"),
    ({"q": (2, 4, 5, 257), "k": (2, 4, 5, 257), "v": (2, 4, 5, 257)}, {}, "q: got head_dim 257, allowed are 1 to 256"),
    ({}, {"window_size": 0}, "window_size: got 0"),
    ({}, {"softcap": -1.0}, "softcap: got -1.0"),
    ({}, {"softmax_scale": math.nan}, "softmax_scale: got nan"),
]


@pytest.mark.parametrize("shapes, options, message", BAD_CALLS)
def test_bad_arguments_are_named(device, shapes, options, message):
    q, k, v = (torch.zeros(shapes.get(name, (2, 4, 5, 16)), device=device) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        kernels.flash_attention(q, k, v, **options)
    if q.shape[-1] <= 256:  # the classic way has no widest head
        with pytest.raises(ValueError, match=message):
            kernels.classic_attention(q, k, v, **options)


def test_bad_dtypes_and_sequences_are_named(device):
    x = torch.zeros(2, 4, 5, 16, device=device)
    with pytest.raises(ValueError, match=r"q: got torch\.int32, allowed are float32, float16 and bfloat16"):
        kernels.flash_attention(x.int(), x.int(), x.int())
    with pytest.raises(ValueError, match=r"q: got torch\.int32, .* needs a floating dtype"):
        kernels.classic_attention(x.int(), x.int(), x.int())
    with pytest.raises(ValueError, match=r"v: got torch\.float16, q is torch\.float32"):
        kernels.flash_attention(x, x, x.half())
    with pytest.raises(ValueError, match=r"cache_seqlens: got torch\.int64"):
        kernels.decode_attention(x, x, x, torch.ones(2, dtype=torch.int64, device=device))
    starts = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: got torch\.int64"):
        kernels.flash_attention_varlen(x[0], x[0], x[0], starts, starts.long(), max_seqlen_q=1, max_seqlen_k=1)


def test_explain_names_the_kernel_and_why_not_the_others(device):
    q = randn(1, 2, 64, 40, device=device)
    said = str(kernels.explain(q, q, q, causal=True))
    assert device in said
    if device == "cuda":
        assert "Triton" in said and "BLOCK_M" in said and "Gluon" in said


@pytest.mark.gpu
def test_graph_replay_equals_eager_with_new_inputs():
    q, dout = randn(2, 2, 4, 200, 64, device="cuda", dtype=torch.bfloat16)
    k, v = randn(2, 2, 2, 200, 64, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([200, 3], dtype=torch.int32, device="cuda")
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def step():
        out = kernels.flash_attention(q, k, v, causal=True)
        decoded = kernels.decode_attention(q[:, :, :1].detach(), k.detach(), v.detach(), lengths)
        return out.detach(), decoded, *torch.autograd.grad(out, inputs, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for x in (q, k, v, dout):
            x.copy_(torch.randn_like(x))
        lengths.copy_(torch.tensor([17, 180]))
    graph.replay()
    for got, expected in zip(replayed, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    q = randn(8300, 16, 1, 128, device="cuda", dtype=torch.bfloat16)
    *_, gradients = differentiate(kernels.flash_attention, (q, q, q), torch.randn_like(q), None)
    assert all(x.isfinite().all() for x in gradients)
    # One key: the output is its value, at the very end of a tensor of more than 2^31 elements too.
    rows = torch.zeros(2**31 // 64 + 300, 64, device="cuda", dtype=torch.float16)
    rows[-300:] = torch.randn_like(rows[-300:])
    rows[:: (len(rows) - 1) // 8] = randn(9, 64, device="cuda", dtype=torch.float16)
    end = rows[None, None, -300:]
    q, k, v = (x.expand(1, 1, *rows.shape)[:, :, :: (len(rows) - 1) // 8] for x in (rows, rows, rows))
    assert (q.stride(2) * 8) > 2**30 and torch.equal(q[0, 0, -1], rows[(len(rows) - 1) // 8 * 8])
    check_attention(q, k, v)
    check_attention(end, end, end, causal=True)
