"""The steps of the attention ladder, what was expected of each before it was measured, and why.

Predictions are for the headline sizes, forward and causal: on a GPU batch 4, 16 heads of 128, 4096 tokens, bf16 (an
H200 copies 4.3 TB/s, multiplies bf16 matrices at 0.75 PFLOP/s and fp32 numbers at 67 TFLOP/s); on a CPU batch 1, 8
heads of 64, 1024 tokens, fp32.

All steps take q, k and v (batch, num_heads, seqlen, head_dim) of one shape, contiguous; the last step alone takes
anything.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kernels
from kernels.steps import Step

HEAD_DIMS = (16, 32, 64, 128)


def steps(device: torch.device) -> Sequence[Step]:
    """The seven steps of a GPU, or the six of a CPU."""
    return _gpu_steps() if device.type == "cuda" else _cpu_steps()


def checked(function: Callable[..., Tensor], dtypes: Sequence[torch.dtype]) -> Callable[..., Tensor]:
    """The same function; raises ValueError for what the steps do not take."""

    @functools.wraps(function)
    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
        if q.dim() != 4 or q.shape[-1] not in HEAD_DIMS:
            allowed = ", ".join(map(str, HEAD_DIMS))
            raise ValueError(f"q: got {tuple(q.shape)}, needs (batch, num_heads, seqlen, head_dim of {allowed})")
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.shape != q.shape or not x.is_contiguous():
                raise ValueError(f"{name}: got {tuple(x.shape)}, strides {x.stride()}, needs q's shape, contiguous")
            if x.dtype not in dtypes or x.dtype != q.dtype:
                allowed = ", ".join(str(dtype)[6:] for dtype in dtypes)
                raise ValueError(f"{name}: got {x.dtype}, needs q's dtype, one of {allowed}")
        return function(q, k, v, causal)

    return run


def _gpu_steps() -> Sequence[Step]:
    """Triton is imported here, where the steps of a GPU are asked for."""
    from kernels.steps import attention_1_classic, attention_7_hopper

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return (
        Step(
            number=1,
            name="classic",
            idea="Three launches: S = Q K^T, P = softmax(S), O = P V, with S and P in memory.",
            predicted_gain=None,
            why="Where the ladder starts.",
            run=checked(attention_1_classic.attention, dtypes),
            bytes_moved=lambda b, h, s, d: b * h * (4 * 4.0 * s * s + 8.0 * s * d),
            flops=lambda b, h, s, d: 4.0 * b * h * s * s * d,
        ),
        Step(
            number=7,
            name="Hopper's own (kernels.flash_attention)",
            idea="Let units work on their own: TMA fetches, wgmma multiplies, warps take one role each.",
            predicted_gain=1.5,
            why="The operations of step 6; what idles there is what there is to win.",
            run=functools.partial(attention_7_hopper.flash_attention, causal=True),
            bytes_moved=lambda b, h, s, d: b * h * (8.0 * s * d + 4.0 * s),
            flops=lambda b, h, s, d: 2.0 * b * h * s * s * d,
            needs=_why_not_hopper,
        ),
    )


def _why_not_hopper(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    return (
        None if capability == (9, 0) else f"needs compute capability 9.0, this card has {capability[0]}.{capability[1]}"
    )


def _cpu_steps() -> Sequence[Step]:
    return (
        Step(
            number=1,
            name="classic",
            idea="Three steps: S = Q K^T, P = softmax(S), O = P V, with S and P in memory.",
            predicted_gain=None,
            why="Where the ladder starts.",
            run=functools.partial(kernels.classic_attention, causal=True),
            bytes_moved=lambda b, h, s, d: b * h * (4 * 4.0 * s * s + 16.0 * s * d),
            flops=lambda b, h, s, d: 4.0 * b * h * s * s * d,
        ),
    )
