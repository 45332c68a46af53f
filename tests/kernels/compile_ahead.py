"""Compile a Triton kernel for a GPU that is not here, and hand back what the compiler made of it.

compiled = compile_kernel(kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 128}, capability=90, num_warps=4)
compiled.asm["ptx"], compiled.metadata.shared
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

CAPABILITIES = (80, 89, 90, 100, 120)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes of a streaming multiprocessor."""

    registers: int  # per thread
    spilled_bytes: int  # per thread, in local memory
    shared_bytes: int  # per program


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    capability: int,
    aligned: Sequence[int] = (),
    **options,
):
    """The compiled kernel (`.asm["ptx"]`, `.metadata`) for compute capability `capability`, such as 90.

    signature  the type of each argument that is not a constant: "*fp32", "i64", ...; in any order
    constants  the value of each other argument; None stands for a pointer that is not given
    aligned    positions of the arguments that are multiples of 16, as a launch would find out
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if name not in signature and name not in constants]
    assert not missing, f"{kernel.__name__}: neither a type nor a value for {missing}"
    attributes = {(position,): [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> Resources:
    """Registers, spills and shared memory, as ptxas and the compiler report them."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [os.fspath(tool), "--dump-resource-usage", os.fspath(cubin)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", printed))
    spilled = max(int(number) for number in re.findall(r"STACK:(\d+)", printed))
    return Resources(registers, spilled, compiled.metadata.shared)
