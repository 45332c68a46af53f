"""Continuous batching: requests join and leave a running batch, and none notices the others.

    submit   a request waits until a row of the batch is free
    run      again and again: free rows take waiting requests -> a few steps for every row -> (request, new text)

A request's text is the one that its prompt and seed give alone: a row of the batch does not depend on the other rows.
Requests may be submitted and cancelled while the loop over `run` goes on, by the same thread.

Knows the decoder's rows and the language model; knows nothing of how a token is computed.
"""

import collections
import dataclasses
from collections.abc import Iterator

from toy_lm.decode import Decoder, Sampling
from toy_lm.generate import LanguageModel, TextDecoder

STEPS_BETWEEN = 4  # tokens of every text between two looks at who joins and leaves


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what became of it so far."""

    prompt: str
    max_new_tokens: int
    seed: int
    decoder: TextDecoder
    text: str = ""  # what was generated, never half a character
    num_tokens: int = 0  # that were drawn
    state: str = "waiting"  # then "running"; at last "done", "cancelled", or "failed": its logits were not finite


class Server:
    """Up to num_rows texts at a time, drawn with one `Sampling`; further requests wait.

    server = toy_lm.Server(lm, num_rows=16, top_k=40)
    requests = [server.submit(prompt, max_new_tokens=100) for prompt in prompts]
    for request, text in server.run():
        ...
    """

    def __init__(self, lm: LanguageModel, *, num_rows: int = 16, **sampling) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows: got {num_rows}, needs 1 or more")
        self.lm = lm
        self.sampling = Sampling(**sampling)
        self.rows: list[Request | None] = [None] * num_rows
        self.waiting: collections.deque[Request] = collections.deque()

    def submit(
        self, prompt: str, *, max_new_tokens: int = 200, seed: int | None = None, stop: str | None = None
    ) -> Request:
        """Let a request wait for its turn; seed: by default the one of the server's sampling; stop: see `generate`.

        Raises ValueError for bad input.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, needs 0 or more")
        seed = self.sampling.seed if seed is None else seed
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: got {seed}, needs a whole number from 0 to 2^63 - 1")
        self.lm.prompt_ids(prompt)  # a prompt that is no text is refused here
        request = Request(prompt, max_new_tokens, seed, TextDecoder(self.lm.tokenizer, stop))
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request where it stands; its row is free from the next step on. One that is over stays as it is."""
        if request.state in ("waiting", "running"):
            request.state = "cancelled"

    def run(self) -> Iterator[tuple[Request, str]]:
        """Serve until nothing waits or runs: each request with the piece of text that it just got."""
        with self.lm.decoder(len(self.rows), self.sampling) as decoder:
            try:
                while self._leave_and_join(decoder):
                    yield from self._advance(decoder)
            finally:  # whatever runs where the loop is left early is over
                for request in filter(None, self.rows):
                    self.cancel(request)
                self.rows = [None] * len(self.rows)

    def _advance(self, decoder: Decoder) -> Iterator[tuple[Request, str]]:
        """A few steps for every row."""
        running = [(row, request) for row, request in enumerate(self.rows) if request is not None]
        left = min(request.max_new_tokens - request.num_tokens for _, request in running)
        token_ids = decoder.next(min(left, STEPS_BETWEEN))[0].tolist()
        for row, request in running:
            if request.state != "running":
                continue  # cancelled while the others' pieces were looked at
            if -1 in token_ids[row]:  # the sampler marks a row of logits that it cannot draw from; the others go on
                request.state = "failed"
                continue
            request.num_tokens += len(token_ids[row])
            last = request.num_tokens == request.max_new_tokens
            piece = request.decoder.decode(*token_ids[row], last=last)
            request.text += piece
            if last or request.decoder.stopped:
                request.state = "done"
            if piece:
                yield request, piece

    def _leave_and_join(self, decoder: Decoder) -> bool:
        """Free the rows of requests that are over and fill them from those that wait. Does any text run?"""
        over = [row for row, request in enumerate(self.rows) if request and request.state != "running"]
        if over:
            decoder.leave(over)
        for row in over:
            self.rows[row] = None
        free = [row for row, request in enumerate(self.rows) if request is None]
        joining: list[tuple[int, Request]] = []
        while self.waiting and len(joining) < len(free):
            request = self.waiting.popleft()
            if request.state == "cancelled":
                continue
            request.state = "running" if request.max_new_tokens else "done"
            if request.max_new_tokens:
                joining.append((free[len(joining)], request))
        if joining:
            prompts = [self.lm.prompt_ids(request.prompt) for _, request in joining]
            decoder.join([row for row, _ in joining], prompts, [request.seed for _, request in joining])
        for row, request in joining:
            self.rows[row] = request
        return any(self.rows)
