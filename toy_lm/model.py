"""The decoder: RMSNorm, rotary positions, QK-norm, grouped-query attention, SwiGLU, tied embeddings, no biases.

This is Qwen3's architecture with Hugging Face's names for the parameters, so that a saved model loads in transformers.

    token_ids -> embedding -> num_layers x [x + attention(norm(x)); x + mlp(norm(x))] -> norm -> logits

Without a cache a call is a full causal forward pass, as in training. With a `KVCache` the call appends its tokens to
the cache: the first call (prefill) attends among its own tokens, later ones over everything cached.

Knows kernels only through `import kernels`; knows nothing of text, files or training.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from toy_lm.config import ModelConfig

ATTENTION: dict[str, Callable[..., Any]] = {"fused": kernels.flash_attention, "classic": kernels.classic_attention}

# Up to here training on a GPU looks tokens up by a matrix product: torch adds up the gradient of a look-up by sorting
# the tokens, in eleven kernels.
_SMALL_VOCABULARY = 1024


class KVCache:
    """The keys and values of every token so far, for a batch of sequences of unequal length.

    k, v     (num_layers, batch, num_kv_heads, capacity, head_dim)
    seqlens  (batch,) int32, the tokens of each sequence; what lies behind them is never read
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, capacity, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.seqlens = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.capacity = capacity
        self.longest = 0  # no sequence is longer: the host's bound on seqlens, known without waiting for the device

    def grow(self, seqlen: int) -> None:
        """Count `seqlen` more tokens for every sequence. Raises ValueError if the cache is full."""
        if self.longest + seqlen > self.capacity:
            raise ValueError(f"cache: {self.longest} + {seqlen} tokens do not fit its capacity of {self.capacity}")
        self.longest += seqlen
        self.seqlens += seqlen

    def set_seqlens(self, seqlens: Tensor, longest: int) -> None:
        """Shorten the sequences to `seqlens` (batch,): what a batch of prompts padded on the right needs."""
        self.seqlens.copy_(seqlens)
        self.longest = longest

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (batch, num_kv_heads, seqlen, head_dim) of one layer at positions (batch, seqlen)."""
        index = positions[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        self.k[layer].scatter_(2, index, k.to(self.k.dtype))
        self.v[layer].scatter_(2, index, v.to(self.v.dtype))


class RotaryPositions(nn.Module):
    """Turns each pair (x_i, x_{i + head_dim / 2}) by position * theta^(-2i / head_dim). (RoFormer, arXiv:2104.09864)"""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.max_seqlen, dtype=torch.float32), config.rope_theta**-exponents)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (max_seqlen, head_dim / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (batch, seqlen, head_dim / 2) of positions (batch, seqlen)."""
        return self.cos[positions], self.sin[positions]


