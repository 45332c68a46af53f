"""A small weighted grammar, the text that it grows, and the exact entropy of that text.

A grammar maps each symbol (in capitals) to weighted rules; a rule is a row of words and symbols. A sentence is drawn
from SENTENCE by picking a rule of each symbol with probability weight / sum of weights, and becomes a line. Lines are
independent of each other.

The entropy follows from the rules alone if no sentence can be drawn in two ways: drawing a sentence is then the same
as drawing the rules behind it, and with r running over the rules of symbol A

    H(A) = sum_r p_r (-log2 p_r + sum of H(B) over the symbols B in r)           bits per A
    L(A) = sum_r p_r (sum of L(B) over the symbols B in r + bytes of the words)  bytes per A

Every word brings one separator with it, a space or the line's end, so that L counts every byte of the text, and
H(SENTENCE) / L(SENTENCE) bits per byte is the limit that no model of the text can beat.

Knows nothing of models and tokens; only of text.
"""

import dataclasses
import functools
import math
import pathlib
import random
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entropy:
    """How much a reader who knows the rules still learns from a sentence."""

    bits_per_sentence: float
    bytes_per_sentence: float

    @property
    def bits_per_byte(self) -> float:
        return self.bits_per_sentence / self.bytes_per_sentence

    @property
    def nats_per_byte(self) -> float:
        return self.bits_per_byte * math.log(2)


class Grammar:
    """Weighted rules, `{symbol: [(weight, "words and SYMBOLS"), ...]}`; a word in capitals that has rules is a symbol.

    Raises ValueError for a weight that is not positive, a symbol without rules, or one that contains itself.
    """

    def __init__(self, rules: Mapping[str, Sequence[tuple[float, str]]], start: str = "SENTENCE") -> None:
        self.start = start
        self.rules: dict[str, list[tuple[float, tuple[str, ...]]]] = {}  # symbol -> (probability, words and symbols)
        for symbol, weighted in rules.items():
            if not weighted or any(weight <= 0 for weight, _ in weighted):
                raise ValueError(f"rules: {symbol} needs rules, each with a weight above 0, got {weighted}")
            total = math.fsum(weight for weight, _ in weighted)
            self.rules[symbol] = [(weight / total, tuple(row.split())) for weight, row in weighted]
        self._check(start, ())

    def _check(self, symbol: str, inside: tuple[str, ...]) -> None:
        if symbol not in self.rules:
            raise ValueError(f"rules: {symbol} is used but has no rules")
        if symbol in inside:
            raise ValueError(f"rules: {symbol} contains itself, by way of {' -> '.join(inside)}")
        for _, row in self.rules[symbol]:
            for part in row:
                if part.isupper():
                    self._check(part, (*inside, symbol))

    def words(self) -> list[str]:
        """The closed vocabulary, sorted."""
        return sorted({part for rules in self.rules.values() for _, row in rules for part in row if not part.isupper()})

    def draw(self, generator: random.Random) -> str:
        """One sentence, without its line end."""
        words: list[str] = []
        pending = [self.start]
        while pending:
            part = pending.pop()
            if part.isupper():
                pending.extend(reversed(self._pick(part, generator.random())))
            else:
                words.append(part)
        return " ".join(words)

    def _pick(self, symbol: str, u: float) -> tuple[str, ...]:
        """The rule of `symbol` in which u in [0, 1) falls when the rules lie side by side, as wide as probable."""
        for probability, row in self.rules[symbol]:
            u -= probability
            if u < 0.0:
                return row
        return self.rules[symbol][-1][1]  # the probabilities' sum was rounded to just below 1

    def grow(self, num_bytes: int, seed: int = 0) -> str:
        """Independent sentences, one a line: the first whole lines from `seed` that reach num_bytes bytes.

        Raises ValueError if num_bytes is below 1.
        """
        if num_bytes < 1:
            raise ValueError(f"num_bytes: got {num_bytes}, needs 1 or more")
        generator = random.Random(seed)
        lines: list[str] = []
        size = 0
        while size < num_bytes:
            lines.append(self.draw(generator) + "\n")
            size += len(lines[-1].encode())
        return "".join(lines)

    def probability(self, sentence: str) -> float:
        """The probability of `sentence`, summed over every way to draw it; 0 if there is none."""
        words = sentence.split()

        @functools.cache
        def ends(symbol: str, begin: int) -> dict[int, float]:
            """Where `symbol` can end if it begins at word `begin`, each with its probability."""
            found: dict[int, float] = {}
            for probability, row in self.rules[symbol]:
                reached = {begin: probability}
                for part in row:
                    further: dict[int, float] = {}
                    for position, p in reached.items():
                        if part.isupper():
                            for end, q in ends(part, position).items():
                                further[end] = further.get(end, 0.0) + p * q
                        elif position < len(words) and words[position] == part:
                            further[position + 1] = further.get(position + 1, 0.0) + p
                    reached = further
                for end, p in reached.items():
                    found[end] = found.get(end, 0.0) + p
            return found

        return ends(self.start, 0).get(len(words), 0.0)

    def entropy(self) -> Entropy:
        """Exact, from the rules; right only if no sentence can be drawn in two ways."""

        @functools.cache
        def measure(symbol: str) -> tuple[float, float]:
            bits, size = 0.0, 0.0
            for probability, row in self.rules[symbol]:
                bits -= probability * math.log2(probability)
                for part in row:
                    part_bits, part_size = measure(part) if part.isupper() else (0.0, len(part.encode()) + 1)
                    bits += probability * part_bits
                    size += probability * part_size
            return bits, size

        bits, size = measure(self.start)
        return Entropy(bits_per_sentence=bits, bytes_per_sentence=size)


