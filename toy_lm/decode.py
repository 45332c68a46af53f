"""The texts of a batch while they grow: the prompts are read, then each text gets one token after the other.

    start    the prompts' tokens stand in a table, the cache is empty
    next     windows that moved are read afresh (prefill) -> one step for every text -> its next token

A step needs nothing from the host: the tokens, their positions, seeds and step numbers lie on the device. On CUDA it is
captured as one graph, from the embedding to the drawn token, once it has run a few times, and replayed from then on.

Knows the model's weights and the ops; knows nothing of text or tokenizers.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from toy_lm.model import KVCache, Transformer

_STEPS_BEFORE_CAPTURE = 2  # libraries allocate their workspaces, Triton compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn, see `kernels.sample`: None switches a filter off, temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0  # sample number i of a prompt is drawn with seed + i


def window_start(num_tokens: int, context: int) -> int:
    """Where the window over a text of num_tokens begins: the least multiple of half a context from which it fits."""
    half = max(1, context // 2)
    return max(0, -((context - num_tokens) // half) * half)


def pack(model: Transformer) -> kernels.DecodeWeights:
    """The model's weights as `kernels.decode_step` takes them; the model's own become views of these."""
    decoder = model.model
    layers = list(decoder.layers)

    def stack(*names: str) -> Tensor:
        """The parameters of these names, one below the other, for every layer: (num_layers, rows, ...)."""
        parameters = [[layer.get_parameter(name) for name in names] for layer in layers]
        stacked = torch.stack([torch.cat([parameter.data for parameter in row]) for row in parameters])
        for of_layer, row in zip(stacked, parameters, strict=True):
            for parameter, part in zip(row, of_layer.split([len(parameter) for parameter in row]), strict=True):
                parameter.data = part
        return stacked

    return kernels.DecodeWeights(
        embedding=decoder.embed_tokens.weight.data,
        input_norm=stack("input_layernorm.weight"),
        qkv=stack("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        q_norm=stack("self_attn.q_norm.weight"),
        k_norm=stack("self_attn.k_norm.weight"),
        o=stack("self_attn.o_proj.weight"),
        post_norm=stack("post_attention_layernorm.weight"),
        gate_up=stack("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        down=stack("mlp.down_proj.weight"),
        final_norm=decoder.norm.weight.data,
        cos=decoder.rotary.cos,
        sin=decoder.rotary.sin,
    )


class Decoder:
    """Draws the tokens of `batch_size` texts; used for one batch of texts after the other.

    vocab_size  of the tokenizer: logits beyond it, where the model's vocabulary is rounded up, are never drawn
    """

    def __init__(
        self, model: Transformer, weights: kernels.DecodeWeights, batch_size: int, vocab_size: int, sampling: Sampling
    ) -> None:
        self.model, self.weights, self.vocab_size, self.sampling = model, weights, vocab_size, sampling
        self.context = model.config.max_seqlen
        device = weights.embedding.device
        self.cache = KVCache(model.config, batch_size, self.context, device=device, dtype=weights.embedding.dtype)
        self.last = torch.zeros(batch_size, dtype=torch.int64, device=device)  # the token that each text ends in
        self.seeds = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # of the step
        self.captures = device.type == "cuda" and kernels.load(device).kind == "fused"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outcome: tuple[Tensor, Tensor] | None = None  # what the graph writes
        self.num_eager = 0

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]) -> None:
        """Begin with these prompts, token ids each; no prompt is empty."""
        device = self.last.device
        self.lengths = [len(prompt) for prompt in prompts]
        self.starts = [-1] * len(prompts)  # of the windows that the cache holds
        self.end = max(self.lengths)
        # The texts end in the same column, self.end, so that a new token of each is a new column.
        token_ids = torch.zeros((len(prompts), self.end + max_new_tokens), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_ids[row, self.end - len(prompt) : self.end] = torch.tensor(prompt)
        self.last.copy_(token_ids[:, self.end - 1])
        self.token_ids = token_ids.to(device)
        self.seeds.copy_(torch.tensor(seeds))
        self.number.zero_()

    @torch.inference_mode()
    def next(self) -> tuple[Tensor, Tensor]:
        """The next token of each text, (batch,), -1 where its logits are not finite; and the logits it was drawn from.

        Both are written anew by the next call.
        """
        starts = [window_start(length, self.context) for length in self.lengths]
        moved = [row for row, start in enumerate(starts) if start != self.starts[row]]
        self.starts = starts
        if moved:
            self._read_windows(moved)
        new, logits = self._step()
        self.token_ids[:, self.end] = new
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return new, logits

    def _step(self) -> tuple[Tensor, Tensor]:
        if not self.captures:
            return self._step_eagerly()
        if self.graph is None and self.num_eager == _STEPS_BEFORE_CAPTURE:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outcome = self._step_eagerly()
        if self.graph is None or self.outcome is None:
            self.num_eager += 1
            return self._step_eagerly()
        self.graph.replay()
        return self.outcome

    def _step_eagerly(self) -> tuple[Tensor, Tensor]:
        cache, sampling = self.cache, self.sampling
        logits = kernels.decode_step(  # token ids -> model (attention op) -> logits
            self.last, cache.seqlens, cache.k, cache.v, self.weights, norm_eps=self.model.config.norm_eps
        )[:, : self.vocab_size]
        new = kernels.sample(  # logits -> sampler op -> token ids
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=self.seeds,
            step=self.number,
        )
        assert isinstance(new, Tensor)
        torch.clamp(new, min=0, out=self.last)  # -1 is no token; whoever asked for it stops
        cache.seqlens.add_(1)
        self.number.add_(1)
        return new, logits

    def _read_windows(self, rows: list[int]) -> None:
        """Fill the cache of these texts with their windows, all but the last token, which comes next for every text."""
        device = self.last.device
        sizes = [length - start - 1 for length, start in zip(self.lengths, self.starts, strict=True)]
        longest = max(sizes[row] for row in rows)
        if longest > 0:
            index = torch.tensor(rows, device=device)
            begins = torch.tensor([self.end - 1 - sizes[row] for row in rows], device=device)
            # What lies behind a shorter text is not masked: no earlier token sees it, and its keys are never read.
            columns = (begins[:, None] + torch.arange(longest, device=device)).clamp(max=self.end - 1)
            fresh = KVCache(self.model.config, len(rows), longest, device=device, dtype=self.cache.k.dtype)
            self.model.hidden(self.token_ids[index[:, None], columns].clamp(min=0), fresh)
            self.cache.k[:, index, :, :longest] = fresh.k
            self.cache.v[:, index, :, :longest] = fresh.v
        self.cache.set_seqlens(torch.tensor(sizes, dtype=torch.int32, device=device), max(sizes))
