"""Launch every attention, sampling and decoding kernel of a GPU at small, odd sizes, for compute-sanitizer to watch.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1   # so that the end of a tensor is the end of an allocation
    compute-sanitizer --tool memcheck python -m tests.kernels.test_every_kernel
    compute-sanitizer --tool racecheck python -m tests.kernels.test_every_kernel

racecheck names what `gl.warp_specialize` itself does: the byte by which it tells its warps what to run, which the first
warpgroup writes and the others read, a barrier between.
"""

import torch

import kernels
from tests.kernels.test_decode_step import EPS, arguments

HOPPER = [(1, 2, 1, 517, head_dim) for head_dim in (128, 64)]  # batch, num_heads, num_kv_heads, seqlen, head_dim
GOING_ROUND = (1, 1, 1, 4100, 64)  # the backward pass of a long sequence without a causal mask
PORTABLE = [
    ((2, 2, 1, 65, 40), torch.float16, {"causal": True, "window_size": 17}),
    ((1, 2, 2, 130, 96), torch.bfloat16, {"softcap": 5.0}),
    ((1, 1, 1, 70, 64), torch.float32, {"causal": True}),
]


def test_every_kernel_can_be_launched(device: str) -> None:
    for shape in HOPPER:
        attend(device, shape, torch.bfloat16, causal=True)
        attend(device, shape, torch.bfloat16)
    attend(device, GOING_ROUND, torch.bfloat16)
    for shape, dtype, options in PORTABLE:
        attend(device, shape, dtype, **options)

    q, k, v = (torch.randn(60, 2, 32, device=device, requires_grad=True) for _ in range(3))
    cu_seqlens = torch.tensor([0, 7, 7, 40, 60], device=device, dtype=torch.int32)
    lengths = {"max_seqlen_q": 33, "max_seqlen_k": 33}
    kernels.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, **lengths, causal=True).sum().backward()

    for num_heads, num_kv_heads, capacity, head_dim in ((4, 2, 1000, 128), (3, 3, 100, 64)):
        q = torch.randn(2, num_heads, 1, head_dim, device=device, dtype=torch.bfloat16)
        cache = torch.randn(2, 2, num_kv_heads, capacity, head_dim, device=device, dtype=torch.bfloat16)
        kernels.decode_attention(q, *cache, torch.tensor([capacity - 3, 17], device=device, dtype=torch.int32))

    for batch_size, vocab_size in ((7, 32), (3, 1000), (2, 50304)):
        logits = torch.randn(batch_size, vocab_size, device=device)
        kernels.top_k(logits, 20)
        for options in ({}, {"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.05}):
            kernels.sample(logits, temperature=0.8, seed=1, **options)
    for head_dim, dtype in ((64, torch.bfloat16), (32, torch.bfloat16), (32, torch.float32)):
        for batch_size in (1, 3, 100):
            take_a_step(device, batch_size, head_dim, dtype)
    if device == "cuda":
        torch.cuda.synchronize()  # a fault is reported here, not in another test


def attend(device: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, **options) -> None:
    batch_size, num_heads, num_kv_heads, seqlen, head_dim = shape
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(batch_size, n, seqlen, head_dim, device=device, dtype=dtype) for n in heads)
    out = kernels.flash_attention(*(x.requires_grad_() for x in (q, k, v)), **options)
    out.backward(torch.randn_like(out))


def take_a_step(device: str, batch_size: int, head_dim: int, dtype: torch.dtype) -> None:
    """Of a decoder: with heads of 64 in bf16, Hopper's own kernels."""
    given = arguments((2, 128, 2, 1, head_dim, 192, 300, 150), batch_size, dtype, device)
    kernels.decode_step(*given, norm_eps=EPS)


if __name__ == "__main__":
    test_every_kernel_can_be_launched("cuda")
    print("every kernel was launched")
