"""Every step of the attention ladder computes the same function, and is made of the instructions its text names."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.flash_attention.reference import classic_attention
from kernels.steps import Step, attention_cpu, attention_steps
from tests.kernels.compile_ahead import compile_kernel, resources

SHAPES = [(1, 1, 1, 16), (2, 3, 17, 64), (1, 2, 64, 64), (1, 2, 129, 128), (2, 1, 257, 64), (1, 1, 1000, 128)]


def check(step: Step, shape: tuple[int, ...], dtype: torch.dtype, causal: bool, device: str) -> None:
    """The error is at most twice that of plain torch in the same dtype, and one rounding."""
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    before = [x.clone() for x in (q, k, v)]
    out = step.run(q, k, v, causal=causal)
    exact = classic_attention(q.double(), k.double(), v.double(), causal=causal)
    plain = classic_attention(q, k, v, causal=causal)
    assert out.shape == q.shape and out.dtype == dtype and not out.isnan().any(), step.name
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (out, plain))
    assert error <= 2 * plain_error + torch.finfo(dtype).eps * exact.abs().max().item(), (step.name, shape, dtype)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True)), f"{step.name} wrote over its input"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_the_same_function(device: str, shape: tuple[int, ...], causal: bool):
    # On a GPU every dtype, head_dim and mask is a kernel of its own, to be compiled: all dtypes at one size alone.
    dtypes = [torch.float32] if device == "cpu" else [torch.bfloat16]
    if device == "cuda" and shape[2] == 17:
        dtypes += [torch.float16, torch.float32]
    for step in attention_steps(torch.device(device)):
        if step.needs(torch.device(device)):
            continue
        for dtype in dtypes:
            check(step, shape, dtype, causal, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["attention_5_fewer_flops", "attention_6_causal"])
def test_lse(name: str):
    import importlib

    q, k, v = (torch.randn(2, 3, 301, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    _, lse = importlib.import_module(f"kernels.steps.{name}").attention(q, k, v)
    _, exact = classic_attention(q.double(), k.double(), v.double(), causal=True, return_lse=True)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_a_step_says_of_itself(kind: str):
    if kind == "cuda":
        pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")
    ladder = attention_steps(torch.device(kind))
    assert [step.number for step in ladder] == list(range(1, len(ladder) + 1))
    assert ladder[0].predicted_gain is None and all(step.predicted_gain for step in ladder[1:])
    batch, num_heads, seqlen, head_dim = 2, 3, 4096, 128
    item = 4 if kind == "cpu" else 2
    for step in ladder:
        assert step.bytes_moved(batch, num_heads, seqlen, head_dim) >= 4 * batch * num_heads * seqlen * head_dim * item
        assert step.flops(batch, num_heads, seqlen, head_dim) >= 2 * batch * num_heads * seqlen**2 * head_dim
        assert step.idea.endswith(".") and step.why.endswith(".")


def test_no_compiler_no_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    attention_cpu.library.cache_clear()
    reasons = [step.needs(torch.device("cpu")) for step in attention_steps(torch.device("cpu"))]
    attention_cpu.library.cache_clear()
    assert all("no C++ compiler found (looked for no-such-compiler)" in str(reason) for reason in reasons[:5])
    assert reasons[5] is None  # kernels.flash_attention falls back to plain torch, and says so


def test_bad_input_is_named():
    run = attention_steps(torch.device("cpu"))[1].run
    x = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"^q: got \(1, 2, 8, 24\), needs \(batch, num_heads, seqlen, head_dim of 16"):
        run(*[torch.randn(1, 2, 8, 24)] * 3)
    with pytest.raises(ValueError, match=r"^k: got \(1, 2, 7, 16\)"):
        run(x, x[:, :, 1:], x)
    with pytest.raises(ValueError, match=r"^v: got \(1, 2, 8, 16\), strides"):
        run(x, x, torch.randn(1, 8, 2, 16).transpose(1, 2))
    with pytest.raises(ValueError, match=r"^q: got \(1, 2, 0, 16\), needs 1 to 65535 heads in all, and a token"):
        run(*[x[:, :, :0]] * 3)
    with pytest.raises(ValueError, match=r"^q: got torch.float64, needs"):
        run(*[x.double()] * 3)


def test_interpreted_steps_agree_with_the_reference():
    pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.steps.interpret_attention_steps"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees with the reference") == 6


MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# of each step: what its code must hold, and what its idea did away with; "mma": the matrix unit of the card
INSTRUCTIONS = {
    1: (("fma.rn", "ex2.approx", "div."), ("mma", "cp.async")),
    2: (("fma.rn", "ex2.approx", "div."), ("mma", "cp.async")),
    3: (("fma.rn", "ex2.approx", "div."), ("mma", "cp.async")),
    4: (("mma", "ex2.approx", "div."), ("cp.async.c",)),
    5: (("mma", "ex2.approx"), ("cp.async.c",)),
    6: (("mma", "ex2.approx", "cp.async.c"), ()),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_code_holds_what_the_text_says(capability: int):
    pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")
    divisions = {}
    for step in attention_steps(torch.device("cuda")):
        if step.number not in INSTRUCTIONS or (capability == 100 and step.number < 4):
            continue  # for sm_100 Triton gives products of widened bf16 to the matrix unit too, as tf32
        code = ""
        for one in step.kernels():
            aligned = [i for i, name in enumerate(one.kernel.arg_names) if one.types.get(name, "").endswith(":16")]
            types = {name: type.removesuffix(":16") for name, type in one.types.items()}
            options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
            compiled = compile_kernel(
                one.kernel, types, dict(one.constants), capability=capability, aligned=aligned, **options
            )
            assert resources(compiled).spilled_bytes <= 16, step.name
            code += compiled.asm["ptx"]
        held, gone = (
            [MATRIX_UNIT[capability] if x == "mma" else x for x in names] for names in INSTRUCTIONS[step.number]
        )
        assert all(name in code for name in held), (step.name, held)
        assert not any(name in code for name in gone), (step.name, gone)
        divisions[step.number] = code.count("div.")
    assert divisions[5] < divisions[4] / 2
