"""Corpora are read whole or refused in one line; batches depend on (seed, step) alone and cover the text."""

import tracemalloc

import numpy as np
import pytest
import torch

from corpus import GRAMMAR, SAMPLE, sample_text
from toy_lm import data
from toy_lm.tokenizer import Tokenizer


def test_grown_corpora_know_their_entropy():
    sample = data.open_corpus("sample:5000")
    assert set("".join(sample.parts()).splitlines()) == set(sample_text().splitlines())
    assert sample.entropy == SAMPLE.entropy()
    grammar = data.open_corpus("grammar:5000")
    assert "".join(grammar.parts()) == GRAMMAR.grow(5000, seed=0)
    assert grammar.num_bytes == len(GRAMMAR.grow(5000, seed=0))
    assert grammar.fingerprint == data.open_corpus("grammar:5000").fingerprint != sample.fingerprint
    assert data.open_corpus("grammar:5000", seed=1).fingerprint != grammar.fingerprint


def test_a_file_is_read_as_it_is_whatever_the_size_of_the_parts(tmp_path, monkeypatch):
    text = "one\r\ntwo 🦊\n\n" * 50 + "no line end"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    whole = data.open_corpus(str(path))
    monkeypatch.setattr(data, "_PART", 7)
    corpus = data.open_corpus(str(path))
    parts = list(corpus.parts())
    assert "".join(parts) == text and len(parts) > 20
    assert all(part.endswith("\n") for part in parts[:-1])
    assert corpus == whole
    assert corpus.num_bytes == len(text.encode()) and corpus.entropy is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; allowed are a text file, 'sample', 'grammar'"),
        (b"", "is empty"),
        (b"text\x00more", r"is binary \(it holds a zero byte\)"),
        (b"caf\xe9", "is not UTF-8 text"),
    ],
)
def test_an_unreadable_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.open_corpus(str(path))
    assert str(caught.value).startswith("corpus: ") and "\n" not in str(caught.value)


def test_other_bad_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        data.open_corpus(str(tmp_path))
    for name in ("grammar:0", "grammar:many", "sample:-1"):
        with pytest.raises(ValueError, match="a number of bytes, 1 or more"):
            data.open_corpus(name)


def test_token_ids_are_written_once_and_anew_for_another_text(tmp_path, monkeypatch):
    corpus = data.open_corpus("grammar:30000")
    tokenizer = Tokenizer.train_bpe(corpus.parts(), 300)
    token_ids = data.tokenize(corpus, tokenizer, tmp_path)
    assert isinstance(token_ids, np.memmap) and token_ids.dtype == np.uint16
    assert tokenizer.decode(token_ids.tolist()) == GRAMMAR.grow(30_000)

    monkeypatch.setattr(data.Corpus, "parts", lambda self: pytest.fail("the text was read again"))
    assert np.array_equal(data.tokenize(corpus, tokenizer, tmp_path), token_ids)
    monkeypatch.undo()
    other = data.tokenize(data.open_corpus("grammar:20000"), tokenizer, tmp_path)
    assert len(other) < len(token_ids)
    as_bytes = data.tokenize(corpus, Tokenizer.bytes_tokenizer(), tmp_path)
    assert bytes(as_bytes.tolist()).decode() == GRAMMAR.grow(30_000)


