"""From a prompt to text, a line a stage:

    prompt -> tokenizer -> token ids -> model (attention op) -> logits -> sampler op -> token ids -> text

    lm = toy_lm.load("runs/sample")
    lm.generate("the quick brown", max_new_tokens=30, top_k=50)

The model reads each token once: its keys and values stay in a cache (`kernels.flash_attention` fills it from the
prompt, `kernels.decode_attention` reads it for each new token). A text of n tokens that is longer than the context is
read through a window, its tokens from `window_start(n, context)` on: when the window is full, its older half is
dropped and the newer half is read afresh. The window depends on n alone, not on where the prompt ended.

Knows the model, the tokenizer and the ops; knows nothing of training, or of how the text is shown.
"""

import codecs
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import kernels
from toy_lm import checkpoint
from toy_lm.device import autocast_dtype, pick_device
from toy_lm.model import KVCache, Transformer
from toy_lm.tokenizer import Tokenizer

EMPTY_PROMPT = "\n"  # what the model is given where the prompt is empty: the text begins after a line's end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn, see `kernels.sample`: None switches a filter off, temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0  # sample number i of a prompt is drawn with seed + i


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One new token and what stood behind it."""

    token_id: int
    text: str  # the characters that this token completed, often none or several
    probability: float  # the model's own, before temperature and filters
    candidates: list[tuple[int, float]]  # the likeliest tokens and their probabilities, likeliest first


def load(
    folder: str | pathlib.Path, *, device: str = "auto", attention: str = "fused", dtype: torch.dtype | None = None
) -> "LanguageModel":
    """The model in a run folder, ready to generate.

    device     "cpu", "cuda", or "auto": CUDA where there is a device
    attention  "fused" or "classic", for the reading of the prompt
    dtype      of the weights and the cache; None: bfloat16 on a GPU that computes in it, else float32

    Raises ValueError, in one line, for a folder that holds no whole model, or a device that is not there.
    """
    where = pick_device(device)
    saved = checkpoint.load(folder)
    model = saved.model(attention=attention, device=where)
    for parameter in model.parameters():  # the buffers, cosines and sines of the positions, stay in fp32
        parameter.data = parameter.data.to(dtype or autocast_dtype(where) or torch.float32)
    return LanguageModel(model, saved.tokenizer)


def window_start(num_tokens: int, context: int) -> int:
    """Where the window over a text of num_tokens begins: the least multiple of half a context from which it fits."""
    half = max(1, context // 2)
    return max(0, -((context - num_tokens) // half) * half)


class LanguageModel:
    """A model and its tokenizer, on one device."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.binding = kernels.load(self.device)

    def generate(self, prompt: str, *, max_new_tokens: int = 200, num_samples: int = 1, **sampling) -> list[str]:
        """num_samples continuations of the prompt, without the prompt itself.

        sampling: the fields of `Sampling`. The same arguments give the same texts; sample i is what seed + i gives
        alone. Bytes that are not UTF-8 come out as U+FFFD; a character left unfinished at the very end is left out.

        Raises ValueError for bad input, FloatingPointError if the model's logits are not finite.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, needs 1 or more")
        settings = Sampling(**sampling)
        return self._texts([prompt] * num_samples, max_new_tokens, settings, _seeds(settings, num_samples))

    def generate_batch(self, prompts: Sequence[str], *, max_new_tokens: int = 200, **sampling) -> list[str]:
        """A continuation of each prompt: the same as `generate` gives for it alone."""
        if not prompts:
            raise ValueError("prompts: got none, needs 1 or more")
        settings = Sampling(**sampling)
        return self._texts(prompts, max_new_tokens, settings, _seeds(settings, 1) * len(prompts))

    def stream(self, prompt: str, *, max_new_tokens: int = 200, **sampling) -> Iterator[str]:
        """The text that `generate` returns, piece by piece as the tokens come, never half a character."""
        for step in self.steps(prompt, max_new_tokens=max_new_tokens, **sampling):
            if step.text:
                yield step.text

    def steps(self, prompt: str, *, max_new_tokens: int = 200, num_candidates: int = 0, **sampling) -> Iterator[Step]:
        """Token by token: each with the `num_candidates` likeliest tokens that the model saw in its place."""
        if not 0 <= num_candidates <= self.tokenizer.vocab_size:
            allowed = f"0 to {self.tokenizer.vocab_size}, the vocabulary"
            raise ValueError(f"num_candidates: got {num_candidates}, needs {allowed}")
        settings = Sampling(**sampling)
        decoder = _Utf8Decoder(self.tokenizer)
        for token_ids, logits in self._tokens([prompt], max_new_tokens, settings, _seeds(settings, 1)):
            token_id = int(token_ids.item())
            self._check([[token_id]])
            probability, candidates = float("nan"), []
            if num_candidates:
                probabilities = logits[0].float().softmax(dim=-1)
                values, indices = kernels.top_k(probabilities, num_candidates)
                probability = probabilities[token_id].item()
                candidates = list(zip(indices.tolist(), values.tolist(), strict=True))
            yield Step(token_id=token_id, text=decoder.decode(token_id), probability=probability, candidates=candidates)

    def prompt_ids(self, prompt: str) -> list[int]:
        """prompt -> tokenizer -> token ids; an empty prompt stands for a line's end."""
        return self.tokenizer.encode(prompt or EMPTY_PROMPT)

    def _texts(self, prompts: Sequence[str], max_new_tokens: int, settings: Sampling, seeds: list[int]) -> list[str]:
        new = [token_ids for token_ids, _ in self._tokens(prompts, max_new_tokens, settings, seeds)]
        rows = torch.stack(new, dim=1).tolist() if new else [[] for _ in prompts]
        self._check(rows)
        texts = []
        for row in rows:
            decoder = _Utf8Decoder(self.tokenizer)
            texts.append("".join(decoder.decode(token_id) for token_id in row))  # token ids -> text
        return texts

    def _tokens(
        self, prompts: Sequence[str], max_new_tokens: int, settings: Sampling, seeds: list[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each new token: token ids (batch,) and the logits (batch, vocab_size) that they were drawn from."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, needs 0 or more")
        token_ids = [self.prompt_ids(prompt) for prompt in prompts]  # prompt -> tokenizer -> token ids
        reader = Reader(self.model, token_ids, max_new_tokens)
        row_seeds = torch.tensor(seeds, device=self.device)
        for step in range(max_new_tokens):
            logits = reader.logits()[:, : self.tokenizer.vocab_size]  # token ids -> model (attention op) -> logits
            new = kernels.sample(  # logits -> sampler op -> token ids
                logits,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
                seed=row_seeds,
                step=step,
            )
            assert isinstance(new, Tensor)
            reader.append(new)
            yield new, logits

    def _check(self, rows: list[list[int]]) -> None:
        """The sampler marks a row of logits that it cannot draw from with -1."""
        for number, row in enumerate(rows):
            if -1 in row:
                raise FloatingPointError(
                    f"the model's logits are not finite at new token {row.index(-1)} of text {number}; "
                    "its weights may be damaged, or too large for the precision"
                )


class Reader:
    """The texts of a batch while they grow: gives the model each token once, and returns the logits behind the last."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.context = model.config.max_seqlen
        self.lengths = [len(prompt) for prompt in prompts]
        self.starts = [-1] * len(prompts)  # of the windows that the cache holds
        self.end = max(self.lengths)
        weight = model.model.embed_tokens.weight
        # The texts end in the same column, self.end, so that a new token of each is a new column.
        self.token_ids = torch.zeros((len(prompts), self.end + max_new_tokens), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.token_ids[row, self.end - len(prompt) : self.end] = torch.tensor(prompt)
        self.token_ids = self.token_ids.to(weight.device)
        capacity = min(self.context, self.token_ids.shape[1])
        self.cache = KVCache(model.config, len(prompts), capacity, device=weight.device, dtype=weight.dtype)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """(batch, vocab_size), for the token after the last of each text."""
        starts = [window_start(length, self.context) for length in self.lengths]
        moved = [row for row, start in enumerate(starts) if start != self.starts[row]]
        self.starts = starts
        if moved:
            self._read_windows(moved)
        return self.model(self.token_ids[:, self.end - 1 : self.end], self.cache)[:, -1]

    def append(self, new: Tensor) -> None:
        """Add token ids (batch,) to the texts; -1, which is no token, is read as 0 and left to the caller."""
        self.token_ids[:, self.end] = new.clamp(min=0)
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _read_windows(self, rows: list[int]) -> None:
        """Fill the cache of these texts with their windows, all but the last token, which comes next for every text."""
        device = self.token_ids.device
        sizes = [length - start - 1 for length, start in zip(self.lengths, self.starts, strict=True)]
        longest = max(sizes[row] for row in rows)
        if longest > 0:
            index = torch.tensor(rows, device=device)
            begins = torch.tensor([self.end - 1 - sizes[row] for row in rows], device=device)
            # What lies behind a shorter text is not masked: no earlier token sees it, and its keys are never read.
            columns = (begins[:, None] + torch.arange(longest, device=device)).clamp(max=self.end - 1)
            fresh = KVCache(self.model.config, len(rows), longest, device=device, dtype=self.cache.k.dtype)
            self.model.hidden(self.token_ids[index[:, None], columns], fresh)
            self.cache.k[:, index, :, :longest] = fresh.k
            self.cache.v[:, index, :, :longest] = fresh.v
        self.cache.set_seqlens(torch.tensor(sizes, dtype=torch.int32, device=device), max(sizes))


class _Utf8Decoder:
    """Token ids one by one -> text, held back until a character is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token_id: int) -> str:
        return self.utf8.decode(self.tokenizer.token_bytes(token_id))


def _seeds(settings: Sampling, num_samples: int) -> list[int]:
    if not 0 <= settings.seed <= 2**63 - num_samples:
        raise ValueError(f"seed: got {settings.seed}, needs a whole number from 0 to 2^63 - {num_samples}")
    return [settings.seed + sample for sample in range(num_samples)]
