"""Attention beside its peers on one GPU, in one process: tables, attention.json, attention.png.

    ours     kernels.flash_attention and kernels.decode_attention
    peers    classic (kernels.classic_attention), and what torch has: FlashAttention-2 and cuDNN through SDPA, the one
             SDPA chooses itself (in the table of small sizes), FlexAttention; FlashAttention-4 where it is installed

Four tables. The grid of the FlashAttention papers: batch x seqlen = 16384 tokens, num_heads x head_dim = 2048, forward
and backward, in TFLOP/s. Sizes that small models train at: forward and backward together, in microseconds, called
one by one (with what the host costs) and replayed as a CUDA graph (without). Decoding: one query over a cache, in
microseconds, beside the time that reading the cache once takes. Peak memory of forward and backward, over seqlen. A
time is the median of device times, with cold caches.

Knows the ops; knows nothing of how they work.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from toy_lm import picture

NUM_TOKENS, WIDTH = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128)
SMALL_SIZES = ((64, 6, 256, 64), (12, 4, 64, 32), (8, 12, 1024, 64))  # batch, num_heads, seqlen, head_dim
DECODE_SIZES = (  # batch, num_heads, num_kv_heads, cache length, head_dim
    (1, 32, 8, 1024, 128),
    (1, 32, 8, 32768, 128),
    (1, 32, 8, 131072, 128),
    (16, 32, 8, 8192, 128),
    (64, 32, 8, 4096, 128),
    (64, 6, 6, 256, 64),
    (1, 6, 6, 256, 64),
)
MEMORY_SEQLENS = (4096, 16384, 65536)  # batch 1, 8 heads of head_dim 128
TABLES = ("grid", "small", "decode", "memory")
OURS = "ours"
PEERS = ("classic", "FA-2", "cuDNN", "SDPA", "Flex", "FA-4")
CLASSIC_MAX_SEQLEN = 4096  # its scores fill the memory of a GPU soon after
Attention = Callable[..., Any]  # (q, k, v) -> out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement of every implementation that ran; `unit` says whether more or less is better."""

    table: str
    size: str
    unit: str  # "TFLOP/s", "us" or "MiB"
    values: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times as fast as the best peer ours is."""
        peers = [value for name, value in self.values.items() if name in PEERS]
        if not peers or OURS not in self.values:
            return float("nan")
        return self.values[OURS] / max(peers) if self.unit == "TFLOP/s" else min(peers) / self.values[OURS]


def run(arguments: Sequence[str] = ()) -> None:
    """`toy-lm bench attention`: see --help. Raises RuntimeError where there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="toy-lm bench attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS, help="of the grid; divisors of 16384")
    parser.add_argument("--milliseconds", type=float, default=100.0, help="spent on each measurement")
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER", help="for attention.json and attention.png")
    options = parser.parse_args(arguments)
    bench(options.tables, options.peers, options.seqlens, options.milliseconds, options.out)


def bench(
    tables: Sequence[str] = TABLES,
    peers: Sequence[str] = PEERS,
    seqlens: Sequence[int] = SEQLENS,
    milliseconds: float = 100.0,
    out: str | pathlib.Path = "runs/bench",
    log: Callable[[str], None] = print,
) -> list[Cell]:
    """Measure, print a line for each cell, write attention.json and (with matplotlib) attention.png into `out`."""
    if not torch.cuda.is_available():
        raise RuntimeError("bench attention: needs a CUDA device; on a CPU, `toy-lm compare` times attention")
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log(kernels.load("cuda").line)
    measure = functools.partial(median_ms, milliseconds=milliseconds)
    cells: list[Cell] = []
    makers = {
        "grid": lambda: grid(peers, seqlens, measure),
        "small": lambda: small(peers, milliseconds),
        "decode": lambda: decode(peers, measure),
        "memory": lambda: memory(peers),
    }
    for table in tables:
        for cell in makers[table]():
            log(describe(cell))
            cells.append(cell)
    contents = {
        "machine": kernels.load("cuda").line,
        "torch": torch.__version__,
        "cells": [{**dataclasses.asdict(cell), "ratio to the best peer": cell.ratio} for cell in cells],
    }
    (folder / "attention.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
    log(f"figures: {folder / 'attention.json'}")
    log(plot(folder / "attention.png", cells))
    return cells


def median_ms(call: Callable[[], object], milliseconds: float, grad_to_none: list[Tensor] | None = None) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=milliseconds / 4, rep=milliseconds, return_mode="median", grad_to_none=grad_to_none)


