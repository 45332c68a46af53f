"""Run the Triton attention kernels on the CPU, in Triton's interpreter, against plain torch in fp64.

A program of its own, because the interpreter is chosen when a kernel is defined: test_triton_attention.py starts it
with TRITON_INTERPRET=1. It prints how many calls agreed.
"""

import itertools
import warnings

import torch

from kernels.flash_attention import reference, triton_backward, triton_decode, triton_forward
from kernels.flash_attention.tiles import Tile

SMALL = Tile(16, 16, 4, 1)
# batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim
SHAPES = ((1, 2, 1, 37, 50, 16), (1, 1, 1, 50, 21, 24), (2, 1, 1, 1, 3, 5))
# window_size (0: none), softcap, softmax_scale
OPTIONS = ((0, 0.0, 0.3), (7, 0.0, 0.3), (0, 2.0, 0.3), (20, 2.0, -0.3))
DTYPES = (torch.float32, torch.float16)


def check(got, plain, exact):
    """The error is at most twice that of plain torch in the same dtype, and two roundings.

    One is the result's own; the other is lse's, from which the backward recomputes P, and plain torch does not.
    """
    assert torch.equal(got.isinf(), exact.isinf())
    finite = ~exact.isinf()
    if not finite.any():
        return
    rounding = torch.finfo(got.dtype).eps * exact[finite].abs().max()
    got, plain, exact = (x[finite].double() for x in (got, plain, exact))
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2 * rounding


def keywords(window_size, softcap, softmax_scale):
    return {"window_size": window_size or None, "softcap": softcap, "softmax_scale": softmax_scale}


def check_dense(shape, dtype, causal, options):
    batch_size, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim = shape
    window_size, softcap, scale = options
    q, dout = torch.randn(2, batch_size, seqlen_q, num_heads, head_dim).to(dtype).transpose(2, 3)
    k, v = torch.randn(2, batch_size, num_kv_heads, seqlen_k, head_dim).to(dtype)
    dlse = torch.randn(batch_size, num_heads, seqlen_q)
    out, lse = torch.full_like(q, torch.nan), torch.full_like(dlse, torch.nan)
    sequences, arguments = (None, None, seqlen_q, seqlen_k), (scale, causal, window_size, softcap)
    triton_forward.launch(q, k, v, out, lse, sequences, arguments, SMALL)
    given = (dout, dlse, q, k, v)
    exact = [x.double() for x in given]
    expected = {"causal": causal, **keywords(*options)}
    exact_forward = reference.classic_attention(*exact[2:], return_lse=True, **expected)
    plain_forward = reference.classic_attention(q, k, v, return_lse=True, **expected)
    for got, plain, right in zip((out, lse), plain_forward, exact_forward, strict=True):
        check(got, plain, right)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    delta = torch.full_like(lse, torch.nan)
    triton_backward.launch_dq(dout, dlse, q, k, v, out, lse, gradients[0], delta, sequences, arguments, SMALL)
    triton_backward.launch_dkdv(dout, q, k, v, lse, delta, *gradients[1:], sequences, arguments, SMALL)
    exact_gradients = reference.classic_backward(*exact, **expected)
    plain_gradients = reference.classic_backward(*given, **expected)
    for got, plain, right in zip(gradients, plain_gradients, exact_gradients, strict=True):
        check(got, plain, right)


def check_packed(dtype, causal, options):
    window_size, softcap, scale = options
    starts_q = torch.tensor([0, 19, 19, 22], dtype=torch.int32)
    starts_k = torch.tensor([0, 30, 37, 37], dtype=torch.int32)
    q, dout = torch.randn(2, 22, 2, 16).to(dtype)
    k, v = torch.randn(2, 37, 1, 16).to(dtype)
    dlse = torch.randn(2, 22)
    sequences = (starts_q, starts_k, 19, 40)
    out, lse = triton_forward.varlen_forward(q, k, v, *sequences, scale, causal, window_size, softcap)
    expected = {"causal": causal, **keywords(*options)}
    given = (dout, dlse, q, k, v)
    exact = [x.double() for x in given]
    starts = (starts_q, starts_k)
    exact_forward = reference.classic_attention_varlen(*exact[2:], *starts, return_lse=True, **expected)
    plain_forward = reference.classic_attention_varlen(q, k, v, *starts, return_lse=True, **expected)
    for got, plain, right in zip((out, lse), plain_forward, exact_forward, strict=True):
        check(got, plain, right)
    ours = (dout, dlse, q, k, v, out, lse, *sequences, scale, causal, window_size, softcap)
    gradients = triton_backward.varlen_backward(*ours)
    exact_gradients = reference.classic_varlen_backward(*exact, *starts, **expected)
    plain_gradients = reference.classic_varlen_backward(*given, *starts, **expected)
    for got, plain, right in zip(gradients, plain_gradients, exact_gradients, strict=True):
        check(got, plain, right)


def check_decode(dtype, num_splits, options):
    window_size, softcap, scale = options
    lengths = torch.tensor([0, 1, 50], dtype=torch.int32)
    for seqlen_q, head_dim in ((1, 16), (3, 24)):
        q = torch.randn(3, 4, seqlen_q, head_dim).to(dtype)
        k, v = torch.randn(2, 3, 60, 2, head_dim).to(dtype).transpose(2, 3)
        k[2, :, 50:] = torch.nan
        out = torch.full_like(q, torch.nan)
        triton_decode.launch(q, k, v, lengths, out, scale, window_size, softcap, num_splits, SMALL)
        exact = reference.classic_decode(q.double(), k.double(), v.double(), lengths, **keywords(*options))
        check(out, reference.classic_decode(q, k, v, lengths, **keywords(*options)), exact)


def main() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        calls = 0
        for causal, options in itertools.product((False, True), OPTIONS):
            for shape in SHAPES:
                check_dense(shape, dtype, causal, options)
                calls += 1
            check_packed(dtype, causal, options)
            calls += 1
        for num_splits, options in itertools.product((1, 3), OPTIONS):
            check_decode(dtype, num_splits, options)
            calls += 1
        print(f"{dtype}: {calls} calls, all agree with plain torch in fp64", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # -inf is meant
    main()
