"""One whole step of a decoder as torch sees it: a token in, the next token's logits out, keys and values cached.

    decode_step   embedding -> num_layers x [norm, q k v, rotary, cache, attention, o; norm, gate up, down] -> logits

At batch 1 a step reads every weight once and computes next to nothing, so that its time is the memory's plus that of
everything between: hundreds of small ops where it is written in torch, a handful of kernels here.

The tensor's device picks the kernel: `cpu.cpp` registers itself, `bind_cuda` registers the Triton launchers, and
`bind_reference` registers plain torch. Every kernel is given arguments that were checked here.

Knows torch and its own folder; knows nothing of models beyond the layer that it computes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decode_step import reference
from kernels.load import ensure, is_fused

DTYPES = (torch.float32, torch.bfloat16)
MATRICES = ("qkv", "o", "gate_up", "down")  # may be int8

_WEIGHTS = (
    "Tensor embedding, Tensor input_norm, Tensor qkv, Tensor q_norm, Tensor k_norm, Tensor o, Tensor post_norm, "
    "Tensor gate_up, Tensor down, Tensor final_norm, Tensor cos, Tensor sin, "
    "Tensor? qkv_scale, Tensor? o_scale, Tensor? gate_up_scale, Tensor? down_scale"
)
_library = torch.library.Library("kernels", "FRAGMENT")
_library.define(
    "decode_step(Tensor token_ids, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    f"{_WEIGHTS}, float norm_eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("rows_together(Tensor matrix) -> int")


class DecodeWeights(NamedTuple):
    """The weights of a decoder with RMSNorm, rotary positions, QK-norm, SwiGLU and tied embeddings (Qwen3's shape).

    Contiguous, in one dtype, fp32 or bf16 (cos and sin: fp32). qkv has the rows of all query heads, then of all key
    heads, then of all value heads; gate_up those of the gate, then those of the up projection. Each of the four
    matrices may be int8, and then has a scale for each of its rows; what it stands for is their product. The embedding
    and the matrices may be packed.
    """

    embedding: Tensor  # (vocab_size, model_dim), also the head
    input_norm: Tensor  # (num_layers, model_dim)
    qkv: Tensor  # (num_layers, (num_heads + 2 num_kv_heads) * head_dim, model_dim)
    q_norm: Tensor  # (num_layers, head_dim)
    k_norm: Tensor  # (num_layers, head_dim)
    o: Tensor  # (num_layers, model_dim, num_heads * head_dim)
    post_norm: Tensor  # (num_layers, model_dim)
    gate_up: Tensor  # (num_layers, 2 mlp_dim, model_dim)
    down: Tensor  # (num_layers, model_dim, mlp_dim)
    final_norm: Tensor  # (model_dim,)
    cos: Tensor  # (max_seqlen, head_dim / 2) fp32
    sin: Tensor  # (max_seqlen, head_dim / 2) fp32
    qkv_scale: Tensor | None = None  # (num_layers, rows of qkv) fp32
    o_scale: Tensor | None = None  # (num_layers, model_dim) fp32
    gate_up_scale: Tensor | None = None  # (num_layers, 2 mlp_dim) fp32
    down_scale: Tensor | None = None  # (num_layers, model_dim) fp32

    def to_int8(self) -> "DecodeWeights":
        """The matrices rounded to whole numbers from -127 to 127; each row's scale maps its largest weight to 127."""
        rounded: dict[str, Tensor] = {}
        for name in MATRICES:
            matrix = getattr(self, name).float()
            scale = matrix.abs().amax(dim=-1).clamp(min=1e-30) / 127  # (num_layers, rows)
            rounded[name] = (matrix / scale[..., None]).round().to(torch.int8)
            rounded[f"{name}_scale"] = scale
        return self._replace(**rounded)

    def packed(self) -> "DecodeWeights":
        """The embedding and the matrices in the order in which the kernel of their device reads them.

        On a CPU (..., rows / lanes, size / depth, lanes, depth): the `lanes` outputs of a vector side by side, and two
        numbers of each, where they are of two bytes or one; `lanes` rows of the gate are followed by those of the up
        projection that they are for. What cannot be divided so stays as it is, and takes longer.
        """
        packed = {name: _pack(getattr(self, name)) for name in ("embedding", "qkv", "o", "down")}
        lanes, mlp_dim = _lanes(self.gate_up), self.down.shape[-1]
        if lanes > 1 and mlp_dim % lanes == 0:
            packed["gate_up"] = _pack(_take_turns(self.gate_up, lanes))
            if self.gate_up_scale is not None:
                packed["gate_up_scale"] = _take_turns(self.gate_up_scale, lanes)
        return self._replace(**packed)


def _lanes(matrix: Tensor) -> int:
    """How many rows of a matrix (..., rows, size) lie side by side once it is packed; 1 where it is not to be."""
    packs = matrix.device.type == "cpu" and is_fused("cpu") and matrix.shape[-1] % _depth(matrix) == 0
    return torch.ops.kernels.rows_together(matrix) if packs else 1


def _depth(matrix: Tensor) -> int:
    return 1 if matrix.itemsize == 4 else 2


def _pack(matrix: Tensor) -> Tensor:
    lanes = _lanes(matrix)
    if lanes == 1 or matrix.shape[-2] % lanes:
        return matrix
    return matrix.unflatten(-1, (-1, _depth(matrix))).unflatten(-3, (-1, lanes)).transpose(-3, -2).contiguous()


def _take_turns(gate_up: Tensor, lanes: int) -> Tensor:
    """The rows (num_layers, 2 mlp_dim, ...) in another order: `lanes` of the gate, as many of the up projection..."""
    return gate_up.unflatten(1, (2, -1, lanes)).transpose(1, 2).flatten(1, 3).contiguous()


def _unpacked_shape(matrix: Tensor) -> torch.Size:
    """The shape, ending in (rows, size), of a matrix that may be packed."""
    if matrix.dim() <= 3:
        return matrix.shape
    *before, blocks, steps, lanes, depth = matrix.shape
    return torch.Size((*before, blocks * lanes, steps * depth))


def decode_step(
    token_ids: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    weights: DecodeWeights,
    *,
    norm_eps: float,
    check: bool = True,
) -> Tensor:
    """Logits (batch, vocab_size) fp32 of the token after token_ids, each at its position; writes its keys and values.

    token_ids         (batch,) int64; -1, which `sample` gives where there is no token, counts as 0. On a CPU also
                      (batch, seqlen), the tokens of a prompt one after the other, as if they came in as many calls
    positions         like token_ids, int32: how many tokens of the sequence are cached before this one; below the
                      capacity and max_seqlen. Read by the kernel alone, so that nothing waits for the GPU
    k_cache, v_cache  (num_layers, batch, num_kv_heads, capacity, head_dim), contiguous, in the weights' dtype; written
                      at `positions`, read up to there
    weights           see `DecodeWeights`
    check             False: what a call with the same weights and caches has found right is not looked at again. A
                      check takes the host 12 us, and 40 where the weights have driven it out of the cache

    Sums are fp32 on every device. A sequence's logits do not depend on the batch around it. Has no derivatives.

    Raises ValueError naming the argument, what it got and what it allows.
    """
    if check:
        _check(token_ids, positions, k_cache, v_cache, weights)
    ensure(token_ids.device.type)
    return torch.ops.kernels.decode_step.default(token_ids, positions, k_cache, v_cache, *weights, norm_eps)


def _check(token_ids: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, weights: DecodeWeights) -> None:
    if k_cache.dim() != 5:
        layout = "(num_layers, batch, num_kv_heads, capacity, head_dim)"
        raise ValueError(f"k_cache: got {k_cache.dim()} dimensions {tuple(k_cache.shape)}, needs {layout}")
    num_layers, batch, num_kv_heads, _, head_dim = k_cache.shape
    vocab_size, model_dim = _unpacked_shape(weights.embedding)
    num_heads = _unpacked_shape(weights.o)[-1] // head_dim
    mlp_dim, max_seqlen = _unpacked_shape(weights.down)[-1], weights.cos.shape[0]
    if num_heads % num_kv_heads:
        raise ValueError(f"k_cache: got {num_kv_heads} heads, needs a divisor of the weights' {num_heads}")
    expected = {
        "embedding": (vocab_size, model_dim),
        "input_norm": (num_layers, model_dim),
        "qkv": (num_layers, (num_heads + 2 * num_kv_heads) * head_dim, model_dim),
        "q_norm": (num_layers, head_dim),
        "k_norm": (num_layers, head_dim),
        "o": (num_layers, model_dim, num_heads * head_dim),
        "post_norm": (num_layers, model_dim),
        "gate_up": (num_layers, 2 * mlp_dim, model_dim),
        "down": (num_layers, model_dim, mlp_dim),
        "final_norm": (model_dim,),
        "cos": (max_seqlen, head_dim // 2),
        "sin": (max_seqlen, head_dim // 2),
        "k_cache": k_cache.shape,
        "v_cache": k_cache.shape,
        "token_ids": (batch, *(token_ids.shape[1:2] if token_ids.device.type == "cpu" else ())),
        "positions": token_ids.shape,
    }
    expected |= {f"{name}_scale": expected[name][:2] for name in MATRICES}
    tensors = {
        **{name: x for name, x in weights._asdict().items() if x is not None},
        "k_cache": k_cache,
        "v_cache": v_cache,
        "token_ids": token_ids,
        "positions": positions,
    }
    special = {"cos": torch.float32, "sin": torch.float32, "token_ids": torch.int64, "positions": torch.int32}
    for name in MATRICES:
        if f"{name}_scale" in tensors:
            special |= {name: torch.int8, f"{name}_scale": torch.float32}
    dtype = weights.embedding.dtype
    if dtype not in DTYPES:
        raise ValueError(f"weights: got {dtype}, allowed are float32 and bfloat16")
    for name, x in tensors.items():
        shape = x.shape
        if name in ("embedding", *MATRICES):
            shape, allowed = _unpacked_shape(x), (_lanes(x), _depth(x))
            if x.dim() > 3 and x.shape[-2:] != allowed:
                raise ValueError(f"{name}: got packed by {tuple(x.shape[-2:])}, allowed on this device is {allowed}")
        if shape != expected[name]:
            raise ValueError(f"{name}: got shape {tuple(shape)}, needs {tuple(expected[name])}")
        if x.dtype != special.get(name, dtype):
            raise ValueError(f"{name}: got {x.dtype}, needs {special.get(name, dtype)}")
        if x.device != token_ids.device:
            raise ValueError(f"{name}: got device {x.device}, token_ids is on {token_ids.device}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()}, needs a contiguous tensor")


def _fake(token_ids, positions, k_cache, v_cache, embedding, *rest):
    return token_ids.new_empty((token_ids.shape[0], _unpacked_shape(embedding)[0]), dtype=torch.float32)


torch.library.register_fake("kernels::decode_step", _fake, lib=_library)


def bind_reference(library: torch.library.Library) -> None:
    """Register plain torch for the device that `library` stands for."""
    library.impl("decode_step", reference.decode_step)


def bind_cuda(library: torch.library.Library) -> None:
    """Register the Triton launchers; Triton is imported here, where a CUDA kernel is first needed."""
    from kernels.decode_step import dispatch

    library.impl("decode_step", dispatch.decode_step)
