"""Text to token ids and back: byte-level BPE, or bytes as they are.

Both start from all 256 bytes, so that every text can be written in tokens and none holds an unknown character. Both
are kept as a `tokenizer.json` of the `tokenizers` library, which Hugging Face loads too. There are no special tokens:
a text here has no end that a model would have to announce.

Knows nothing of models, tensors or corpora.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

FILE_NAME = "tokenizer.json"


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode).

    Printable bytes of Latin-1 stand for themselves, the others are moved up behind the last of them, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


_CHARACTER_OF_BYTE = _byte_characters()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}


class Tokenizer:
    """Made by `train_bpe`, `bytes_tokenizer` or `load`; `vocab_size` tokens, with ids 0 to vocab_size - 1."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ValueError if the vocabulary of `backend` is not byte-level, or lacks one of the 256 bytes."""
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        names = [backend.id_to_token(token_id) or "" for token_id in range(self.vocab_size)]
        if any(not name or not _BYTE_OF_CHARACTER.keys() >= set(name) for name in names):
            raise ValueError("tokenizer: its vocabulary is not byte-level")
        self._bytes = [bytes(_BYTE_OF_CHARACTER[character] for character in name) for name in names]
        if not {bytes([byte]) for byte in range(256)} <= set(self._bytes):
            raise ValueError("tokenizer: its vocabulary lacks some of the 256 bytes")
        self.is_bytes = self.vocab_size == 256 and all(name == bytes([i]) for i, name in enumerate(self._bytes))

    @classmethod
    def train_bpe(cls, text: str | Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges of `text` (one string, or its parts) until there are vocab_size tokens or none is left.

        Raises ValueError if vocab_size is below 256, the number of bytes.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size: got {vocab_size}, BPE over bytes needs 256 or more")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=_CHARACTER_OF_BYTE, show_progress=False, min_frequency=2
        )
        backend.train_from_iterator([text] if isinstance(text, str) else text, trainer)
        return cls(backend)

    @classmethod
    def bytes_tokenizer(cls) -> "Tokenizer":
        """256 tokens: the id of a byte is its value."""
        vocabulary = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}
        return cls(_byte_level(models.BPE(vocab=vocabulary, merges=[])))

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Tokenizer":
        """Read `tokenizer.json` in `folder`. Raises ValueError if it is missing, damaged or not byte-level."""
        path = pathlib.Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{folder}: there is no {FILE_NAME} in this folder")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer that can be read: {error}") from None
        return cls(backend)

    def files(self, max_seqlen: int) -> dict[str, str]:
        """What a Hugging Face model folder holds for this tokenizer, as {file name: text}."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seqlen}
        config["clean_up_tokenization_spaces"] = False
        return {FILE_NAME: self.backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}

    def save(self, folder: str | pathlib.Path, max_seqlen: int = 1 << 20) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`, which exists."""
        for name, text in self.files(max_seqlen).items():
            (pathlib.Path(folder) / name).write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises ValueError if it holds half a surrogate pair, which no UTF-8 text does."""
        if self.is_bytes:
            return list(self._utf8(text))
        self._utf8(text)
        return self.backend.encode(text).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """What `encode` gives for each of the texts, by several threads."""
        if self.is_bytes:
            return [self.encode(text) for text in texts]
        for text in texts:
            self._utf8(text)
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]

    @staticmethod
    def _utf8(text: str) -> bytes:
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text: character {error.start} is not valid Unicode ({error.reason})") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token_id: got {token_id}, the vocabulary has ids 0 to {self.vocab_size - 1}")
        return self._bytes[token_id]

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """The bytes that the tokens stand for, one behind the other."""
        token_ids = tuple(token_ids)
        if self.is_bytes:
            with contextlib.suppress(ValueError):  # an id that is no byte is named below
                return bytes(token_ids)
        return b"".join(self.token_bytes(token_id) for token_id in token_ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(token_ids).decode("utf-8", errors="replace")


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """Words (with the space before them), numbers, signs and white space apart, each as a row of bytes."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend
