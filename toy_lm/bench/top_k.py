"""Top-K and sampling beside what one would use otherwise, in one process: table, top_k.json, top_k.png.

    ours          kernels.top_k; kernels.sample with temperature, top-k, the draw and both log-probabilities; the same
                  with top-p or min-p in place of top-k
    peers         torch.topk; torch.topk + softmax + multinomial; nanoGPT's sampler; FlashInfer, where it is installed
    yardsticks    torch's one-pass maximum: what reading the logits once costs in practice; and the floor: their bytes
                  over the bandwidth that a copy reaches on this machine

On a GPU a time is the median over replays of a CUDA graph of the call, with cold caches: the time of the device, not of
Python on the host, which hides only behind work that is as long. What starting one replay takes is in each of these
times; it is measured by itself, as the time of a kernel on one element. On a CPU a time is the median of wall times:
the calls take turns, each repeated for a while, and the first of a turn does not count.

Knows the ops; knows nothing of how they work.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import kernels
from toy_lm import picture
from toy_lm.device import pick_device

# batch, vocab_size, k
GPU_SIZES = (
    (30_000, 32, 32),
    (1, 50_304, 50),
    (1, 128_256, 50),
    (64, 50_304, 50),
    (256, 128_256, 50),
    (1024, 32_000, 50),
    (4096, 512, 40),
)
CPU_SIZES = ((30_000, 32, 32), (1, 50_304, 50), (64, 50_304, 50), (16, 512, 40))
CURVE = (1, 4, 16, 64, 256, 1024)  # k, at the size below
GPU_CURVE_SIZE, CPU_CURVE_SIZE = (256, 128_256), (16, 50_304)
TEMPERATURE = 0.8
CPU_SECONDS, CPU_TURN = 1.5, 0.01  # that the calls at one size take turns, and that one turn lasts
OURS = ("kernels.top_k", "kernels.sample top-k", "kernels.sample top-p", "kernels.sample min-p")
MARKS = {  # in the picture: ours are blue
    "kernels.top_k": ("D", picture.LIGHT_BLUE),
    "kernels.sample top-k": ("o", picture.BLUE),
    "kernels.sample top-p": ("^", picture.BLUE),
    "kernels.sample min-p": ("s", picture.BLUE),
    "torch.topk": ("D", picture.GRAY),
    "topk + softmax + multinomial": ("o", picture.GRAY),
    "nanoGPT": ("s", picture.GRAY),
    "FlashInfer": ("o", picture.INK),
}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def run(arguments: Sequence[str] = ()) -> None:
    """`toy-lm bench top-k [--device auto|cpu|cuda] [--out FOLDER]`."""
    parser = argparse.ArgumentParser(prog="toy-lm bench top-k", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default="runs/bench", help="where top_k.json and top_k.png go (%(default)s)")
    options = parser.parse_args(arguments)
    bench(options.device, options.out)


def bench(device: str = "auto", out: str | pathlib.Path = "runs/bench", log: Callable[[str], None] = print) -> None:
    """Measure on `device`, print a table, write top_k.json and (with matplotlib) top_k.png into the folder `out`."""
    where, folder = pick_device(device), pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log(kernels.load(where).line)
    bytes_per_second = copy_bandwidth(where)
    log(f"a copy reaches {bytes_per_second / 1e9:.0f} GB/s, bytes read and bytes written added up")
    report: dict = {"machine": kernels.load(where).line, "seconds": []}
    if where.type == "cuda":
        report["empty"] = time_graph(functools.partial(torch.zeros(1, device=where).add_, 1))
        log(f"a kernel on one element takes {1e6 * report['empty']:.1f} us of each time below")
    for batch, vocab_size, k in GPU_SIZES if where.type == "cuda" else CPU_SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(batch, vocab_size, device=where).to(dtype)
            times = time_calls(calls(logits, k), where)
            floor = logits.numel() * logits.element_size() / bytes_per_second
            size = {"batch": batch, "vocab_size": vocab_size, "k": k, "dtype": str(dtype)[6:]}
            report["seconds"].append({**size, "floor": floor, **times})
            log(describe(report["seconds"][-1]))
            _write(folder, report)  # a run that is broken off leaves what it has measured
    report["curve_size"] = GPU_CURVE_SIZE if where.type == "cuda" else CPU_CURVE_SIZE
    report["curve"] = measure_curve(torch.randn(report["curve_size"], device=where))
    for name, seconds in report["curve"].items():
        log(f"over k, {name}, " + ", ".join(f"{k}: {1e6 * s:.0f} us" for k, s in seconds.items()))
    log(f"figures: {_write(folder, report)}")
    log(plot(folder / "top_k.png", report["seconds"], report["curve"], report["curve_size"]))


def _write(folder: pathlib.Path, report: Mapping) -> pathlib.Path:
    path = folder / "top_k.json"
    path.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return path


def calls(logits: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """What is measured on these logits (batch, vocab_size), by name."""
    sample = functools.partial(kernels.sample, logits, temperature=TEMPERATURE, seed=1, return_logprobs=True)
    named: dict[str, Callable[[], object]] = {
        "max": lambda: logits.max(dim=-1),
        "torch.topk": lambda: torch.topk(logits, k),
        "topk + softmax + multinomial": lambda: sample_with_torch(logits, k),
        "nanoGPT": lambda: sample_like_nanogpt(logits, k),
        "kernels.top_k": lambda: kernels.top_k(logits, k),
        "kernels.sample top-k": lambda: sample(top_k=k),
        "kernels.sample top-p": lambda: sample(top_p=0.9),
        "kernels.sample min-p": lambda: sample(min_p=0.05),
    }
    if logits.device.type == "cuda":
        try:
            from flashinfer.sampling import top_k_sampling_from_probs
        except ImportError:
            return named
        named["FlashInfer"] = lambda: top_k_sampling_from_probs(torch.softmax(logits.float() / TEMPERATURE, dim=-1), k)
    return named


def sample_with_torch(logits: Tensor, k: int) -> Tensor:
    values, indices = torch.topk(logits, k)
    chosen = torch.multinomial(torch.softmax(values.float() / TEMPERATURE, dim=-1), 1)
    return indices.gather(-1, chosen)


def sample_like_nanogpt(logits: Tensor, k: int) -> Tensor:
    """Everything below the k-th largest masked, softmax and multinomial over the whole vocabulary."""
    logits = logits / TEMPERATURE
    values, _ = torch.topk(logits, k)
    masked = logits.masked_fill(logits < values[:, -1:], float("-inf"))
    return torch.multinomial(torch.softmax(masked.float(), dim=-1), 1)


def time_calls(named: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each call."""
    if device.type == "cuda":
        return {name: time_graph(call) for name, call in named.items()}
    seconds: dict[str, list[float]] = {name: [] for name in named}
    begin = time.perf_counter()
    for rounds in itertools.count():
        if rounds >= 3 and time.perf_counter() - begin > CPU_SECONDS:
            break
        for name, call in named.items():
            call()  # finds the caches, the threads and the free memory as another call left them
            turn = time.perf_counter()
            while time.perf_counter() - turn < CPU_TURN:
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def time_graph(call: Callable[[], object]) -> float:
    """Median seconds of a replay, the L2 cache flushed before each."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles; nothing may be compiled while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return 1e-3 * do_bench(graph.replay, warmup=10, rep=40, return_mode="median")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written bytes added up."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    seconds = time_calls({"max": lambda: target.copy_(source)}, device)["max"]
    return 2 * source.numel() * source.element_size() / seconds


def measure_curve(logits: Tensor) -> dict[str, dict[int, float]]:
    """Seconds over k on these logits (batch, vocab_size): ours, what torch offers, and what does not depend on k."""
    sample = functools.partial(kernels.sample, logits, temperature=TEMPERATURE, seed=1, return_logprobs=True)
    named: dict[str, Callable[[], object]] = {
        "max": lambda: logits.max(dim=-1),
        "kernels.sample top-p": lambda: sample(top_p=0.9),
    }
    constant = tuple(named)
    for k in CURVE:
        named[f"ours {k}"] = functools.partial(sample, top_k=k)
        named[f"torch {k}"] = functools.partial(sample_with_torch, logits, k)
    times = time_calls(named, logits.device)
    return {
        "kernels.sample top-k": {k: times[f"ours {k}"] for k in CURVE},
        "topk + softmax + multinomial": {k: times[f"torch {k}"] for k in CURVE},
        **{name: dict.fromkeys(CURVE, times[name]) for name in constant},
    }


def describe(row: Mapping) -> str:
    """One size: every time in microseconds, and ours as multiples of the one-pass maximum."""
    size = f"{row['batch']} x {row['vocab_size']}, k = {row['k']}, {row['dtype']}"
    lines = [f"\n{size}: floor {1e6 * row['floor']:.1f} us"]
    skipped = ("batch", "vocab_size", "k", "dtype", "floor")
    for name, seconds in row.items():
        if name not in skipped:
            lines.append(f"  {name:30s} {1e6 * seconds:10.1f} us   {seconds / row['max']:6.2f} x max")
    return "\n".join(lines)


def plot(
    path: pathlib.Path, rows: Sequence[Mapping], curve: Mapping[str, Mapping[int, float]], size: Sequence[int]
) -> str:
    """Draw times as multiples of the one-pass maximum, and the cost over k at `size`; returns where."""
    figure = picture.new_figure(13, 2.2 + 0.36 * len(rows))
    if figure is None:
        return picture.save(None, path)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_sizes(left, rows)
    _draw_curve(right, curve, size)
    return picture.save(figure, path)


def _draw_sizes(panel, rows: Sequence[Mapping]) -> None:
    for name, (marker, color) in MARKS.items():
        points = [(row[name] / row["max"], place) for place, row in enumerate(rows) if name in row]
        if points:
            panel.plot(*zip(*points, strict=True), marker, color=color, markersize=6, label=name)
    panel.axvline(1.0, color=picture.RED, linewidth=1.6, linestyle="--", label="one read: torch's max")
    labels = [f"{row['batch']} x {row['vocab_size']}, k = {row['k']}, {SHORT[row['dtype']]}" for row in rows]
    panel.set_yticks(range(len(rows)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.set(xscale="log", xlabel="time over that of the one-pass maximum")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    picture.clean(panel)


def _draw_curve(panel, curve: Mapping[str, Mapping[int, float]], size: Sequence[int]) -> None:
    """With the marks of the panel on the left, whose legend holds for both."""
    for name, times in curve.items():
        marker, color = MARKS.get(name, ("", picture.RED))  # max
        style = {"linewidth": 1.6, "linestyle": "-" if name in MARKS else "--"}
        panel.plot(list(times), [1e6 * seconds for seconds in times.values()], color=color, marker=marker, **style)
    panel.set(xscale="log", xlabel="k", ylabel="microseconds", ylim=(0, None))
    panel.set_xticks(CURVE, [str(k) for k in CURVE])
    panel.minorticks_off()
    panel.set_title("{} x {}, fp32, over k".format(*size), loc="left", fontsize=10, fontweight="bold")
    picture.clean(panel)
