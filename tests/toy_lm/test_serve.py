"""Continuous batching: nothing is lost, and every request's text is the one that it gets alone."""

import random

import pytest

import kernels
import toy_lm
from tests.toy_lm.conftest import CONTEXT
from toy_lm import decode
from toy_lm.generate import LanguageModel

WORDS = ["the", "quick", "brown", "foxes", "jump", "over", "lazy", "dogs", "under", "old", "trees", "ü", "😀"]
SETTINGS = {"temperature": 1.3, "top_k": 30}


def mixed_requests(count: int) -> list[dict]:
    """Prompts of 0 to 29 words, 0 to 39 new tokens: inside the context, and far beyond it."""
    chance = random.Random(0)
    return [
        {
            "prompt": " ".join(chance.choices(WORDS, k=chance.randrange(30))),
            "max_new_tokens": chance.randrange(40),
            "seed": chance.randrange(2**40),
        }
        for _ in range(count)
    ]


def alone(lm: LanguageModel, request: dict) -> str:
    return lm.generate(**request, **SETTINGS)[0]


def test_each_of_256_requests_gets_the_text_that_it_gets_alone(lm: LanguageModel):
    wanted = mixed_requests(256)
    expected = [alone(lm, request) for request in wanted]
    assert max(len(lm.prompt_ids(request["prompt"])) for request in wanted) > 2 * CONTEXT
    server = toy_lm.Server(lm, num_rows=7, **SETTINGS)
    requests = [server.submit(**request) for request in wanted[:100]]
    pieces: dict[int, str] = {}
    later = iter(wanted[100:])
    for request, piece in server.run():
        pieces[id(request)] = pieces.get(id(request), "") + piece
        requests += [server.submit(**another) for another in [next(later, None)] if another]  # while others run
    assert [request.text for request in requests] == expected
    assert [pieces.get(id(request), "") for request in requests] == expected
    assert {request.state for request in requests} == {"done"}
    assert [request.num_tokens for request in requests] == [request["max_new_tokens"] for request in wanted]


def test_cancelling_disturbs_nobody(lm: LanguageModel):
    wanted = mixed_requests(40)
    server = toy_lm.Server(lm, num_rows=5, **SETTINGS)
    requests = [server.submit(**request) for request in wanted]
    server.cancel(requests[39])  # before its turn
    cancelled = {39}
    for request, _ in server.run():
        number = requests.index(request)
        assert number not in cancelled
        if number % 3 == 0 and request.state == "running":
            server.cancel(request)
            cancelled.add(number)
    assert len(cancelled) > 5
    for number, (request, given) in enumerate(zip(requests, wanted, strict=True)):
        if number in cancelled:
            assert request.state == "cancelled" and request.num_tokens < given["max_new_tokens"]
            assert alone(lm, given).startswith(request.text)
        else:
            assert request.state == "done" and request.text == alone(lm, given)


def test_logits_that_are_not_finite_end_one_request_alone(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    wanted = [{"prompt": prompt, "max_new_tokens": 9} for prompt in ("the", "quick", "jump")]
    expected = [alone(lm, request) for request in wanted]
    decode_step, steps = kernels.decode_step, iter(range(1000))

    def damaged(*given, **options):
        logits = decode_step(*given, **options)
        logits[1] = float("nan") if next(steps) == 6 else logits[1]
        return logits

    monkeypatch.setattr(decode.kernels, "decode_step", damaged)
    monkeypatch.setattr(decode, "_STEPS_BEFORE_CAPTURE", 1000)  # a graph would repeat one step
    server = toy_lm.Server(lm, num_rows=3, **SETTINGS)
    requests = [server.submit(**request) for request in wanted]
    for _ in server.run():
        pass
    assert [request.state for request in requests] == ["done", "failed", "done"]
    assert [requests[0].text, requests[2].text] == [expected[0], expected[2]]
    assert expected[1].startswith(requests[1].text) and requests[1].num_tokens < 9


def test_a_loop_that_is_left_can_be_taken_up_by_another(lm: LanguageModel):
    """What ran when the loop was left is over; what waited is served."""
    wanted = [{"prompt": "the", "max_new_tokens": 20, "seed": seed} for seed in range(3)]
    server = toy_lm.Server(lm, num_rows=1, **SETTINGS)
    requests = [server.submit(**request) for request in wanted]
    loop = server.run()
    next(loop)
    loop.close()
    for _ in server.run():
        pass
    assert [request.state for request in requests] == ["cancelled", "done", "done"]
    assert requests[2].text == alone(lm, wanted[2])


@pytest.mark.parametrize(("name", "value"), [("max_new_tokens", -1), ("seed", -1), ("seed", 2**63)])
def test_bad_requests_are_refused_at_once(lm: LanguageModel, name: str, value: int):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        toy_lm.Server(lm).submit("the", **{name: value})
    with pytest.raises(ValueError, match=r"^num_rows: got"):
        toy_lm.Server(lm, num_rows=0)
