"""How the kernels got fast: every step of both ladders beside its peers, in one process: tables, ladder.json, pictures.

    attention   kernels.steps.attention_steps, forward, causal    peers: what torch has
    top-K       kernels.steps.top_k_steps                         peer: torch.topk; torch.max: one read of the rows

The machine's two ceilings are measured in the same run: the rate of a large matrix product, and the bandwidth of a
large copy (on a CPU: of reading). The floor of a size is the longer of two times: its operations at that rate, and its
input read and its output written once at that bandwidth. The share of the ceiling is the floor over the time.

On a GPU a time is the median of device times with cold caches; on a CPU the least of many, all taking turns.

Knows what a step says of itself; knows nothing of how it works.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

import kernels
from kernels import steps
from toy_lm import picture
from toy_lm.bench.attention import implementations, median_ms
from toy_lm.bench.attention_cpu import least_seconds
from toy_lm.bench.attention_cpu import matmul as cpu_matmul
from toy_lm.bench.top_k import copy_bandwidth
from toy_lm.device import pick_device

LADDERS = ("attention", "top-K")
# batch, num_heads, seqlen, head_dim
ATTENTION_SIZE = {"cuda": (4, 16, 4096, 128), "cpu": (1, 8, 1024, 64)}
ATTENTION_DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
ATTENTION_PEERS = {"classic": "classic, in torch", "FA-2": "FA-2", "cuDNN": "cuDNN", "Flex": "FlexAttention"}
# rows, n, k: a model's logits, and the recipe's benchmark
TOP_K_SIZES = {"cuda": ((256, 128_256, 50), (30_000, 32, 32)), "cpu": ((64, 50_304, 50), (30_000, 32, 32))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """One step, or one peer, at one size."""

    name: str
    number: int | None  # None: a peer
    seconds: float | None  # None: it does not run here, and `note` says why
    bytes_moved: float | None = None  # of a peer they are not known
    flops: float | None = None  # done, which may be more than the answer takes; likewise
    gain: float | None = None  # times as fast as the step before
    predicted_gain: float | None = None  # said beforehand, for the first size alone
    why: str = ""  # it was predicted
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """The rungs of one ladder at one size."""

    ladder: str
    size: str
    flops: float  # that the answer takes; 0 where they do not count
    floor: float  # seconds
    rungs: list[Rung]


def run(arguments: Sequence[str] = ()) -> None:
    """`toy-lm bench ladder`: see --help."""
    parser = argparse.ArgumentParser(prog="toy-lm bench ladder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--ladders", nargs="+", choices=LADDERS, default=LADDERS, metavar="LADDER", help="%(choices)s")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=ATTENTION_PEERS,
        default=list(ATTENTION_PEERS),
        metavar="PEER",
        help="of attention on a GPU: %(choices)s",
    )
    parser.add_argument("--milliseconds", type=float, default=100.0, help="spent on each measurement")
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER", help="for ladder.json and the pictures")
    options = parser.parse_args(arguments)
    bench(options.device, options.ladders, options.milliseconds, options.out, peers=options.peers)


def bench(
    device: str = "auto",
    ladders: Sequence[str] = LADDERS,
    milliseconds: float = 100.0,
    out: str | pathlib.Path = "runs/bench",
    log: Callable[[str], None] = print,
    peers: Sequence[str] = tuple(ATTENTION_PEERS),
) -> list[Ladder]:
    """Measure, print a table for each size, write ladder.json and (with matplotlib) ladder-*.png into `out`."""
    where, folder = pick_device(device), pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log(kernels.load(where).line)
    ceilings = measure_ceilings(where, milliseconds)
    log("measured ceilings: " + ", ".join(f"{name} {value / 1e9:,.0f} G/s" for name, value in ceilings.items()))
    makers: dict[str, Callable[..., list[Ladder]]] = {
        "attention": functools.partial(attention_ladders, names=peers),
        "top-K": top_k_ladders,
    }
    measured: list[Ladder] = []
    for name in ladders:
        for ladder in makers[name](where, milliseconds, ceilings):
            log(f"\n{table(ladder)}")
            measured.append(ladder)
    contents = {
        "machine": kernels.load(where).line,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ceilings": ceilings,
        "ladders": [dataclasses.asdict(ladder) for ladder in measured],
    }
    (folder / "ladder.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
    log(f"\nfigures: {folder / 'ladder.json'}")
    for name in ladders:
        log(plot(folder / f"ladder-{name.lower()}.png", [ladder for ladder in measured if ladder.ladder == name]))
    return measured


def measure_ceilings(device: torch.device, milliseconds: float) -> dict[str, float]:
    """FLOP per second of a large matrix product in the ladder's dtype, bytes per second of a large copy or reading."""
    if device.type == "cpu":
        cell = cpu_matmul(torch.float32, milliseconds / 1e3)[0]
        words = torch.ones(2**25, dtype=torch.int32)  # whole numbers, of which the greatest is found as fast as read
        seconds = least_seconds({"read": words.max}, milliseconds / 1e3)["read"]
        return {"matmul": 1e9 * cell.values["torch"], "memory": words.nbytes / seconds}
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "matmul": 2 * 8192**3 / (1e-3 * median_ms(lambda: a @ b, milliseconds)),
        "memory": copy_bandwidth(device),
    }


