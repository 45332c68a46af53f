"""Run the Triton kernels of top_k and sample on the CPU, in Triton's interpreter, against the reference.

A program of its own, because the interpreter is chosen when a kernel is defined: test_top_k_triton.py starts it with
TRITON_INTERPRET=1. It prints how many calls agreed.
"""

import warnings

import torch

from kernels.top_k import reference, triton_sample, triton_select, triton_top_k

NUMBERS = ("temperature", "top_k", "top_p", "min_p", "seed", "step")
OFF = (1.0, 0, 1.0, 0.0, 0, 0)
TYPES = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
OPTIONS = (
    {},
    {"temperature": 0.7, "top_k": 50, "step": 1},
    {"top_p": 0.7, "min_p": 0.02, "seed": 2**40},
    {"temperature": 0.0, "step": 2},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "step": 2**33},
    {"temperature": (0.0, 1.3), "top_p": (0.6, 1.0), "min_p": (0.0, 0.01)},  # of each of two rows
)


CASES = (
    (torch.float32, 7, "normal"),
    (torch.float32, 32, "close"),
    (torch.float32, 150, "ties"),
    (torch.float16, 150, "normal"),
)


def rows(kind: str, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    x = 3 * torch.randn(2, vocab_size)
    if kind == "ties":
        x = x.round()
        x[0] = 1.0
    if kind == "close":  # alike in all but the last bits
        x = 1 + 1e-6 * x
    x[0, vocab_size // 2] = float("-inf")
    if kind == "ties":
        x[1, 5] = float("nan")
    return x.to(dtype)


def check_top_k(x: torch.Tensor, k: int) -> None:
    for got, expected in zip(triton_top_k.top_k(x, k), reference.top_k(x, k), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def check_sample(x: torch.Tensor, options: dict, as_tensors: bool) -> None:
    values = [options.get(name, off) for name, off in zip(NUMBERS, OFF, strict=True)]
    values[1] = values[1] and min(values[1], x.shape[1])
    tensors = [torch.tensor(v, dtype=t).expand(len(x)) for v, t in zip(values, TYPES, strict=True)]
    expected = reference.sample(x, *tensors)
    if as_tensors:
        token_ids, logprobs = triton_sample.sample(
            x, *OFF, tensors[0], tensors[1] if values[1] else None, *tensors[2:], True
        )
    else:
        token_ids, logprobs = triton_sample.sample(x, *values, *(None,) * 6, True)
    assert torch.equal(token_ids, expected[0]), (options, token_ids, expected[0])
    torch.testing.assert_close(logprobs, torch.stack(expected[1:]), rtol=3e-6, atol=3e-6, equal_nan=True)


def force(path: str) -> None:
    """Make short rows take the way of long ones, so that these are run at a size the interpreter can bear."""
    if path == "whole rows":
        return
    length = 16 if path == "short list" else 1024
    triton_sample.MAX_SAMPLE, triton_sample.MAX_LIST, triton_sample.GROUP = 64, length, 32
    triton_sample.GUESS_SAMPLE = 64
    triton_sample.ALONE_FROM = 0 if path == "row by row" else 1000
    triton_sample.LEAST_WARPS = triton_sample.MOST_WARPS = 2
    most = 1024 if path == "best groups" else 0
    for module in (triton_select, triton_sample, triton_top_k):
        module.CHUNK, module.MAX_TILE, module.MAX_GROUPS_CHOSEN = 128, 0, most
    triton_top_k.MAX_SORTED_WHOLE = 0


def main() -> None:
    torch.manual_seed(0)
    calls = 0
    for path in ("whole rows", "best groups", "chunk by chunk", "row by row", "short list"):
        force(path)
        for dtype, vocab_size, kind in CASES:
            x = rows(kind, vocab_size, dtype)
            for k in {1, min(40, vocab_size), vocab_size} if path not in ("row by row", "short list") else ():
                check_top_k(x, k)
                calls += 1
            if kind == "close" and path == "whole rows":
                x[:, 3], x[:, 20] = float("inf"), float("nan")  # neighbours among the keys
                check_top_k(x, 2)
                x[:, 3], x[:, 20] = 1.0, 1.0
                calls += 1
            for number, options in enumerate(OPTIONS):
                if path in ("row by row", "short list") and "top_k" in options:
                    continue
                a_row_each = number == len(OPTIONS) - 1
                check_sample(x, options, as_tensors=a_row_each or (number % 2 == 1 and path != "best groups"))
                calls += 1
        print(f"{path}: {calls} calls so far, all agree with the reference", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NaN and -inf are meant
    main()
