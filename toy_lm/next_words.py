"""What follows a word: counted in a text, and predicted by a model.

    text -> the words that follow `word` -> counts -> top_k op -> a table of next words by frequency
    text before each occurrence -> model -> probability of each next word, averaged over the occurrences -> top_k op

The average over the occurrences, each with its true left context, is what the counts measure: a perfect model of the
text would predict the counts' shares. The total variation distance says how far the two are apart: half the sum of the
differences, 0 if they are equal, 1 if they share no word.

A word is what stands between white space. A word of several tokens has the product of their probabilities, and it is
that word only if white space follows; so the probability of "run" leaves out "runs". A line's end counts as a word.

Knows a text, a model and its tokenizer; knows nothing of training.
"""

import collections
import dataclasses
import pathlib
import re

import numpy as np
import torch
from torch import Tensor

import kernels
from toy_lm.generate import LanguageModel
from toy_lm.model import KVCache

LINE_END = "\n"
MAX_CHARACTERS = 1_000_000  # of a file; what lies behind is neither counted nor predicted
MAX_CONTEXTS = 1000  # occurrences that the model reads, spread over the text
MAX_CANDIDATES = 100  # words whose probability is computed
_ROWS = 64  # contexts that are read at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextWords:
    """How often each word follows `word`, as shares that add up to 1; `predicted` has the rest under no word."""

    word: str
    num_occurrences: int
    num_contexts: int  # how many of the occurrences the model read
    counts: dict[str, int]
    predicted: dict[str, float]

    @property
    def total_variation(self) -> float:
        total = sum(self.counts.values())
        words = self.counts.keys() | self.predicted.keys()
        apart = sum(abs(self.counts.get(word, 0) / total - self.predicted.get(word, 0.0)) for word in words)
        return 0.5 * (apart + abs(1.0 - sum(self.predicted.values())))


def read_text(corpus: str) -> str:
    """`sample`: the lines of sample.txt; `grammar`: what it grows; else the start of a UTF-8 text file.

    Raises ValueError, in one line, for a file that is missing, empty, binary or not UTF-8.
    """
    from corpus import GRAMMAR, sample_text
    from toy_lm import data

    if not pathlib.Path(corpus).is_file():
        if corpus == "sample":
            return sample_text()
        if corpus == "grammar":
            return GRAMMAR.grow(MAX_CHARACTERS)
    return next(data.open_corpus(corpus).parts())[:MAX_CHARACTERS]


def count(text: str, word: str) -> tuple[collections.Counter[str], list[int]]:
    """What follows `word` in the text, and where its occurrences end.

    Raises ValueError if `word` is no single word or does not occur.
    """
    if word.split() != [word]:
        raise ValueError(f"word: got {word!r}, needs a single word without white space")
    ends = [match.end() for match in re.finditer(rf"(?<!\S){re.escape(word)}(?=\s)", text)]
    if not ends:
        raise ValueError(f"word: {word!r} is not in the text; it has {', '.join(sorted(set(text.split()))[:20])}, ...")
    following = re.compile(r"[^\S\n]*(\n|\S+|$)")
    return collections.Counter(following.match(text, end).group(1) or LINE_END for end in ends), ends  # type: ignore[union-attr]