def time_calls(
    calls: Mapping[str, Callable[[], object]], device: torch.device, milliseconds: float
) -> dict[str, float]:
    """Seconds of each call."""
    if device.type == "cuda":
        return {name: 1e-3 * median_ms(call, milliseconds) for name, call in calls.items()}
    with torch.no_grad():
        return least_seconds(calls, milliseconds / 1e3 * len(calls))


def measure_rungs(
    ladder: Sequence[steps.Step],
    peers: Mapping[str, Callable[[], object]],
    inputs: tuple,
    sizes: tuple[int, ...],
    device: torch.device,
    milliseconds: float,
    is_headline: bool = True,
) -> list[Rung]:
    """Time the steps that run here and the peers; steps first."""
    reasons = {step.number: step.needs(device) or step.applies(*sizes) for step in ladder}
    calls = {str(step.number): functools.partial(step.run, *inputs) for step in ladder if not reasons[step.number]}
    seconds = time_calls({**calls, **peers}, device, milliseconds)
    rungs: list[Rung] = []
    before: float | None = None
    for step in ladder:
        taken = seconds.get(str(step.number))
        rungs.append(
            Rung(
                name=step.name,
                number=step.number,
                seconds=taken,
                bytes_moved=step.bytes_moved(*sizes) if taken else None,
                flops=step.flops(*sizes) if taken else None,
                gain=before / taken if before and taken else None,
                predicted_gain=step.predicted_gain if is_headline else None,
                why=step.why if is_headline else "",
                note=reasons[step.number] or "",
            )
        )
        before = taken or before
    return rungs + [Rung(name=name, number=None, seconds=seconds[name]) for name in peers]


def attention_ladders(
    device: torch.device,
    milliseconds: float,
    ceilings: Mapping[str, float],
    names: Sequence[str] = tuple(ATTENTION_PEERS),
) -> list[Ladder]:
    """Attention forward, causal, at one size, beside the peers of these names."""
    shape, dtype = ATTENTION_SIZE[device.type], ATTENTION_DTYPE[device.type]
    batch, num_heads, seqlen, head_dim = shape
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    peers = attention_peers(device, seqlen, names)
    flops = 2.0 * batch * num_heads * seqlen**2 * head_dim  # two products, half of each: causal
    floor = max(flops / ceilings["matmul"], 4 * q.nbytes / ceilings["memory"])
    size = f"batch {batch}, {num_heads} heads of {head_dim}, seqlen {seqlen}, causal, {str(dtype)[6:]}"
    rungs = measure_rungs(
        steps.attention_steps(device),
        {name: functools.partial(peer, q, k, v) for name, peer in peers.items()},
        (q, k, v),
        shape,
        device,
        milliseconds,
    )
    return [Ladder(ladder="attention", size=size, flops=flops, floor=floor, rungs=rungs)]