def implementations(names: Sequence[str], causal: bool, seqlen: int) -> dict[str, Attention]:
    """Attention of (batch, num_heads, seqlen, head_dim) by name, ours first; those that are not there are left out."""
    found: dict[str, Attention] = {OURS: functools.partial(kernels.flash_attention, causal=causal)}
    if "classic" in names and seqlen <= CLASSIC_MAX_SEQLEN:
        found["classic"] = functools.partial(kernels.classic_attention, causal=causal)
    for name, backend in (("FA-2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        if name in names:
            found[name] = functools.partial(_sdpa, backend, causal)
    if "SDPA" in names:
        found["SDPA"] = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
    if "Flex" in names:
        found["Flex"] = _flex_attention(causal)
    if "FA-4" in names:
        try:
            from flash_attn.cute.interface import flash_attn_func
        except ImportError:
            return found
        found["FA-4"] = functools.partial(_flash_attention_4, flash_attn_func, causal)
    return found


def _sdpa(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _flex_attention(causal: bool) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.cache
    def mask(seqlen: int):
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen, seqlen, device="cuda")

    torch.compiler.reset()  # forgets the shapes before, of which torch.compile bears eight and then runs unfused
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask(q.shape[2]) if causal else None)


def _flash_attention_4(flash_attn_func, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FA-4 wants positions before heads: given tensors that lie so in memory, as its users' do, no copy is made."""
    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _inputs(name: str, batch: int, num_heads: int, seqlen: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v and dout (batch, num_heads, seqlen, head_dim), bf16; for FA-4 with positions before heads in memory."""
    shape = (batch, seqlen, num_heads, head_dim) if name == "FA-4" else (batch, num_heads, seqlen, head_dim)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    *inputs, dout = (x.transpose(1, 2) for x in tensors) if name == "FA-4" else tensors
    return [x.requires_grad_() for x in inputs], dout


def grid(peers: Sequence[str], seqlens: Sequence[int], measure: Callable[..., float]):
    """Forward and backward at the papers' sizes; yields cells."""
    peers = [name for name in peers if name != "SDPA"]  # chooses one of the others
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            for seqlen in seqlens:
                shape = (NUM_TOKENS // seqlen, WIDTH // head_dim, seqlen, head_dim)
                flops = 4 * NUM_TOKENS * seqlen * WIDTH * (0.5 if causal else 1.0)
                forward, backward = {}, {}
                for name, attention in implementations(peers, causal, seqlen).items():
                    try:
                        times = _forward_and_backward(name, attention, shape, measure)
                    except Exception as error:
                        _leave_out(name, shape, error)
                        continue
                    forward[name] = 1e-9 * flops / times[0]
                    backward[name] = 2.5e-9 * flops / times[1]
                size = f"head_dim {head_dim}, {'causal' if causal else 'full'}, seqlen {seqlen}"
                yield Cell(table="forward", size=size, unit="TFLOP/s", values=forward)
                yield Cell(table="backward", size=size, unit="TFLOP/s", values=backward)


def _forward_and_backward(
    name: str, attention: Attention, shape: tuple[int, int, int, int], measure: Callable[..., float]
) -> tuple[float, float]:
    """Milliseconds of the forward pass (which keeps what the backward pass needs) and of the backward pass."""
    inputs, dout = _inputs(name, *shape)
    forward = measure(lambda: attention(*inputs))
    out = attention(*inputs)
    backward = measure(lambda: torch.autograd.backward(out, dout, retain_graph=True), grad_to_none=inputs)
    return forward, backward


def small(peers: Sequence[str], milliseconds: float):
    """Forward and backward together at small sizes, causal; yields cells."""
    from triton.testing import do_bench_cudagraph

    for shape in SMALL_SIZES:
        eager, graph = {}, {}
        for name, attention in implementations(peers, True, shape[2]).items():
            inputs, dout = _inputs(name, *shape)
            step = functools.partial(_step, attention, inputs, dout)
            try:
                eager[name] = 1e3 * median_ms(step, milliseconds)
                graph[name] = 1e3 * do_bench_cudagraph(step, rep=milliseconds, return_mode="median")
            except Exception as error:
                _leave_out(name, shape, error)
        yield Cell(table="small, eager", size=str(shape), unit="us", values=eager)
        yield Cell(table="small, CUDA graph", size=str(shape), unit="us", values=graph)


def _leave_out(name: str, shape: tuple[int, ...], error: Exception) -> None:
    """Say that a peer does not take this shape, in whatever words it has for it; ours has to take all."""
    if name == OURS:
        raise error
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"{name} left out at {shape}: {first_line}")


def _step(attention: Attention, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attention(*inputs), inputs, dout)


def decode(peers: Sequence[str], measure: Callable[..., float]):
    """One query over a cache; yields cells."""
    source = torch.empty(2**28, device="cuda")
    bytes_per_us = 2 * source.nbytes / (1e3 * measure(source.clone))
    del source
    for batch, num_heads, num_kv_heads, length, head_dim in DECODE_SIZES:
        q = torch.randn(batch, num_heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, batch, num_kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
        lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
        calls = {OURS: functools.partial(kernels.decode_attention, q, k, v, lengths)}
        for name, backend in (("FA-2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            if name in peers:
                calls[name] = functools.partial(_decode_sdpa, backend, q, k, v)
        values = {name: 1e3 * measure(call) for name, call in calls.items()}
        values["floor"] = (k.nbytes + v.nbytes) / bytes_per_us
        size = f"batch {batch}, {num_heads} heads on {num_kv_heads}, cache {length}, head_dim {head_dim}"
        yield Cell(table="decode", size=size, unit="us", values=values)


def _decode_sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def memory(peers: Sequence[str]):
    """Peak memory of forward and backward, causal, beyond what the inputs take; yields cells."""
    for seqlen in MEMORY_SEQLENS:
        values = {}
        for name, attention in implementations([x for x in peers if x != "SDPA"], True, CLASSIC_MAX_SEQLEN).items():
            inputs, dout = _inputs(name, 1, 8, seqlen, 128)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                _step(attention, inputs, dout)
            except Exception as error:
                _leave_out(name, (1, 8, seqlen, 128), error)
                continue
            values[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        yield Cell(table="peak memory", size=f"seqlen {seqlen}", unit="MiB", values=values)


def describe(cell: Cell) -> str:
    """One line: every value, and how many times as fast as the best peer ours is."""
    values = "  ".join(f"{name} {value:7.1f}" for name, value in cell.values.items())
    verdict = "as little as" if cell.unit == "MiB" else "as fast as"
    return f"{cell.table:18s} {cell.size:50s} {cell.unit:8s} {values}   {cell.ratio:5.2f} x {verdict} the best peer"


COLORS = {OURS: picture.BLUE, "cuDNN": picture.RED, "FA-4": picture.INK}  # every other peer is gray


def plot(path: pathlib.Path, cells: Sequence[Cell]) -> str:
    """Draw the grid (TFLOP/s over seqlen), and small sizes and decoding beside the best peer; returns where."""
    figure = picture.new_figure(14, 10)
    if figure is None:
        return picture.save(None, path)
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 2), squeeze=False)[:, 0]
    for part in (upper, lower):
        part.set_facecolor("none")  # the figure's own, and its frame, show
    panels = upper.subplots(2, 4, sharex=True, sharey=True)
    ceiling = 1.08 * max([1.0, *(rate for cell in cells if cell.unit == "TFLOP/s" for rate in cell.values.values())])
    titles = [f"head_dim {head_dim}, {mask}" for head_dim in HEAD_DIMS for mask in ("full", "causal")]
    for row, table in enumerate(("forward", "backward")):
        for panel, title in zip(panels[row], titles, strict=True):
            chosen = [cell for cell in cells if cell.table == table and cell.size.startswith(f"{title}, seqlen ")]
            _draw_curves(panel, chosen, ceiling)
            panel.set_title(f"{table}, {title}", loc="left", fontsize=10, fontweight="bold")
        panels[row, 0].set_ylabel("TFLOP/s")
    for panel in panels[1]:
        panel.set_xlabel("seqlen")
    _draw_ratios(lower.subplots(), [cell for cell in cells if cell.unit == "us"])
    return picture.save(figure, path)


def _draw_curves(panel, cells: Sequence[Cell], ceiling: float) -> None:
    ends = []
    for name in (OURS, *PEERS):
        points = [(int(cell.size.rsplit(" ", 1)[1]), cell.values[name]) for cell in cells if name in cell.values]
        if not points:
            continue
        color = COLORS.get(name, picture.GRAY)
        panel.plot(*zip(*points, strict=True), color=color, linewidth=2.6 if name == OURS else 1.4, marker=".")
        ends.append((points[-1], name, color))
    picture.clean(panel)
    panel.set(xscale="log", ylim=(0, ceiling))
    panel.set_xticks(SEQLENS, [f"{seqlen // 1024}k" if seqlen >= 1024 else str(seqlen) for seqlen in SEQLENS])
    panel.minorticks_off()
    panel.set_xlim(SEQLENS[0] / 1.2, SEQLENS[-1] * 2.6)  # room for the names at the curves' ends
    lowest: dict[int, float] = {}  # free height, by where curves end
    for (seqlen, rate), name, color in sorted(ends):
        at = max(rate, lowest.get(seqlen, 0.0))
        panel.text(1.12 * seqlen, at, name, color=color, va="center", fontsize=8)
        lowest[seqlen] = at + 0.055 * ceiling


def _draw_ratios(panel, cells: Sequence[Cell]) -> None:
    labels = [f"{cell.table}: {cell.size}" for cell in cells]
    places = range(len(cells))
    panel.barh(places, [cell.ratio for cell in cells], color=picture.BLUE, height=0.66)
    for place, cell in zip(places, cells, strict=True):
        times = f"{cell.values[OURS]:.1f} us, best peer {cell.values[OURS] * cell.ratio:.1f} us"
        box = {"facecolor": picture.CARD, "edgecolor": "none", "pad": 1}
        panel.text(cell.ratio + 0.01, place, times, va="center", fontsize=8, color=picture.INK, bbox=box)
    panel.axvline(1.0, color=picture.RED, linewidth=1.6, linestyle="--")
    panel.set_yticks(places, labels, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.3 * max([1.0, *(cell.ratio for cell in cells)]))
    panel.set_xlabel("times as fast as the best peer")
    picture.clean(panel)
    panel.grid(visible=False, axis="y")
