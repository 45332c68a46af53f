"""Training beside nanoGPT: the same text, the same shape, in one process: tables, training.json, training.png.

    toy-lm bench training --text input.txt --nanogpt FOLDER                   on a GPU nanoGPT's shakespeare-char run
    toy-lm bench training --text input.txt --nanogpt FOLDER --device cpu      its README's run for a CPU

First tokens per second in steady state, with the two taking turns; then a race to a validation loss, over the whole
validation text, in seconds of training (evaluations are not counted, and compilation is shown apart).

`--nanogpt` names a clone of github.com/karpathy/nanoGPT: its model and its optimizer are imported from there, its
training loop is followed here. Without it only this project is measured.

Knows the training step and the presets; knows nothing of run folders.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from toy_lm import data, picture
from toy_lm.config import ModelConfig, Preset, TrainConfig, preset
from toy_lm.device import pick_device, training_dtype
from toy_lm.model import Transformer
from toy_lm.optimizer import Optimizer
from toy_lm.step import TrainStep
from toy_lm.tokenizer import Tokenizer
from toy_lm.train import learning_rate

NANOGPT = "nanoGPT"
OVERFITTED = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something that learns: `step(i)` trains, `losses(inputs, targets)` are nats per token (any shape)."""

    name: str
    step: Callable[[int], None]
    losses: Callable[[Tensor, Tensor], Tensor]
    num_parameters: int
    batch_size: int
    num_steps: int
    evaluate_every: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race:
    """How one contestant fared. Seconds are of training: evaluations and the first step are left out."""

    name: str
    curve: list[tuple[float, int, float]]  # seconds, step, validation loss at each evaluation
    at_target: float  # inf if it was not reached
    seconds: float  # in all


def run(arguments: Sequence[str]) -> None:
    """The job behind `toy-lm bench training`. Raises ValueError for a text or a clone that cannot be read."""
    parser = argparse.ArgumentParser(prog="toy-lm bench training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="the text: the file input.txt of nanoGPT's data/shakespeare_char")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT")
    parser.add_argument(
        "--preset", nargs="+", help="the first is timed, all race; default: shakespeare, on a CPU shakespeare-cpu"
    )
    parser.add_argument("--target", type=float, help="the validation loss to race to; default: nanoGPT's own best")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of this project race")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--skip-race", action="store_true", help="measure the steady state only")
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER", help="for training.json and training.png")
    options = parser.parse_args(arguments)

    device = pick_device(options.device)
    names = options.preset or ["shakespeare-cpu" if device.type == "cpu" else "shakespeare"]
    presets = {name: preset(name) for name in names}
    chosen = presets[names[0]]
    for name, other in presets.items():
        if other.train.seqlen != chosen.train.seqlen:
            raise ValueError(
                f"preset: {name!r} has context {other.train.seqlen}, {names[0]!r} has {chosen.train.seqlen}"
            )
    target = options.target or chosen.train.nanogpt_loss
    if target is None:
        raise ValueError(f"preset: got {names[0]!r}, for which nanoGPT's loss is not known; name a --target")
    with tempfile.TemporaryDirectory() as folder:
        token_ids = data.tokenize(data.open_corpus(options.text), Tokenizer.bytes_tokenizer(), folder)
        train_ids, validation_ids = data.split(token_ids, 0.1, chosen.train.seqlen)  # nanoGPT's split
        train = data.Windows(train_ids, chosen.train.seqlen, device)
        validation = data.Windows(validation_ids, chosen.train.seqlen, device)
        print(kernels.load(device).line)
        makers = [
            functools.partial(_this_project, name, one, train, device, seed)
            for name, one in presets.items()
            for seed in range(options.seeds)
        ]
        num_ours = len(makers)
        if options.nanogpt:
            makers.append(functools.partial(_nanogpt, pathlib.Path(options.nanogpt), chosen, train_ids, device))
        steady = _steady_state([makers[0], *makers[num_ours:]], chosen, device)
        races = []
        if not options.skip_race:
            races = [_race(make(), validation, chosen, target, device) for make in makers]
            if options.nanogpt:
                _compare([*races[: options.seeds], races[-1]], target)
    _write(pathlib.Path(options.out), kernels.load(device).line, steady, races, target)


