"""Attention and top-K sampling kernels: Triton for the GPU, C++ for the CPU, the same contract on both.

The tensor's device picks the kernel. Importing this package compiles nothing and asks no driver anything.
"""

from kernels.decode_step.op import DecodeWeights, decode_step
from kernels.flash_attention.op import (
    classic_attention,
    decode_attention,
    explain,
    flash_attention,
    flash_attention_varlen,
)
from kernels.layer.op import add_norm, cross_entropy, norm_rotary, swiglu
from kernels.load import BuildError, load
from kernels.orthogonalize.op import orthogonalize
from kernels.top_k.op import Sampled, sample, top_k

__all__ = [
    "BuildError",
    "DecodeWeights",
    "Sampled",
    "add_norm",
    "classic_attention",
    "cross_entropy",
    "decode_attention",
    "decode_step",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "load",
    "norm_rotary",
    "orthogonalize",
    "sample",
    "swiglu",
    "top_k",
]