def sample_text() -> str:
    """The lines of sample.txt."""
    return (pathlib.Path(__file__).parent / "sample.txt").read_text(encoding="utf-8")


# The sample text as a grammar: each of its lines as likely as any other.
SAMPLE = Grammar({"SENTENCE": [(1, line) for line in sample_text().splitlines()]})

# The same words in many more sentences; every line of the sample text is one of them. What the animals do depends on
# which animals they are, so that a model has to look back past the adjectives.
GRAMMAR = Grammar(
    {
        "SENTENCE": [(6, "CLAUSE"), (2, "CLAUSE while CLAUSE"), (2, "CLAUSE at night")],
        "CLAUSE": [(5, "FOXES FOX-DEED"), (4, "DOGS DOG-DEED"), (3, "RABBITS RABBIT-DEED")],
        "FOXES": [
            (5, "the quick brown foxes"),
            (2, "the brown foxes"),
            (2, "the quick foxes"),
            (1, "the shady foxes"),
        ],
        "DOGS": [(5, "the lazy dogs"), (2, "the brown dogs"), (1, "the old dogs"), (1, "the quick brown dogs")],
        "RABBITS": [(4, "the quick rabbits"), (3, "the young rabbits"), (2, "the quick brown rabbits")],
        "TREES": [(4, "the trees"), (2, "the shady trees"), (1, "the old trees"), (1, "the brown trees")],
        "FOX-DEED": [
            (4, "jump over DOGS"),
            (3, "chase RABBITS"),
            (2, "watch RABBITS"),
            (2, "run WAY"),
            (1, "hide PLACE"),
        ],
        "DOG-DEED": [(5, "sleep PLACE"), (3, "bark at FOXES"), (1, "chase RABBITS"), (1, "run WAY")],
        "RABBIT-DEED": [(4, "run WAY"), (3, "hide PLACE"), (2, "hide from FOXES")],
        "PLACE": [(3, "under TREES"), (2, "behind TREES"), (1, "in the shade")],
        "WAY": [
            (2, "around TREES"),
            (2, "between TREES"),
            (2, "through the grass"),
            (1, "past RABBITS"),
        ],
    }
)
