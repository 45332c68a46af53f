"""Run the Triton steps of the attention ladder on the CPU, in Triton's interpreter, against plain torch in fp64.

A program of its own, because the interpreter is chosen when a kernel is defined: test_attention_steps.py starts it with
TRITON_INTERPRET=1. It prints a line for each step that agreed everywhere.
"""

import warnings

import torch

from kernels.steps import attention_steps
from tests.kernels.steps.test_attention_steps import check

SHAPES = ((1, 2, 1, 16), (2, 1, 33, 32), (1, 1, 97, 16))  # 97: two tiles of 64 queries, and four of 32 keys


def main() -> None:
    torch.manual_seed(0)
    for step in attention_steps(torch.device("cuda"))[:-1]:
        for shape in SHAPES:
            for dtype in (torch.float32, torch.float16):
                for causal in (False, True):
                    check(step, shape, dtype, causal, "cpu")
        print(f"{step.name} agrees with the reference", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # -inf is meant
    main()
