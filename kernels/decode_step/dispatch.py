"""Which kernels a decode step on CUDA gets: Gluon's on Hopper where they take the model, else the portable Triton ones.

The only place that knows both. What is chosen depends on the model alone: a text is the same alone and in a batch.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.decode_step import triton_decode_step
from kernels.decode_step.op import DecodeWeights


def decode_step(
    token_ids: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, *weights_and_norm_eps: Any
) -> Tensor:
    """The op as `kernels::decode_step` declares it: the fields of DecodeWeights, then norm_eps."""
    state = (token_ids, positions, k_cache, v_cache)
    if torch.cuda.get_device_capability(token_ids.device) == (9, 0):
        from kernels.decode_step import gluon_decode_step

        *fields, norm_eps = weights_and_norm_eps
        weights = DecodeWeights(*fields)
        if gluon_decode_step.supports(weights, k_cache, v_cache):
            return gluon_decode_step.decode_step(*state, weights, norm_eps)
    return triton_decode_step.decode_step(*state, *weights_and_norm_eps)
