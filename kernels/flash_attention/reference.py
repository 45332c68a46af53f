"""Attention as the formula says it: S = Q K^T, P = softmax(S), O = P V, with S and P written to memory.

`classic_attention` is at once the baseline that the fused kernels are measured against, the function that their tests
compare with (in fp64), and the attention that can be differentiated any number of times.

Knows torch; knows nothing of tiles, devices or how the op is registered.
"""

from typing import Any

import torch
from torch import Tensor


def visible_keys(
    seqlen_q: int, seqlen_k: int, *, causal: bool, window_size: int | None, device: torch.device | str
) -> Tensor | None:
    """Which keys a query may see, or None if it sees all: bool (seqlen_q, seqlen_k).

    Queries stand at the end of the keys (bottom-right alignment): query i has position i + seqlen_k - seqlen_q.
    """
    if not causal and window_size is None:
        return None
    query_position = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    distance = query_position - torch.arange(seqlen_k, device=device)[None, :]  # (seqlen_q, seqlen_k), > 0: the past
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window_size is not None:
        visible &= distance.abs() < window_size
    return visible


def classic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in three steps, in the inputs' own dtype; arguments and results as `kernels.flash_attention`.

    Every step is a torch op, so that it runs on any device and in any floating dtype and has derivatives of any order.
    """
    groups = q.shape[1] // k.shape[1]  # grouped-query attention: so many query heads share one key head
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    s = (q @ k.transpose(-2, -1)) * scale  # (batch, num_heads, seqlen_q, seqlen_k)
    if softcap > 0.0:
        s = softcap * torch.tanh(s / softcap)
    visible = visible_keys(q.shape[2], k.shape[2], causal=causal, window_size=window_size, device=q.device)
    if visible is None:
        p = torch.softmax(s, dim=-1)
    else:
        # A row that sees no key gets finite scores, so that its softmax (and gradient) holds no NaN, and then weight 0.
        blind = ~visible.any(dim=-1, keepdim=True)  # (seqlen_q, 1)
        s = s.masked_fill(~visible & ~blind, float("-inf"))
        p = torch.softmax(s, dim=-1).masked_fill(blind, 0.0)
    out = p @ v  # (batch, num_heads, seqlen_q, head_dim)
    if not return_lse:
        return out

    lse = torch.logsumexp(s if s.dtype == torch.float64 else s.float(), dim=-1)  # (batch, num_heads, seqlen_q)
    if visible is not None:
        lse = lse.masked_fill(blind.squeeze(-1), float("-inf"))
    return out, lse


def classic_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: bool = False, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """`classic_attention` document by document; arguments as `kernels.flash_attention_varlen`."""
    outs: list[Any] = []
    lses: list[Any] = []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for document in range(len(starts_q) - 1):
        rows_q = slice(starts_q[document], starts_q[document + 1])
        rows_k = slice(starts_k[document], starts_k[document + 1])
        one = (x[rows].transpose(0, 1)[None] for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
        out, lse = classic_attention(*one, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))  # (seqlen_q, num_heads, head_dim)
        lses.append(lse[0])  # (num_heads, seqlen_q)
    out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    return (out, lse) if return_lse else out


def classic_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`classic_attention`, causal, of each sequence's last queries over the part of the cache that is filled."""
    outs: list[Any] = []
    for sequence, seqlen in enumerate(cache_seqlens.tolist()):
        rows = slice(sequence, sequence + 1)
        outs.append(
            classic_attention(
                q[rows],
                k_cache[rows, :, :seqlen],
                v_cache[rows, :, :seqlen],
                causal=True,
                softmax_scale=softmax_scale,
                window_size=window_size,
                softcap=softcap,
            )
        )
    return torch.cat(outs)


def classic_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the equations that the fused kernels follow (FlashAttention-2, section 2.3).

    For s = softmax_scale q k^T, p = softmax(s) and out = p v: dv = p^T dout, dp = dout v^T, ds = p (dp - delta) with
    delta = rowsum(p dp), dq = softmax_scale ds k, dk = softmax_scale ds^T q. From lse comes one term more: since
    d lse / d s = p, ds = p (dp - delta + dlse).
    """
    batch, num_kv_heads, seqlen_k, head_dim = k.shape
    groups = q.shape[1] // num_kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    k_all, v_all = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    s = (q @ k_all.transpose(-2, -1)) * scale  # (batch, num_heads, seqlen_q, seqlen_k)
    capped = softcap * torch.tanh(s / softcap) if softcap > 0.0 else s
    visible = visible_keys(q.shape[2], seqlen_k, causal=causal, window_size=window_size, device=q.device)
    if visible is None:
        p = torch.softmax(capped, dim=-1)
    else:
        p = torch.softmax(capped.masked_fill(~visible, float("-inf")), dim=-1).masked_fill(~visible, 0.0)

    dv = p.transpose(-2, -1) @ dout
    dp = dout @ v_all.transpose(-2, -1)
    delta = (p * dp).sum(dim=-1, keepdim=True)
    ds = p * (dp - delta if dlse is None else dp - delta + dlse[..., None].to(dp.dtype))
    if softcap > 0.0:
        ds = ds * (1.0 - (capped / softcap).square())  # d tanh(x) = 1 - tanh(x)^2
    dq = scale * (ds @ k_all)
    dk = scale * (ds.transpose(-2, -1) @ q)
    shared = (batch, num_kv_heads, groups, seqlen_k, head_dim)  # the heads of a group add up in the key head they share
    return dq, dk.view(shared).sum(dim=2), dv.view(shared).sum(dim=2)


def classic_varlen_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """`classic_backward` document by document, for `classic_attention_varlen`."""
    gradients = []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for document in range(len(starts_q) - 1):
        rows_q = slice(starts_q[document], starts_q[document + 1])
        rows_k = slice(starts_k[document], starts_k[document + 1])
        tensors = ((dout, rows_q), (q, rows_q), (k, rows_k), (v, rows_k))
        one_dout, *one = (x[rows].transpose(0, 1)[None] for x, rows in tensors)
        one_dlse = None if dlse is None else dlse[None, :, rows_q]
        gradients.append([dx[0].transpose(0, 1) for dx in classic_backward(one_dout, one_dlse, *one, **options)])
    dq, dk, dv = (torch.cat(parts) for parts in zip(*gradients, strict=True))
    return dq, dk, dv
