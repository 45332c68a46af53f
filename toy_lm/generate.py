"""From a prompt to text, a line a stage:

    prompt -> tokenizer -> token ids -> model (attention op) -> logits -> sampler op -> token ids -> text

    lm = toy_lm.load("runs/sample")
    lm.generate("the quick brown", max_new_tokens=30, top_k=50)

The model reads each token once: its keys and values stay in a cache, which is filled from the prompt, by
`kernels.flash_attention` or on a CPU by `kernels.decode_step`, which reads it for each new token (decode.py). A text of
n tokens that is longer than the context is read through a window, its tokens from `window_start(n, context)` on: when
the window is full, its older half is dropped and the newer half is read afresh. The window depends on n alone, not on
where the prompt ended.

Knows the model, the tokenizer and the ops; knows nothing of training, or of how the text is shown.
"""

import codecs
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

import kernels
from toy_lm import checkpoint
from toy_lm.decode import Decoder, PromptReader, Sampling, pack
from toy_lm.device import autocast_dtype, pick_device
from toy_lm.model import Transformer
from toy_lm.tokenizer import Tokenizer

EMPTY_PROMPT = "\n"  # what the model is given where the prompt is empty: the text begins after a line's end

_STOP_EVERY = 64  # tokens of every text between two looks for `stop`: each look waits for the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One new token and what stood behind it."""

    token_id: int
    text: str  # the characters that this token completed, often none or several
    probability: float  # the model's own, before temperature and filters
    candidates: list[tuple[int, float]]  # the likeliest tokens and their probabilities, likeliest first


