"""Run the Triton steps of the top-K ladder on the CPU, in Triton's interpreter, against the reference.

A program of its own, because the interpreter is chosen when a kernel is defined: test_top_k_steps.py starts it with
TRITON_INTERPRET=1. It prints a line for each step that agreed everywhere.
"""

import torch

from kernels.steps import top_k_2_rounds, top_k_3_on_chip, top_k_4_warp, top_k_5_redux, top_k_6_groups
from kernels.top_k import reference
from tests.kernels.steps.test_top_k_steps import difficult_rows

STEPS = (top_k_2_rounds, top_k_3_on_chip, top_k_4_warp, top_k_5_redux, top_k_6_groups)
SIZES = ((1, 1), (7, 7), (33, 5), (257, 6), (700, 3))


def main() -> None:
    torch.manual_seed(0)
    top_k_2_rounds.MAX_BLOCK = top_k_6_groups.CHUNK = 64
    for module in (top_k_3_on_chip, top_k_4_warp, top_k_5_redux):
        module.MAX_PIECE = 128  # so that rows the interpreter can bear have several pieces, and these winners again
    for step in STEPS:
        for n, k in SIZES:
            x = difficult_rows(2, n)
            for got, expected in zip(step.top_k(x, k), reference.top_k(x, k), strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=0)
        print(f"{step.__name__} agrees with the reference", flush=True)


if __name__ == "__main__":
    main()
