"""Every text comes back as it went in, whatever it holds, and Hugging Face reads the same tokens from the same file."""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import GRAMMAR
from toy_lm.tokenizer import Tokenizer

TEXT = GRAMMAR.grow(20_000)
TOKENIZERS = {"bpe": Tokenizer.train_bpe(TEXT, 400), "bytes": Tokenizer.bytes_tokenizer()}
SAMPLES = [
    "",
    "the quick brown foxes\n",
    "  two  spaces\r\n\tand\n\n\nlines ",
    "héllo Ω 日本 🦊👩‍👩‍👧",
    "\x00\x01\x7f\u0080\ufffd",
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("text", SAMPLES)
def test_text_comes_back(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode_bytes(token_ids) == text.encode() == b"".join(map(tokenizer.token_bytes, token_ids))


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_byte_is_its_own_id():
    tokenizer = TOKENIZERS["bytes"]
    assert tokenizer.vocab_size == 256
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]


def test_the_words_of_the_corpus_become_tokens():
    tokenizer = TOKENIZERS["bpe"]
    assert 256 < tokenizer.vocab_size <= 400
    token_ids = tokenizer.encode("the quick brown foxes hide under the trees\n")
    assert [tokenizer.token_bytes(i) for i in token_ids] == [
        b"the", b" quick", b" brown", b" foxes", b" hide", b" under", b" the", b" trees", b"\n",
    ]  # fmt: skip


def test_half_a_character_is_kept_as_bytes_and_shown_as_a_replacement():
    tokenizer = TOKENIZERS["bytes"]
    half = tokenizer.encode("🦊")[:2]
    assert tokenizer.decode_bytes(half) == "🦊".encode()[:2]
    assert tokenizer.decode(half) == "\ufffd"


def test_saved_and_loaded_it_is_the_same_here_and_in_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path, max_seqlen=64)
    loaded = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size == len(theirs)
    for text in [*SAMPLES, TEXT[:2000]]:
        token_ids = tokenizer.encode(text)
        assert loaded.encode(text) == token_ids
        assert theirs(text)["input_ids"] == token_ids
        assert theirs.decode(token_ids) == text


def test_bad_input_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size: got 255, BPE over bytes needs 256"):
        Tokenizer.train_bpe("text", 255)
    with pytest.raises(ValueError, match="text: character 1 is not valid Unicode"):
        tokenizer.encode("a\udc80")
    with pytest.raises(ValueError, match=f"token_id: got {tokenizer.vocab_size}"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="token_id: got 256"):
        Tokenizer.bytes_tokenizer().decode([65, 256])
    with pytest.raises(ValueError, match="token_id: got -1"):
        tokenizer.token_bytes(-1)
    with pytest.raises(ValueError, match=r"there is no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer that can be read"):
        Tokenizer.load(tmp_path)
    TOKENIZERS["bytes"].save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    del fields["model"]["vocab"]["A"]
    fields["model"]["vocab"]["AB"] = 65
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="lacks some of the 256 bytes"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_many_texts_are_encoded_as_each_by_itself(kind):
    tokenizer = (
        Tokenizer.train_bpe("the quick brown foxes\n" * 9, 280) if kind == "bpe" else Tokenizer.bytes_tokenizer()
    )
    texts = ["the quick", "", " brown 🦊 foxes\n\n", "\n"] * 5
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode_all(["fine", "\ud800"])