def load(
    folder: str | pathlib.Path,
    *,
    device: str = "auto",
    attention: str = "fused",
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> "LanguageModel":
    """The model in a run folder, ready to generate.

    device     "cpu", "cuda", or "auto": CUDA where there is a device
    attention  "fused" or "classic", for the reading of the prompt
    dtype      of the weights and the cache; None: bfloat16 on a GPU that computes in it, else float32
    int8       round the layers' matrices to int8, a scale a row: fewer bytes to read for each token

    Raises ValueError, in one line, for a folder that holds no whole model, or a device that is not there.
    """
    where = pick_device(device)
    saved = checkpoint.load(folder)
    model = saved.model(attention=attention, device=where)
    for parameter in model.parameters():  # the buffers, cosines and sines of the positions, stay in fp32
        parameter.data = parameter.data.to(dtype or autocast_dtype(where) or torch.float32)
    return LanguageModel(model, saved.tokenizer, int8=int8)


class LanguageModel:
    """A model and its tokenizer, on one device."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, int8: bool = False) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.binding = kernels.load(self.device)
        self.weights = pack(self.model, int8)
        self.reader = PromptReader(self.model, self.weights)
        self._kept: dict[tuple[int, Sampling], Decoder] = {}

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        num_samples: int = 1,
        stop: str | None = None,
        **sampling,
    ) -> list[str]:
        """num_samples continuations of the prompt, without the prompt itself.

        stop: a text ends before the first `stop` in it. sampling: the fields of `Sampling`. The same arguments give the
        same texts; sample i is what seed + i gives alone. Bytes that are not UTF-8 come out as U+FFFD; a character left
        unfinished at the very end is left out.

        Raises ValueError for bad input, FloatingPointError if the model's logits are not finite.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, needs 1 or more")
        settings = Sampling(**sampling)
        return self._texts([prompt] * num_samples, max_new_tokens, stop, settings, _seeds(settings, num_samples))

    def generate_batch(
        self, prompts: Sequence[str], *, max_new_tokens: int = 200, stop: str | None = None, **sampling
    ) -> list[str]:
        """A continuation of each prompt: the same as `generate` gives for it alone."""
        if not prompts:
            raise ValueError("prompts: got none, needs 1 or more")
        settings = Sampling(**sampling)
        return self._texts(prompts, max_new_tokens, stop, settings, _seeds(settings, 1) * len(prompts))

    def stream(self, prompt: str, *, max_new_tokens: int = 200, stop: str | None = None, **sampling) -> Iterator[str]:
        """The text that `generate` returns, piece by piece as the tokens come, never half a character."""
        for step in self.steps(prompt, max_new_tokens=max_new_tokens, stop=stop, **sampling):
            if step.text:
                yield step.text

    def steps(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        num_candidates: int = 0,
        stop: str | None = None,
        **sampling,
    ) -> Iterator[Step]:
        """Token by token: each with the `num_candidates` likeliest tokens that the model saw in its place."""
        if not 0 <= num_candidates <= self.tokenizer.vocab_size:
            allowed = f"0 to {self.tokenizer.vocab_size}, the vocabulary"
            raise ValueError(f"num_candidates: got {num_candidates}, needs {allowed}")
        settings = Sampling(**sampling)
        decoder = TextDecoder(self.tokenizer, stop)
        tokens = self._tokens([prompt], max_new_tokens, settings, _seeds(settings, 1), at_once=1)
        for number, (token_ids, logits) in enumerate(tokens, 1):
            token_id = int(token_ids.item())
            self.check([[token_id]], number - 1)
            probability, candidates = float("nan"), []
            if num_candidates:
                probabilities = logits[0].float().softmax(dim=-1)
                values, indices = kernels.top_k(probabilities, num_candidates)
                probability = probabilities[token_id].item()
                candidates = list(zip(indices.tolist(), values.tolist(), strict=True))
            text = decoder.decode(token_id, last=number == max_new_tokens)
            yield Step(token_id=token_id, text=text, probability=probability, candidates=candidates)
            if decoder.stopped:
                return

    def prompt_ids(self, prompt: str) -> list[int]:
        """prompt -> tokenizer -> token ids; an empty prompt stands for a line's end."""
        return self.tokenizer.encode(prompt or EMPTY_PROMPT)

    def _texts(
        self, prompts: Sequence[str], max_new_tokens: int, stop: str | None, settings: Sampling, seeds: list[int]
    ) -> list[str]:
        decoders = [TextDecoder(self.tokenizer, stop) for _ in prompts]
        texts = [""] * len(prompts)
        num_tokens = 0
        for new, _ in self._tokens(prompts, max_new_tokens, settings, seeds, _STOP_EVERY if stop else sys.maxsize):
            rows = new.tolist()
            self.check(rows, num_tokens)
            num_tokens += new.shape[1]
            texts = [text + decoder.decode(*row) for text, decoder, row in zip(texts, decoders, rows, strict=True)]
            if all(decoder.stopped for decoder in decoders):
                break
        return [text + decoder.decode(last=True) for text, decoder in zip(texts, decoders, strict=True)]

    def _tokens(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        settings: Sampling,
        seeds: list[int],
        at_once: int = sys.maxsize,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """New token ids (batch, at_once or fewer) again and again, and the logits that the last were drawn from."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, needs 0 or more")
        token_ids = [self.prompt_ids(prompt) for prompt in prompts]  # prompt -> tokenizer -> token ids
        with self.decoder(len(prompts), settings) as decoder:
            decoder.join(range(len(prompts)), token_ids, seeds)
            while max_new_tokens:
                # token ids -> model (attention op) -> logits -> sampler op -> token ids
                new, logits = decoder.next(min(max_new_tokens, at_once))
                max_new_tokens -= new.shape[1]
                yield new, logits

    @contextlib.contextmanager
    def decoder(self, batch_size: int, settings: Sampling) -> Iterator[Decoder]:
        """One that nobody else uses until it is given back; the last one is kept, with its cache and its graphs."""
        key = (batch_size, dataclasses.replace(settings, seed=0))
        decoder = self._kept.pop(key, None)
        if decoder is None:
            self._kept.clear()
            decoder = Decoder(self.reader, self.weights, batch_size, self.tokenizer.vocab_size, key[1])
        try:
            yield decoder
        finally:
            decoder.unread, decoder.num_unread = [], 0
            decoder.leave(range(batch_size))
            self._kept[key] = decoder

    def check(self, rows: Iterable[Sequence[int]], num_before: int = 0) -> None:
        """The sampler marks a row of logits that it cannot draw from with -1."""
        for number, row in enumerate(rows):
            if -1 in row:
                raise FloatingPointError(
                    f"the model's logits are not finite at new token {num_before + row.index(-1)} of text {number}; "
                    "its weights may be damaged, or too large for the precision"
                )


class TextDecoder:
    """Token ids, a few at a time -> text, held back until a character is whole, and while it may be part of `stop`.

    Raises ValueError if stop is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | None = None) -> None:
        if stop == "":
            raise ValueError("stop: got '', needs one character or more, or None")
        self.tokenizer, self.stop = tokenizer, stop
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.stopped = False  # was `stop` met? Nothing comes after it

    def decode(self, *token_ids: int, last: bool = False) -> str:
        """The text that these tokens complete; last: no more will come."""
        if self.stopped:
            return ""
        text = self.held + self.utf8.decode(self.tokenizer.decode_bytes(token_ids))
        if self.stop is None:
            return text
        text, found, _ = text.partition(self.stop)
        self.stopped = found != ""
        may_begin = [] if last or found else range(len(self.stop) - 1, 0, -1)
        begun = next((length for length in may_begin if text.endswith(self.stop[:length])), 0)
        self.held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _seeds(settings: Sampling, num_samples: int) -> list[int]:
    if not 0 <= settings.seed <= 2**63 - num_samples:
        raise ValueError(f"seed: got {settings.seed}, needs a whole number from 0 to 2^63 - {num_samples}")
    return [settings.seed + sample for sample in range(num_samples)]