def attention_peers(device: torch.device, seqlen: int, names: Sequence[str]) -> dict[str, Callable]:
    if device.type == "cpu":
        return {
            "classic, in torch": functools.partial(kernels.classic_attention, causal=True),
            "torch SDPA": functools.partial(F.scaled_dot_product_attention, is_causal=True),
        }
    found = implementations(names, True, seqlen)
    return {ATTENTION_PEERS[name]: found[name] for name in names if name in found}


def top_k_ladders(device: torch.device, milliseconds: float, ceilings: Mapping[str, float]) -> list[Ladder]:
    """Top-K of fp32 rows, at a model's size and at the recipe's."""
    ladders: list[Ladder] = []
    for rows, n, k in TOP_K_SIZES[device.type]:
        x = torch.randn(rows, n, device=device)
        floor = (x.nbytes + 12 * rows * k) / ceilings["memory"]  # a value of 4 bytes and an index of 8 for each of K
        peers: dict[str, Callable[[], object]] = {
            "torch.topk": functools.partial(torch.topk, x, k),
            "torch.max": functools.partial(torch.max, x, dim=-1),  # what reading the rows once costs in practice
        }
        rungs = measure_rungs(steps.top_k_steps(device), peers, (x, k), (rows, n, k), device, milliseconds, not ladders)
        size = f"{rows} x {n}, K = {k}, float32"
        ladders.append(Ladder(ladder="top-K", size=size, flops=0.0, floor=floor, rungs=rungs))
    return ladders


def rate(ladder: Ladder, rung: Rung) -> tuple[float, str] | None:
    """What a rung reaches: FLOP/s of the answer where operations count, else bytes moved per second."""
    if rung.seconds is None:
        return None
    if ladder.flops:
        tera = ladder.flops / rung.seconds / 1e12
        return (tera, "TFLOP/s") if tera >= 1 else (1e3 * tera, "GFLOP/s")
    return None if rung.bytes_moved is None else (rung.bytes_moved / rung.seconds / 1e9, "GB/s")


COLUMNS = ("step", "time", "rate", "operations", "bytes moved", "gain", "predicted", "share of the ceiling")


def columns(ladder: Ladder) -> list[str]:
    """Of its table: operations where they count, predictions where there are some."""
    absent = set() if ladder.flops else {"operations"}
    if not any(rung.predicted_gain for rung in ladder.rungs):
        absent.add("predicted")
    return [column for column in COLUMNS if column not in absent]


def cells(ladder: Ladder, rung: Rung) -> dict[str, str]:
    """A rung's line of the table, by column."""
    reached = rate(ladder, rung)
    return {
        "step": rung.name if rung.number is None else f"{rung.number}. {rung.name}",
        "time": "-" if rung.seconds is None else duration(rung.seconds),
        "rate": "-" if reached is None else f"{number(reached[0])} {reached[1]}",
        "operations": "-" if rung.flops is None else f"{number(rung.flops / 1e9)} G",
        "bytes moved": "-" if rung.bytes_moved is None else f"{number(rung.bytes_moved / 1e6)} MB",
        "gain": "-" if rung.gain is None else times(rung.gain),
        "predicted": "-" if rung.predicted_gain is None else f"{rung.predicted_gain:.2g}x",
        "share of the ceiling": "-" if rung.seconds is None else f"{100 * ladder.floor / rung.seconds:.1f} %",
    }


