"""`toy-lm JOB`: the jobs of this project as commands.

    train      learn a text and leave a run folder           generate   continue a prompt
    top-k      what follows a word, counted and predicted    compare    classic against fused attention
    bench      the kernels beside their peers                info       what is bound on this machine, and why
    self-test  check the kernels and the model here

What is expected to go wrong (bad input, a full disk, no compiler, Ctrl-C) ends in one line on stderr and an exit status
other than 0. Everything heavy is imported by the job that needs it.

Knows the names and the flags of the jobs; knows nothing of how they work.
"""

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

DEFAULT_RUN = "runs/sample"
BENCH_FOLDER = pathlib.Path(__file__).parent / "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; `arguments` are those of the command line unless given. Returns the exit status."""
    options, rest = _parser().parse_known_args(arguments)
    if rest and options.job != "bench":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        options.run_job(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130)
    except BrokenPipeError:  # `toy-lm generate | head` closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        return _fail(str(error) or type(error).__name__, 1)
    return 0


def _expected_errors() -> tuple[type[Exception], ...]:
    import torch

    from kernels import BuildError

    return (ValueError, OSError, FloatingPointError, BuildError, torch.OutOfMemoryError)


def _fail(message: str, status: int) -> int:
    print(f"toy-lm: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="toy-lm", description=(__doc__ or "").splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for add in (_add_train, _add_generate, _add_top_k, _add_compare, _add_bench, _add_info, _add_self_test):
        add(jobs)
    return parser


def _add_job(jobs, name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
    job = jobs.add_parser(name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    job.set_defaults(run_job=run)
    return job


def _add_device(job: argparse.ArgumentParser) -> None:
    job.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _add_run(job: argparse.ArgumentParser) -> None:
    job.add_argument("--run", default=DEFAULT_RUN, metavar="FOLDER", help="the run folder that train made")


def _add_attention(job: argparse.ArgumentParser) -> None:
    job.add_argument("--attention", default="fused", choices=("fused", "classic"), help="which attention kernels")


def _add_train(jobs) -> None:
    job = _add_job(jobs, "train", _train, "Train a model on a text and leave a run folder.")
    job.add_argument("--corpus", default="sample", help="a UTF-8 text file, sample, grammar or grammar:BYTES")
    names = "sample, shakespeare, shakespeare-long, shakespeare-cpu or small"
    job.add_argument("--preset", default="sample", help=names)
    job.add_argument("--out", default=DEFAULT_RUN, metavar="FOLDER", help="the run folder to make")
    job.add_argument("--resume", action="store_true", help="continue the run in --out")
    job.add_argument("--steps", type=int, help="how many steps in all, in place of the preset's")
    job.add_argument("--seed", type=int, help="of the weights and batches, in place of the preset's")
    job.add_argument("--precision", default="auto", help="fp32, bf16, or auto: bf16 where the hardware is faster in it")
    job.add_argument(
        "--documents", metavar="END", help=r"the text that ends a document, as '\n\n': attention stays within documents"
    )
    job.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, more time")
    job.add_argument("--shard", action="store_true", help="under torchrun: a slice of the model for each GPU (FSDP2)")
    job.add_argument("--tensorboard", action="store_true", help="write the losses for TensorBoard, too")
    job.add_argument("--profile", action="store_true", help="write trace.json: where the time of a few steps went")
    _add_attention(job)
    _add_device(job)


def _train(options: argparse.Namespace) -> None:
    from toy_lm import config, train

    if options.steps is not None and options.steps < 1:
        raise ValueError(f"steps: got {options.steps}, needs 1 or more")
    result = train.train(
        options.corpus,
        config.preset(options.preset),
        options.out,
        attention=options.attention,
        device=options.device,
        resume=options.resume,
        seed=options.seed,
        steps=options.steps,
        precision=options.precision,
        documents=None if options.documents is None else options.documents.replace("\\n", "\n"),
        recompute=options.recompute,
        shard=options.shard,
        tensorboard=options.tensorboard,
        profile=options.profile,
    )
    if result.interrupted:
        again = f"toy-lm train --corpus {options.corpus} --out {options.out} --resume"
        raise ValueError(f"stopped after step {result.step} of {result.num_steps}; everything is saved: {again}")
    if os.environ.get("RANK", "0") == "0":  # under torchrun one worker speaks
        print(f"run folder: {result.folder}")
        print(f'next: toy-lm generate "the quick brown" --run {result.folder}')


def _add_generate(jobs) -> None:
    job = _add_job(jobs, "generate", _generate, "Continue a prompt.")
    job.add_argument("prompt", nargs="*", metavar="PROMPT", help="the text to continue; - or nothing: read stdin")
    job.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    _add_run(job)
    job.add_argument("--max-new-tokens", type=int, default=100, help="how many tokens to add")
    job.add_argument("--num-samples", type=int, default=1, help="how many texts; sample i is drawn with seed + i")
    job.add_argument("--temperature", type=float, default=1.0, help="0 always takes the likeliest token")
    job.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    job.add_argument("--top-p", type=float, help="draw from the fewest tokens that together reach probability p")
    job.add_argument("--min-p", type=float, help="draw from tokens at least this fraction as likely as the likeliest")
    job.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    job.add_argument("--stop", metavar="TEXT", help=r"end where this text would begin, as '\n\n'")
    job.add_argument("--show-top-k", type=int, default=0, metavar="N", help="print the N candidates behind each token")
    job.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; by default bfloat16 on a GPU that computes in it, else float32",
    )
    job.add_argument("--int8", action="store_true", help="round the layers' matrices to int8: less to read for a token")
    _add_attention(job)
    _add_device(job)


def _generate(options: argparse.Namespace) -> None:
    prompt = _read_prompt(options)
    import torch

    import toy_lm

    dtype = getattr(torch, options.dtype) if options.dtype else None
    lm = toy_lm.load(options.run, device=options.device, attention=options.attention, dtype=dtype, int8=options.int8)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    settings = {name: getattr(options, name) for name in names}
    settings["stop"] = None if options.stop is None else options.stop.replace("\\n", "\n")
    if options.show_top_k:
        for step in lm.steps(prompt, num_candidates=options.show_top_k, **settings):
            shown = [f"{lm.tokenizer.decode([token_id])!r} {p:.3f}" for token_id, p in step.candidates]
            print(
                f"{lm.tokenizer.decode([step.token_id])!r} {step.probability:.3f}  from  {'  '.join(shown)}", flush=True
            )
    elif options.num_samples == 1:
        print(prompt, end="", flush=True)
        for piece in lm.stream(prompt, **settings):
            print(piece, end="", flush=True)
        print()
    else:
        for number, text in enumerate(lm.generate(prompt, num_samples=options.num_samples, **settings)):
            print(f"--- sample {number} (seed {options.seed + number})\n{prompt}{text}")


def _read_prompt(options: argparse.Namespace) -> str:
    """From the command line, a file or a pipe; one line end at the end of a file or a pipe is not part of it."""
    if options.prompt_file is not None:
        if options.prompt:
            raise ValueError("prompt: got both a PROMPT and --prompt-file, allowed is one of them")
        source, data = options.prompt_file, pathlib.Path(options.prompt_file).read_bytes()
    elif options.prompt == ["-"] or (not options.prompt and not sys.stdin.isatty()):
        source, data = "stdin", sys.stdin.buffer.read()
    else:
        return " ".join(options.prompt)
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt: {source} is not UTF-8 text ({error.reason}, byte {error.start})") from None


def _add_top_k(jobs) -> None:
    job = _add_job(jobs, "top-k", _top_k, "What follows each word: counted in a text, and predicted by the model.")
    job.add_argument("words", nargs="*", metavar="WORD", default=["the", "quick", "brown"])
    job.add_argument("--k", type=int, default=8, help="how many next words to show")
    job.add_argument("--corpus", default="sample", help="the text to count in: sample (its sixteen lines) or a file")
    _add_run(job)
    _add_device(job)


def _top_k(options: argparse.Namespace) -> None:
    import toy_lm
    from toy_lm import next_words

    text = next_words.read_text(options.corpus)
    lm = toy_lm.load(options.run, device=options.device)
    for word in options.words:
        print(next_words.table(next_words.compare(lm, text, word), options.k))


def _add_compare(jobs) -> None:
    job = _add_job(jobs, "compare", _compare, "Classic against fused attention: time, memory, error, losses.")
    job.add_argument("--out", default="runs/compare", metavar="FOLDER", help="for compare.json and compare.png")
    job.add_argument("--steps", type=int, default=150, help="training steps for the two loss curves")
    job.add_argument("--quick", action="store_true", help="short sequences and few repetitions")
    _add_device(job)


def _compare(options: argparse.Namespace) -> None:
    from toy_lm import compare

    compare.compare(options.out, device=options.device, steps=options.steps, quick=options.quick)


def _add_bench(jobs) -> None:
    names = ", ".join(_bench_names())
    job = _add_job(jobs, "bench", _bench, f"The kernels and the jobs beside their peers, on this machine: {names}.")
    job.add_argument("name", choices=_bench_names(), metavar="NAME", help=f"{names}; `bench NAME -- --help` says more")


def _bench_names() -> list[str]:
    """attention for attention.py (GPU) and attention_cpu.py alike."""
    return sorted({path.stem.removesuffix("_cpu").replace("_", "-") for path in BENCH_FOLDER.glob("[a-z]*.py")})


def _bench(options: argparse.Namespace) -> None:
    rest = [argument for argument in options.rest if argument != "--"]
    name = options.name.replace("-", "_")
    if (BENCH_FOLDER / f"{name}_cpu.py").is_file() and _bench_device(rest) == "cpu":
        name += "_cpu"
    importlib.import_module(f"toy_lm.bench.{name}").run(rest)


def _bench_device(rest: list[str]) -> str:
    from toy_lm.device import pick_device

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="auto")
    return pick_device(parser.parse_known_args(rest)[0].device).type


def _add_info(jobs) -> None:
    job = _add_job(jobs, "info", _info, "What kernels are bound on this machine, for which device, and why.")
    job.add_argument("--ptx", action="store_true", help="show the telling instructions of each step of the ladders")
    job.add_argument("--capability", type=int, default=90, help="with --ptx: the GPU to compile for; 90 is an H200")


def _info(options: argparse.Namespace) -> None:
    from toy_lm import info

    if not options.ptx:
        print(info.describe())
        return
    for line in info.describe_steps(options.capability):
        print(line, flush=True)


def _add_self_test(jobs) -> None:
    job = _add_job(jobs, "self-test", _self_test, "Check the kernels and the model on this machine, in under a minute.")
    _add_device(job)


def _self_test(options: argparse.Namespace) -> None:
    from toy_lm import self_test

    failed = self_test.run(options.device)
    if failed:
        raise ValueError(f"self-test: {failed} of the checks failed")


if __name__ == "__main__":
    sys.exit(main())
