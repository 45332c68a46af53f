"""Which attention kernel a CUDA tensor gets: Gluon's on Hopper where it applies, else the portable Triton one.

The only place that knows both. Knows no kernel's inside.
"""

from typing import Any

from torch import Tensor

from kernels.flash_attention import tiles, triton_backward, triton_forward

varlen_forward = triton_forward.varlen_forward
varlen_backward = triton_backward.varlen_backward


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) as `kernels::flash_attention_forward` declares it."""
    if why_not_hopper(q, k, v, *options) is None:
        from kernels.flash_attention import gluon_forward

        return gluon_forward.forward(q, k, v, *options)
    return triton_forward.forward(q, k, v, *options)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) as `kernels::flash_attention_backward` declares it."""
    if why_not_hopper(q, k, v, *options) is None:
        from kernels.flash_attention import gluon_backward

        return gluon_backward.backward(dout, dlse, q, k, v, out, lse, *options)
    return triton_backward.backward(dout, dlse, q, k, v, out, lse, *options)


def why_not_hopper(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str | None:
    """Why these arguments do not get the Hopper kernels, in a few words; None if they do."""
    if tiles.card(q.device) != "hopper":
        return "needs compute capability 9.0"
    from kernels.flash_attention import gluon_forward

    return gluon_forward.supports(q, k, v, *options)


def explain(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str:
    """What `forward` and `backward` would run, in a few lines."""
    reason = why_not_hopper(q, k, v, *options)
    lines = [f"{q.device}: a card of the kind {tiles.card(q.device)!r}"]
    if reason is None:
        lines.append("forward, backward: Gluon kernels for Hopper")
        lines.append("not the portable Triton kernels: slower here")
        return "\n".join(lines)
    causal = options[1]
    for name in (tiles.FORWARD, tiles.BACKWARD_DQ, tiles.BACKWARD_DKDV):
        tile = tiles.fitting_tile(name, q, causal)
        picture = f"BLOCK_M {tile.block_m}, BLOCK_N {tile.block_n}, {tile.warps} warps, {tile.stages} stages"
        lines.append(f"{name}: Triton, {picture}")
    lines.append(f"not the Gluon kernels for Hopper: {reason}")
    return "\n".join(lines)
