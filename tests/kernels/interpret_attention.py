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


def check(got, expected, dtype):
    assert torch.equal(got.isinf(), expected.isinf())
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(got.double(), expected.double(), **close)


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
    exact = [x.double() for x in (dout, dlse, q, k, v)]
    expected = {"causal": causal, **keywords(*options)}
    exact_out, exact_lse = reference.classic_attention(*exact[2:], return_lse=True, **expected)
    check(out, exact_out, dtype)
    check(lse, exact_lse, dtype)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    delta = torch.full_like(lse, torch.nan)
    triton_backward.launch_dq(dout, dlse, q, k, v, out, lse, gradients[0], delta, sequences, arguments, SMALL)
    triton_backward.launch_dkdv(dout, q, k, v, lse, delta, *gradients[1:], sequences, arguments, SMALL)
    for got, wanted in zip(gradients, reference.classic_backward(*exact, **expected), strict=True):
        check(got, wanted, dtype)


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
    exact = [x.double() for x in (dout, dlse, q, k, v)]
    exact_out, exact_lse = reference.classic_attention_varlen(
        *exact[2:], starts_q, starts_k, return_lse=True, **expected
    )
    check(out, exact_out, dtype)
    check(lse, exact_lse, dtype)
    ours = (dout, dlse, q, k, v, out, lse, *sequences, scale, causal, window_size, softcap)
    wanted = reference.classic_varlen_backward(*exact, starts_q, starts_k, **expected)
    for got, right in zip(triton_backward.varlen_backward(*ours), wanted, strict=True):
        check(got, right, dtype)


def check_decode(dtype, num_splits, options):
    window_size, softcap, scale = options
    lengths = torch.tensor([0, 1, 50], dtype=torch.int32)
    for seqlen_q, head_dim in ((1, 16), (3, 24)):
        q = torch.randn(3, 4, seqlen_q, head_dim).to(dtype)
        k, v = torch.randn(2, 3, 60, 2, head_dim).to(dtype).transpose(2, 3)
        k[2, :, 50:] = torch.nan
        out = torch.full_like(q, torch.nan)
        triton_decode.launch(q, k, v, lengths, out, scale, window_size, softcap, num_splits, SMALL)
        exact = (q.double(), k.double(), v.double(), lengths)
        check(out, reference.classic_decode(*exact, **keywords(*options)), dtype)


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
