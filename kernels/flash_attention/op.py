"""The attention ops as torch sees them: schemas, argument checks, fakes and derivatives, for every device alike.

    flash_attention          dense batches                                  forward, backward
    flash_attention_varlen   packed documents                               forward, backward
    decode_attention         a few new queries over a cache                 forward
    classic_attention        reference.py, with derivatives of any order

The tensor's device picks the kernel: `cpu.cpp` registers itself, `bind_cuda` registers the Triton launchers, and
`bind_reference` registers plain torch. Every kernel is given arguments that were checked here.

Knows torch and its own folder; knows nothing of models.
"""

import math

import torch
from torch import Tensor

from kernels.flash_attention import reference
from kernels.load import ensure, load

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NO_WINDOW = 0  # in the schemas, where window_size is a plain int

# Arguments that every op below ends with.
_OPTIONS = "float softmax_scale, bool causal, int window_size, float softcap"
_VARLEN = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k"

_library = torch.library.Library("kernels", "FRAGMENT")
for _schema in (
    f"flash_attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    "flash_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    f"flash_attention_varlen_forward(Tensor q, Tensor k, Tensor v, {_VARLEN}, {_OPTIONS}) -> (Tensor, Tensor)",
    "flash_attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_VARLEN}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
    "float softmax_scale, int window_size, float softcap) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops = torch.ops.kernels


def flash_attention(
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
    """softmax(softmax_scale * q k^T) v, without ever writing the scores to memory. FlashAttention-2 (arXiv:2307.08691).

    q             (batch, num_heads, seqlen_q, head_dim), any strides; fp32, fp16 or bf16; head_dim 1 to 256
    k, v          (batch, num_kv_heads, seqlen_k, head_dim); num_kv_heads divides num_heads (grouped-query attention)
    causal        query i sees keys j <= i + seqlen_k - seqlen_q (bottom-right aligned)
    softmax_scale None: 1 / sqrt(head_dim)
    window_size   W: a query sees itself and the W - 1 keys before it (causal), or all keys with |i - j| < W
    softcap       c > 0: scores become c * tanh(scores / c)

    Returns out, laid out in memory as q is, and with `return_lse` also lse (batch, num_heads, seqlen_q): fp32, the
    natural logarithm of the sum of exponentials of a row's scores. A row that sees no key has out 0, lse -inf and
    gradients 0. Differentiable once in q, k and v, through out and lse alike; `classic_attention` any number of times.

    Raises ValueError naming the argument, what it got and what it allows.
    """
    head_dim = _check_batches(q, k, v)
    _check_supported(q, head_dim)
    options = _options(head_dim, softmax_scale, causal, window_size, softcap)
    ensure(q.device.type)
    out, lse = _ops.flash_attention_forward(q, k, v, *options)
    return (out, lse) if return_lse else out


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
    """`flash_attention` in three steps of plain torch, with the scores and their softmax written to memory.

    Arguments, results and errors are those of `flash_attention`, in any floating dtype and with any head_dim. Can be
    differentiated any number of times.
    """
    head_dim = _check_batches(q, k, v)
    if not q.dtype.is_floating_point or head_dim < 1:
        raise ValueError(f"q: got {q.dtype}, head_dim {head_dim}, needs a floating dtype and head_dim 1 or more")
    _options(head_dim, softmax_scale, causal, window_size, softcap)
    return reference.classic_attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        return_lse=return_lse,
    )


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` over documents packed one after the other, each seeing only itself.

    q             (total_q, num_heads, head_dim); k, v (total_k, num_kv_heads, head_dim)
    cu_seqlens_q  (num_documents + 1,) int32: document n holds rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] of q; the
                  first entry is 0, the last total_q, and a document may be empty. cu_seqlens_k likewise for k and v.
    max_seqlen_q  the longest document's length (or more), in rows of q; max_seqlen_k likewise.

    Returns out (total_q, num_heads, head_dim) and with `return_lse` also lse (num_heads, total_q). The lengths are read
    by the kernel alone, so that nothing waits for the GPU: they are not checked against total_q and max_seqlen_q.
    """
    _, (*_, head_dim) = _check_tensors(q, k, v, dims=3)
    _check_supported(q, head_dim)
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{name}: got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, needs int32 (documents + 1,)")
        if cu_seqlens.device != q.device:
            raise ValueError(f"{name}: got device {cu_seqlens.device}, q is on {q.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"{tuple(cu_seqlens_k.shape)}, cu_seqlens_q has {tuple(cu_seqlens_q.shape)}"
        raise ValueError(f"cu_seqlens_k: got shape {got}")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            raise ValueError(f"{name}: got {longest}, needs 0 or more")
    options = _options(head_dim, softmax_scale, causal, window_size, softcap)
    ensure(q.device.type)
    sequences = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)
    out, lse = _ops.flash_attention_varlen_forward(q, k, v, *sequences, *options)
    return (out, lse) if return_lse else out


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the newest tokens of each sequence over everything cached so far, their own keys included.

    q                 (batch, num_heads, seqlen_q, head_dim), usually seqlen_q = 1
    k_cache, v_cache  (batch, num_kv_heads, capacity, head_dim), any strides; what lies behind a sequence's length is
                      never read
    cache_seqlens     (batch,) int32: keys in the cache, after the new ones were written. 0 gives out 0

    Returns out, laid out in memory as q is. Query i of a sequence sees keys j <= i + cache_seqlens - seqlen_q. Has no
    derivatives. The result does not depend on capacity.
    """
    head_dim = _check_batches(q, k_cache, v_cache, names=("q", "k_cache", "v_cache"))
    _check_supported(q, head_dim)
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.shape != (q.shape[0],):
        got = f"{cache_seqlens.dtype} {tuple(cache_seqlens.shape)}"
        raise ValueError(f"cache_seqlens: got {got}, needs int32 ({q.shape[0]},), a length for each sequence")
    if cache_seqlens.device != q.device:
        raise ValueError(f"cache_seqlens: got device {cache_seqlens.device}, q is on {q.device}")
    scale, _, window, cap = _options(head_dim, softmax_scale, True, window_size, softcap)
    ensure(q.device.type)
    return _ops.decode_attention(q, k_cache, v_cache, cache_seqlens.contiguous(), scale, window, cap)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float = 0.0,
) -> str:
    """Which kernels `flash_attention` would run for these arguments, with which tiles, and why not the others.

    Arguments, and errors, as `flash_attention`. Runs nothing.
    """
    head_dim = _check_batches(q, k, v)
    _check_supported(q, head_dim)
    options = _options(head_dim, softmax_scale, causal, window_size, softcap)
    binding = load(q.device)
    if q.device.type != "cuda" or binding.kind != "fused":
        return binding.line
    from kernels.flash_attention import dispatch

    return f"{binding.line}\n{dispatch.explain(q, k, v, *options)}"


def _check_batches(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")) -> int:
    """Of (batch, heads, seqlen, head_dim) tensors; returns head_dim."""
    shape, kv_shape = _check_tensors(q, k, v, dims=4, names=names)
    if shape[0] != kv_shape[0]:
        raise ValueError(f"{names[1]}: got batch {kv_shape[0]}, q has batch {shape[0]}")
    return shape[3]


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, *, dims: int, names: tuple[str, str, str] = ("q", "k", "v")
) -> tuple[torch.Size, torch.Size]:
    """Returns the shapes of q and of k and v. A small kernel takes no longer than this: nothing is asked for twice."""
    shape, kv_shape = q.shape, k.shape
    alike = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device and kv_shape == v.shape
    if alike and len(shape) == len(kv_shape) == dims and shape[-1] == kv_shape[-1]:
        num_kv_heads = kv_shape[1]
        if num_kv_heads > 0 and shape[1] % num_kv_heads == 0:
            return shape, kv_shape
    for name, x in zip(names, (q, k, v), strict=True):
        if x.dim() != dims:
            layout = "(batch, heads, seqlen, head_dim)" if dims == 4 else "(total, heads, head_dim)"
            raise ValueError(f"{name}: got {x.dim()} dimensions {tuple(x.shape)}, needs {layout}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got {x.dtype}, q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: got device {x.device}, q is on {q.device}")
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name}: got head_dim {x.shape[-1]}, q has {q.shape[-1]}")
    if kv_shape != v.shape:
        raise ValueError(f"{names[2]}: got shape {tuple(v.shape)}, {names[1]} has {tuple(kv_shape)}")
    raise ValueError(f"{names[1]}: got {kv_shape[1]} heads, needs a divisor of q's {shape[1]}")


def _check_supported(q: Tensor, head_dim: int) -> None:
    """What the fused kernels cannot do, and `classic_attention` can."""
    if q.dtype not in DTYPES and not (q.dtype == torch.float64 and q.device.type == "cpu"):
        raise ValueError(f"q: got {q.dtype}, allowed are float32, float16 and bfloat16 (on the CPU also float64)")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: got head_dim {head_dim}, allowed are 1 to {MAX_HEAD_DIM}")


def _options(
    head_dim: int, softmax_scale: float | None, causal: bool, window_size: int | None, softcap: float
) -> tuple[float, bool, int, float]:
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size: got {window_size}, needs 1 or more, or None for no window")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}, needs a finite number, 0 (off) or more")
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not abs(scale) < math.inf:
        raise ValueError(f"softmax_scale: got {softmax_scale}, needs a finite number")
    return scale, bool(causal), NO_WINDOW if window_size is None else window_size, float(softcap)


# What the ops return, without computing it: out and the gradients are laid out as the tensors they belong to.


def _fake_forward(q, k, v, *options):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


def _fake_varlen_forward(q, k, v, *sequences_and_options):
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))


def _fake_backward(dout, dlse, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fake_decode(q, *rest):
    return torch.empty_like(q)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


torch.library.register_fake("kernels::flash_attention_forward", _fake_forward, lib=_library)
torch.library.register_fake("kernels::flash_attention_varlen_forward", _fake_varlen_forward, lib=_library)
torch.library.register_fake("kernels::flash_attention_backward", _fake_backward, lib=_library)
torch.library.register_fake("kernels::flash_attention_varlen_backward", _fake_backward, lib=_library)
torch.library.register_fake("kernels::decode_attention", _fake_decode, lib=_library)


# Derivatives. The backward ops are ops of their own, so that torch.compile sees through them. `register_autograd` would
# write this too, at twice the time a call: what is below is as long as a small kernel takes.


class _Attention(torch.autograd.Function):
    """A forward op, differentiated once by its backward op."""

    @staticmethod
    def forward(ctx, forward_op, backward_op, q, k, v, *rest):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = forward_op(q, k, v, *rest)
        ctx.save_for_backward(q, k, v, out, lse, *(x for x in rest if isinstance(x, Tensor)))
        ctx.backward_op = backward_op
        ctx.rest = tuple(x for x in rest if not isinstance(x, Tensor))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "flash_attention has no second derivative (create_graph=True); "
                "kernels.classic_attention computes the same and can be differentiated any number of times"
            )
        q, k, v, out, lse, *sequences = ctx.saved_tensors
        nothing = (None,) * (len(sequences) + len(ctx.rest))
        if dout is None and dlse is None:
            return None, None, None, None, None, *nothing
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = ctx.backward_op(dout, dlse, q, k, v, out, lse, *sequences, *ctx.rest)
        return None, None, *gradients, *nothing


def _with_derivative(name: str) -> None:
    forward_op = getattr(_ops, f"{name}_forward").default
    backward_op = getattr(_ops, f"{name}_backward").default

    def autograd(q, k, v, *rest):
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attention.apply(forward_op, backward_op, q, k, v, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(q, k, v, *rest)

    _library.impl(f"{name}_forward", autograd, "Autograd")


_with_derivative("flash_attention")
_with_derivative("flash_attention_varlen")


def _as_keywords(softmax_scale: float, causal: bool, window_size: int, softcap: float) -> dict:
    window = None if window_size == NO_WINDOW else window_size
    return {"softmax_scale": softmax_scale, "causal": causal, "window_size": window, "softcap": softcap}


def bind_reference(library: torch.library.Library) -> None:
    """Register plain torch for the device that `library` stands for."""

    def forward(q, k, v, *options):
        out, lse = reference.classic_attention(q, k, v, return_lse=True, **_as_keywords(*options))
        return torch.empty_like(q).copy_(out), lse

    def backward(dout, dlse, q, k, v, out, lse, *options):
        gradients = reference.classic_backward(dout, dlse, q, k, v, **_as_keywords(*options))
        return tuple(torch.empty_like(x).copy_(dx) for x, dx in zip((q, k, v), gradients, strict=True))

    def varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
        out, lse = reference.classic_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **_as_keywords(*options)
        )
        return torch.empty_like(q).copy_(out), lse

    def varlen_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *options):
        gradients = reference.classic_varlen_backward(
            dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, **_as_keywords(*options)
        )
        return tuple(torch.empty_like(x).copy_(dx) for x, dx in zip((q, k, v), gradients, strict=True))

    def decode(q, k_cache, v_cache, cache_seqlens, softmax_scale, window_size, softcap):
        keywords = _as_keywords(softmax_scale, True, window_size, softcap)
        del keywords["causal"]
        return torch.empty_like(q).copy_(reference.classic_decode(q, k_cache, v_cache, cache_seqlens, **keywords))

    library.impl("flash_attention_forward", forward)
    library.impl("flash_attention_backward", backward)
    library.impl("flash_attention_varlen_forward", varlen_forward)
    library.impl("flash_attention_varlen_backward", varlen_backward)
    library.impl("decode_attention", decode)


def bind_cuda(library: torch.library.Library) -> None:
    """Register the Triton launchers; Triton is imported here, where a CUDA kernel is first needed."""
    from kernels.flash_attention import dispatch, triton_decode

    library.impl("flash_attention_forward", dispatch.forward)
    library.impl("flash_attention_backward", dispatch.backward)
    library.impl("flash_attention_varlen_forward", dispatch.varlen_forward)
    library.impl("flash_attention_varlen_backward", dispatch.varlen_backward)
    library.impl("decode_attention", triton_decode.decode)