def _write(folder: pathlib.Path, machine: str, steady: list[dict], races: Sequence[Race], target: float) -> None:
    """The figures, and the picture of a race, if there was one."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "machine": machine,
        "steady": steady,
        "target": target,
        "races": [{"name": race.name, "curve": race.curve} for race in races],
    }
    (folder / "training.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
    print(f"figures: {folder / 'training.json'}")
    if races:
        print(plot(folder / "training.png", races, target))


def plot(path: pathlib.Path, races: Sequence[Race], target: float) -> str:
    """Draw each contestant's validation loss over the seconds; returns a line that says where the picture is."""
    figure = picture.new_figure(8, 4.5)
    if figure is None:
        return picture.save(None, path)
    panel = figure.add_subplot()
    names = [race.name.partition(",")[0] for race in races]
    shades = itertools.cycle((picture.BLUE, picture.LIGHT_BLUE))
    colors = {**dict(zip(dict.fromkeys(names), shades, strict=False)), NANOGPT: picture.RED}
    for number, (name, race) in enumerate(zip(names, races, strict=True)):
        color, line = colors[name], "--" if name == NANOGPT else "-"
        label = name if name == NANOGPT else f"{name}, each seed"
        label = "" if name in names[:number] else label
        seconds, _, losses = zip(*race.curve, strict=True)
        panel.plot(seconds, losses, color=color, linestyle=line, linewidth=1.8, label=label)
        panel.plot(seconds[-1], losses[-1], marker="o", color=color)
    panel.axhline(target, color=picture.GRAY, linewidth=1, label=f"{target}, the loss that is raced for")
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set(xlabel="seconds of training", ylabel="validation loss, nats per token", title="Loss over time")
    panel.legend(frameon=False)
    picture.clean(panel)
    return picture.save(figure, path)


