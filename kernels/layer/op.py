"""What a decoder computes between its matrix products, each piece as one op.

    add_norm       x + dropout(branch), and its RMSNorm
    norm_rotary    queries, keys and values of a fused projection: RMSNorm of each head, and its rotary position
    swiglu         silu(gate) * up
    cross_entropy  what each target costs, of the logits

All of it is bound by memory. On a GPU each is one Triton kernel forward and one backward, with sums in fp32, and can be
differentiated once. On the CPU, and where there is no Triton, each is plain torch.

Knows torch and its own folder; knows nothing of attention or of models.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.layer import reference
from kernels.load import is_fused

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("kernels", "FRAGMENT")
for _schema in (
    "add_norm(Tensor x, Tensor branch, Tensor? key, Tensor weight, int threshold, float eps) -> (Tensor, Tensor)",
    "add_norm_backward(Tensor dnew_x, Tensor dh, Tensor new_x, Tensor? key, Tensor weight, int threshold, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "norm_rotary(Tensor qkv, Tensor q_norm, Tensor k_norm, Tensor cos, Tensor sin, int num_heads, int num_kv_heads, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    "norm_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_norm, Tensor k_norm, Tensor cos, "
    "Tensor sin, float eps) -> (Tensor, Tensor)",
    "swiglu(Tensor gate_up) -> Tensor",
    "swiglu_backward(Tensor dout, Tensor gate_up) -> Tensor",
    "cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    "cross_entropy_backward(Tensor dnats, Tensor logits, Tensor targets, Tensor lse) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops = torch.ops.kernels


def add_norm(
    x: Tensor, branch: Tensor, key: Tensor | None, weight: Tensor, *, threshold: int = 0, eps: float
) -> tuple[Tensor, Tensor]:
    """x + dropout(branch), and the RMSNorm of that sum.

    x, branch  (..., model_dim), of one shape, dtype and device
    key        (2,) int64, random: of it and an entry's place a byte is made. Where that is below `threshold` branch is
               left out, and what is kept is scaled by 256 / (256 - threshold). None keeps everything
    weight     (model_dim,), the norm's scale

    Raises ValueError naming the argument, what it got and what it allows.
    """
    _check_dtype("x", x)
    if branch.shape != x.shape:
        raise ValueError(f"branch: got shape {tuple(branch.shape)}, x has {tuple(x.shape)}")
    if branch.dtype != x.dtype:
        raise ValueError(f"branch: got {branch.dtype}, x is {x.dtype}")
    if key is not None and (key.dtype != torch.int64 or tuple(key.shape) != (2,)):
        raise ValueError(f"key: got {key.dtype} of shape {tuple(key.shape)}, needs int64 of shape (2,)")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, needs {tuple(x.shape[-1:])}")
    if not 0 <= threshold < 256:
        raise ValueError(f"threshold: got {threshold}, needs 0 to 255")
    if x.is_cuda and is_fused("cuda"):
        return _ops.add_norm(x.contiguous(), branch.contiguous(), key, weight, threshold, eps)
    return reference.add_norm(x, branch, key, weight, threshold, eps)


def norm_rotary(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, seqlen, num_heads, head_dim) and k, v (batch, seqlen, num_kv_heads, head_dim) of qkv.

    qkv             (batch, seqlen, (num_heads + 2 num_kv_heads) * head_dim): queries, then keys, then values
    q_norm, k_norm  (head_dim,), the scales of the RMSNorm of each head's queries and keys
    cos, sin        (1 or batch, seqlen, head_dim / 2) fp32, of the angle that x_i and x_{i + head_dim / 2} turn by

    Raises ValueError naming the argument, what it got and what it allows.
    """
    _check_dtype("qkv", qkv)
    head_dim = q_norm.shape[0]
    if qkv.dim() != 3 or qkv.shape[2] != (num_heads + 2 * num_kv_heads) * head_dim:
        needed = f"({num_heads} + 2 * {num_kv_heads}) * {head_dim}"
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, needs (batch, seqlen, {needed})")
    if k_norm.shape != q_norm.shape:
        raise ValueError(f"k_norm: got shape {tuple(k_norm.shape)}, q_norm has {tuple(q_norm.shape)}")
    for name, x in (("cos", cos), ("sin", sin)):
        if tuple(x.shape) not in [(n, qkv.shape[1], head_dim // 2) for n in (1, qkv.shape[0])]:
            allowed = f"(1 or {qkv.shape[0]}, {qkv.shape[1]}, {head_dim // 2})"
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, needs {allowed}")
    if qkv.is_cuda and is_fused("cuda"):
        angles = cos.contiguous(), sin.contiguous()
        return _ops.norm_rotary(qkv.contiguous(), q_norm, k_norm, *angles, num_heads, num_kv_heads, eps)
    return reference.norm_rotary(qkv, q_norm, k_norm, cos, sin, num_heads, num_kv_heads, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (..., mlp_dim) of gate_up (..., 2 mlp_dim): the gate's values, then up's. (arXiv:2002.05202)

    Raises ValueError naming the argument, what it got and what it allows.
    """
    _check_dtype("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got {gate_up.shape[-1]} columns, needs an even number")
    if gate_up.is_cuda and is_fused("cuda"):
        return _ops.swiglu(gate_up.contiguous())
    return reference.swiglu(gate_up)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], (...,) fp32 (or fp64), of logits (..., vocab_size) and targets (...,) int64.

    A target outside the vocabulary gives NaN on a GPU, for which nothing waits; on the CPU torch raises IndexError.

    Raises ValueError naming the argument, what it got and what it allows.
    """
    _check_dtype("logits", logits)
    if targets.shape != logits.shape[:-1] or targets.dtype != torch.int64:
        got = f"got {targets.dtype} of shape {tuple(targets.shape)}"
        raise ValueError(f"targets: {got}, needs torch.int64 of shape {tuple(logits.shape[:-1])}")
    if logits.is_cuda and is_fused("cuda"):
        return _ops.cross_entropy(logits.contiguous(), targets.contiguous())[0]
    return reference.cross_entropy(logits, targets)


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise ValueError(f"{name}: got {x.dtype}, allowed are float32, float16 and bfloat16 (on the CPU also float64)")


# What the ops return, without computing it.


def _fake_add_norm_backward(dnew_x, dh, new_x, key, weight, threshold, eps):
    dw = new_x.new_empty(new_x.shape[-1], dtype=torch.float32)
    return torch.empty_like(new_x), torch.empty_like(new_x) if key is not None else new_x.new_empty(0), dw


def _fake_norm_rotary(qkv, q_norm, k_norm, cos, sin, num_heads, num_kv_heads, eps):
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return tuple(qkv.new_empty((*qkv.shape[:2], n, q_norm.shape[0])) for n in heads)


def _fake_norm_rotary_backward(dq, dk, dv, qkv, q_norm, *rest):
    return torch.empty_like(qkv), qkv.new_empty((2, q_norm.shape[0]), dtype=torch.float32)


def _fake_swiglu(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_cross_entropy(logits, targets):
    nats = targets.new_empty(targets.shape, dtype=torch.float32)
    return nats, torch.empty_like(nats)


for _name, _fake in (
    ("add_norm", lambda x, *rest: (torch.empty_like(x), torch.empty_like(x))),
    ("add_norm_backward", _fake_add_norm_backward),
    ("norm_rotary", _fake_norm_rotary),
    ("norm_rotary_backward", _fake_norm_rotary_backward),
    ("swiglu", _fake_swiglu),
    ("swiglu_backward", lambda dout, gate_up: torch.empty_like(gate_up)),
    ("cross_entropy", _fake_cross_entropy),
    ("cross_entropy_backward", lambda dnats, logits, targets, lse: torch.empty_like(logits)),
):
    torch.library.register_fake(f"kernels::{_name}", _fake, lib=_library)


# Derivatives.


def _keep_add_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, key, weight, ctx.threshold, ctx.eps = inputs
    ctx.save_for_backward(output[0], key, weight)


def _add_norm_backward(ctx: Any, dnew_x: Tensor, dh: Tensor) -> tuple:
    new_x, key, weight = ctx.saved_tensors
    gradients = (dnew_x.contiguous(), dh.contiguous())
    dx, dbranch, dw = _ops.add_norm_backward(*gradients, new_x, key, weight, ctx.threshold, ctx.eps)
    return dx, dx if key is None else dbranch, None, dw.to(weight.dtype), None, None


def _keep_norm_rotary(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_rotary_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
    qkv, q_norm, k_norm, cos, sin = ctx.saved_tensors
    gradients = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
    dqkv, dw = _ops.norm_rotary_backward(*gradients, qkv, q_norm, k_norm, cos, sin, ctx.eps)
    return dqkv, dw[0].to(q_norm.dtype), dw[1].to(k_norm.dtype), None, None, None, None, None


def _keep_swiglu(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_backward(ctx: Any, dout: Tensor) -> Tensor:
    return _ops.swiglu_backward(dout.contiguous(), ctx.saved_tensors[0])


def _keep_cross_entropy(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _cross_entropy_backward(ctx: Any, dnats: Tensor, dlse: None) -> tuple:
    return _ops.cross_entropy_backward(dnats.contiguous(), *ctx.saved_tensors), None


for _name, _backward, _keep in (
    ("add_norm", _add_norm_backward, _keep_add_norm),
    ("norm_rotary", _norm_rotary_backward, _keep_norm_rotary),
    ("swiglu", _swiglu_backward, _keep_swiglu),
    ("cross_entropy", _cross_entropy_backward, _keep_cross_entropy),
):
    torch.library.register_autograd(f"kernels::{_name}", _backward, setup_context=_keep, lib=_library)


def bind_reference(library: torch.library.Library) -> None:
    """Nothing to register: where the kernels are not bound, the public functions call the reference themselves."""


def bind_cuda(library: torch.library.Library) -> None:
    """Register the Triton launchers; Triton is imported here, where a CUDA kernel is first needed."""
    from kernels.layer import triton_layer

    library.impl("add_norm", triton_layer.add_norm_forward)
    library.impl("add_norm_backward", triton_layer.add_norm_backward)
    library.impl("norm_rotary", triton_layer.norm_rotary_forward)
    library.impl("norm_rotary_backward", triton_layer.norm_rotary_backward)
    library.impl("swiglu", triton_layer.swiglu_forward)
    library.impl("swiglu_backward", triton_layer.swiglu_backward)
    library.impl("cross_entropy", triton_layer.cross_entropy_forward)
    library.impl("cross_entropy_backward", triton_layer.cross_entropy_backward)