class Copies(torch.autograd.Function):
    """Copies of weights in the dtype that matrices are multiplied in, some side by side; gradients come back in fp32.

    All are rounded by one kernel, and one widens all gradients, where autocast takes two or three for each weight.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, counts: tuple[int, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        """The first counts[0] of the weights (rows, columns) make one copy, and so on."""
        ends = itertools.accumulate(counts)
        groups = [weights[end - count : end] for count, end in zip(counts, ends, strict=True)]
        ctx.rows = [[len(weight) for weight in group] for group in groups]
        copies = [
            group[0].new_empty((sum(rows), group[0].shape[1]), dtype=dtype)
            for group, rows in zip(groups, ctx.rows, strict=True)
        ]
        parts = [part for copy, rows in zip(copies, ctx.rows, strict=True) for part in copy.split(rows)]
        torch._foreach_copy_(parts, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = [part for gradient, rows in zip(gradients, ctx.rows, strict=True) for part in gradient.split(rows)]
        widened = [torch.empty_like(part, dtype=torch.float32) for part in parts]
        torch._foreach_copy_(widened, parts)
        return None, None, *widened


def project(x: Tensor, weight: Tensor | None, *linears: nn.Linear) -> Tensor:
    """What the linear maps make of x (..., model_dim), side by side; `weight` is a copy of all their weights, or None.

    In training as one product with their weights side by side: x is read once, and its gradient is not added up from
    parts. Without gradients of two copies the smaller is made: for few tokens each map goes alone.
    """
    if weight is None and len(linears) == 1:
        weight = linears[0].weight
    elif weight is None and (torch.is_grad_enabled() or x.numel() > x.shape[-1] ** 2):
        weight = torch.cat([linear.weight for linear in linears])
    if weight is not None:
        return F.linear(x, weight)
    return torch.cat([linear(x) for linear in linears], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, attention: str) -> None:
        super().__init__()
        self.attention = ATTENTION[attention]
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.eps = config.norm_eps
        self.q_proj = nn.Linear(config.model_dim, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.model_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.model_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.model_dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        copies: tuple[Tensor | None, Tensor | None],
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        layer: int,
        positions: Tensor,
        prefill: bool,
        documents: Tensor | None,
    ) -> Tensor:
        batch_size, seqlen, _ = x.shape
        q, k, v = kernels.norm_rotary(
            project(x, copies[0], self.q_proj, self.k_proj, self.v_proj),
            self.q_norm.weight,
            self.k_norm.weight,
            cos,
            sin,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            eps=self.eps,
        )
        if documents is not None:
            packed = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
            out = kernels.flash_attention_varlen(
                *packed, documents, documents, max_seqlen_q=seqlen, max_seqlen_k=seqlen, causal=True
            )
            assert isinstance(out, Tensor)
            return project(out.reshape(batch_size, seqlen, -1), copies[1], self.o_proj)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # q (batch, num_heads, seqlen, head_dim); k, v (batch, num_kv_heads, seqlen, head_dim)

        if cache is not None:
            cache.write(layer, positions, k, v)
        if prefill:
            out = self.attention(q, k, v, causal=True)
        else:
            assert cache is not None
            out = kernels.decode_attention(q, cache.k[layer], cache.v[layer], cache.seqlens)
        return project(out.transpose(1, 2).reshape(batch_size, seqlen, -1), copies[1], self.o_proj)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). (arXiv:2002.05202)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.model_dim, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.model_dim, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor, copies: tuple[Tensor | None, Tensor | None]) -> Tensor:
        return project(kernels.swiglu(project(x, copies[0], self.gate_proj, self.up_proj)), copies[1], self.down_proj)


class Dropout(nn.Module):
    """Random keys that decide what is left out in training: `threshold` entries of 256."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.threshold = round(256 * share)

    def forward(self, count: int, device: torch.device) -> Tensor | None:
        """So many keys (count, 2) for `kernels.add_norm`; None where nothing is to be left out."""
        if not self.training or self.threshold == 0:
            return None
        return torch.randint(1 << 62, (count, 2), device=device)


class AddNorm(nn.Module):
    """Adds a branch to the residual stream, in training without what dropout leaves out, and normalises the sum."""

    def __init__(self, config: ModelConfig, dropout: Dropout) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.model_dim))
        self.threshold, self.eps = dropout.threshold, config.norm_eps

    def forward(self, x: Tensor, branch: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of x and branch, and its norm, (batch, seqlen, model_dim) each; key: one of Dropout's."""
        return kernels.add_norm(x, branch, key, self.weight, threshold=self.threshold, eps=self.eps)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, attention: str, dropout: Dropout) -> None:
        super().__init__()
        self.input_layernorm = AddNorm(config, dropout)
        self.self_attn = Attention(config, attention)
        self.post_attention_layernorm = AddNorm(config, dropout)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, branch: Tensor, keys: Tensor | None, copies: tuple[Tensor | None, ...], *context
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what has yet to be added to it: both as the layer before left them.

        keys    (2, 2) of Dropout, for that branch and for attention's, or None
        copies  of the weights of the four products, or None for each
        """
        first, second = (None, None) if keys is None else keys
        x, h = self.input_layernorm(x, branch, first)
        x, h = self.post_attention_layernorm(x, self.self_attn(h, copies[:2], *context), second)
        return x, self.mlp(h, copies[2:])


def _products(layer: Any) -> list[list[nn.Linear]]:
    """A layer's linear maps, those together that are applied as one product."""
    a, m = layer.self_attn, layer.mlp
    return [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]]