def table(ladder: Ladder) -> str:
    """A Markdown table of one ladder at one size, peers below the steps, and what a step's note says."""
    header = columns(ladder)
    rungs = [cells(ladder, rung) for rung in ladder.rungs]
    lines = [header, ["---"] * len(header), *([one[column] for column in header] for one in rungs)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    notes = [f"{rung.number}. does not run: {rung.note}" for rung in ladder.rungs if rung.note]
    whys = [f"{rung.number}. predicted: {rung.why}" for rung in ladder.rungs if rung.predicted_gain]
    return "\n".join([f"{ladder.ladder}: {ladder.size}; floor {duration(ladder.floor)}", "", *rows, "", *whys, *notes])


def number(x: float) -> str:
    """Four digits of it, or all of them that stand before the point."""
    return f"{x:,.4g}" if x < 1e4 else f"{x:,.0f}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, name = next((one for one in ((1.0, "s"), (1e-3, "ms")) if seconds >= one[0]), (1e-6, "us"))
    return f"{seconds / unit:.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:,.0f} {name}"


def plot(path: pathlib.Path, ladders: Sequence[Ladder]) -> str:
    """One panel for each size: the steps' times as bars, the peers' and the floor as lines; returns a line on where."""
    drawn = [ladder for ladder in ladders if any(rung.seconds for rung in ladder.rungs)]
    if not drawn:
        return f"no {path.name}: nothing was measured"
    heights = [1.5 + sum(0.42 if rung.number is not None else 0.25 for rung in ladder.rungs) for ladder in drawn]
    figure = picture.new_figure(10, sum(heights))
    if figure is None:
        return picture.save(None, path)
    for panel, ladder in zip(
        figure.subplots(len(drawn), 1, height_ratios=heights, squeeze=False).flat, drawn, strict=True
    ):
        _draw(panel, ladder)
    return picture.save(figure, path)


BEHIND_TEXT = {"facecolor": picture.CARD, "edgecolor": "none", "pad": 1}  # so that no line strikes it out


def _draw(panel, ladder: Ladder) -> None:
    shown = [rung for rung in ladder.rungs if rung.number is not None]
    peers = sorted((rung.seconds, rung.name) for rung in ladder.rungs if rung.number is None and rung.seconds)
    taken = [rung.seconds for rung in ladder.rungs if rung.seconds]
    left, top = 0.6 * min(ladder.floor, *taken), -0.62
    for place, rung in enumerate(shown):
        if rung.seconds is None:
            label = panel.text(1.05 * left, place, f"does not run: {rung.note}", va="center", color=picture.GRAY)
            label.set_bbox(BEHIND_TEXT)
            continue
        color = picture.BLUE if rung is shown[-1] else picture.LIGHT_BLUE
        panel.barh(place, rung.seconds - left, left=left, height=0.66, color=color)
        gain = "" if rung.gain is None else f"   {times(rung.gain)}"
        label = panel.text(1.05 * rung.seconds, place, f"{duration(rung.seconds)}{gain}", va="center")
        label.set(color=picture.INK, bbox=BEHIND_TEXT)
    lines = [(ladder.floor, "floor", picture.GRAY, "-")] + [(*peer, picture.RED, "--") for peer in peers]
    for level, (seconds, name, color, style) in enumerate(lines):
        panel.axvline(seconds, color=color, linewidth=1.6, linestyle=style)
        label = panel.text(1.03 * seconds, top - 0.55 * level, f"{name}, {duration(seconds)}", color=color, va="bottom")
        label.set_bbox(BEHIND_TEXT)
    panel.set_yticks(range(len(shown)), [f"{rung.number}. {rung.name}" for rung in shown])
    panel.set_xscale("log")
    panel.set_xlim(left, 4.0 * max(taken))
    panel.set_ylim(len(shown) - 0.5, top - 0.55 * len(lines) - 0.1)
    panel.set_xlabel("time, on a logarithmic scale")
    panel.set_title(f"{ladder.ladder}: {ladder.size}", fontweight="bold", loc="left")
    picture.clean(panel)
    panel.grid(visible=False, axis="y")
    panel.xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
    panel.xaxis.set_minor_formatter("")


def times(gain: float) -> str:
    return f"{gain:.2f}x" if gain < 10 else f"{gain:.0f}x"
