"""The grammar's entropy is exact, its text is what the rules say, and the sample text is of its language."""

import collections
import itertools
import math
import random

import pytest

import corpus
from corpus.grammar import GRAMMAR, SAMPLE, Grammar, sample_text


def test_entropy_of_a_grammar_counted_by_hand():
    # Three sentences: "a b" and "a cc", 3/8 each, and "d", 1/4; with line ends 4, 5 and 2 bytes.
    grammar = Grammar({"SENTENCE": [(3, "a TAIL"), (1, "d")], "TAIL": [(2, "b"), (2, "cc")]})
    entropy = grammar.entropy()
    assert entropy.bits_per_sentence == pytest.approx(2 * 0.375 * math.log2(1 / 0.375) + 0.25 * 2)
    assert entropy.bytes_per_sentence == pytest.approx(0.375 * 4 + 0.375 * 5 + 0.25 * 2)
    assert entropy.nats_per_byte == pytest.approx(math.log(2) * entropy.bits_per_sentence / entropy.bytes_per_sentence)


@pytest.mark.parametrize("grammar", [GRAMMAR, SAMPLE], ids=["grammar", "sample"])
def test_entropy_and_length_are_the_means_over_drawn_sentences(grammar):
    sentences = grammar.grow(1_000_000, seed=1).splitlines()
    bits = [-math.log2(grammar.probability(sentence)) for sentence in sentences]
    sizes = [len(sentence) + 1 for sentence in sentences]
    entropy = grammar.entropy()
    for drawn, exact in ((bits, entropy.bits_per_sentence), (sizes, entropy.bytes_per_sentence)):
        mean = sum(drawn) / len(drawn)
        deviation = (sum((x - mean) ** 2 for x in drawn) / len(drawn)) ** 0.5
        assert abs(mean - exact) <= 4.5 * deviation / len(drawn) ** 0.5 + 1e-9


def _derivations(grammar, symbol):
    """Every (words, probability) that `symbol` can become, a pair for each way."""
    for probability, row in grammar.rules[symbol]:
        choices = [list(_derivations(grammar, part)) if part.isupper() else [((part,), 1.0)] for part in row]
        for combination in itertools.product(*choices):
            words = tuple(itertools.chain.from_iterable(words for words, _ in combination))
            yield words, probability * math.prod(p for _, p in combination)


def test_no_sentence_can_be_drawn_in_two_ways():
    clauses = list(_derivations(GRAMMAR, "CLAUSE"))
    assert len({words for words, _ in clauses}) == len(clauses)
    # A sentence is clauses joined by words that no clause holds or ends with, so it too can be taken apart in one way.
    assert not any("while" in words or "night" in words for words, _ in clauses)
    assert math.fsum(p for _, p in clauses) == pytest.approx(1.0)
    assert len(set(sample_text().splitlines())) == len(sample_text().splitlines())


def test_probability_is_that_of_the_derivation():
    for words, probability in random.Random(0).sample(list(_derivations(GRAMMAR, "CLAUSE")), 100):
        assert GRAMMAR.probability(" ".join(words)) == pytest.approx(0.6 * probability)
        assert GRAMMAR.probability(" ".join((*words, "at", "night"))) == pytest.approx(0.2 * probability)
    assert GRAMMAR.probability("the foxes") == 0.0
    assert GRAMMAR.probability("") == 0.0
    two_ways = Grammar({"SENTENCE": [(1, "A"), (1, "B")], "A": [(1, "x")], "B": [(1, "x"), (1, "y")]})
    assert two_ways.probability("x") == pytest.approx(0.75)


def test_the_same_seed_grows_the_same_text_and_more_bytes_only_add_lines():
    text = GRAMMAR.grow(1000, seed=3)
    assert text == GRAMMAR.grow(1000, seed=3) != GRAMMAR.grow(1000, seed=4)
    assert GRAMMAR.grow(5000, seed=3).startswith(text)
    assert len(text.encode()) >= 1000 > len("".join(text.splitlines(keepends=True)[:-1]).encode())
    assert text.endswith("\n")
    assert all(GRAMMAR.probability(line) > 0 for line in text.splitlines())


def test_rules_are_drawn_as_often_as_their_weights_say():
    text = Grammar({"SENTENCE": [(1, "a"), (2, "b"), (5, "c")]}).grow(32_000, seed=0)
    counts = collections.Counter(text.split())
    expected = {"a": 2000, "b": 4000, "c": 10_000}
    chi_square = sum((counts[word] - n) ** 2 / n for word, n in expected.items())
    assert chi_square < 20  # two degrees of freedom: exceeded once in 22 000


def test_the_sample_text_is_of_the_grammar_and_its_next_word_counts_are_telling():
    lines = sample_text().splitlines()
    assert all(GRAMMAR.probability(line) > 0 for line in lines)
    assert sorted({word for line in lines for word in line.split()}) == GRAMMAR.words()
    assert SAMPLE.entropy().bits_per_sentence == pytest.approx(math.log2(len(lines)))
    followers = collections.defaultdict(collections.Counter)
    for line in lines:
        for word, follower in itertools.pairwise(line.split()):
            followers[word][follower] += 1
    for word in ("the", "quick", "brown"):
        counts = [count for _, count in followers[word].most_common(3)]
        assert len(counts) == 3 and counts[0] > counts[-1]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_bytes: got 0"):
        GRAMMAR.grow(0)
    with pytest.raises(ValueError, match="MISSING is used but has no rules"):
        Grammar({"SENTENCE": [(1, "a MISSING")]})
    with pytest.raises(ValueError, match="SENTENCE contains itself"):
        Grammar({"SENTENCE": [(1, "a SENTENCE"), (1, "b")]})
    with pytest.raises(ValueError, match="weight above 0"):
        Grammar({"SENTENCE": [(0, "a")]})
    assert corpus.GRAMMAR is GRAMMAR
