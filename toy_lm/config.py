"""What a model and a training run are made of, as plain values; and the presets, which name combinations that work.

Knows nothing of torch, files or devices: a config is only ever passed as an argument.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder's shape; a preset's vocab_size is replaced by the tokenizer's once that is known."""

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_seqlen: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "max_seqlen"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: got {getattr(self, field)}, needs 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: got {self.num_kv_heads}, needs a divisor of num_heads = {self.num_heads}")
        if self.head_dim % 2 or not 2 <= self.head_dim <= 256:
            raise ValueError(f"head_dim: got {self.head_dim}, rotary positions need an even number from 2 to 256")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Lengths are in tokens, learning rates per AdamW step."""

    batch_size: int
    seqlen: int
    num_steps: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    tokenizer: str  # "bpe" or "bytes"
    vocab_size: int  # what BPE may grow to; bytes use 256
    optimizer: str = "adamw"  # or "muon": Muon for the matrices of the layers, AdamW for the rest
    grad_accumulation: int = 1  # parts of a batch that go through the model one after another
    dropout: float = 0.0
    token_noise: float = 0.0  # share of the tokens read in training that are random ones; the targets stay
    weight_decay: float = 0.1
    momentum: float = 0.95  # Muon's
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    eval_every: int = 100
    eval_batches: int = 8  # at most so many batches of validation windows, spread over the validation text
    eval_context: int = 0  # tokens at the head of a validation window that are read but not counted
    checkpoint_every: int = 500
    validation_fraction: float = 0.1
    document_end: str = ""  # the text behind which a document ends; "" takes the corpus as one
    nanogpt_loss: float | None = None  # what nanoGPT's README run in this shape comes to on tiny Shakespeare
    seed: int = 0

    def __post_init__(self) -> None:
        for field in (
            "batch_size",
            "seqlen",
            "num_steps",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "grad_accumulation",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: got {getattr(self, field)}, needs 1 or more")
        if not 0 <= self.eval_context < self.seqlen:
            raise ValueError(f"eval_context: got {self.eval_context}, needs 0 to seqlen - 1 = {self.seqlen - 1}")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"grad_accumulation: got {self.grad_accumulation}, needs a divisor of batch_size = {self.batch_size}"
            )
        for field in ("dropout", "token_noise"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field}: got {getattr(self, field)}, needs 0 or more, and less than 1")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer: got {self.optimizer!r}, allowed are 'adamw' and 'muon'")
        if self.tokenizer not in ("bpe", "bytes"):
            raise ValueError(f"tokenizer: got {self.tokenizer!r}, allowed are 'bpe' and 'bytes'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and the training that suits it."""

    model: ModelConfig
    train: TrainConfig

    def with_vocab_size(self, vocab_size: int) -> "Preset":
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=vocab_size))


_SHAKESPEARE_SHAPE = ModelConfig(
    vocab_size=256,
    model_dim=384,
    num_layers=6,
    num_heads=6,
    num_kv_heads=6,
    head_dim=64,
    mlp_dim=1024,
    max_seqlen=256,
)
_SHAKESPEARE = TrainConfig(
    batch_size=64,
    seqlen=256,
    num_steps=400,
    learning_rate=4e-3,
    min_learning_rate=0.0,
    warmup_steps=30,
    optimizer="muon",
    dropout=0.1,
    token_noise=0.05,
    weight_decay=1.0,
    tokenizer="bytes",
    vocab_size=256,
    eval_batches=40,
    nanogpt_loss=1.4637,
)

PRESETS = {
    # The sample text in under a minute on two CPU cores.
    "sample": Preset(
        model=ModelConfig(
            vocab_size=320,
            model_dim=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mlp_dim=256,
            max_seqlen=64,
        ),
        train=TrainConfig(
            batch_size=12,
            seqlen=64,
            num_steps=600,
            learning_rate=2e-3,
            min_learning_rate=2e-4,
            warmup_steps=50,
            tokenizer="bpe",
            vocab_size=512,
            eval_context=32,
            eval_every=50,
            eval_batches=32,
        ),
    ),
    # nanoGPT's shakespeare-char shape: 6 layers of width 384, 10.7 M parameters.
    "shakespeare": Preset(
        model=_SHAKESPEARE_SHAPE,
        # Validation loss on an H200, nanoGPT's best in this shape being 1.4637: 1.445, 1.447, 1.448 for seeds 0, 1, 2.
        # Seed 0 in as many steps with decay 0.5, dropout 0.1, 2 % noise 1.460; with decay 0.1, dropout 0.2, no noise
        # 1.488; 350 steps at 5e-3 1.452. Training loss after 140 steps at 1e-3: Muon 1.424, AdamW 1.446.
        train=_SHAKESPEARE,
    ),
    # The same in five times the steps, for the best loss.
    "shakespeare-long": Preset(
        model=_SHAKESPEARE_SHAPE,
        # Validation loss, best of a run, seeds 0, 1, 2: 1.415, 1.412, 1.416. Dropout 0.15, 1800 steps 1.428, 1.414,
        # 1.419; dropout 0.1, 1600 steps 1.430, 1.422, 1.432; dropout 0.08, 22 % noise, 1800 steps 1.442, 1.434, 1.442.
        # Seed 0 without dropout, at 2e-3, 25 % noise 1.462.
        train=dataclasses.replace(
            _SHAKESPEARE, num_steps=2200, learning_rate=3e-3, warmup_steps=60, dropout=0.2, token_noise=0.2
        ),
    ),
    # nanoGPT's shape for a CPU: 4 layers of width 128, 0.8 M parameters.
    "shakespeare-cpu": Preset(
        model=ModelConfig(
            vocab_size=256,
            model_dim=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mlp_dim=344,
            max_seqlen=64,
        ),
        # Validation loss at the end, seeds 0, 1, 2: 190 steps 1.842, 1.871, 1.842; 220 steps 1.812, 1.823, 1.818. With
        # momentum 0.95 batches of 12 take 270 steps to 1.862; AdamW at 3e-3 has 1.906 after 600 of them.
        train=TrainConfig(
            batch_size=16,
            seqlen=64,
            num_steps=200,
            learning_rate=6e-3,
            min_learning_rate=6e-4,
            warmup_steps=30,
            optimizer="muon",
            momentum=0.9,
            tokenizer="bytes",
            vocab_size=256,
            eval_batches=40,
            nanogpt_loss=1.8857,
        ),
    ),
    # GPT-2's smallest shape: 12 layers of width 768, 124 M parameters.
    "small": Preset(
        model=ModelConfig(
            vocab_size=50_304,
            model_dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            mlp_dim=2048,
            max_seqlen=1024,
        ),
        train=TrainConfig(
            batch_size=8,
            seqlen=1024,
            num_steps=20_000,
            learning_rate=6e-4,
            min_learning_rate=6e-5,
            warmup_steps=500,
            tokenizer="bpe",
            vocab_size=50_304,
            eval_every=500,
        ),
    ),
}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError naming the ones there are."""
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, allowed are {', '.join(map(repr, PRESETS))}")
    return PRESETS[name]
