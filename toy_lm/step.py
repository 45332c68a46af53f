"""One training step as the device sees it: no host in the loop.

    windows -> model -> mean cross-entropy -> gradients -> clipped -> optimizer

The host lays out the next `TABLE` steps at once: their windows of tokens and their learning rates go to the device in
two copies, and a counter on the device says which row a step takes. A step therefore needs nothing from the host. On
CUDA it is captured as one graph after a few steps and replayed from then on; on the CPU the same function is simply
called. Losses stay on the device until they are asked for.

Knows the model, the optimizer and windows of tokens; knows nothing of files, evaluation or progress.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from toy_lm.config import TrainConfig
from toy_lm.data import Windows
from toy_lm.distributed import ALONE, Workers, whole
from toy_lm.model import Transformer
from toy_lm.optimizer import Optimizer

TABLE = 64  # steps that are laid out at once
_STEPS_BEFORE_CAPTURE = 3  # libraries allocate their workspaces, Triton compiles


class TrainStep:
    """Trains `model` on random windows, a step a call.

    rate         the learning rate of a step, a number
    autocast     what matrices are multiplied in; None is fp32
    workers      with whom each batch is shared out
    recompute    keep little of each layer for the backward pass (gradient checkpointing)
    sharded      the workers hold slices of the model: gradients are then added up as they come

    Raises ValueError if the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        windows: Windows,
        config: TrainConfig,
        rate: Callable[[int], float],
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        workers: Workers = ALONE,
        recompute: bool = False,
        sharded: bool = False,
    ) -> None:
        self.model, self.optimizer, self.windows, self.config, self.rate = model, optimizer, windows, config, rate
        self.device, self.workers, self.recompute, self.sharded = device, workers, recompute, sharded
        if config.batch_size % (workers.count * config.grad_accumulation):
            raise ValueError(
                f"batch_size: got {config.batch_size}, needs a multiple of {workers.count} workers times "
                f"grad_accumulation = {config.grad_accumulation}"
            )
        self.autocast = autocast
        self.begin = self.next_step = self.end = 0  # the first step laid out, the one to do, the one after the last
        part = config.batch_size // (workers.count * config.grad_accumulation)
        shape = (TABLE, config.grad_accumulation, part, config.seqlen + 1)
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=device)
        self.documents = None
        if windows.document_starts is not None:
            num_documents = windows.max_documents(part) + 1
            self.documents = torch.zeros((*shape[:2], num_documents), dtype=torch.int32, device=device)
        self.rates = torch.zeros(TABLE, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.outcomes = torch.zeros(TABLE, 2, device=device)  # loss, gradient norm
        self.first_unread = 0  # the row of `outcomes` to read from
        self.unread: list[Tensor] = []
        self.can_capture = device.type == "cuda" and not sharded
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.num_eager = 0

    def __call__(self, step: int) -> None:
        """Do step number `step`, counted from 0; the host does not wait for the device."""
        if step != self.next_step or step == self.end:
            self._lay_out(step)
        if self.graph is None and self.can_capture and self.num_eager >= _STEPS_BEFORE_CAPTURE:
            self.graph = self._captured()
        if self.graph is not None:
            self.graph.replay()
        else:
            with self._aside():
                self._step()
            self.num_eager += 1
        self.next_step = step + 1

    def losses(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Nats of each target, (batch * seqlen,) fp32, of inputs and targets (batch, seqlen) int64."""
        recompute = self.recompute and torch.is_grad_enabled()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            hidden = self.model.hidden(inputs, documents=documents, recompute=recompute)
            return self.model.losses(hidden, targets)

    def read(self) -> list[list[float]]:
        """[loss, gradient norm] of every step since the last call; waits for the device."""
        self._collect()
        values = torch.cat(self.unread).tolist() if self.unread else []
        self.unread.clear()
        return values

    def _lay_out(self, step: int) -> None:
        """Fill the tables from `step` on."""
        self._collect()
        config = self.config
        steps = range(step, step + TABLE)
        mine = slice(self.workers.rank, None, self.workers.count)
        starts = np.concatenate([self.windows.random_starts(config.batch_size, config.seed, s)[mine] for s in steps])
        rates = torch.tensor([self.rate(s) for s in steps], dtype=torch.float32)
        self._send(torch.from_numpy(self.windows.cut(starts)), self.tokens)
        self._send(rates, self.rates)
        if self.documents is not None:
            parts = starts.reshape(-1, self.tokens.shape[2])
            self._send(torch.from_numpy(np.stack([self.windows.documents(part) for part in parts])), self.documents)
        self.row.zero_()
        self.begin, self.next_step, self.end, self.first_unread = step, step, step + TABLE, 0

    def _send(self, values: Tensor, table: Tensor) -> None:
        if self.device.type == "cuda":
            values = values.pin_memory()  # so that the copy does not wait for the device
        table.copy_(values.view(table.shape), non_blocking=True)

    def _collect(self) -> None:
        """Set aside the outcomes of the steps that were done since the last time."""
        done = self.next_step - self.begin
        if done > self.first_unread:
            self.unread.append(self.outcomes[self.first_unread : done].clone())
            self.first_unread = done

    def _step(self) -> None:
        config = self.config
        self.optimizer.set_learning_rate(self.rates[self.row])
        windows = self.tokens[self.row].squeeze(0).long()  # (grad_accumulation, part of the batch, seqlen + 1)
        documents = None if self.documents is None else self.documents[self.row].squeeze(0)
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(windows):
            inputs = self._with_noise(part[:, :-1])
            nats = self.losses(inputs, part[:, 1:], None if documents is None else documents[number])
            loss = nats.sum() / (config.batch_size * config.seqlen)
            loss.backward()
            total += loss.detach()
        gradients = [] if self.sharded else [p.grad for p in self.model.parameters() if p.grad is not None]
        self.workers.add_up([total, *gradients])
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.outcomes[self.row] = torch.stack((total, norm))
        self.row += 1

    def _with_noise(self, inputs: Tensor) -> Tensor:
        """With a share of the tokens replaced by random ones, against overfitting. (Xie et al., arXiv:1703.02573)"""
        share = self.config.token_noise
        if share == 0.0:
            return inputs
        others = torch.randint_like(inputs, self.model.config.vocab_size)
        return torch.where(torch.rand(inputs.shape, device=self.device) < share, others, inputs)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On CUDA, a stream like the one that captures: autograd ties a parameter's gradient to the first it sees.

        Always the same one: what is freed on a stream is only ever allocated again on that stream.
        """
        if self.stream is None:
            yield
            return
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's threads ask the device how it fares
            self._step()
        return graph
