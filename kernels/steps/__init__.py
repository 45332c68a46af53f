"""The optimisation ladders: every step from the obvious kernel to the one that ships, one idea at a time.

    attention_steps(device)   steps/attention_*
    top_k_steps(device)       steps/top_k_*

kernels/README.md walks through them; `toy-lm bench ladder` measures them; `toy-lm info --ptx` shows what the compiler
makes of them. Triton is imported only where the steps of a GPU are asked for.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """A Triton kernel as a launch would compile it; `types` holds its arguments that are no constants."""

    kernel: Any
    types: Mapping[str, str]  # "*bf16", "i32", ...; ":16" behind it says that it is a multiple of 16
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    capability: tuple[int, int] | None = None  # the only compute capability that it is made for; None: any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One idea, the kernel that has it, and what was expected of it before it was measured."""

    number: int
    name: str
    idea: str  # one sentence
    predicted_gain: float | None  # times as fast as the step before, at the headline size; None: the first step
    why: str  # the prediction's reason, and that of its error
    run: Callable[..., Any]  # attention: (q, k, v) -> out; top-K: (x, k) -> values, indices
    bytes_moved: Callable[..., float]  # of the sizes: through the device's memory, read and written
    flops: Callable[..., float]  # of the sizes
    kernels: Callable[[], Sequence[Compilation]] = tuple
    needs: Callable[[torch.device], str | None] = lambda device: None  # why it cannot run there
    applies: Callable[..., str | None] = lambda *sizes: None  # of the sizes: why the idea changes nothing there


def attention_steps(device: torch.device) -> Sequence[Step]:
    """Attention forward, causal, from three launches with S and P in memory to kernels.flash_attention."""
    from kernels.steps import attention_ladder

    return attention_ladder.steps(device)


def top_k_steps(device: torch.device) -> Sequence[Step]:
    """Top-K of fp32 rows, from sorting everything to kernels.top_k."""
    from kernels.steps import top_k_ladder

    return top_k_ladder.steps(device)
