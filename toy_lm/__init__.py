"""A toy language model: training, generation and their reports, on the ops of `kernels`.

lm = toy_lm.load("runs/sample")
print(lm.generate("the quick brown", max_new_tokens=30)[0])
"""

from typing import Any

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `LanguageModel` come from toy_lm.generate, imported when first asked for: the jobs start quickly."""
    if name in __all__:
        from toy_lm import generate

        return getattr(generate, name)
    raise AttributeError(f"module 'toy_lm' has no attribute {name!r}")
