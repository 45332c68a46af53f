"""From a corpus to batches: text, token ids in a file, windows of them.

    corpus name or file -> text, part by part -> token ids, memory-mapped -> training part | validation part -> batches

The token ids are written once into the run folder, so that neither the text nor the ids need fit in memory. A batch
depends on (seed, step) alone: there is no position to keep, and a resumed run draws what an uninterrupted one does.
Documents, where they are told apart, lie one after the other; a window holds the end of one, whole ones, and a start.

Knows tokenizers and the corpus; knows nothing of models or training.
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from corpus import GRAMMAR, SAMPLE, Entropy
from toy_lm.tokenizer import Tokenizer

# How many bytes a grown corpus has: more than the presets read, so that its lines' order cannot be learnt by heart.
GROWN_BYTES = {"sample": 2_000_000, "grammar": 10_000_000}
_GROWN = {"sample": SAMPLE, "grammar": GRAMMAR}
# SHA-256 of the text that nanoGPT's shakespeare-char runs learn, 1,115,394 bytes.
TINY_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_PART = 1 << 16  # characters of a file that are read, and tokenised by one thread
_PARTS = 16  # so many parts, or documents of their size, go to the threads at once
_QUIET_BELOW = 20_000_000  # bytes that are tokenised before a progress bar would be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text that can be read as often as needed; `entropy` is known if a grammar grew it."""

    name: str
    path: pathlib.Path | None  # where a file's text lies
    text: str | None  # what a grammar grew
    num_bytes: int
    fingerprint: str  # SHA-256 of the bytes
    entropy: Entropy | None

    def parts(self) -> Iterator[str]:
        """The text in parts of whole lines (unless a line is very long)."""
        if self.path is not None:
            yield from _file_parts(self.path)
        else:
            yield from _parts(io.StringIO(self.text, newline=""))


def open_corpus(name: str, *, seed: int = 0) -> Corpus:
    """`sample`, `grammar` or `grammar:BYTES`, grown from `seed`, or the path of a UTF-8 text file.

    Raises ValueError, in one line, for a file that is missing, empty, binary or not UTF-8.
    """
    kind, _, size = name.partition(":")
    if kind in _GROWN and not pathlib.Path(name).is_file():
        try:
            num_bytes = int(size) if size else GROWN_BYTES[kind]
            text = _GROWN[kind].grow(num_bytes, seed)
        except ValueError:
            raise ValueError(f"corpus: got {name!r}, the part after ':' must be a number of bytes, 1 or more") from None
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        entropy = _GROWN[kind].entropy()
        return Corpus(
            name=name, path=None, text=text, num_bytes=len(text.encode()), fingerprint=fingerprint, entropy=entropy
        )
    path = pathlib.Path(name)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"corpus: got {name!r}, {what}; allowed are a text file, 'sample', 'grammar', 'grammar:BYTES'")
    digest = hashlib.sha256()
    num_bytes = 0
    for part in _file_parts(path):
        digest.update(part.encode())
        num_bytes += len(part.encode())
    if num_bytes == 0:
        raise ValueError(f"corpus: {name!r} is empty")
    return Corpus(name=name, path=path, text=None, num_bytes=num_bytes, fingerprint=digest.hexdigest(), entropy=None)


def _parts(file: TextIO) -> Iterator[str]:
    while part := file.read(_PART) + file.readline(1 << 16):
        yield part


def _file_parts(path: pathlib.Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for part in _parts(file):
                if "\0" in part:
                    raise ValueError(f"corpus: {str(path)!r} is binary (it holds a zero byte); allowed is UTF-8 text")
                yield part
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus: {str(path)!r} is not UTF-8 text ({error.reason}, byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"corpus: {str(path)!r} cannot be read: {error.strerror}") from None


def tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: str | pathlib.Path) -> np.ndarray:
    """Every token id of the corpus, (num_tokens,) uint16 or uint32, memory-mapped from a file in `folder`.

    The file is named after the text and the tokenizer and is written only if it is not there yet.
    """
    return tokenize_documents(corpus, tokenizer, folder, "")[0]


