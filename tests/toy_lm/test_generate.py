"""Generation: the same text with a cache or without, alone or in a batch, streamed or whole; seeds, windows, UTF-8."""

import pytest
import torch

import kernels
import toy_lm
from tests.toy_lm.conftest import CONTEXT, small_model
from toy_lm import decode, generate
from toy_lm.decode import window_start
from toy_lm.generate import EMPTY_PROMPT, LanguageModel
from toy_lm.tokenizer import Tokenizer

PROMPTS = ["the quick", "d", "the lazy dogs sleep under the old trees at", "", "the quick brown foxes jump 😀 über"]


@torch.no_grad()
def greedy_without_cache(lm: LanguageModel, prompt: str, max_new_tokens: int) -> list[int]:
    """Reads the window of the text afresh for each token, in fp64 on the CPU."""
    model = small_model(lm.tokenizer.vocab_size, "classic").double()
    token_ids = lm.prompt_ids(prompt)
    for _ in range(max_new_tokens):
        window = token_ids[window_start(len(token_ids), CONTEXT) :]
        token_ids = [*token_ids, int(model(torch.tensor([window]))[0, -1].argmax())]
    return token_ids[len(token_ids) - max_new_tokens :]


def text_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """A character that is unfinished at the end is left out."""
    whole = tokenizer.decode_bytes(token_ids)
    for cut in range(4):
        text = whole[: len(whole) - cut].decode("utf-8", errors="replace")
        if not text.endswith("\ufffd"):
            return text
    return tokenizer.decode(token_ids)


def test_window_over_a_long_text():
    for context in (1, 2, 3, 8, 9):
        half = max(1, context // 2)
        for num_tokens in range(1, 50):
            start = window_start(num_tokens, context)
            assert start % half == 0
            assert 0 <= start < num_tokens and num_tokens - start <= context
            assert start == 0 or num_tokens - (start - half) > context  # not a token dropped too early
            assert start == 0 if num_tokens <= context else start > 0


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cache_equals_no_cache(lm: LanguageModel, prompt: str):
    """Also far beyond the context, for prompts shorter and longer than it."""
    steps = list(lm.steps(prompt, max_new_tokens=60, temperature=0.0))
    assert [step.token_id for step in steps] == greedy_without_cache(lm, prompt, 60)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 5}]
)
def test_alone_equals_batched_equals_streamed(lm: LanguageModel, settings: dict):
    alone = [lm.generate(prompt, max_new_tokens=50, **settings)[0] for prompt in PROMPTS]
    assert lm.generate_batch(PROMPTS, max_new_tokens=50, **settings) == alone
    assert lm.generate_batch(PROMPTS[::-1], max_new_tokens=50, **settings) == alone[::-1]
    assert ["".join(lm.stream(prompt, max_new_tokens=50, **settings)) for prompt in PROMPTS] == alone
    assert len(set(alone)) == len(PROMPTS)


def test_prompts_are_read_together_without_much_padding(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    """Equal ones once, ones of about the same length together, never more tokens at once than the limit."""
    prompts = [*PROMPTS, "d" * 40, "the quick", "the quick", "quick the"]
    expected = [lm.generate(prompt, max_new_tokens=40, seed=4)[0] for prompt in prompts]
    read: list[tuple[int, int]] = []
    read_windows = decode.PromptReader.read

    def recording(self, windows):
        read.append((len(windows), len(windows[-1])))
        return read_windows(self, windows)

    monkeypatch.setattr(decode.PromptReader, "read", recording)
    monkeypatch.setattr(decode, "_PADDING", 4)
    monkeypatch.setattr(decode, "_TOKENS_AT_ONCE", 40)
    assert lm.generate_batch(prompts, max_new_tokens=40, seed=4) == expected
    assert all(rows == 1 or rows * seqlen <= 40 for rows, seqlen in read)
    assert any(rows > 1 for rows, _ in read)
    read.clear()
    lm.generate("the quick", max_new_tokens=1, num_samples=5)
    assert read == [(1, len(lm.prompt_ids("the quick")) - 1)]


def test_a_prompt_is_read_the_same_again(lm: LanguageModel):
    """On a GPU, prompts of about the same length share a graph, which the second of them captures."""
    windows = [list(range(size, 0, -1)) for size in (CONTEXT - 1, CONTEXT - 2, 3, 1)]
    expected = [kept(decode.PromptReader(lm.model, lm.weights), window) for window in windows]
    reader = decode.PromptReader(lm.model, lm.weights)
    for _ in range(2):
        for window, caches in zip(windows, expected, strict=True):
            assert all(map(torch.equal, kept(reader, window), caches))


@torch.inference_mode()
def kept(reader: decode.PromptReader, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    cache = reader.read([window])
    return cache.k[..., : len(window), :].clone(), cache.v[..., : len(window), :].clone()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 40, "seed": 5}])
def test_both_devices_give_the_same_text(run_folder: str, settings: dict):
    """In fp32, whose rounding is far below what separates these tokens."""
    texts = [
        toy_lm.load(run_folder, device=device, dtype=torch.float32).generate_batch(
            PROMPTS, max_new_tokens=50, **settings
        )
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]


