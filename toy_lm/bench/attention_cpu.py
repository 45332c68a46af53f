"""Attention beside its peers on the CPU, in one process: tables and attention_cpu.json.

    ours     kernels.flash_attention and kernels.decode_attention
    peers    classic (kernels.classic_attention) and torch's flash attention for the CPU, through SDPA

Four tables, each with one thread and with all. Forward and backward, in GFLOP/s (4 batch heads seqlen^2 head_dim
operations, half of them when causal, the backward pass 2.5 times as many). Decoding: one query over a cache, in
microseconds, beside the time in which torch reads the cache once. Call: what a call costs where there is nothing to
compute. Matmul: torch's own matrix product, in GFLOP/s: what this machine can reach. Times are the least of many, ours
and the peers' taken in turns, so that what else the machine does falls on all alike.

Knows the ops; knows nothing of how they work.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels

SIZES = (  # batch, num_heads, seqlen, head_dim
    (12, 4, 64, 32),
    (16, 4, 128, 32),
    (4, 6, 256, 64),
    (2, 8, 1024, 64),
    (1, 8, 4096, 64),
    (1, 4, 4096, 128),
)
DECODE_SIZES = (  # batch, num_heads, num_kv_heads, cache length, head_dim
    (1, 8, 8, 1024, 64),
    (1, 32, 8, 1024, 128),
    (1, 32, 8, 8192, 128),
    (1, 32, 8, 32768, 128),
    (16, 6, 6, 256, 64),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLES = ("matmul", "call", "attention", "decode")
OURS, PEERS = "ours", ("classic", "torch flash")
CLASSIC_MAX_SEQLEN = 1024  # beyond, a call of classic attention takes longer than all others together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement of every implementation that ran; `unit` says whether more or less is better."""

    table: str
    size: str
    threads: int
    unit: str  # "GFLOP/s" or "us"
    values: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times as fast as the best of the others ours is."""
        others = [value for name, value in self.values.items() if name != OURS]
        if not others or OURS not in self.values:
            return float("nan")
        return self.values[OURS] / max(others) if self.unit == "GFLOP/s" else min(others) / self.values[OURS]


def run(arguments: Sequence[str] = ()) -> None:
    """`toy-lm bench attention --device cpu`: see --help."""
    parser = argparse.ArgumentParser(prog="toy-lm bench attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu"])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1 and as many as there are")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each measurement")
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER", help="for attention_cpu.json")
    options = parser.parse_args(arguments)
    bench(options.tables, options.dtypes, options.threads, options.seconds, options.out)


def bench(
    tables: Sequence[str] = TABLES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    threads: Sequence[int] | None = None,
    seconds: float = 0.3,
    out: str | pathlib.Path = "runs/bench",
    log: Callable[[str], None] = print,
) -> list[Cell]:
    """Measure, print a line for each cell, write attention_cpu.json into `out`."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log(kernels.load("cpu").line)
    all_threads = torch.get_num_threads()
    makers = {"matmul": matmul, "call": call, "attention": attention, "decode": decode}
    cells: list[Cell] = []
    try:
        for count in threads or sorted({1, all_threads}):
            torch.set_num_threads(count)
            for table in tables:
                for name in dtypes:
                    for cell in makers[table](DTYPES[name], seconds):
                        log(describe(cell))
                        cells.append(cell)
    finally:
        torch.set_num_threads(all_threads)
    contents = {
        "machine": kernels.load("cpu").line,
        "torch": torch.__version__,
        "cells": [{**dataclasses.asdict(cell), "ratio to the best other": cell.ratio} for cell in cells],
    }
    (folder / "attention_cpu.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
    log(f"figures: {folder / 'attention_cpu.json'}")
    return cells


def describe(cell: Cell) -> str:
    values = "  ".join(f"{name} {value:8.1f}" for name, value in cell.values.items())
    ratio = "" if cell.ratio != cell.ratio else f"  x{cell.ratio:.2f}"
    return f"{cell.table:9s} {cell.threads} threads  {cell.size:48s} {values}  {cell.unit}{ratio}"


def least_seconds(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The least time of each call, taken in turns for `seconds` in all; the first round is not counted.

    Each round has an order of its own: what a call leaves in the caches must not fall on the same one every time.
    """
    least = dict.fromkeys(calls, float("inf"))
    for function in calls.values():
        function()
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or float("inf") in least.values():
        for name, function in order.sample(sorted(calls.items()), len(calls)):
            start = time.perf_counter()
            function()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def matmul(dtype: torch.dtype, seconds: float) -> list[Cell]:
    size = 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    least = least_seconds({"torch": lambda: a @ b}, seconds)
    return [make_cell("matmul", f"{size}^3 {dtype_name(dtype)}", "GFLOP/s", least, operations=2 * size**3)]


def call(dtype: torch.dtype, seconds: float) -> list[Cell]:
    """One query over one key, in inference mode: the cost of a call."""
    q, k, v = (torch.randn(1, 1, 1, 32).to(dtype) for _ in range(3))
    with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        least = least_seconds(
            {
                OURS: lambda: kernels.flash_attention(q, k, v, causal=True),
                "torch flash": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            },
            seconds,
        )
    return [make_cell("call", f"(1, 1, 1, 32) {dtype_name(dtype)}", "us", least)]


def attention(dtype: torch.dtype, seconds: float) -> list[Cell]:
    return [
        cell
        for size in SIZES
        for causal in (False, True)
        for cell in attention_of_size(size, causal=causal, dtype=dtype, seconds=seconds)
    ]


def attention_of_size(size: tuple[int, ...], *, causal: bool, dtype: torch.dtype, seconds: float) -> list[Cell]:
    """Forward and backward at one size."""
    batch, num_heads, seqlen, head_dim = size
    q, k, v = (torch.randn(size).to(dtype).requires_grad_() for _ in range(3))
    functions: dict[str, Callable[[], Any]] = {
        OURS: lambda: kernels.flash_attention(q, k, v, causal=causal),
        "torch flash": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }
    if seqlen <= CLASSIC_MAX_SEQLEN:
        functions["classic"] = lambda: kernels.classic_attention(q, k, v, causal=causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad():
            forward = least_seconds(functions, seconds * len(functions))
        outs = {name: function() for name, function in functions.items()}
        dout = torch.randn_like(q)
        backward = least_seconds(
            {name: differentiate(out, (q, k, v), dout) for name, out in outs.items()}, seconds * len(functions)
        )
    operations = 4 * batch * num_heads * seqlen**2 * head_dim * (0.5 if causal else 1.0)
    what = f"{size} {'causal' if causal else 'full'} {dtype_name(dtype)}"
    return [
        make_cell("attention", f"{what} forward", "GFLOP/s", forward, operations=operations),
        make_cell("attention", f"{what} backward", "GFLOP/s", backward, operations=2.5 * operations),
    ]


def differentiate(out: Tensor, inputs: tuple[Tensor, ...], dout: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def decode(dtype: torch.dtype, seconds: float) -> list[Cell]:
    cells = []
    for batch, num_heads, num_kv_heads, length, head_dim in DECODE_SIZES:
        q = torch.randn(batch, num_heads, 1, head_dim).to(dtype)
        cache = torch.randn(2, batch, num_kv_heads, length, head_dim).to(dtype)
        lengths = torch.full((batch,), length, dtype=torch.int32)
        cells.append(decode_cell(q, cache, lengths, seconds))
    return cells


def decode_cell(q: Tensor, cache: Tensor, lengths: Tensor, seconds: float) -> Cell:
    k_cache, v_cache = cache
    words = cache.view(torch.int32)  # read as whole numbers, of which the greatest is found at the speed of reading
    grouped = q.shape[1] != k_cache.shape[1]
    with torch.no_grad():
        least = least_seconds(
            {
                OURS: lambda: kernels.decode_attention(q, k_cache, v_cache, lengths),
                "torch SDPA": lambda: F.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=grouped),
                "reading": words.max,
            },
            3 * seconds,
        )
    size = f"{tuple(q.shape)} over {k_cache.shape[1]} x {k_cache.shape[2]} keys {dtype_name(q.dtype)}"
    return make_cell("decode", size, "us", least)


def make_cell(table: str, size: str, unit: str, least: dict[str, float], *, operations: float = 0.0) -> Cell:
    values = {name: operations / t / 1e9 if unit == "GFLOP/s" else t * 1e6 for name, t in least.items()}
    return Cell(table=table, size=size, threads=torch.get_num_threads(), unit=unit, values=values)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
