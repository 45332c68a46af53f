"""Which kernels a decode step on CUDA gets: Gluon's on Hopper where they take the model, else the portable Triton ones.

The only place that knows both. What is chosen depends on the model alone: a text is the same alone and in a batch.
"""

import torch
from torch import Tensor

from kernels.decode_step import triton_decode_step


def decode_step(
    token_ids: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    embedding: Tensor,
    input_norm: Tensor,
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    o: Tensor,
    post_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    final_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    qkv_scale: Tensor | None,
    o_scale: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """See `kernels.decode_step`."""
    state = (token_ids, positions, k_cache, v_cache)
    weights = (embedding, input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down, final_norm, cos, sin)
    if torch.cuda.get_device_capability(embedding.device) == (9, 0):
        from kernels.decode_step import gluon_decode_step

        if gluon_decode_step.supports(embedding, qkv, o, down, k_cache, v_cache):
            return gluon_decode_step.decode_step(*state, *weights, norm_eps)
    scales = (qkv_scale, o_scale, gate_up_scale, down_scale)
    return triton_decode_step.decode_step(*state, *weights, *scales, norm_eps)
