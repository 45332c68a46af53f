"""The texts of a batch while they grow: a prompt joins in a row, then each text gets one token after the other.

    join     prompts begin in rows that are idle
    next     windows that are new or moved are read (prefill) -> steps for every text -> its next tokens
    leave    rows are idle again; the other texts notice neither

A step needs nothing from the host: the tokens, their positions, seeds and step numbers lie on the device. On CUDA it is
captured as one graph, from the embedding to the drawn token, once it has run a few times, and replayed from then on;
where many tokens are asked for, as a graph of several steps. So is the reading of a single prompt, for a few lengths.

Knows the model's weights and the ops; knows nothing of text or tokenizers.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from toy_lm.model import KVCache, Transformer

_STEPS_BEFORE_CAPTURE = 2  # libraries allocate their workspaces, Triton compiles
# Between two graphs the GPU has nothing to do for tens of microseconds; the more steps in one, the longer its launch.
_STEPS_AT_ONCE = (1, 4, 16, 64)
_LEAST_PROMPT = 64  # tokens that a graph reads; the next one reads twice as many
_PADDING = 32  # windows that differ by fewer tokens than this are read together
_TOKENS_AT_ONCE = 16384  # that are read together: a bound on the memory it takes


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


def pack(model: Transformer, int8: bool = False) -> kernels.DecodeWeights:
    """The model's weights as `kernels.decode_step` takes them, packed; the model's own become views of what was packed.

    int8: the matrices rounded to int8; the model's own, with which prompts are read, become what these stand for.
    """
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

    weights = kernels.DecodeWeights(
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
    if not int8:
        return weights.packed()
    rounded = weights.to_int8()
    for name in ("qkv", "o", "gate_up", "down"):
        getattr(weights, name).copy_(getattr(rounded, name) * getattr(rounded, f"{name}_scale")[..., None])
    return rounded.packed()


class PromptReader:
    """Reads windows. What it gives back is written anew by the next call.

    With packed weights that is a decode step of many tokens, unless classic attention is asked for; otherwise, and with
    int8, whose products are slower, the model reads them. On CUDA a window that comes alone is padded to a power of
    two, and read by a graph from the second of that size on: launched one by one, the kernels would take the host
    several times as long as they run.
    """

    def __init__(self, model: Transformer, weights: kernels.DecodeWeights) -> None:
        self.model, self.weights = model, weights
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.captures = self.device.type == "cuda" and kernels.load(self.device).kind == "fused"
        packed = weights.qkv.dim() > 3 and weights.qkv_scale is None
        self.in_one_step = packed and model.attention == "fused"
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, KVCache]] = {}  # by the number of tokens
        self.seen: set[int] = set()

    def read(self, windows: Sequence[Sequence[int]]) -> KVCache:
        """The keys and values of token ids, a sequence for each, none longer than the last."""
        size = len(windows[-1])
        alone = self.captures and len(windows) == 1
        if alone:
            size = min(self.model.config.max_seqlen, max(_LEAST_PROMPT, 1 << (size - 1).bit_length()))
        # What stands behind a shorter window is not masked: no earlier token sees it, and its keys are never read.
        token_ids = torch.tensor([[*window, *[0] * (size - len(window))] for window in windows])
        if not alone or size not in self.seen:
            if alone:
                self.seen.add(size)
            return self._read(token_ids.to(self.device))
        if size not in self.graphs:
            given, graph = token_ids.to(self.device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.graphs[size] = graph, given, self._read(given)
        graph, given, cache = self.graphs[size]
        given.copy_(token_ids)
        graph.replay()
        return cache

    def _read(self, token_ids: Tensor) -> KVCache:
        config = self.model.config
        cache = KVCache(config, *token_ids.shape, device=self.device, dtype=self.dtype)
        if self.in_one_step:
            positions = torch.arange(token_ids.shape[1], dtype=torch.int32).expand(token_ids.shape).contiguous()
            kernels.decode_step(token_ids, positions, cache.k, cache.v, self.weights, norm_eps=config.norm_eps)
        else:
            self.model.hidden(token_ids, cache)
        return cache


class Decoder:
    """Draws the tokens of up to `batch_size` texts, each in a row of its own; the other rows are idle.

    vocab_size  of the tokenizer: logits beyond it, where the model's vocabulary is rounded up, are never drawn
    """

    def __init__(
        self, reader: PromptReader, weights: kernels.DecodeWeights, batch_size: int, vocab_size: int, sampling: Sampling
    ) -> None:
        self.reader, self.weights, self.vocab_size, self.sampling = reader, weights, vocab_size, sampling
        self.config = reader.model.config
        self.context, device = self.config.max_seqlen, reader.device
        self.cache = KVCache(self.config, batch_size, self.context, device=device, dtype=reader.dtype)
        self.texts: list[list[int]] = [[] for _ in range(batch_size)]  # empty where the row is idle
        self.starts = [-1] * batch_size  # of the windows that the cache holds; -1: none
        self.unread: list[Tensor] = []  # tokens that were drawn and that `texts` lacks, (batch, any number) each
        self.num_unread = 0
        self.seeds, self.joined = [0] * batch_size, [0] * batch_size  # of each text: its seed, its prompt's length
        self.changed = False  # does the device lack something that the host knows of the rows?
        self.state = torch.zeros((5, batch_size), dtype=torch.int64, device=device)  # a step's whole input, see `_tell`
        self.steps = torch.arange(_STEPS_AT_ONCE[-1] + 1, device=device)[:, None]
        self.ahead = self.steps * self.state[4]  # by how much each row's position has grown before each of them
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}  # by their number of steps
        self.num_eager = 0
        self.unchecked = True  # has no step been taken with this cache and these weights?

    def join(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        """Begin with these prompts, token ids each, none empty, in these rows."""
        self.read()
        for row, prompt, seed in zip(rows, prompts, seeds, strict=True):
            self.texts[row], self.starts[row], self.seeds[row], self.joined[row] = list(prompt), -1, seed, len(prompt)
        self.changed = True

    def leave(self, rows: Sequence[int]) -> None:
        """The texts in these rows are over."""
        self.read()
        for row in rows:
            self.texts[row], self.starts[row] = [], -1
        self.changed = True

    def _tell(self) -> None:
        """Give the device what a step needs, in one copy: for each row

        the token that its text ends in, how many were drawn before, its position, its seed, and 1 if there is a text.
        """
        rows = zip(self.texts, self.joined, self.starts, self.seeds, strict=True)
        known = [
            (text[-1], len(text) - joined, len(text) - start - 1, seed, 1) if text else (0, 0, 0, 0, 0)
            for text, joined, start, seed in rows
        ]
        self.state.copy_(torch.tensor(known).T)
        torch.mul(self.steps, self.state[4], out=self.ahead)
        self.changed = False

    def read(self) -> None:
        """Wait for the tokens that were drawn and add them to `texts`."""
        if self.unread:
            for text, new in zip(self.texts, torch.cat(self.unread, dim=1).clamp(min=0).tolist(), strict=True):
                text.extend(new if text else ())
            self.unread, self.num_unread = [], 0

    @torch.inference_mode()
    def next(self, count: int = 1) -> tuple[Tensor, Tensor]:
        """The next tokens of each text, (batch, count) or fewer, at least one: up to where a window moves.

        A token is -1 where its logits are not finite, and any number in an idle row. Also the logits that the last
        one was drawn from, (batch, vocab_size), written anew by the next call.
        """
        windows = {
            row: window_start(len(text) + self.num_unread, self.context) for row, text in enumerate(self.texts) if text
        }
        moved = [row for row, start in windows.items() if start != self.starts[row]]
        if moved:
            self.read()
            for row in moved:
                self.starts[row] = windows[row]
            self._read_windows(moved)
        if moved or self.changed:
            self._tell()
        room = [start + self.context + 1 - len(self.texts[row]) - self.num_unread for row, start in windows.items()]
        count = min([count, *room])
        drawn: list[Tensor] = []
        while count:
            new, logits = self._steps(count)
            drawn.append(new)
            count -= new.shape[1]
        self.unread += drawn
        self.num_unread += sum(new.shape[1] for new in drawn)
        return torch.cat(drawn, dim=1), logits

    def _steps(self, most: int) -> tuple[Tensor, Tensor]:
        """The tokens (batch, count) of some steps, not more than `most`, and the logits of the last."""
        if not self.reader.captures:
            return self._run(min(most, _STEPS_AT_ONCE[-1]))
        if self.num_eager < _STEPS_BEFORE_CAPTURE:
            self.num_eager += 1
            return self._run(1)
        # The remainder first: the GPU begins at once, and is busy while the host launches what takes longer.
        count = next((few for few, more in itertools.pairwise(_STEPS_AT_ONCE) if most % more), _STEPS_AT_ONCE[-1])
        if count not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.graphs[count] = graph, *self._run(count)
        graph, new, logits = self.graphs[count]
        graph.replay()
        return new.clone(), logits

    def _run(self, count: int) -> tuple[Tensor, Tensor]:
        """The tokens (batch, count) of as many steps, and the logits of the last."""
        cache, sampling = self.cache, self.sampling
        counts = self.state[1:3] + self.ahead[: count + 1, None]  # (count + 1, 2, batch): before each step, at the end
        numbers, positions = counts[:, 0], counts[:, 1].int()
        token_ids, drawn = self.state[0], []
        for number, position in zip(numbers[:-1], positions[:-1], strict=True):
            logits = kernels.decode_step(  # token ids -> model (attention op) -> logits
                token_ids, position, cache.k, cache.v, self.weights, norm_eps=self.config.norm_eps, check=self.unchecked
            )
            self.unchecked = False
            if self.vocab_size < logits.shape[1]:
                logits = logits[:, : self.vocab_size]
            new = kernels.sample(  # logits -> sampler op -> token ids
                logits,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=self.state[3],
                step=number,
            )
            assert isinstance(new, Tensor)
            token_ids = new  # -1 is no token: the next step takes it for 0, and whoever asked for it stops
            drawn.append(new)
        torch.stack((token_ids, *counts[-1]), out=self.state[:3])
        return torch.stack(drawn, dim=1), logits

    def _read_windows(self, rows: list[int]) -> None:
        """Fill the cache of these texts with their windows, all but the last token, which comes next for every text.

        Equal windows are read once, and windows of nearly equal length together.
        """
        readers: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            readers.setdefault(tuple(self.texts[row][self.starts[row] : -1]), []).append(row)
        batch: list[tuple[int, ...]] = []
        for window in sorted(readers, key=len):
            if batch and (len(window) >= len(batch[0]) + _PADDING or len(window) * (len(batch) + 1) > _TOKENS_AT_ONCE):
                self._prefill(batch, readers)
                batch = []
            if window:
                batch.append(window)
        if batch:
            self._prefill(batch, readers)

    def _prefill(self, windows: list[tuple[int, ...]], readers: dict[tuple[int, ...], list[int]]) -> None:
        """Read these windows, shortest first, and give the keys and values of each to the rows that it stands in."""
        longest = len(windows[-1])
        fresh = self.reader.read(windows)
        pairs = [(number, row) for number, window in enumerate(windows) for row in readers[window]]
        source, target = torch.tensor(pairs, device=self.state.device).T if len(pairs) > 1 else pairs[0]
        for cached, new in ((self.cache.k, fresh.k), (self.cache.v, fresh.v)):
            cached[:, target, :, :longest] = new[:, source, :, :longest]
