"""A small model with random weights, as a language model and as a run folder."""

import pytest
import torch

from toy_lm import checkpoint
from toy_lm.config import ModelConfig
from toy_lm.generate import LanguageModel
from toy_lm.model import Transformer
from toy_lm.tokenizer import Tokenizer

TEXT = "the quick brown foxes jump over the lazy dogs\nthe old dogs sleep under the trees\n" * 3
CONTEXT = 24


def small_model(vocab_size: int, attention: str = "fused") -> Transformer:
    """Weights large enough that its predictions depend on every token and are far from even."""
    config = ModelConfig(
        vocab_size=vocab_size,
        model_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_seqlen=CONTEXT,
    )
    torch.manual_seed(7)
    model = Transformer(config, attention).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(TEXT, 280)


@pytest.fixture
def lm(device: str, tokenizer: Tokenizer) -> LanguageModel:
    return LanguageModel(small_model(tokenizer.vocab_size).to(device), tokenizer)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> str:
    folder = tmp_path_factory.mktemp("run")
    model = small_model(tokenizer.vocab_size)
    checkpoint.begin(folder, model.config, tokenizer)
    checkpoint.save(folder, step=1, weights=model.state_dict(), state={}, info={})
    return str(folder)
