"""Training: batches in, a run folder out.

    for each step: windows of the corpus -> model -> cross-entropy -> gradients, clipped -> AdamW
    every eval_every steps: the loss on validation text, a row of metrics.csv
    every checkpoint_every steps, at the end, and on Ctrl-C: a checkpoint that `resume=True` continues exactly

Losses are in nats per token, and in bits per byte so that models with different tokenizers can be compared. For a text
that a grammar grew, its exact entropy is printed beside them: the loss that no model can get below.

The host waits for the device only to show progress, twice a second at most: a step's loss is read later, together with
others.

Knows the model, the data and the run folder; knows nothing of kernels beyond binding them, or of generation.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from toy_lm import checkpoint, data, distributed, report
from toy_lm.config import ModelConfig, Preset, TrainConfig
from toy_lm.device import pick_device, training_dtype
from toy_lm.distributed import Workers
from toy_lm.model import Transformer
from toy_lm.optimizer import Optimizer
from toy_lm.step import TABLE, TrainStep
from toy_lm.tokenizer import Tokenizer

_READ_SECONDS = 0.5  # how often the losses are read from the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended. Losses are in nats per token; nan before the first evaluation."""

    folder: pathlib.Path
    step: int
    num_steps: int
    interrupted: bool  # stopped before num_steps, with a checkpoint from which to resume
    train_loss: float
    validation_loss: float
    best_validation_loss: float
    best_step: int
    bits_per_byte: float  # of the validation text
    entropy_bits_per_byte: float | None  # the limit, where it is known
    tokens_per_second: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is carried out; what it computes does not depend on it, but for rounding."""

    attention: str
    device: torch.device
    autocast: torch.dtype | None
    workers: Workers
    recompute: bool = False
    sharded: bool = False
    tensorboard: bool = False


def train(
    corpus: str,
    preset: Preset,
    out: str | pathlib.Path,
    *,
    attention: str = "fused",
    device: str = "auto",
    resume: bool = False,
    seed: int | None = None,
    steps: int | None = None,
    stop_after: int | None = None,
    precision: str = "auto",
    documents: str | None = None,
    recompute: bool = False,
    shard: bool = False,
    profile: bool = False,
    tensorboard: bool = False,
    log: Callable[[str], None] = tqdm.write,
) -> TrainResult:
    """Train on `corpus` (see `data.open_corpus`) and leave a run folder at `out`.

    attention   "fused" or "classic"
    device      "cpu", "cuda", or "auto": CUDA where there is a device
    resume      continue the run in `out` as if it had never stopped; its own preset, seed and steps then hold
    seed        of the weights and the batches; None takes the preset's
    steps       how many steps in all; None takes the preset's
    precision   "fp32", "bf16", or "auto": bf16 where the hardware multiplies it faster
    documents   the text behind which a document ends, as "\\n\\n": attention then stays within documents, which lie
                packed in the windows; None takes the preset's. "fused" attention only
    recompute   gradient checkpointing: keep each layer's input alone for the backward pass, compute the rest again
    shard       under torchrun, leave each worker a slice of every weight (FSDP2), not a copy
    tensorboard write the rows of metrics.csv for TensorBoard too
    profile     write trace.json, where the time of a few steps went, for chrome://tracing or ui.perfetto.dev
    stop_after  stop, with a checkpoint, once so many steps are done; None goes on to the end

    Raises ValueError for bad input, OSError if `out` cannot be written, FloatingPointError if the loss is no
    longer finite.
    """
    out = pathlib.Path(out)
    config = dataclasses.replace(
        preset.train,
        seed=preset.train.seed if seed is None else seed,
        num_steps=preset.train.num_steps if steps is None else steps,
        document_end=preset.train.document_end if documents is None else documents,
    )
    preset = dataclasses.replace(preset, train=config)
    with distributed.workers(pick_device(device)) as (workers, where):
        autocast = training_dtype(where, precision)
        execution = Execution(
            attention=attention,
            device=where,
            autocast=autocast,
            workers=workers,
            recompute=recompute,
            sharded=shard and workers.count > 1,
            tensorboard=tensorboard,
        )
        if workers.rank > 0:
            log = distributed.silent
        with workers.first_alone():
            text = data.open_corpus(corpus)
            trainer = _resumed(text, out, execution) if resume else _begun(text, preset, out, execution)
        log(kernels.load(where, wait=False).line)
        log(trainer.describe())
        last_step = trainer.config.num_steps if stop_after is None else min(stop_after, trainer.config.num_steps)
        with _interrupts() as interrupted, _profiled(out / "trace.json", profile) as step_done:
            trainer.run(last_step, interrupted, step_done, log)
        return trainer.result()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the step that follows `step` finished ones: a linear warm-up, then half a cosine down to the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def _begun(text: data.Corpus, preset: Preset, out: pathlib.Path, execution: Execution) -> "Trainer":
    """A new run: learn the tokenizer, make the folder, initialise the weights."""
    if checkpoint.exists(out):
        raise ValueError(f"out: {str(out)!r} already holds a run; resume it, or name another folder")
    window = preset.train.seqlen + 1
    if text.num_bytes < 2 * window:
        raise ValueError(
            f"corpus: {text.name!r} has {text.num_bytes} bytes; a context of {preset.train.seqlen} tokens needs "
            f"{2 * window} tokens or more"
        )
    if execution.workers.rank > 0:
        tokenizer = Tokenizer.load(out)  # what the first worker has learnt
    elif preset.train.tokenizer == "bytes":
        tokenizer = Tokenizer.bytes_tokenizer()
    else:
        tokenizer = Tokenizer.train_bpe(text.parts(), preset.train.vocab_size)
    preset = preset.with_vocab_size(tokenizer.vocab_size)
    torch.manual_seed(preset.train.seed)
    model = Transformer(preset.model, execution.attention, preset.train.dropout)
    if execution.workers.rank == 0:
        checkpoint.begin(out, preset.model, tokenizer)
    return Trainer(text, tokenizer, preset, model, out, execution)


def _resumed(text: data.Corpus, out: pathlib.Path, execution: Execution) -> "Trainer":
    """The run in `out`, as its last checkpoint left it."""
    saved = checkpoint.load(out)
    state, info = checkpoint.load_training_state(saved)
    if info["corpus"]["fingerprint"] != text.fingerprint:
        raise ValueError(
            f"corpus: {text.name!r} is not the text that the run in {str(out)!r} was begun with "
            f"({info['corpus']['name']!r}, SHA-256 {info['corpus']['fingerprint'][:16]}...)"
        )
    preset = Preset(model=ModelConfig(**info["preset"]["model"]), train=TrainConfig(**info["preset"]["train"]))
    model = saved.model(attention=execution.attention, dropout=preset.train.dropout)
    trainer = Trainer(text, saved.tokenizer, preset, model, out, execution)
    trainer.restore(saved.step, state, info)
    return trainer


class Trainer:
    """A run while it is in memory: the model, its optimizer, and how far it has come."""

    def __init__(
        self,
        text: data.Corpus,
        tokenizer: Tokenizer,
        preset: Preset,
        model: Transformer,
        out: pathlib.Path,
        execution: Execution,
    ) -> None:
        self.text, self.preset, self.config, self.out = text, preset, preset.train, out
        self.execution, self.workers, self.device = execution, execution.workers, execution.device
        device = execution.device
        self.model = model.to(device).train()

        end, seqlen = self.config.document_end, self.config.seqlen
        if end and execution.attention == "classic":
            raise ValueError("attention: got 'classic', packed documents need 'fused'")
        token_ids, starts = data.tokenize_documents(text, tokenizer, out, end)
        train_ids, validation_ids = data.split(token_ids, self.config.validation_fraction, seqlen)
        train_starts, validation_starts = data.split_starts(starts, len(train_ids)) if end else (None, None)
        self.train_windows = data.Windows(train_ids, seqlen, device, train_starts)
        self.validation_windows = data.Windows(validation_ids, seqlen, device, validation_starts)
        if execution.sharded:
            distributed.shard(self.model, list(self.model.model.layers), "hidden")
        self.optimizer = Optimizer(self.model, self.config, device)
        rate = functools.partial(learning_rate, config=self.config)
        self.train_step = TrainStep(
            self.model,
            self.optimizer,
            self.train_windows,
            self.config,
            rate,
            device=device,
            autocast=execution.autocast,
            workers=self.workers,
            recompute=execution.recompute,
            sharded=execution.sharded,
        )
        self.board = _tensorboard(out) if execution.tensorboard and self.workers.rank == 0 else None
        self.bytes_per_token = text.num_bytes / len(token_ids)
        sizes = [len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)]
        self.token_sizes = torch.tensor(sizes, device=device)

        self.step = 0
        self.losses: list[float] = []  # of the steps since the last row of metrics.csv
        self.rows: list[report.Metrics] = []
        self.seconds = 0.0  # of training and evaluation, in all sessions
        self.row_seconds = 0.0  # of training alone, since the last row
        self.saved_step: int | None = None

    def describe(self) -> str:
        """What is trained on what, in a few lines."""
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        lines = [
            f"model: {num_parameters:,} parameters, {self.execution.attention} attention, "
            f"{'fp32' if self.train_step.autocast is None else 'bf16 autocast'} on {self.device}"
            + (f", {self.workers.count} workers" if self.workers.count > 1 else "")
            + (", sharded" if self.execution.sharded else ""),
            f"corpus: {self.text.name}, {self.text.num_bytes:,} bytes, {self.bytes_per_token:.2f} bytes per token, "
            f"vocabulary of {self.preset.model.vocab_size}",
            f"steps: {self.config.num_steps:,} of {self.config.batch_size} x {self.config.seqlen} tokens, "
            f"{self.config.optimizer}",
        ]
        if self.text.entropy is not None:
            lines.append(
                f"limit: the text's exact entropy, {self.text.entropy.bits_per_byte:.4f} bits per byte = "
                f"{self.text.entropy.nats_per_byte * self.bytes_per_token:.4f} nats per token"
            )
        return "\n".join(lines)

    def run(
        self,
        last_step: int,
        interrupted: Callable[[], bool],
        step_done: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """Train until last_step is done or `interrupted()`; evaluate and save when due, and save at the end."""
        config = self.config
        self.model.train()
        hidden = None if self.workers.rank == 0 else True  # None: where there is no terminal
        with tqdm(total=config.num_steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True) as bar:
            shown = begin = clock = time.perf_counter()
            announced = self.device.type == "cuda"
            if announced:
                log("the first step waits until its kernels are compiled: a second from a cache, else some ten")
            while self.step < last_step and not self._must_stop(interrupted):
                self.train_step(self.step)
                if announced:
                    log(f"first step begun after {time.perf_counter() - begin:.1f} s")
                    announced = False
                self.step += 1
                step_done()
                bar.update()
                now = time.perf_counter()
                is_last = self.step == config.num_steps
                if is_last or self.step % config.eval_every == 0:
                    clock = self._add_row(clock, bar, log)
                elif now - shown > _READ_SECONDS:
                    self._read_losses()
                    self._show(bar, clock)
                    shown = now
                if self.step % config.checkpoint_every == 0 and self.step < last_step:
                    self._count_time(clock)
                    self.save()
                    clock = time.perf_counter()
            self._read_losses()
            self._count_time(clock)
        if self.saved_step != self.step:
            self.save()
        if self.workers.rank == 0:
            log(self._plot())

    def _must_stop(self, interrupted: Callable[[], bool]) -> bool:
        """Whether Ctrl-C was pressed. Workers agree on it now and then: they have to stop at the same step."""
        if self.workers.count == 1:
            return interrupted()
        return self.step % TABLE == 0 and self.workers.any(interrupted(), self.device)

    def _read_losses(self) -> None:
        """Wait for the device and take over the losses. Raises FloatingPointError at the first that is not finite."""
        values = self.train_step.read()
        first = self.step - len(values) + 1
        for offset, (loss, norm) in enumerate(values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                good = "there is no checkpoint yet"
                if self.saved_step is not None:
                    good = f"the checkpoint of step {self.saved_step} in {self.out} is good"
                raise FloatingPointError(
                    f"step {first + offset}: the loss is {loss}, its gradient's norm {norm}; training has stopped; "
                    f"{good}. A lower learning rate may help"
                )
            self.losses.append(loss)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss over the validation windows: (nats per token, bits per byte).

        The first eval_context tokens of each window are read but not counted.
        """
        config = self.config
        self.model.eval()
        counted = slice(config.eval_context, None)
        stride = config.seqlen - config.eval_context
        starts = self.validation_windows.spread_starts(config.eval_batches * config.batch_size, stride)
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        num_bytes = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in np.array_split(starts, math.ceil(len(starts) / config.batch_size)):
            inputs, targets = self.validation_windows.at(batch)
            documents = None
            if self.validation_windows.document_starts is not None:
                documents = torch.from_numpy(self.validation_windows.documents(batch)).to(self.device)
            nats += (
                self.train_step.losses(inputs, targets, documents)
                .view(targets.shape)[:, counted]
                .sum(dtype=torch.float64)
            )
            num_bytes += self.token_sizes[targets[:, counted]].sum()
        self.model.train()
        num_tokens = len(starts) * stride
        return nats.item() / num_tokens, nats.item() / num_bytes.item() / math.log(2)

    def _add_row(self, clock: float, bar: tqdm, log: Callable[[str], None]) -> float:
        """Evaluate and write a row of metrics.csv; returns the time at which training goes on."""
        self._read_losses()
        self._count_time(clock)
        if self.workers.rank > 0:
            if self.execution.sharded:  # whose layers are gathered from all
                self.evaluate()
            self.losses, self.row_seconds = [], 0.0
            return time.perf_counter()
        train_loss = math.fsum(self.losses) / len(self.losses)
        tokens_per_second = len(self.losses) * self.config.batch_size * self.config.seqlen / self.row_seconds
        begin = time.perf_counter()
        validation_loss, bits_per_byte = self.evaluate()
        self.seconds += time.perf_counter() - begin
        row = report.Metrics(
            step=self.step,
            train_loss=train_loss,
            validation_loss=validation_loss,
            perplexity=math.exp(min(validation_loss, 700.0)),
            bits_per_byte=bits_per_byte,
            learning_rate=learning_rate(self.step - 1, self.config),
            tokens_per_second=round(tokens_per_second, 1),
            seconds=round(self.seconds, 3),
        )
        self.rows.append(row)
        report.write_metrics(self.out / "metrics.csv", self.rows)
        if self.board is not None:
            for name, value in dataclasses.asdict(row).items():
                self.board.add_scalar(name, value, row.step)
            self.board.flush()
        self.losses, self.row_seconds = [], 0.0
        limit = self.text.entropy
        log(
            f"step {row.step}: train {train_loss:.4f}, validation {validation_loss:.4f} nats/token, perplexity "
            f"{row.perplexity:.3f}, {bits_per_byte:.4f} bits/byte"
            + (f" (limit {limit.bits_per_byte:.4f})" if limit else "")
            + f", {tokens_per_second:,.0f} tokens/s, {self._seconds_left(tokens_per_second):,.0f} s left"
        )
        return time.perf_counter()

    def _seconds_left(self, tokens_per_second: float) -> float:
        num_steps = self.config.num_steps - self.step
        return num_steps * self.config.batch_size * self.config.seqlen / tokens_per_second

    def _count_time(self, clock: float) -> None:
        elapsed = time.perf_counter() - clock
        self.seconds += elapsed
        self.row_seconds += elapsed

    def _show(self, bar: tqdm, clock: float) -> None:
        recent = self.losses[-20:]
        loss = sum(recent) / len(recent)
        tokens = len(self.losses) * self.config.batch_size * self.config.seqlen
        bar.set_postfix_str(
            f"loss {loss:.3f}, {loss / self.bytes_per_token / math.log(2):.3f} bits/byte, "
            f"{tokens / (self.row_seconds + time.perf_counter() - clock):,.0f} tokens/s"
        )

    def save(self) -> None:
        """Write a checkpoint of this step; only a finite one."""
        self._read_losses()
        weights = {name: distributed.whole(weight) for name, weight in self.model.state_dict().items()}
        state = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        state.update(self.optimizer.state())
        if self.workers.rank > 0:
            self.saved_step = self.step
            return
        info: dict[str, Any] = {
            "preset": dataclasses.asdict(self.preset),
            "corpus": {"name": self.text.name, "fingerprint": self.text.fingerprint},
            "losses": self.losses,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "seconds": self.seconds,
            "row_seconds": self.row_seconds,
        }
        checkpoint.save(self.out, step=self.step, weights=weights, state=state, info=info)
        self.saved_step = self.step

    def restore(self, step: int, state: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Take over what `save` wrote at `step`, apart from the weights."""
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        self.optimizer.load_state(state)
        self.step = self.saved_step = step
        self.losses = info["losses"]
        self.rows = [report.Metrics(**row) for row in info["rows"]]
        self.seconds, self.row_seconds = info["seconds"], info["row_seconds"]
        if self.workers.rank == 0:
            report.write_metrics(self.out / "metrics.csv", self.rows)  # without the rows of steps that were lost

    def _plot(self) -> str:
        limit = None
        if self.text.entropy is not None:
            limit = self.text.entropy.nats_per_byte * self.bytes_per_token
        title = f"{self.text.name}, {self.execution.attention} attention, step {self.step}"
        peer = self.config.nanogpt_loss if self.text.fingerprint == data.TINY_SHAKESPEARE else None
        return report.plot_losses(self.out / "loss.png", self.rows, limit=limit, peer=peer, title=title)

    def result(self) -> TrainResult:
        last = self.rows[-1] if self.rows else None
        best = min(self.rows, key=lambda row: row.validation_loss, default=None)
        nan = math.nan
        return TrainResult(
            folder=self.out,
            step=self.step,
            num_steps=self.config.num_steps,
            interrupted=self.step < self.config.num_steps,
            train_loss=last.train_loss if last else nan,
            validation_loss=last.validation_loss if last else nan,
            best_validation_loss=best.validation_loss if best else nan,
            best_step=best.step if best else 0,
            bits_per_byte=last.bits_per_byte if last else nan,
            entropy_bits_per_byte=self.text.entropy.bits_per_byte if self.text.entropy else None,
            tokens_per_second=last.tokens_per_second if last else nan,
            seconds=self.seconds,
        )


def _tensorboard(out: pathlib.Path) -> Any:
    """What writes for TensorBoard into out/tensorboard. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: it is not installed; pip install tensorboard, or train without it") from None
    return SummaryWriter(str(out / "tensorboard"))


@contextlib.contextmanager
def _profiled(path: pathlib.Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step; a few steps after compilation and capture then leave a trace at `path`."""
    if not wanted:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=20, warmup=2, active=5, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path))
    ) as profiler:
        yield profiler.step


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; a second Ctrl-C interrupts as usual."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def handle(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
