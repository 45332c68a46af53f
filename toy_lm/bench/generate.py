"""Generation beside its peers in one process: transformers on the same weights; nanoGPT and gpt-fast in the same shape.

Each generates from a prompt of one token up to the full context, drawing with top-k 40, at several batch sizes; the
best of a few repetitions that take turns counts. gpt-fast comes last and at batch 1 alone, since it is compiled for
each. The weights are random: time does not depend on them. Also: the time until the first new token of a prompt of 200
tokens. Prints rows, and writes them to generate.json, as they come.

Knows the public interface of generation; knows nothing of how it works.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import toy_lm
from toy_lm import checkpoint, next_words
from toy_lm.config import ModelConfig, preset
from toy_lm.device import pick_device
from toy_lm.model import Transformer
from toy_lm.tokenizer import Tokenizer

TOP_K = 40
WARMUP_TOKENS = 128  # enough for whatever is compiled or captured, ours as graphs of 1, 4, 16 and 64 steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`batch_size` texts of `num_tokens` new tokens each, in `seconds`."""

    name: str
    dtype: str
    batch_size: int
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size * self.num_tokens / self.seconds


def run(arguments: Sequence[str] = ()) -> None:
    """`toy-lm bench generate`: see --help. Raises ValueError for an unknown preset, device or folder."""
    parser = argparse.ArgumentParser(prog="toy-lm bench generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--preset", default="shakespeare", help="whose model shape")
    parser.add_argument("--run", metavar="FOLDER", help="a trained model instead; also shows what int8 costs it")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="default: 1 16, on a GPU 1 64")
    parser.add_argument("--num-tokens", type=int, help="new tokens of each text; default: up to the context")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="time nothing but this library")
    parser.add_argument("--static-cache", action="store_true", help="also transformers with static cache, compiled")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT, to be timed too")
    parser.add_argument(
        "--gpt-fast", metavar="FOLDER", help="a clone of gpt-fast, to be timed too, compiled, at batch 1"
    )
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER", help="for generate.json")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    config = checkpoint.load(options.run).config if options.run else preset(options.preset).model
    num_tokens = options.num_tokens or config.max_seqlen - 1
    if not 1 <= num_tokens < config.max_seqlen:
        raise ValueError(f"num-tokens: got {num_tokens}, needs 1 to {config.max_seqlen - 1}, the context less one")
    batch_sizes = options.batch_sizes or [1, 64 if device.type == "cuda" else 16]
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run or scratch
        if not options.run:
            _write_model(folder, config)
        report = Report(pathlib.Path(options.out))
        print(f"{options.run or options.preset}: {config.num_layers} layers of {config.model_dim}, top-k {TOP_K}")
        print(f"  {'':<20} {'dtype':<9} {'batch':>5} {'tokens/s':>11} {'us a step':>10} {'slower':>7}")
        for dtype in dtypes:
            lm = toy_lm.load(folder, device=device.type, dtype=dtype)
            report.machine = lm.binding.line
            int8 = toy_lm.load(folder, device=device.type, dtype=dtype, int8=True)
            contestants, compiled = {"toy-lm": _ours(lm), "toy-lm int8": _ours(int8)}, {}
            if not options.no_peers:
                contestants |= _transformers(folder, device, dtype, options.static_cache)
                contestants |= _nanogpt(options.nanogpt, config, device, dtype)
                compiled = _gpt_fast(options.gpt_fast, config, device, dtype)
            for batch_size in batch_sizes:
                report.add(
                    _time(contestants, batch_size, num_tokens, options.repetitions), dtype, batch_size, num_tokens
                )
            if config.max_seqlen > 200:
                report.add(_time({"first token of 200": _first_token(lm)}, 1, 1, 10), dtype, 1, 1)
            if options.run:
                losses = f"{str(dtype)[6:]}: {_loss(lm):.5f}, int8 {_loss(int8):.5f}"
                print(f"  nats/token on corpus/sample.txt, {losses}")
            if 1 in batch_sizes:
                report.add(_time(compiled, 1, num_tokens, options.repetitions), dtype, 1, num_tokens)
    print(f"{report.machine}\nfigures: {report.file}")


class Report:
    """Rows, printed and written to generate.json as they come: who is interrupted has those until then."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.machine, self.rows = folder / "generate.json", "", list[Row]()

    def add(self, seconds: dict[str, float], dtype: torch.dtype, batch_size: int, num_tokens: int) -> None:
        for name, best in seconds.items():
            row = Row(name=name, dtype=str(dtype)[6:], batch_size=batch_size, num_tokens=num_tokens, seconds=best)
            self.rows.append(row)
            print(self.line(row), flush=True)
        figures = [{**dataclasses.asdict(row), "tokens_per_second": row.tokens_per_second} for row in self.rows]
        self.file.write_text(json.dumps({"machine": self.machine, "rows": figures}, indent=2), encoding="utf-8")

    def line(self, row: Row) -> str:
        ours = {(row.dtype, row.batch_size): row.seconds for row in self.rows if row.name == "toy-lm"}
        line = f"  {row.name:<20} {row.dtype:<9} {row.batch_size:>5} {row.tokens_per_second:>11,.0f} "
        line += f"{1e6 * row.seconds / row.num_tokens:>10.1f}"
        if row.num_tokens > 1:
            line += f" {row.seconds / ours[row.dtype, row.batch_size]:>6.1f}x"
        return line


def _write_model(folder: str, config: ModelConfig) -> None:
    tokenizer = Tokenizer.bytes_tokenizer()
    torch.manual_seed(0)
    checkpoint.begin(folder, config, tokenizer)
    checkpoint.save(folder, step=0, weights=Transformer(config).state_dict(), state={}, info={})


@torch.inference_mode()
def _loss(lm: "toy_lm.LanguageModel") -> float:
    """Of the sample text, read in windows of the context: nats per token."""
    token_ids = torch.tensor(lm.prompt_ids(next_words.read_text("sample")), device=lm.device)
    context = lm.model.config.max_seqlen
    num_windows = (len(token_ids) - 1) // context
    given, wanted = (token_ids[shift:][: num_windows * context].view(num_windows, context) for shift in (0, 1))
    return F.cross_entropy(lm.model(given).double().flatten(0, 1), wanted.flatten()).item()


Contestant = Callable[[int, int], object]  # (batch size, number of new tokens) -> whatever; ends when all is done


def _time(contestants: dict[str, Contestant], batch_size: int, num_tokens: int, repetitions: int) -> dict[str, float]:
    """The best of some repetitions that take turns, after a short one that does not count."""
    seconds = {name: float("inf") for name in contestants}
    for repetition in range(repetitions + 1):
        for name, generate in contestants.items():
            begin = time.perf_counter()
            generate(batch_size, num_tokens if repetition else min(num_tokens, WARMUP_TOKENS))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


def _ours(lm: "toy_lm.LanguageModel") -> Contestant:
    return lambda batch_size, num_tokens: lm.generate(
        "\n", max_new_tokens=num_tokens, num_samples=batch_size, top_k=TOP_K
    )


def _first_token(lm: "toy_lm.LanguageModel") -> Contestant:
    return lambda batch_size, num_tokens: lm.generate("a" * 200, max_new_tokens=1, top_k=TOP_K)


def _transformers(folder: str, device: torch.device, dtype: torch.dtype, static: bool) -> dict[str, Contestant]:
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: not timed", file=sys.stderr)
        return {}
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()

    def generate(batch_size: int, num_tokens: int, **cache) -> None:
        prompt = torch.full((batch_size, 1), 10, device=device)
        settings = {"do_sample": True, "top_k": TOP_K, "pad_token_id": 0, "min_new_tokens": num_tokens}
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, max_new_tokens=num_tokens, **settings, **cache).cpu()

    contestants: dict[str, Contestant] = {"transformers": generate}
    if static:
        contestants["transformers static"] = lambda *given: generate(*given, cache_implementation="static")
    return contestants


def _nanogpt(
    folder: str | None, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Contestant]:
    if folder is None:
        return {}
    module = _import("nanogpt", folder, "model.py", "nanogpt_model")
    shape = module.GPTConfig(
        block_size=config.max_seqlen,
        vocab_size=config.vocab_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_embd=config.model_dim,
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(shape).to(device, dtype).eval()

    def generate(batch_size: int, num_tokens: int) -> None:
        model.generate(torch.full((batch_size, 1), 10, device=device), num_tokens, top_k=TOP_K).cpu()

    return {"nanoGPT": generate}


def _gpt_fast(
    folder: str | None, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Contestant]:
    if folder is None:
        return {}
    sys.modules["tokenizer"] = types.ModuleType("tokenizer")  # its own needs packages that text alone is made with
    sys.modules["tokenizer"].get_tokenizer = None  # type: ignore[attr-defined]
    theirs = _import("gpt-fast", folder, "model.py", "model")
    loop = _import("gpt-fast", folder, "generate.py", "gpt_fast_generate")
    shape = theirs.ModelArgs(
        block_size=config.max_seqlen,
        vocab_size=config.vocab_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_local_heads=config.num_kv_heads,
        dim=config.model_dim,
        intermediate_size=config.mlp_dim,
    )
    with device:
        model = theirs.Transformer(shape).to(dtype).eval()
    loop.decode_one_token = torch.compile(loop.decode_one_token, mode="reduce-overhead", fullgraph=True)

    def generate(batch_size: int, num_tokens: int) -> None:
        with device:  # caches of the full size, so that nothing is compiled again for a longer text
            model.setup_caches(max_batch_size=batch_size, max_seq_length=config.max_seqlen)
        prompt = torch.full((1,), 10, dtype=torch.int32, device=device)
        options = {"batch_size": batch_size, "interactive": False, "draft_model": None, "top_k": TOP_K}
        loop.generate(model, prompt, num_tokens, **options)[0].cpu()

    return {"gpt-fast": generate}


def _import(option: str, folder: str, file: str, name: str) -> Any:
    """A file of a clone, as the module called `name`."""
    source = pathlib.Path(folder) / file
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None or not source.is_file():
        raise ValueError(f"{option}: got {folder!r}, there is no {file} in it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
