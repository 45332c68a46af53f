"""Classic against fused attention: time, peak memory and error over sequence lengths, and both inside the model.

Alone, per length: forward and backward, causal, of `kernels.classic_attention` and `kernels.flash_attention` on the
same tensors; a length twice as long has half the batch, so that the number of tokens stays. Time is the median of
repetitions that alternate between the two, each pass timed by itself. The error is the root mean square difference
from fp64, of out and of the gradients together, over the root mean square of the fp64 values.

Inside the model: the training step of the `sample` preset with each of the two, and the losses of two short runs that
differ in nothing else.

Peak memory is what a call needs on top of what was there before. On a GPU: what torch's allocator counts. On Linux: the
process's resident memory, whose peak the kernel resets when asked (`/proc/self/clear_refs`), so that torch's tensors
and the kernels' own buffers count alike. Elsewhere it is not measured.

Knows the ops and `train`; knows nothing of how either works.
"""

import ctypes
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from toy_lm import picture, report
from toy_lm.config import ModelConfig, preset
from toy_lm.device import autocast_dtype, pick_device
from toy_lm.model import ATTENTION, Transformer

KINDS = ("classic", "fused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One kind of attention at one length; memory is None where it cannot be measured."""

    kind: str
    seqlen: int
    milliseconds: float
    peak_mib: float | None
    error: float | None = None
    forward_ms: float | None = None  # of the milliseconds; the backward pass took the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """num_tokens = batch * seqlen of every length; a longer length than num_tokens has batch 1."""

    seqlens: tuple[int, ...]
    num_tokens: int
    num_heads: int
    head_dim: int
    repetitions: int


CPU_SIZES = Sizes(seqlens=(64, 128, 256, 512, 1024, 2048), num_tokens=2048, num_heads=4, head_dim=32, repetitions=7)
GPU_SIZES = Sizes(
    seqlens=(128, 256, 512, 1024, 2048, 4096, 8192), num_tokens=8192, num_heads=12, head_dim=64, repetitions=11
)


def compare(
    out: str | pathlib.Path,
    *,
    device: str = "auto",
    steps: int = 150,
    quick: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Measure, print two tables, and write compare.json and (where matplotlib is installed) compare.png into `out`.

    steps  training steps for the losses; 0 leaves them out
    quick  only the shorter half of the lengths, three repetitions

    Raises ValueError for bad input, OSError if `out` cannot be written.
    """
    if steps < 0:
        raise ValueError(f"steps: got {steps}, needs 0 or more")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    where = pick_device(device)
    log(kernels.load(where).line)
    sizes = CPU_SIZES if where.type == "cpu" else GPU_SIZES
    if quick:
        sizes = dataclasses.replace(sizes, seqlens=sizes.seqlens[: len(sizes.seqlens) // 2], repetitions=3)
    alone = compare_alone(sizes, where)
    log(f"\nattention alone, forward + backward, causal, {_described(sizes, where)}\n{_table(alone)}")
    inside = compare_steps(where, repetitions=3 * sizes.repetitions)
    log(f"\na training step of the preset `sample`, {_step_described()}\n{_table(inside)}")
    losses = compare_losses(where, steps) if steps else {}
    if losses:
        log(f"\n{_losses_described(losses)}")
    contents = {
        "machine": kernels.load(where).line,
        "alone": [dataclasses.asdict(row) for row in alone],
        "inside": [dataclasses.asdict(row) for row in inside],
        "losses": losses,
    }
    (out / "compare.json").write_text(json.dumps(contents, indent=2), encoding="utf-8")
    log(f"\nfigures: {out / 'compare.json'}")
    log(plot(out / "compare.png", alone, losses, _described(sizes, where)))


def compare_alone(sizes: Sizes, device: torch.device) -> list[Measured]:
    """Both kinds of attention at each length, in bf16 on a GPU that computes in it, else in fp32."""
    rows = []
    for seqlen in sizes.seqlens:
        shape = (max(1, sizes.num_tokens // seqlen), sizes.num_heads, seqlen, sizes.head_dim)
        generator = torch.Generator(device).manual_seed(seqlen)
        dtype = autocast_dtype(device) or torch.float32
        q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(4))
        for x in (q, k, v):
            x.requires_grad_()
        exactly = [x.detach()[:1, :1].double().requires_grad_() for x in (q, k, v)]  # one head stands for all
        exact = _forward_backward("classic", exactly[0], exactly[1], exactly[2], dout[:1, :1])
        passes = _time_passes(q, k, v, dout, sizes.repetitions)
        for kind in KINDS:
            call = functools.partial(_forward_backward, kind, q, k, v, dout)
            rows.append(
                Measured(
                    kind=kind,
                    seqlen=seqlen,
                    milliseconds=1e3 * sum(passes[kind]),
                    forward_ms=1e3 * passes[kind][0],
                    peak_mib=peak_memory(call, device),
                    error=_relative_error([x[:1, :1] for x in call()], exact),
                )
            )
    return rows


def _time_passes(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, repetitions: int) -> dict[str, tuple[float, float]]:
    """Median seconds of the forward and of the backward pass of each kind."""
    outs: dict[str, Tensor] = {}

    def forward(kind: str) -> None:
        outs[kind] = ATTENTION[kind](q, k, v, causal=True)

    def backward(kind: str) -> None:
        torch.autograd.grad(outs[kind], (q, k, v), dout.to(outs[kind].dtype), retain_graph=True)

    calls = {
        f"{kind} {run.__name__}": functools.partial(run, kind) for kind in KINDS for run in (forward, backward)
    }  # in this order: a backward pass follows its forward pass
    seconds = time_alternately(calls, repetitions, q.device)
    return {kind: (seconds[f"{kind} forward"], seconds[f"{kind} backward"]) for kind in KINDS}


def _forward_backward(kind: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, dq, dk, dv, all (batch, num_heads, seqlen, head_dim)."""
    out = ATTENTION[kind](q, k, v, causal=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


def _relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    apart = sum((x.double() - y).square().sum().item() for x, y in zip(got, exact, strict=True))
    return (apart / sum(y.square().sum().item() for y in exact)) ** 0.5


def compare_steps(device: torch.device, repetitions: int) -> list[Measured]:
    """A training step (forward, loss, backward) of the `sample` preset's model and batch, with each attention."""
    config, training = preset("sample").model, preset("sample").train
    shape = (training.batch_size, training.seqlen)
    token_ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    calls = {kind: _step(config, kind, token_ids) for kind in KINDS}
    seconds = time_alternately(calls, repetitions, device)
    return [
        Measured(
            kind=kind,
            seqlen=training.seqlen,
            milliseconds=1e3 * seconds[kind],
            peak_mib=peak_memory(call, device),
        )
        for kind, call in calls.items()
    ]


def _step(config: ModelConfig, kind: str, token_ids: Tensor) -> Callable[[], None]:
    device = token_ids.device
    torch.manual_seed(0)
    model = Transformer(config, kind).to(device)
    dtype = autocast_dtype(device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(token_ids)
        F.cross_entropy(logits.flatten(0, 1).float(), token_ids.flatten()).backward()
        model.zero_grad(set_to_none=True)

    return step


def compare_losses(device: torch.device, steps: int) -> dict[str, list[tuple[int, float, float]]]:
    """(step, training loss, validation loss) of two runs on the sample text that differ in the attention alone."""
    from toy_lm.train import train

    base = preset("sample")
    training = dataclasses.replace(base.train, eval_every=max(1, steps // 15), checkpoint_every=steps, eval_batches=2)
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            out = pathlib.Path(folder) / kind
            train(
                "sample",
                dataclasses.replace(base, train=training),
                out,
                attention=kind,
                device=device.type,
                steps=steps,
                precision="fp32" if autocast_dtype(device) is None else "bf16",
                log=lambda line: None,
            )
            rows = report.read_metrics(out / "metrics.csv")
            curves[kind] = [(row.step, row.train_loss, row.validation_loss) for row in rows]
    return curves


def time_alternately(
    calls: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns; the first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions + 1):
        for name, call in calls.items():
            _wait(device)
            begin = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that the call needs at its peak, on top of what was held before; None where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that using it again is seen
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present
    except OSError:
        return None
    before = _resident_kib("VmRSS")
    call()
    return max(0, _resident_kib("VmHWM") - before) / 2**10


def _resident_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _described(sizes: Sizes, device: torch.device) -> str:
    dtype = str(autocast_dtype(device) or torch.float32).removeprefix("torch.")
    return f"{sizes.num_tokens} tokens, {sizes.num_heads} heads of {sizes.head_dim}, {dtype} on {device.type}"


def _step_described() -> str:
    training = preset("sample").train
    return f"batch {training.batch_size} x {training.seqlen} tokens"


def _losses_described(losses: dict[str, list[tuple[int, float, float]]]) -> str:
    apart = max(abs(a[2] - b[2]) for a, b in zip(losses["classic"], losses["fused"], strict=True))
    step, _, classic = losses["classic"][-1]
    fused = losses["fused"][-1][2]
    return (
        f"two training runs of {step} steps: validation loss {classic:.4f} classic, {fused:.4f} fused; "
        f"the curves are at most {apart:.4f} nats apart"
    )


def _table(rows: Sequence[Measured]) -> str:
    lines = [f"  {'seqlen':>6}  {'classic ms':>10} {'fused ms':>9} {'faster':>7}  {'classic MiB':>11} {'fused MiB':>9}"]
    has_error = any(row.error is not None for row in rows)
    lines[0] += f"  {'classic error':>13} {'fused error':>11}" if has_error else ""
    by_kind = [[row for row in rows if row.kind == kind] for kind in KINDS]
    for classic, fused in zip(*by_kind, strict=True):
        line = f"  {classic.seqlen:>6}  {classic.milliseconds:>10.3f} {fused.milliseconds:>9.3f} "
        line += f"{classic.milliseconds / fused.milliseconds:>6.1f}x  {_mib(classic):>11} {_mib(fused):>9}"
        if has_error:
            line += f"  {classic.error:>13.1e} {fused.error:>11.1e}"
        lines.append(line)
    return "\n".join(lines)


def _mib(row: Measured) -> str:
    return "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"


def plot(
    path: pathlib.Path, alone: Sequence[Measured], losses: dict[str, list[tuple[int, float, float]]], title: str
) -> str:
    """Draw time, memory and losses; returns a line that says where the picture is, or why there is none."""
    by_kind = {kind: [row for row in alone if row.kind == kind] for kind in KINDS}
    panels = [_PASSES] if any(row.forward_ms is None for row in alone) else [_FORWARD, _BACKWARD]
    if all(row.peak_mib for row in alone):
        panels.append(_MEMORY)
    num_panels = len(panels) + bool(losses)
    num_lines = (num_panels + 1) // 2
    figure = picture.new_figure(10, 0.8 + 3.5 * num_lines)
    if figure is None:
        return picture.save(None, path)
    axes = figure.subplots(num_lines, 2, squeeze=False).flat
    figure.suptitle(f"Classic against fused attention\n{title}", fontsize=13, color=picture.INK)
    for panel, (what, unit, verdict, value) in zip(axes, panels, strict=False):
        curves = {kind: [(row.seqlen, value(row)) for row in rows] for kind, rows in by_kind.items()}
        _draw_curves(panel, curves, unit)
        (seqlen, classic), (_, fused) = curves["classic"][-1], curves["fused"][-1]
        panel.set_title(f"{what}: {_times(classic / fused)} {verdict} at {seqlen}", fontweight="bold")
        panel.set_ylabel(unit)
    if losses:
        _draw_losses(axes[num_panels - 1], losses)
    for panel in axes[num_panels:]:
        panel.remove()
    for panel in axes[:num_panels]:
        picture.clean(panel)
    return picture.save(figure, path)


# what, its unit, what less of it is called, its value
_PASSES = ("forward + backward", "ms", "faster", lambda row: row.milliseconds)
_FORWARD = ("forward", "ms", "faster", lambda row: row.forward_ms)
_BACKWARD = ("backward", "ms", "faster", lambda row: row.milliseconds - row.forward_ms)
_MEMORY = ("peak memory", "MiB", "less", lambda row: row.peak_mib)
_STYLES: dict[str, dict] = {
    "classic": {"color": picture.RED, "marker": "s", "linewidth": 2.5},
    "fused": {"color": picture.BLUE, "marker": "o", "linewidth": 2.5},
}


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def _draw_curves(panel, curves: dict[str, list[tuple[int, float]]], unit: str) -> None:
    """Both kinds over the lengths, each named at its end: no legend to look up."""
    for kind, points in curves.items():
        seqlens, values = zip(*points, strict=True)
        panel.plot(seqlens, values, **_STYLES[kind])
        label = f" {kind}\n {values[-1]:.3g} {unit}"
        panel.annotate(label, points[-1], va="center", color=_STYLES[kind]["color"], fontweight="bold")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlim(seqlens[0] / 1.2, seqlens[-1] * 2.6)  # room for the names
    panel.set_xticks(seqlens)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")
    panel.set_xlabel("sequence length")


def _draw_losses(panel, losses: dict[str, list[tuple[int, float, float]]]) -> None:
    """Laid over each other: the classic curve wide, the fused one thin on top of it."""
    for kind, width in (("classic", 7), ("fused", 2)):
        steps, _, validation = zip(*losses[kind], strict=True)
        panel.plot(steps, validation, label=kind, color=_STYLES[kind]["color"], linewidth=width)
    panel.set(xlabel="training step", ylabel="validation loss, nats/token")
    panel.set_title("loss: the same model either way", fontweight="bold")
    panel.legend(frameon=False)
