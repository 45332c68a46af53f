"""The sample text, and the grammar that grows it to any size with a known entropy.

Knows the Python standard library only: no tensors, no tokens, no models.
"""

from corpus.grammar import GRAMMAR, SAMPLE, Entropy, Grammar, sample_text

__all__ = ["GRAMMAR", "SAMPLE", "Entropy", "Grammar", "sample_text"]
