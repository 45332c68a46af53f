"""Next words: the counts, the model's probabilities against sums over every continuation, and the distance."""

import itertools

import pytest
import torch

from corpus import sample_text
from toy_lm import next_words
from toy_lm.generate import LanguageModel
from toy_lm.next_words import LINE_END, NextWords, compare, count, read_text, table
from toy_lm.tokenizer import Tokenizer


def test_counts_can_be_read_off_the_text():
    counts, ends = count("a b a c\na  b\nb a", "a")
    assert counts == {"b": 2, "c": 1}
    assert ends == [1, 5, 9]
    assert count("a b\nb b\n", "b")[0] == {LINE_END: 2, "b": 1}
    assert count(sample_text(), "quick")[0] == {"brown": 7, "rabbits": 3, "foxes": 2}
    assert "quickly" not in count("quickly the quick one", "quick")[0]


@pytest.mark.parametrize("word", ["", "two words", "absent", " the"])
def test_words_that_are_refused(word: str):
    with pytest.raises(ValueError, match=r"^word: "):
        count(sample_text(), word)


@torch.no_grad()
def probability_by_hand(lm: LanguageModel, context: str, word: str) -> float:
    """Token by token with a full forward pass: the word's tokens, then any token that begins with white space."""
    token_ids = lm.tokenizer.encode(context)
    probability = 1.0
    for token_id in lm.tokenizer.encode(" " + word):
        probability *= (
            lm.model(torch.tensor([token_ids], device=lm.device))[0, -1].double().softmax(dim=-1)[token_id].item()
        )
        token_ids.append(token_id)
    last = lm.model(torch.tensor([token_ids], device=lm.device))[0, -1].double().softmax(dim=-1)
    vocabulary = range(lm.tokenizer.vocab_size)
    return probability * sum(last[i].item() for i in vocabulary if lm.tokenizer.token_bytes(i)[:1].isspace())


def test_prediction_is_the_average_over_the_true_contexts(lm: LanguageModel):
    text = "a quick dog\nb quick fox\nquick dog\n"
    result = compare(lm, text, "quick")
    contexts = ["a quick", "a quick dog\nb quick", "a quick dog\nb quick fox\nquick"]
    assert (result.num_occurrences, result.num_contexts) == (3, 3)
    assert result.counts == {"dog": 2, "fox": 1}
    for word in ("dog", "fox", "b"):
        by_hand = sum(probability_by_hand(lm, context, word) for context in contexts) / len(contexts)
        assert result.predicted[word] == pytest.approx(by_hand, rel=1e-4)


def test_words_do_not_overlap(lm: LanguageModel):
    """In bytes: whichever words are asked for, they and the line's end share a probability of at most 1."""
    bytes_only = LanguageModel(lm.model, Tokenizer.bytes_tokenizer())
    words = [LINE_END] + ["".join(letters) for n in (1, 2) for letters in itertools.product("qrs", repeat=n)]
    text = "a " + " a ".join(words[1:])
    predicted = compare(bytes_only, text, "a").predicted
    assert set(words) <= set(predicted)
    assert 0.0 < sum(predicted.values()) <= 1.0


def test_total_variation():
    def distance(counts: dict[str, int], predicted: dict[str, float]) -> float:
        return NextWords(
            word="w", num_occurrences=1, num_contexts=1, counts=counts, predicted=predicted
        ).total_variation

    assert distance({"a": 3, "b": 1}, {"a": 0.75, "b": 0.25}) == pytest.approx(0.0)
    assert distance({"a": 3}, {"b": 1.0}) == pytest.approx(1.0)
    assert distance({"a": 1, "b": 1}, {"a": 0.5}) == pytest.approx(0.5)  # the model's other half is on other words
    assert distance({"a": 1, "b": 1}, {"a": 0.75, "b": 0.25}) == pytest.approx(0.25)


def test_table_is_ordered_and_cut():
    counts = {"x": 1, "y": 5, LINE_END: 2, "z": 2}
    result = NextWords(word="w", num_occurrences=10, num_contexts=4, counts=counts, predicted={"y": 0.9, "x": 0.1})
    lines = table(result, 3).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["y", "(line", "z"]
    assert lines[2].split() == ["y", "5", "50.0%", "y", "90.0%"]
    assert "model read at 4 of them" in lines[-1]
    with pytest.raises(ValueError, match=r"^k: got 0"):
        table(result, 0)


def test_texts_that_are_read(tmp_path):
    assert read_text("sample") == sample_text()
    assert len(read_text("grammar")) >= next_words.MAX_CHARACTERS
    (tmp_path / "text.txt").write_text("ä b\n" * 10, encoding="utf-8")
    assert read_text(str(tmp_path / "text.txt")) == "ä b\n" * 10
    with pytest.raises(ValueError, match="no such file"):
        read_text("missing.txt")
