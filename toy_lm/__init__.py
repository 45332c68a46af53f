"""A toy language model: training, generation and their reports, on the ops of `kernels`.

lm = toy_lm.load("runs/sample")
print(lm.generate("the quick brown", max_new_tokens=30)[0])
"""

import importlib
from typing import Any

__all__ = ["LanguageModel", "Server", "load"]


def __getattr__(name: str) -> Any:
    """These come from toy_lm.generate and toy_lm.serve, imported when first asked for: the jobs start quickly."""
    if name in __all__:
        module = importlib.import_module("toy_lm.serve" if name == "Server" else "toy_lm.generate")
        return getattr(module, name)
    raise AttributeError(f"module 'toy_lm' has no attribute {name!r}")
