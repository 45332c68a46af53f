"""The Triton kernels of decode_step where there is no GPU: interpreted, and compiled for the cards that they run on."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from tests.kernels.compile_ahead import CAPABILITIES, compile_kernel, resources
from tests.kernels.test_decode_step import EPS, arguments

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]
KERNELS = ("_embed", "_linear", "_attend", "_gate_up", "_add")
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def test_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.interpret_decode_step"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == 5


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.launch: tuple[tuple, dict] = ((), {})

    def __getitem__(self, grid):
        def launch(*arguments, **options) -> None:
            self.launch = (arguments, options)

        return launch

    def compile(self, capability: int):
        arguments, options = self.launch
        names = self.kernel.arg_names
        values = {**dict(zip(names, arguments, strict=False)), **{n: options[n] for n in names if n in options}}
        constexpr = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        constexpr |= {name for name, value in values.items() if value is None}
        signature = {
            name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if type(value) is float else "i32"
            for name, value in values.items()
            if name not in constexpr
        }
        launched_with = {name: value for name, value in options.items() if name not in names}
        constants = {name: value for name, value in values.items() if name in constexpr}
        aligned = [  # as a launch finds out
            position
            for position, (name, value) in enumerate(values.items())
            if name in signature and (isinstance(value, torch.Tensor) or value % 16 == 0)
        ]
        return compile_kernel(
            self.kernel, signature, constants, capability=capability, aligned=aligned, **launched_with
        )


@pytest.mark.parametrize(
    ("dtype", "capability", "batch", "int8"),
    [
        *((torch.bfloat16, capability, 1, False) for capability in CAPABILITIES),
        (torch.bfloat16, 90, 9, False),
        (torch.bfloat16, 90, 1, True),
        (torch.float32, 80, 1, False),
        (torch.float32, 120, 9, True),
    ],
    ids=str,
)
def test_compiles_for_every_card(
    capability: int, dtype: torch.dtype, batch: int, int8: bool, monkeypatch: pytest.MonkeyPatch
):
    from kernels.decode_step import triton_decode_step as module

    recorders = {name: Recorder(getattr(module, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(module, name, recorder)
    monkeypatch.setattr(module, "can_overlap", lambda device: capability >= 90)
    *tensors, weights = arguments((1, 384, 6, 6, 64, 1024, 256, 256), batch, dtype, "cpu")
    weights = weights.to_int8() if int8 else weights
    module.decode_step(*tensors, *weights, EPS)
    for name, recorder in recorders.items():
        compiled = recorder.compile(capability)
        assert resources(compiled).spilled_bytes <= 16, name  # for 128 registers, ptxas spills four words
        if name in ("_linear", "_gate_up", "_add"):
            matrix_units = ("mma.sync", "wgmma", "tcgen05")
            used = any(instruction in compiled.asm["ptx"] for instruction in matrix_units)
            assert used == (dtype == torch.bfloat16), name  # in fp32 they would round to tf32
        assert ("griddepcontrol" in compiled.asm["ptx"]) == (capability >= 90), name
        if capability >= 90:  # one step never overlaps the next: see the module
            starts, waits = (compiled.asm["ptx"].index(f"griddepcontrol.{x}") for x in ("launch_dependents", "wait"))
            assert (starts < waits) == (name != "_embed"), name
        assert "div.rn.f64" not in compiled.asm["ptx"], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_the_same_code_for_any_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A tile of another size would add in another order."""
    from kernels.decode_step import triton_decode_step as module

    launched_with = []
    for batch in (1, 9):
        recorders = {name: Recorder(getattr(module, name)) for name in KERNELS}
        for name, recorder in recorders.items():
            monkeypatch.setattr(module, name, recorder)
        *tensors, weights = arguments((1, 384, 6, 6, 64, 1024, 256, 256), batch, dtype, "cpu")
        module.decode_step(*tensors, *weights, EPS)
        launched_with.append(recorders["_attend"].launch[1])
    assert launched_with[0] == launched_with[1]