def test_an_interrupted_tokenization_leaves_no_file(tmp_path):
    corpus = data.open_corpus("grammar:5000")

    class Broken(Tokenizer):
        def encode_all(self, texts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.tokenize(corpus, Broken(Tokenizer.bytes_tokenizer().backend), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_tokens", [34, 35, 100, 1000])
def test_the_split_leaves_both_parts_a_window(num_tokens):
    train, validation = data.split(np.arange(num_tokens), 0.1, seqlen=16)
    assert np.array_equal(np.concatenate([train, validation]), np.arange(num_tokens))
    assert len(train) >= 17 and len(validation) >= 17
    if num_tokens == 1000:
        assert len(train) == 900


def test_a_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match="corpus: it has 33 tokens, but a context of 16 needs 34 or more"):
        data.split(np.arange(33), 0.1, seqlen=16)


def test_targets_follow_their_inputs(device):
    windows = data.Windows(np.arange(100, dtype=np.uint16), 8, device)
    starts = np.array([0, 5, 91])
    inputs, targets = windows.at(starts)
    assert inputs.shape == targets.shape == (3, 8)
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.device.type == device
    assert torch.equal(inputs.cpu(), torch.tensor(starts)[:, None] + torch.arange(8))
    assert torch.equal(targets, inputs + 1)


def test_random_starts_depend_on_seed_and_step_alone_and_are_uniform():
    windows = data.Windows(np.zeros(24, dtype=np.uint16), 8, "cpu")
    first = windows.random_starts(64, seed=1, step=7)
    windows.random_starts(64, seed=5, step=1)
    assert np.array_equal(first, windows.random_starts(64, seed=1, step=7))
    assert not np.array_equal(first, windows.random_starts(64, seed=1, step=8))
    assert not np.array_equal(first, windows.random_starts(64, seed=2, step=7))
    # The batches of every machine and release: Philox4x64-10 keyed by (seed, step), modulo the number of windows.
    assert windows.random_starts(6, seed=1, step=7).tolist() == [3, 2, 11, 10, 11, 10]
    counts = np.bincount(np.concatenate([windows.random_starts(100, 0, step) for step in range(160)]), minlength=16)
    assert len(counts) == 16  # windows start at 0 ... 24 - 8 - 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 44  # chi-square, 15 degrees of freedom: exceeded once in 10 000


def test_spread_starts_cover_the_text():
    windows = data.Windows(np.zeros(100, dtype=np.uint16), 8, "cpu")
    assert windows.spread_starts(1000, 8).tolist() == list(range(0, 92, 8))
    few = windows.spread_starts(4, 8)
    assert len(few) == 4 and few[0] == 0 and few[-1] == 88 and (np.diff(few) > 16).all()
    assert data.Windows(np.zeros(9, dtype=np.uint16), 8, "cpu").spread_starts(4, 8).tolist() == [0]


def test_documents_are_told_apart_whatever_the_size_of_the_parts(tmp_path, monkeypatch):
    text = "one\n\ntwo words\nand more\n\n\n\nthree 🦊\n\nno end"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    expected = ["one\n\n", "two words\nand more\n\n", "\n\n", "three 🦊\n\n", "no end"]
    for part in (1 << 20, 1, 7):
        monkeypatch.setattr(data, "_PART", part)
        (tmp_path / str(part)).mkdir()
        corpus = data.open_corpus(str(tmp_path / "text.txt"))
        ids, starts = data.tokenize_documents(corpus, Tokenizer.bytes_tokenizer(), tmp_path / str(part), "\n\n")
        assert [bytes(x.tolist()).decode() for x in np.split(ids, starts[1:])] == expected and starts[0] == 0
    assert data.tokenize(corpus, Tokenizer.bytes_tokenizer(), tmp_path / "7").tolist() == ids.tolist()
    assert data.tokenize_documents(corpus, Tokenizer.bytes_tokenizer(), tmp_path / "7", "")[1].tolist() == [0]
    train, validation = data.split_starts(starts, 6)
    assert train.tolist() == [0, 5] and validation.tolist() == (starts[2:] - 6).tolist()


@pytest.mark.parametrize("seqlen", [1, 2, 7, 16, 50])
def test_windows_know_where_their_documents_begin(seqlen):
    starts = np.array([0, 3, 4, 5, 20, 21, 60, 61, 99])
    windows = data.Windows(np.zeros(120, dtype=np.uint16), seqlen, "cpu", starts)
    every = np.arange(windows.num_starts)
    counts = []
    for window in every:
        inside = [int(start - window) for start in starts if window < start < window + seqlen]
        counts.append(1 + len(inside))
        got = windows.documents(np.array([window])).tolist()
        assert len(got) == windows.max_documents(1) + 1
        assert got == [0, *inside] + [seqlen] * (len(got) - 1 - len(inside))
    assert max(counts) <= windows.max_documents(1) <= max(counts) + 1  # the first may begin where no window can
    two = windows.documents(np.array([2, 58])).tolist()
    expected = [int(s) - 2 for s in starts if 2 < s < 2 + seqlen]
    expected = [0, *expected, seqlen, *[int(s) - 58 + seqlen for s in starts if 58 < s < 58 + seqlen], 2 * seqlen]
    assert two[: len(expected)] == expected and set(two[len(expected) :]) <= {2 * seqlen}


def test_neither_the_text_nor_its_tokens_are_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PART", 1 << 11)
    (tmp_path / "text.txt").write_text("a line of text\n" * 200_000)  # 3 MB, 6 MB of token ids
    tracemalloc.start()
    try:
        corpus = data.open_corpus(str(tmp_path / "text.txt"))
        token_ids = data.tokenize(corpus, Tokenizer.bytes_tokenizer(), tmp_path)
        windows = data.Windows(token_ids, 64, "cpu")
        windows.at(windows.random_starts(12, 0, 0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(token_ids) == 3_000_000 and peak < 1_000_000
