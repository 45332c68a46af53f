"""Attention on the CPU, steps 1 to 5, in C++: the ladder's ideas where there are few, fast cores. Step 6 is what ships.

    1 classic     three loops over everything, S and P in memory
    2 tiled       64 queries at a time: their scores stay in the cache
    3 online      a running maximum and sum: one pass over K and V, 64 scores at a time
    4 vectors     as many queries side by side as a vector register has lanes, 16 with AVX-512: 16 products at once
    5 threads     one block of queries after the other goes to whichever core is free
    6 shipped     kernels.flash_attention: products of small blocks in registers, in which each number that is loaded is
                  used several times before it is dropped (kernels/flash_attention/cpu.cpp and microkernels.h)

The code is attention_cpu.cpp, compiled as the shipped kernels are, when a step is first run.
"""

import ctypes
import functools
import pathlib

import torch
from torch import Tensor

from kernels.load import BuildError, build

SOURCE = pathlib.Path(__file__).with_suffix(".cpp")


@functools.cache
def library() -> ctypes.CDLL:
    """attention_cpu.cpp, built for this machine. Raises kernels.load.BuildError where it cannot be."""
    return ctypes.CDLL(str(build([SOURCE])[0]))


def why_not(device: torch.device) -> str | None:
    """Why the steps cannot run here: the compiler's absence or its words, in one line."""
    try:
        library()
    except BuildError as error:
        return str(error).splitlines()[0]
    return None


def attention(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """The step of that name: q, k, v (batch, num_heads, seqlen, head_dim), fp32, contiguous -> out, likewise."""
    batch, num_heads, seqlen, head_dim = q.shape
    out = torch.empty_like(q)
    tensors = (ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out))
    sizes = (ctypes.c_int64(x) for x in (batch * num_heads, seqlen, head_dim))
    threads = ctypes.c_int64(torch.get_num_threads())
    getattr(library(), f"attention_{name}")(*tensors, *sizes, ctypes.c_bool(causal), threads)
    return out
