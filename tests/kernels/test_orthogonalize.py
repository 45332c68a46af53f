"""Newton-Schulz rounds, against the singular values and against the rounds' definition in fp64."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.orthogonalize import reference
from tests.kernels.compile_ahead import compile_kernel, resources

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = [(3, 40, 24), (2, 24, 40), (2, 64, 64), (1, 5, 7), (2, 384, 300), (3, 130, 513)]


def matrices(shape, device, size=1.0):
    """Random ones, without small singular values: those grow threefold a round, and bf16's errors with them."""
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return (size * (u * (s + s.max())[:, None, :] @ v)).to(device).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_singular_values_come_near_one(shape, device):
    x, scale = matrices(shape, device), torch.tensor(2.0, device=device)
    out = kernels.orthogonalize(x, scale)
    assert (out.dtype, out.shape) == (torch.float32, x.shape)
    values = torch.linalg.svdvals(out / 2)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_equals_the_definition(shape, size, device):
    """Within twice the error of plain torch in bf16, and one rounding; lying or standing."""
    x, scale = matrices(shape, device, size), torch.tensor(0.3, device=device)
    exact = reference.orthogonalize(x.double(), scale.double())

    def error(out):
        return ((out.double() - exact).norm() / exact.norm()).item()

    bound = 2 * error(reference.orthogonalize(x, scale)) + torch.finfo(torch.bfloat16).eps / 2
    assert error(kernels.orthogonalize(x, scale)) <= bound
    assert error(kernels.orthogonalize(x.mT, scale).mT) <= bound


def test_nothing_comes_of_nothing(device):
    out = kernels.orthogonalize(torch.zeros(2, 5, 3, device=device).bfloat16(), torch.tensor(1.0, device=device))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.gpu
def test_twice_the_same_bits():
    x, scale = torch.randn(24, 384, 384, device="cuda").bfloat16(), torch.tensor(1.0, device="cuda")
    first = kernels.orthogonalize(x, scale)
    assert all(torch.equal(kernels.orthogonalize(x, scale), first) for _ in range(5))


def test_interpreted():
    pytest.importorskip("triton")
    code = """
import torch
from kernels.orthogonalize import reference, triton_orthogonalize
from tests.kernels.test_orthogonalize import SHAPES
triton_orthogonalize.TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}  # more than one, of small matrices
for shape in SHAPES[:4]:
    x, scale = torch.randn(shape), torch.tensor(0.3)
    exact = reference.orthogonalize(x.double(), scale.double())
    assert (triton_orthogonalize.orthogonalize(x, scale) - exact).norm() < 1e-5 * exact.norm(), shape
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_ahead_nothing_spills(symmetric):
    pytest.importorskip("triton")
    from kernels.orthogonalize.triton_orthogonalize import TILE, product_kernel

    given = {name: size for name, size in TILE.items() if name.startswith("BLOCK")}
    given |= {"SYMMETRIC": symmetric, "a_inner": 1, "c_column": 1, "out_column": 1}
    given |= {"b_inner": 1} if symmetric else {"b_column": 1}
    types = dict.fromkeys(("a", "b", "c", "out"), "*bf16") | {"scales": "*fp32", "alpha": "fp32", "beta": "fp32"}
    signature = {name: types.get(name, "i32") for name in product_kernel.arg_names if name not in given}
    aligned = [i for i, name in enumerate(product_kernel.arg_names) if signature.get(name, "fp32") != "fp32"]
    options = {name: TILE[name] for name in ("num_warps", "num_stages")}
    compiled = compile_kernel(product_kernel, signature, given, capability=90, aligned=aligned, **options)
    assert resources(compiled).spilled_bytes == 0
    assert "wgmma" in compiled.asm["ptx"] and "cp.async.cg" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (torch.zeros(2, 3, 4), torch.tensor(1.0), r"x: got torch.float32 of shape \(2, 3, 4\), needs bfloat16"),
        (
            torch.zeros(3, 4).bfloat16(),
            torch.tensor(1.0),
            r"x: got torch.bfloat16 of shape \(3, 4\), needs bfloat16 \(",
        ),
        (
            torch.zeros(2, 3, 4).bfloat16(),
            torch.ones(2),
            r"scale: got torch.float32 of shape \(2,\), needs one float32",
        ),
    ],
)
def test_refused_in_one_line(x, scale, message):
    with pytest.raises(ValueError, match=message):
        kernels.orthogonalize(x, scale)
