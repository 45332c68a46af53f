"""What a layer computes between its matrix products, in plain torch: differentiable, and right at a glance."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor, branch: Tensor, key: Tensor | None, weight: Tensor, threshold: int, eps: float
) -> tuple[Tensor, Tensor]:
    if key is not None:
        branch = branch * kept(key, x.shape, threshold) * (256 / (256 - threshold))
    x = x + branch
    return x, _norm(x, weight, eps)


def kept(key: Tensor, shape: Sequence[int], threshold: int) -> Tensor:
    """Which entries dropout leaves: four neighbours get a byte each of a hash of their place and the key."""

    def mix(x: Tensor) -> Tensor:
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    first, second = key & 0xFFFFFFFF
    row, word, byte = (torch.arange(n, device=key.device) for n in (math.prod(shape[:-1]), -(-shape[-1] // 4), 4))
    row = mix(mix(row ^ first) + second & 0xFFFFFFFF)
    words = mix(row[:, None] + word * 0x9E3779B1 & 0xFFFFFFFF)
    return (words[:, :, None] >> 8 * byte & 255 >= threshold).flatten(1)[:, : shape[-1]].view(shape)


def norm_rotary(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (-1, q_norm.numel()))  # (batch, seqlen, num_heads + 2 num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    cos, sin = cos[:, :, None], sin[:, :, None]  # (1 or batch, seqlen, 1, head_dim / 2)
    return rotate(_norm(q, q_norm, eps), cos, sin), rotate(_norm(k, k_norm, eps), cos, sin), v


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim / 2}) by its angle, in its own dtype's precision or better."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, with its scale in x's dtype: for two dtypes torch has no fused kernel."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
