"""Every step of the top-K ladder computes the same function, and is made of the instructions that its text names."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.steps import top_k_steps
from kernels.top_k import reference
from tests.kernels.compile_ahead import compile_kernel, resources


def difficult_rows(rows: int, n: int, device: str = "cpu") -> torch.Tensor:
    """Ties, both zeros, both infinities, and a row that is -inf nearly everywhere."""
    x = 3 * torch.randn(rows, n, device=device)
    x[0] = x[0].round()
    x[0, n // 2] = float("inf")
    x[0, : n // 3] = 0.0
    x[0, : n // 4] = -0.0
    x[-1, 1:] = float("-inf")
    x[-1, n - 1] = 1.0
    return x


@pytest.mark.parametrize(
    "rows, n, k", [(1, 1, 1), (3, 7, 7), (37, 32, 32), (2, 1601, 50), (3, 5003, 128), (2, 9000, 1)]
)
def test_every_step_is_the_same_function(device: str, rows: int, n: int, k: int):
    x = difficult_rows(rows, n, device)
    before = x.clone()
    expected = reference.top_k(x, k)
    for step in top_k_steps(torch.device(device)):
        values, indices = step.run(x, k)
        assert torch.equal(values, expected[0]), step.name
        assert torch.equal(indices, expected[1]), step.name
        assert torch.equal(x, before), f"{step.name} wrote over its input"


def test_a_row_of_a_vocabulary(device: str):
    x = torch.randn(2, 128_257, device=device)
    expected = reference.top_k(x, 50)
    for step in top_k_steps(torch.device(device)):
        values, indices = step.run(x, 50)
        assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1]), step.name


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_a_step_says_of_itself(kind: str):
    if kind == "cuda":
        pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")
    ladder = top_k_steps(torch.device(kind))
    assert [step.number for step in ladder] == list(range(1, len(ladder) + 1))
    assert ladder[0].predicted_gain is None and all(step.predicted_gain for step in ladder[1:])
    rows, n, k = 64, 50_304, 50
    for step in ladder:
        assert step.bytes_moved(rows, n, k) >= rows * (4 * n + 12 * k), "less than reading the input and writing"
        assert step.idea.endswith(".") and step.why.endswith(".")


def test_bad_input_is_named():
    run = top_k_steps(torch.device("cpu"))[1].run
    with pytest.raises(ValueError, match=r"^x: got \(2, 8\) torch.float64"):
        run(torch.randn(2, 8).double(), 2)
    with pytest.raises(ValueError, match=r"^k: got 9, needs 1 to 8"):
        run(torch.randn(2, 8), 9)


def test_interpreted_steps_agree_with_the_reference():
    pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.steps.interpret_top_k_steps"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees with the reference") == 5


# of each step: what its code must hold, and what its idea did away with
INSTRUCTIONS = {
    2: (("ld.global", "shfl.sync", "bar.sync"), ("redux.sync",)),
    3: (("shfl.sync", "bar.sync"), ("redux.sync",)),
    4: (("shfl.sync",), ("bar.sync", "st.shared", "redux.sync")),
    5: (("redux.sync.max.u32", "redux.sync.min"), ("shfl.sync", "bar.sync")),
    6: (("redux.sync.max.u32", "max.f32"), ()),
}


@pytest.mark.parametrize("capability", [80, 90])
def test_the_code_holds_what_the_text_says(capability: int):
    pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")
    for step in top_k_steps(torch.device("cuda")):
        if step.number not in INSTRUCTIONS:
            continue
        code = ""
        for one in step.kernels():
            aligned = [i for i, name in enumerate(one.kernel.arg_names) if one.types.get(name, "").endswith(":16")]
            types = {name: type.removesuffix(":16") for name, type in one.types.items()}
            compiled = compile_kernel(
                one.kernel, types, dict(one.constants), capability=capability, aligned=aligned, num_warps=one.num_warps
            )
            assert resources(compiled).spilled_bytes == 0, step.name
            code += compiled.asm["ptx"]
        held, gone = INSTRUCTIONS[step.number]
        assert all(name in code for name in held), (step.name, held)
        assert not any(name in code for name in gone), (step.name, gone)
        assert "ld.global.v4.b32" in code, f"{step.name} reads less than 16 bytes at once"
