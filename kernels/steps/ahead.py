"""What the compiler makes of a step: its kernels compiled for a GPU that need not be there, and their instructions.

PTX is the assembly language of NVIDIA's GPUs, one step above what the card runs. A step's idea can be seen in it:
whether the matrix unit is used (`mma.sync`, `wgmma`), how data comes from memory (`ld.global` and its width,
`cp.async`, the tensor memory accelerator), how threads talk to one another (`shfl`, `redux`, `bar.sync`).
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any

from kernels.steps import Compilation

# What is counted, in the order in which it is shown: a name, and the instructions that it stands for.
TELLING = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05.mma": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "ldmatrix": r"ldmatrix",
    "cp.async.bulk.tensor": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
    "mbarrier wait": r"mbarrier\.try_wait",
    "setmaxnreg": r"setmaxnreg",
    "fma": r"fma\.rn\.(?:ftz\.)?f32",
    "ex2": r"ex2\.approx",
    "div": r"div\.(?:full|rn|approx)\.(?:ftz\.)?f32",
    "max": r"max\.\w+",
    "shfl": r"shfl\.sync",
    "redux": r"redux\.sync",
    "bar.sync": r"bar(?:rier)?\.sync",
    "ld.shared": r"ld\.shared",
    "st.shared": r"st\.shared",
    "ld.local": r"ld\.local",
}
_WIDTH = re.compile(r"^(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)$")
_INSTRUCTION = re.compile(r"(?:^|[{;])\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Made:
    """What became of one kernel."""

    name: str
    num_warps: int
    registers: int  # of each thread
    spilled_bytes: int  # of each thread, in memory, because the registers did not suffice
    shared_bytes: int  # of each program
    instructions: dict[str, int]  # how often each stands in the code, not how often it is run


def compile_ahead(one: Compilation, capability: int) -> Made:
    """Compile for a compute capability, such as 90 for an H200."""
    import triton
    from triton.backends.compiler import GPUTarget

    types = {name: one.types.get(name, "constexpr") for name in one.kernel.arg_names}
    aligned = [place for place, type in enumerate(types.values()) if type.endswith(":16")]
    source = _source_class(one.kernel)(
        fn=one.kernel,
        signature={name: type.removesuffix(":16") for name, type in types.items()},
        constexprs=dict(one.constants),
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    name = one.kernel.__name__
    counted = count(compiled.asm["ptx"])
    return Made(name, one.num_warps, registers, spilled, compiled.metadata.shared, counted)


def _source_class(kernel: Any) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    return GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource


def count(ptx: str) -> dict[str, int]:
    """How often each telling instruction stands in the code; memory's by how many bytes a thread moves at once."""
    found: dict[str, int] = {}
    names = _INSTRUCTION.findall(ptx)
    for telling, pattern in TELLING.items():
        number = sum(re.match(pattern, name) is not None for name in names)
        if number:
            found[telling] = number
    widths: dict[str, int] = {}
    for name in names:
        width = _WIDTH.match(name)
        if width:
            key = f"{width[1]}.global {int(width[2] or 1) * int(width[3]) // 8} B"
            widths[key] = widths.get(key, 0) + 1
    return {**found, **dict(sorted(widths.items()))}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of each thread."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [os.fspath(tool), "--dump-resource-usage", os.fspath(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (max(map(int, re.findall(rf"{what}:(\d+)", printed))) for what in ("REG", "STACK"))
    return registers, spilled
