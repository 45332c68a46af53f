"""One step of a decoder in plain torch: what `decode_step` computes, said as plainly as possible."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.flash_attention.reference import classic_attention


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
    """See `kernels.decode_step`; the caches are written, everything is computed in the weights' dtype."""
    if token_ids.dim() == 2:
        weights = (embedding, input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down, final_norm, cos, sin)
        scales = (qkv_scale, o_scale, gate_up_scale, down_scale)
        for tokens, at in zip(token_ids.T, positions.T, strict=True):
            logits = decode_step(tokens, at, k_cache, v_cache, *weights, *scales, norm_eps)
        return logits
    qkv, o = _matrix(qkv, qkv_scale, embedding), _matrix(o, o_scale, embedding)
    gate_up, down = _matrix(gate_up, gate_up_scale, embedding), _matrix(down, down_scale, embedding)
    num_layers, batch, num_kv_heads, _, head_dim = k_cache.shape
    rows = torch.arange(batch, device=token_ids.device)
    at = positions.long()
    angles = cos[at][:, None], sin[at][:, None]  # (batch, 1, head_dim / 2)
    x = embedding[token_ids.clamp(min=0)]  # (batch, model_dim)
    for layer in range(num_layers):
        projected = F.linear(_norm(x, input_norm[layer], norm_eps), qkv[layer]).view(batch, -1, head_dim)
        q, k, v = projected.split((projected.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
        q, k = (_rotate(_norm(*pair, norm_eps), *angles) for pair in ((q, q_norm[layer]), (k, k_norm[layer])))
        k_cache[layer, rows, :, at] = k.to(k_cache.dtype)
        v_cache[layer, rows, :, at] = v.to(v_cache.dtype)
        outs = []
        for row, position in enumerate(positions.tolist()):
            keys, values = (cache[layer, row, None, :, : position + 1].to(q.dtype) for cache in (k_cache, v_cache))
            out = classic_attention(q[row, None, :, None], keys, values)  # (1, num_heads, 1, head_dim)
            assert isinstance(out, Tensor)
            outs.append(out.flatten())
        x = x + F.linear(torch.stack(outs), o[layer])
        gate, up = F.linear(_norm(x, post_norm[layer], norm_eps), gate_up[layer]).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, down[layer])
    return F.linear(_norm(x, final_norm, norm_eps), embedding).float()


def _matrix(w: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
    return w if scale is None else w.to(like.dtype) * scale[..., None].to(like.dtype)


def _norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], scale, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