def _this_project(name: str, chosen: Preset, windows: data.Windows, device: torch.device, seed: int) -> Contestant:
    config = dataclasses.replace(chosen.train, seed=seed)
    torch.manual_seed(seed)
    model = Transformer(chosen.model, "fused", config.dropout).to(device)
    step = TrainStep(
        model,
        Optimizer(model, config, device),
        windows,
        config,
        functools.partial(learning_rate, config=config),
        device=device,
        autocast=training_dtype(device, "auto"),
    )

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        model.eval()
        values = step.losses(inputs, targets)
        model.train()
        return values

    return Contestant(
        name=f"{name}, seed {seed}",
        step=step,
        losses=losses,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        evaluate_every=max(1, config.num_steps // 20),
    )


def _nanogpt(folder: pathlib.Path, chosen: Preset, token_ids: np.ndarray, device: torch.device) -> Contestant:
    """nanoGPT with the settings of its README for this shape: on a GPU 5000 steps in bf16, on a CPU 2000 in fp32."""
    on_gpu = device.type == "cuda"
    shape: ModelConfig = chosen.model
    config: TrainConfig = chosen.train
    module = _import(folder / "model.py")
    characters, ids = np.unique(np.asarray(token_ids), return_inverse=True)  # its characters are this text's bytes
    id_of_byte = torch.zeros(256, dtype=torch.int64, device=device)
    id_of_byte[torch.from_numpy(characters.astype(np.int64)).to(device)] = torch.arange(len(characters), device=device)
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True  # as its train.py sets it
    model = module.GPT(
        module.GPTConfig(
            block_size=config.seqlen,
            vocab_size=len(characters),
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_embd=shape.model_dim,
            dropout=0.2 if on_gpu else 0.0,
            bias=False,
        )
    ).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    compiled = torch.compile(model) if on_gpu else model
    batch_size, num_steps = (64, 5000) if on_gpu else (12, 2000)
    schedule = dataclasses.replace(
        config, num_steps=num_steps, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100
    )
    ids = ids.astype(np.uint16)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - config.seqlen, (batch_size,)).tolist()
        windows = [torch.from_numpy(ids[i : i + config.seqlen + 1].astype(np.int64)) for i in starts]
        both = torch.stack([x[:-1] for x in windows]), torch.stack([x[1:] for x in windows])
        if on_gpu:
            return both[0].pin_memory().to(device, non_blocking=True), both[1].pin_memory().to(
                device, non_blocking=True
            )
        return both

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    ahead = [batch()]

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, schedule)
        with autocast:
            _, loss = compiled(*ahead.pop())
        ahead.append(batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number % 10 == 0:
            loss.item()  # its log interval

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        model.eval()
        with autocast:
            _, loss = model(id_of_byte[inputs], id_of_byte[targets])  # the mean, which is all that it gives
        model.train()
        return loss.expand(targets.numel())

    count = sum(parameter.numel() for parameter in model.parameters())
    return Contestant(
        name=NANOGPT,
        step=step,
        losses=losses,
        num_parameters=count,
        batch_size=batch_size,
        num_steps=num_steps,
        evaluate_every=250,
    )


def _import(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise ValueError(f"nanogpt: there is no {path.name} in {str(path.parent)!r}; name a clone of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _steady_state(makers: Sequence[Callable[[], Contestant]], chosen: Preset, device: torch.device) -> list[dict]:
    """Tokens per second, each contestant timed in turn, five times; the median counts. Prints and returns the rows."""
    steps = 60 if device.type == "cuda" else 10
    contestants, starts, done = [], [], []
    for make in makers:
        begin = time.perf_counter()
        contestants.append(make())
        contestants[-1].step(0)
        _wait(device)
        starts.append(time.perf_counter() - begin)
        for number in range(1, 10):
            contestants[-1].step(number)
        done.append(10)
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(5):
        for index, contestant in enumerate(contestants):
            _wait(device)
            begin = time.perf_counter()
            for number in range(done[index], done[index] + steps):
                contestant.step(number)
            _wait(device)
            times[index].append((time.perf_counter() - begin) / steps)
            done[index] += steps
    peak = _matrix_product_flops(device)
    print(f"a plain matrix product here: {peak / 1e12:.2f} TFLOP/s")
    print("| | first step, s | tokens a step | ms per step | tokens/s | share of that |\n|---|---|---|---|---|---|")
    rows = []
    for contestant, start, seconds in zip(contestants, starts, times, strict=True):
        median = sorted(seconds)[len(seconds) // 2]
        num_tokens = contestant.batch_size * chosen.train.seqlen
        shape = chosen.model
        attention = 6 * shape.num_layers * shape.num_heads * shape.head_dim * chosen.train.seqlen  # causal: the half
        flops = (6 * contestant.num_parameters + attention) * num_tokens / median
        speed = f"{median * 1e3:.2f} | {num_tokens / median:,.0f} | {flops / peak:.1%}"
        print(f"| {contestant.name} | {start:.1f} | {num_tokens} | {speed} |", flush=True)
        rows.append({"name": contestant.name, "first_step": start, "seconds": seconds, "share": flops / peak})
    return rows


def _race(
    contestant: Contestant, validation: data.Windows, chosen: Preset, target: float, device: torch.device
) -> Race:
    """Train to the end of the contestant's own schedule; print when the target was reached, and the best loss.

    A run whose loss has risen by OVERFITTED above its best ends there.
    """
    starts = validation.spread_starts(1 << 40, chosen.train.seqlen)  # the whole validation text
    batches = np.array_split(starts, math.ceil(len(starts) / 64))
    _wait(device)
    begin = time.perf_counter()
    contestant.step(0)
    _wait(device)
    first, seconds = time.perf_counter() - begin, 0.0
    curve: list[tuple[float, int, float]] = []
    begin = time.perf_counter()
    for number in range(1, contestant.num_steps):
        contestant.step(number)
        if (number + 1) % contestant.evaluate_every:
            continue
        _wait(device)
        seconds += time.perf_counter() - begin
        with torch.no_grad():
            nats = sum(contestant.losses(*validation.at(batch)).sum().item() for batch in batches)
        loss = nats / (len(starts) * chosen.train.seqlen)
        curve.append((seconds, number + 1, loss))
        if loss > min(point[2] for point in curve) + OVERFITTED:
            break
        begin = time.perf_counter()
    at_target, at_step, _ = next((point for point in curve if point[2] <= target), (math.inf, 0, 0.0))
    _, best_step, best = min(curve, key=lambda point: point[2])
    reached = f"{at_target:.2f} s, step {at_step}" if at_step else "not reached"
    print(
        f"{contestant.name} ({contestant.num_parameters:,} parameters): loss {target} after {reached}; "
        f"best {best:.4f} at step {best_step}; {curve[-1][1]} steps in {seconds:.1f} s, "
        f"the first (compiling) {first:.1f} s",
        flush=True,
    )
    return Race(name=contestant.name, curve=curve, at_target=at_target, seconds=seconds)


def _compare(races: Sequence[Race], target: float) -> None:
    """The slowest run of the first preset beside nanoGPT's, which is the last."""
    *ours, peer = races
    slowest = max(race.at_target for race in ours)
    there = f"there after {peer.at_target:.2f} s" if math.isfinite(peer.at_target) else "does not get there"
    print(
        f"loss {target}, slowest of {len(ours)}: {slowest:.2f} s; nanoGPT {there}, its run takes {peer.seconds:.2f} s, "
        f"{peer.seconds / slowest:.1f} times that",
        flush=True,
    )


def _matrix_product_flops(device: torch.device) -> float:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        _wait(device)
        begin = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