def test_a_text_ends_where_stop_begins(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    """Whole, streamed or in a batch; held back is what may begin it, and given back where it does not."""
    monkeypatch.setattr(generate, "_STOP_EVERY", 7)
    settings = {"max_new_tokens": 60, "temperature": 1.5, "seed": 5}
    texts = lm.generate_batch(PROMPTS, **settings)
    middle = texts[0][20:23]
    for stop in (texts[0][0], middle, texts[0][-3:], texts[0][-2:] + "x", middle + "\x00", "not in it"):
        expected = [text.partition(stop)[0] for text in texts]
        assert lm.generate_batch(PROMPTS, stop=stop, **settings) == expected
        assert lm.generate(PROMPTS[0], stop=stop, **settings) == expected[:1]
        pieces = list(lm.stream(PROMPTS[0], stop=stop, **settings))
        assert "".join(pieces) == expected[0]
        server = toy_lm.Server(lm, num_rows=2, temperature=1.5, seed=5)
        requests = [server.submit(prompt, max_new_tokens=60, stop=stop) for prompt in PROMPTS]
        assert "".join(piece for request, piece in server.run() if request is requests[0]) == expected[0]
        assert [request.text for request in requests] == expected
        assert {request.state for request in requests} == {"done"}
    assert lm.generate(PROMPTS[0], max_new_tokens=0, stop="x") == [""]
    with pytest.raises(ValueError, match="stop: got ''"):
        lm.generate("the", stop="")


def test_no_token_is_drawn_long_after_stop(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate, "_STOP_EVERY", 7)
    text = lm.generate("the", max_new_tokens=200, seed=3)[0]
    drawn: list[int] = []
    draw = decode.Decoder.next

    def counting(self, count):
        new, logits = draw(self, count)
        drawn.append(new.shape[1])
        return new, logits

    monkeypatch.setattr(decode.Decoder, "next", counting)
    lm.generate("the", max_new_tokens=200, seed=3, stop=text[0])
    assert sum(drawn) <= 7
    drawn.clear()
    assert list(lm.stream("the", max_new_tokens=200, seed=3, stop=text[0])) == []
    assert len(drawn) <= 4  # a character is at most four tokens


def test_seeds(lm: LanguageModel):
    texts = lm.generate("the", max_new_tokens=30, num_samples=4, seed=10)
    assert texts == lm.generate("the", max_new_tokens=30, num_samples=4, seed=10)
    assert texts == [lm.generate("the", max_new_tokens=30, seed=10 + sample)[0] for sample in range(4)]
    assert len(set(texts)) == 4
    greedy = lm.generate("the", max_new_tokens=30, num_samples=3, temperature=0.0, seed=10)
    assert greedy == lm.generate("the", max_new_tokens=30, num_samples=3, temperature=0.0, seed=99)
    assert len(set(greedy)) == 1


def test_int8_weights(lm: LanguageModel):
    """The prompt and the new tokens meet the same rounded weights: the cache still equals no cache."""
    rounded = LanguageModel(small_model(lm.tokenizer.vocab_size).to(lm.device), lm.tokenizer, int8=True)
    steps = list(rounded.steps("the quick", max_new_tokens=40, temperature=0.0, num_candidates=3))
    token_ids = rounded.prompt_ids("the quick")
    for step in steps:
        window = token_ids[window_start(len(token_ids), CONTEXT) :]
        logits = rounded.model(torch.tensor([window], device=lm.device))[0, -1]
        assert step.probability == pytest.approx(logits.double().softmax(dim=-1)[step.token_id].item(), rel=1e-3)
        token_ids.append(step.token_id)
    exact, given = (model.model(torch.tensor([token_ids[:CONTEXT]], device=lm.device)) for model in (lm, rounded))
    assert 0 < (exact.softmax(-1) - given.softmax(-1)).abs().max() < 0.05


def test_classic_attention_gives_the_same_text(lm: LanguageModel):
    other = LanguageModel(small_model(lm.tokenizer.vocab_size, "classic").to(lm.device), lm.tokenizer)
    assert other.generate(PROMPTS[2], max_new_tokens=50, seed=3) == lm.generate(PROMPTS[2], max_new_tokens=50, seed=3)


def test_an_empty_prompt_stands_for_a_line_end(lm: LanguageModel):
    assert lm.generate("", max_new_tokens=20) == lm.generate(EMPTY_PROMPT, max_new_tokens=20)


def test_nothing_to_generate(lm: LanguageModel):
    assert lm.generate("the", max_new_tokens=0) == [""]
    assert list(lm.stream("the", max_new_tokens=0)) == []


def test_candidates_are_the_models_probabilities(lm: LanguageModel):
    token_ids = lm.prompt_ids("the quick")
    for step in lm.steps("the quick", max_new_tokens=8, num_candidates=5, temperature=2.0, seed=1):
        logits = lm.model(torch.tensor([token_ids], device=lm.device))[0, -1]
        expected = logits.double().softmax(dim=-1)
        assert [p for _, p in step.candidates] == pytest.approx(sorted(expected.tolist(), reverse=True)[:5], rel=1e-4)
        assert [p for _, p in step.candidates] == pytest.approx(
            [expected[token_id].item() for token_id, _ in step.candidates], rel=1e-4
        )
        assert step.probability == pytest.approx(expected[step.token_id].item(), rel=1e-4)
        token_ids.append(step.token_id)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """Makes the logits certain of the tokens of a script, one after the other; -1 stands for logits that are NaN."""

    def follow(script: list[int]) -> None:
        remaining = iter(script)

        def decode_step(token_ids, positions, k_cache, v_cache, weights, *, norm_eps, check=True):
            if token_ids.dim() == 2:  # a prompt that is read
                return None
            logits = torch.zeros(len(token_ids), 512, device=token_ids.device)
            token_id = next(remaining)
            logits[:, token_id] = 100.0 if token_id >= 0 else 0.0
            return logits if token_id >= 0 else logits * float("nan")

        monkeypatch.setattr(decode.kernels, "decode_step", decode_step)
        monkeypatch.setattr(decode, "_STEPS_BEFORE_CAPTURE", 1000)  # a script is no graph

    return follow


def test_a_character_is_never_streamed_by_halves(lm: LanguageModel, scripted):
    text = "ü😀é"
    names = {lm.tokenizer.token_bytes(token_id): token_id for token_id in range(lm.tokenizer.vocab_size)}
    script = [names[bytes([byte])] for byte in text.encode()]
    scripted(script)
    assert list(lm.stream("the", max_new_tokens=len(script))) == ["ü", "😀", "é"]
    scripted(script)
    assert lm.generate("the", max_new_tokens=len(script) - 1) == ["ü😀"]
    scripted([names[b"\xff"], names[b"a"]])
    assert lm.generate("the", max_new_tokens=2) == ["\ufffda"]


def test_ids_beyond_the_tokenizer_never_come_out(lm: LanguageModel):
    """A model may have more ids than its tokenizer, to round up its vocabulary."""
    bytes_only = LanguageModel(lm.model, Tokenizer.bytes_tokenizer())
    assert lm.model.config.vocab_size > 256
    for step in bytes_only.steps("the", max_new_tokens=200, temperature=50.0):
        assert step.token_id < 256


def test_logits_that_are_not_finite(lm: LanguageModel, scripted):
    for job in (
        lambda: lm.generate("the", max_new_tokens=4, num_samples=2),
        lambda: list(lm.stream("the", max_new_tokens=4)),
    ):
        scripted([5, 5, -1, 5])
        with pytest.raises(FloatingPointError, match="not finite at new token 2 of text 0"):
            job()


def test_streams_do_not_disturb_each_other(lm: LanguageModel):
    """Two at once with the same settings, and others before and after."""
    expected = [lm.generate(prompt, max_new_tokens=20, seed=1)[0] for prompt in PROMPTS[:2]]
    streams = [lm.steps(prompt, max_new_tokens=20, seed=1) for prompt in PROMPTS[:2]]
    texts = ["", ""]
    for step_of_each in zip(*streams, strict=True):
        texts = [text + step.text for text, step in zip(texts, step_of_each, strict=True)]
    assert texts == expected
    unfinished = lm.stream("d", max_new_tokens=20, seed=9)
    next(unfinished)
    unfinished.close()
    assert lm.generate(PROMPTS[0], max_new_tokens=20, seed=1) == expected[:1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", 10**6),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("seed", -1),
        ("seed", 2**63),
        ("max_new_tokens", -1),
        ("num_samples", 0),
    ],
)
def test_bad_settings_are_named(lm: LanguageModel, name: str, value: float):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        lm.generate("the", **{"max_new_tokens": 2, name: value})


def test_text_that_is_no_unicode(lm: LanguageModel):
    with pytest.raises(ValueError, match="not valid Unicode"):
        lm.generate("half a pair \ud800")


def test_load(run_folder: str, device: str, lm: LanguageModel):
    loaded = toy_lm.load(run_folder, device=device, dtype=torch.float32)
    assert loaded.generate("the quick", max_new_tokens=40, seed=2) == lm.generate(
        "the quick", max_new_tokens=40, seed=2
    )
    assert kernels.load(device) is loaded.binding


def test_greedy_text_equals_that_of_transformers(run_folder: str, tokenizer: Tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_folder, dtype=torch.float32).eval()
    lm = toy_lm.load(run_folder, device="cpu")
    token_ids = torch.tensor([tokenizer.encode("the quick")])
    count = CONTEXT - token_ids.shape[1]
    # The end-of-text id -1 is no token: like ours, their text then goes on to the last token asked for.
    expected = theirs.generate(token_ids, max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    ours = [step.token_id for step in lm.steps("the quick", max_new_tokens=count, temperature=0.0)]
    assert ours == expected[0, token_ids.shape[1] :].tolist()