class Decoder(nn.Module):
    """Everything below the logits; Hugging Face calls this part `model`."""

    def __init__(self, config: ModelConfig, attention: str, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(Layer(config, attention, self.dropout) for _ in range(config.num_layers))
        self.norm = AddNorm(config, self.dropout)
        self.rotary = RotaryPositions(config)


class Transformer(nn.Module):
    """A causal language model.

    attention  "fused" (kernels.flash_attention) or "classic" (kernels.classic_attention) for training and prefill.
    dropout    in training, the share of what the embedding and each layer's two parts yield that is left out

    Raises ValueError if attention is neither.
    """

    def __init__(self, config: ModelConfig, attention: str = "fused", dropout: float = 0.0) -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention: got {attention!r}, allowed are {', '.join(map(repr, ATTENTION))}")
        self.config, self.attention = config, attention
        self.model = Decoder(config, attention, dropout)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights; those that write into the residual stream shrink with depth (GPT-2, section 2.3)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        residual = module.o_proj if isinstance(module, Attention) else getattr(module, "down_proj", None)
        if residual is not None:
            nn.init.normal_(residual.weight, std=0.02 / (2 * self.config.num_layers) ** 0.5)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (batch, seqlen, vocab_size) of token_ids (batch, seqlen) int64."""
        return self.logits(self.hidden(token_ids, cache))

    def hidden(
        self, token_ids: Tensor, cache: KVCache | None = None, documents: Tensor | None = None, recompute: bool = False
    ) -> Tensor:
        """The last layer's normalised output (batch, seqlen, model_dim), for callers who need few logits, or losses.

        documents  (num_documents + 1,) int32, where each begins in the batch * seqlen tokens: attention stays within
        recompute  keep each layer's input alone, and compute the rest of it again when its gradients are asked for
                   (Chen et al., arXiv:1604.06174)

        Raises ValueError if the tokens exceed max_seqlen or the cache's capacity.
        """
        _, seqlen = token_ids.shape
        if seqlen > self.config.max_seqlen:
            raise ValueError(f"token_ids: got {seqlen} tokens, the model's context holds {self.config.max_seqlen}")
        prefill = cache is None or cache.longest == 0
        positions = torch.arange(seqlen, device=token_ids.device)[None]  # (1, seqlen)
        if cache is not None:
            positions = positions + cache.seqlens[:, None]  # (batch, seqlen)
            cache.grow(seqlen)
        cos, sin = self.model.rotary(positions)
        branch = self._embedded(token_ids)  # (batch, seqlen, model_dim)
        x = torch.zeros_like(branch)
        copies = self._copies(token_ids.device.type)
        keys = self.model.dropout(2 * len(self.model.layers) + 1, x.device)
        for number, layer in enumerate(self.model.layers):
            own_keys = None if keys is None else keys[2 * number : 2 * number + 2]
            own_copies = copies[4 * number : 4 * number + 4]
            arguments = (x, branch, own_keys, own_copies, cos, sin, cache, number, positions, prefill, documents)
            if recompute:  # what is random is an argument
                x, branch = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, branch = layer(*arguments)
        return self.model.norm(x, branch, None if keys is None else keys[-1])[1]

    def _copies(self, kind: str) -> tuple[Tensor | None, ...]:
        """In autocast's dtype, for training: of the weights of each layer's four `_products`.

        None for each on the CPU, where nothing is gained, where nothing is rounded, and for slices, which each layer
        gathers by itself (FSDP2).
        """
        products = [linears for layer in self.model.layers for linears in _products(layer)]
        weights = [linear.weight for linears in products for linear in linears]
        rounded = kind == "cuda" and torch.is_grad_enabled() and torch.is_autocast_enabled(kind)
        if not rounded or hasattr(weights[0], "full_tensor"):
            return (None,) * len(products)
        counts = tuple(len(linears) for linears in products)
        return Copies.apply(torch.get_autocast_dtype(kind), counts, *weights)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """In the dtype of autocast, if it is on: what the layers add to is then half the traffic."""
        weight, kind = self.model.embed_tokens.weight, token_ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        if kind == "cuda" and torch.is_grad_enabled() and len(weight) <= _SMALL_VOCABULARY:
            one_hot = torch.zeros(*token_ids.shape, len(weight), dtype=dtype, device=token_ids.device)
            return one_hot.scatter_(-1, token_ids[..., None], 1.0) @ weight
        return self.model.embed_tokens(token_ids).to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., model_dim) -> (..., vocab_size), by the tied embedding."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target, (batch * seqlen,) fp32, of what `hidden` gave and targets (batch, seqlen) int64."""
        return kernels.cross_entropy(self.logits(hidden), targets).flatten()