def compare(lm: LanguageModel, text: str, word: str) -> NextWords:
    """Count what follows `word` in the text, and average what the model predicts there (at most MAX_CONTEXTS times)."""
    counts, ends = count(text, word)
    chosen = ends
    if len(ends) > MAX_CONTEXTS:
        chosen = [ends[i] for i in np.linspace(0, len(ends) - 1, MAX_CONTEXTS).round().astype(int)]
    seen = dict.fromkeys([following for following, _ in counts.most_common(MAX_CANDIDATES // 2)])
    frequent = dict.fromkeys(
        following for following, _ in collections.Counter(text.split()).most_common(MAX_CANDIDATES)
    )
    candidates = [*(seen | {LINE_END: None} | frequent)][:MAX_CANDIDATES]
    sums = torch.zeros(len(candidates), dtype=torch.float64)
    for begin in range(0, len(chosen), _ROWS):
        reach = 8 * lm.model.config.max_seqlen  # characters before a word: more than the model can read
        contexts = [text[max(0, end - reach) : end] for end in chosen[begin : begin + _ROWS]]
        sums += _probabilities(lm, contexts, candidates).sum(dim=0)
    predicted = dict(zip(candidates, (sums / len(chosen)).tolist(), strict=True))
    return NextWords(
        word=word, num_occurrences=len(ends), num_contexts=len(chosen), counts=dict(counts), predicted=predicted
    )


@torch.inference_mode()
def _probabilities(lm: LanguageModel, contexts: list[str], candidates: list[str]) -> Tensor:
    """(contexts, candidates) fp64: how probable each candidate is as the next word of each context."""
    spellings = [[] if word == LINE_END else lm.tokenizer.encode(" " + word) for word in candidates]
    room = lm.model.config.max_seqlen - max(map(len, spellings))
    if room < 1:
        raise ValueError(f"words: the longest takes more tokens than the context of {lm.model.config.max_seqlen} holds")
    rows = [lm.tokenizer.encode(context)[-room:] for context in contexts]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=lm.device)
    longest = max(map(len, rows))
    token_ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    for number, row in enumerate(rows):
        token_ids[number, : len(row)] = torch.tensor(row)

    config = lm.model.config
    cache = KVCache(config, len(rows), config.max_seqlen, device=lm.device, dtype=lm.dtype)
    hidden = lm.model.hidden(token_ids.to(lm.device), cache)  # (contexts, longest, model_dim)
    last = hidden[torch.arange(len(rows), device=lm.device), lengths.long() - 1]
    first = lm.model.logits(last).double().log_softmax(dim=-1)  # (contexts, vocab_size), of the next word's first token

    names = [lm.tokenizer.token_bytes(token_id) for token_id in range(lm.tokenizer.vocab_size)]
    is_space = torch.tensor([name[:1].isspace() for name in names], device=lm.device)
    is_line_end = torch.tensor([name[:1] == b"\n" for name in names], device=lm.device)
    columns = []
    for word, spelling in zip(candidates, spellings, strict=True):
        if word == LINE_END:
            columns.append(first[:, : len(names)][:, is_line_end].exp().sum(dim=1))
            continue
        cache.set_seqlens(lengths, longest)  # forget the candidate before
        chunk = torch.tensor(spelling, device=lm.device)[None].expand(len(rows), -1)
        logprobs = lm.model(chunk, cache).double().log_softmax(dim=-1)  # (contexts, tokens of the word, vocab_size)
        spelled = first[:, spelling[0]]
        for position, token_id in enumerate(spelling[1:]):
            spelled = spelled + logprobs[:, position, token_id]
        ended = logprobs[:, -1, : len(names)][:, is_space].exp().sum(dim=1)
        columns.append(spelled.exp() * ended)
    return torch.stack(columns, dim=1).cpu()


def table(result: NextWords, k: int) -> str:
    """The k likeliest next words, by frequency in the text and beside it by the model, ordered by the top_k op.

    Raises ValueError if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, needs 1 or more")
    total = sum(result.counts.values())
    shares = {word: number / total for word, number in result.counts.items()}
    lines = [
        f'after "{result.word}": {result.num_occurrences} occurrences in the text',
        f"  {'in the text':<18} {'count':>7} {'share':>7}    {'the model predicts':<18} {'share':>7}",
    ]
    counted, predicted = _ordered(shares, k), _ordered(result.predicted, k)
    for row in range(max(len(counted), len(predicted))):
        left, right = counted[row : row + 1], predicted[row : row + 1]
        line = f"  {_shown(left):<18} {result.counts[left[0]] if left else '':>7} {_share(shares, left):>7}"
        lines.append(f"{line}    {_shown(right):<18} {_share(result.predicted, right):>7}")
    read = "" if result.num_contexts == result.num_occurrences else f" (model read at {result.num_contexts} of them)"
    lines.append(f"  total variation distance: {result.total_variation:.3f}{read}\n")
    return "\n".join(lines)


def _ordered(shares: dict[str, float], k: int) -> list[str]:
    words = list(shares)
    _, indices = kernels.top_k(torch.tensor([list(shares.values())], dtype=torch.float32), min(k, len(words)))
    return [words[index] for index in indices[0].tolist()]


def _shown(word: list[str]) -> str:
    return "(line end)" if word == [LINE_END] else "".join(word)


def _share(shares: dict[str, float], word: list[str]) -> str:
    return f"{shares[word[0]]:.1%}" if word else ""
