"""Fused against classic attention inside training, as the context grows: tokens per second and peak memory.

    toy-lm bench contexts                                   the preset `small`, contexts 1024 to 16384: for a GPU
    toy-lm bench contexts --preset sample --contexts 64 256 1024 --tokens 4096
    torchrun --nproc-per-node 2 -m toy_lm.cli bench contexts --contexts 1024 --tokens 32768

Every step trains on the same number of tokens, cut into as many windows as the context allows; the tokens are random,
which neither speed nor memory depends on. What does not fit in memory is said to be so. Under torchrun the processes
share the tokens out, and the memory is the first one's.

Knows the training step and the presets; knows nothing of texts or run folders.
"""

import argparse
import dataclasses
import functools
import gc
import time
from collections.abc import Sequence

import numpy as np
import torch

import kernels
from toy_lm import data, distributed
from toy_lm.config import Preset, preset
from toy_lm.device import pick_device, training_dtype
from toy_lm.distributed import Workers
from toy_lm.model import Transformer
from toy_lm.optimizer import Optimizer
from toy_lm.step import TrainStep


def run(arguments: Sequence[str]) -> None:
    """The job behind `toy-lm bench contexts`."""
    parser = argparse.ArgumentParser(prog="toy-lm bench contexts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="small", help="the model's shape")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=16384, help="of a step; each context has to divide it")
    parser.add_argument("--steps", type=int, default=10, help="how many are timed")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    for context in options.contexts:
        if context < 1 or options.tokens % context:
            raise ValueError(f"contexts: got {context}, needs divisors of tokens = {options.tokens}")
    with distributed.workers(pick_device(options.device)) as (workers, device):
        say = functools.partial(print, flush=True) if workers.rank == 0 else distributed.silent
        say(kernels.load(device).line)
        say(f"preset {options.preset}, {options.tokens} tokens a step, {workers.count} processes")
        say("| context | classic tokens/s | fused tokens/s | faster | classic GiB | fused GiB |")
        say("|---|---|---|---|---|---|")
        for context in options.contexts:
            chosen = _with_context(preset(options.preset), context, options.tokens)
            classic, fused = (_measure(chosen, name, device, workers, options) for name in ("classic", "fused"))
            faster = f"{fused[0] / classic[0]:.1f}x" if classic and fused else "-"
            speeds = " | ".join(f"{x[0]:,.0f}" if x else "out of memory" for x in (classic, fused))
            sizes = " | ".join(f"{x[1]:.1f}" if x and x[1] else "-" for x in (classic, fused))
            say(f"| {context} | {speeds} | {faster} | {sizes} |")


def _with_context(chosen: Preset, context: int, num_tokens: int) -> Preset:
    return Preset(
        model=dataclasses.replace(chosen.model, max_seqlen=context),
        train=dataclasses.replace(
            chosen.train, batch_size=num_tokens // context, seqlen=context, grad_accumulation=1, eval_context=0
        ),
    )


def _measure(
    chosen: Preset, attention: str, device: torch.device, workers: Workers, options: argparse.Namespace
) -> tuple[float, float] | None:
    """Tokens per second, and GiB allocated on the GPU at the most (0 on a CPU); None if it does not fit."""
    try:
        measured = _train(chosen, attention, device, workers, options)
    except torch.OutOfMemoryError:
        measured = None
    gc.collect()  # the model, which nothing holds any more, before the next one comes
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return measured


def _train(
    chosen: Preset, attention: str, device: torch.device, workers: Workers, options: argparse.Namespace
) -> tuple[float, float]:
    config = chosen.train
    token_ids = np.random.default_rng(0).integers(0, chosen.model.vocab_size, 4 * options.tokens + config.seqlen)
    torch.manual_seed(0)
    model = Transformer(chosen.model, attention).to(device).train()
    step = TrainStep(
        model,
        Optimizer(model, config, device),
        data.Windows(token_ids, config.seqlen, device),
        config,
        lambda number: 1e-4,
        device=device,
        autocast=training_dtype(device, "auto"),
        workers=workers,
    )
    number = 0
    for _ in range(5):  # on a GPU the fourth is captured
        step(number)
        number += 1
    step.read()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(options.steps):
        step(number)
        number += 1
    step.read()
    seconds = time.perf_counter() - begin
    most = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return options.steps * options.tokens / seconds, most