def tokenize_documents(
    corpus: Corpus, tokenizer: Tokenizer, folder: str | pathlib.Path, document_end: str
) -> tuple[np.ndarray, np.ndarray]:
    """As `tokenize`, each document by itself; also where the documents begin, (num_documents,) int64, likewise mapped.

    A document ends behind each `document_end`; where that is "" the whole corpus is one.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    key = hashlib.sha256((corpus.fingerprint + tokenizer.backend.to_str() + document_end).encode()).hexdigest()[:16]
    paths = [pathlib.Path(folder) / f"{kind}-{key}.bin" for kind in ("documents", "tokens")]
    if not paths[1].is_file():
        unfinished = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
        bar = tqdm(
            total=corpus.num_bytes, unit="B", unit_scale=True, desc="tokens", disable=corpus.num_bytes < _QUIET_BELOW
        )
        try:
            with open(unfinished[0], "wb") as starts, open(unfinished[1], "wb") as tokens, bar:
                num_tokens, begins = 0, True
                for pieces in _batches(_documents(corpus.parts(), document_end)):
                    encoded = tokenizer.encode_all([text for text, _ in pieces])
                    for (text, ends), token_ids in zip(pieces, encoded, strict=True):
                        if begins:
                            starts.write(np.int64(num_tokens).tobytes())
                        tokens.write(np.asarray(token_ids, dtype=dtype).tobytes())
                        num_tokens, begins = num_tokens + len(token_ids), ends
                        bar.update(len(text.encode()))
            for written, path in zip(unfinished, paths, strict=True):  # the tokens last: where they are, all is
                os.replace(written, path)
        finally:
            for path in unfinished:
                path.unlink(missing_ok=True)
    return np.memmap(paths[1], dtype=dtype, mode="r"), np.memmap(paths[0], dtype=np.int64, mode="r")


def _documents(parts: Iterator[str], document_end: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces that can be tokenised by themselves, and whether a document ends with the piece."""
    if not document_end:
        yield from ((part, False) for part in parts)
        return
    rest = ""
    for part in parts:
        *whole, rest = (rest + part).split(document_end)
        yield from ((text + document_end, True) for text in whole)
    if rest:
        yield rest, True


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _PARTS * _PART:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split(token_ids: np.ndarray, validation_fraction: float, seqlen: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens for training, the last for validation: each at least one window of seqlen + 1 tokens.

    Raises ValueError if the corpus is too short for that.
    """
    num_tokens, window = len(token_ids), seqlen + 1
    if num_tokens < 2 * window:
        raise ValueError(
            f"corpus: it has {num_tokens} tokens, but a context of {seqlen} needs {2 * window} or more: "
            f"{window} to train on and {window} to validate on"
        )
    num_train = min(int(num_tokens * (1.0 - validation_fraction)), num_tokens - window)
    num_train = max(num_train, window)
    return token_ids[:num_train], token_ids[num_train:]


def split_starts(document_starts: np.ndarray, num_train: int) -> tuple[np.ndarray, np.ndarray]:
    """Where documents begin in the first num_train tokens, and in those after them, each counted from its part."""
    first = int(np.searchsorted(document_starts, num_train))
    return document_starts[:first], document_starts[first:] - num_train


class Windows:
    """Cuts windows of seqlen + 1 tokens out of token_ids (num_tokens,) and hands them out on `device`."""

    def __init__(
        self,
        token_ids: np.ndarray,
        seqlen: int,
        device: torch.device | str,
        document_starts: np.ndarray | None = None,
    ) -> None:
        """With document_starts (num_documents,), ascending positions in token_ids, `documents` can be asked for."""
        self.token_ids = token_ids
        self.document_starts = document_starts
        self.seqlen = seqlen
        self.device = torch.device(device)
        self.num_starts = len(token_ids) - seqlen

    def at(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets (len(starts), seqlen) int64; a target is the token after its input."""
        windows = torch.from_numpy(self.cut(starts)).to(self.device).long()
        return windows[:, :-1], windows[:, 1:]

    def cut(self, starts: np.ndarray) -> np.ndarray:
        """The tokens from each start on, (len(starts), seqlen + 1) int32."""
        return self.token_ids[starts[:, None] + np.arange(self.seqlen + 1)].astype(np.int32)

    def documents(self, starts: np.ndarray) -> np.ndarray:
        """Where each document begins in the inputs of `at(starts)`, one after the other; what begins a window counts.

        (max_documents(len(starts)) + 1,) int32, ascending, as attention over packed documents takes it; the end of the
        inputs fills the rest, which makes empty documents.
        """
        assert self.document_starts is not None
        first = np.searchsorted(self.document_starts, starts, side="right")
        last = np.searchsorted(self.document_starts, starts + self.seqlen, side="left")
        inside = [self.document_starts[i:j] - start for i, j, start in zip(first, last, starts, strict=True)]
        begins = [np.concatenate([[0], x]) + n * self.seqlen for n, x in enumerate(inside)]
        padded = np.full(self.max_documents(len(starts)) + 1, len(starts) * self.seqlen, dtype=np.int32)
        flat = np.concatenate(begins)
        padded[: len(flat)] = flat
        return padded

    def max_documents(self, num_windows: int) -> int:
        """How many documents, or parts of one, so many windows hold at most."""
        return num_windows * (1 + self._most_inside)

    @functools.cached_property
    def _most_inside(self) -> int:
        """Documents that begin behind a window's first token: the most of any window."""
        starts, most = self.document_starts, 0
        assert starts is not None
        for begin in range(0, len(starts), _PART):
            some = starts[begin : begin + _PART]
            ends = np.searchsorted(starts, some + self.seqlen - 1, side="left")
            most = max(most, int((ends - np.arange(begin, begin + len(some))).max()))
        return min(most, self.seqlen - 1)

    def random_starts(self, batch_size: int, seed: int, step: int) -> np.ndarray:
        """(batch_size,) positions that depend on seed and step alone, on every machine and numpy release."""
        bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
        return (bits % np.uint64(self.num_starts)).astype(np.int64)

    def spread_starts(self, num_windows: int, stride: int) -> np.ndarray:
        """Positions `stride` apart over the whole text or, if those are more than num_windows, that many of them."""
        starts = np.arange(0, self.num_starts, stride)
        if len(starts) > num_windows:
            starts = starts[np.linspace(0, len(starts) - 1, num_windows).round().astype(np.int64)]
        return starts
