"""What this machine offers and what is bound to it: the first thing to read, and to paste into a report.

`describe_steps` shows what the compiler makes of the steps of both ladders, for a GPU that need not be there.

Knows versions, devices, `kernels.load` and the steps; knows nothing of models.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

import kernels
from kernels.load import cache_folder

_PACKAGES = ("torch", "triton", "tokenizers", "safetensors", "numpy", "matplotlib")
_CAPABILITIES = (80, 89, 90, 100, 120)
_VARIABLES = (
    "TOY_LM_KERNELS",
    "TOY_LM_CPU_CAPABILITY",
    "TOY_LM_CACHE",
    "CXX",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def describe() -> str:
    """Versions, devices, and for each device the kernels that are bound and why, in lines of `name: value`."""
    lines = [
        f"toy-lm: {_version('toy-lm')}, Python {platform.python_version()} on {platform.platform()}",
        "packages: " + ", ".join(f"{package} {_version(package)}" for package in _PACKAGES),
        f"processor: {_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"kernel cache: {cache_folder()}",
    ]
    lines += [f"environment: {name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    lines.append(kernels.load("cpu").line)
    if torch.cuda.is_available():
        lines.append(kernels.load("cuda").line)
    else:
        lines.append(f"cuda: {_why_no_cuda()}")
    return "\n".join(lines)


def describe_steps(capability: int = 90) -> Iterator[str]:
    """The telling instructions of each step's kernels, line by line, compiled for a compute capability.

    Raises ValueError where there is no Triton, or where it cannot compile for that capability.
    """
    if capability not in _CAPABILITIES:
        allowed = ", ".join(map(str, _CAPABILITIES))
        raise ValueError(f"capability: got {capability}, needs one of {allowed}")
    if _version("triton") == "not installed":
        raise ValueError("--ptx: needs Triton, which is made for Linux on x86-64; it is not installed")
    from kernels import steps
    from kernels.steps import ahead

    yield f"compiled for sm_{capability} by Triton {_version('triton')}: how often each instruction stands in the code"
    device = torch.device("cuda")
    for ladder, of_device in (("attention", steps.attention_steps), ("top-K", steps.top_k_steps)):
        for step in of_device(device):
            yield f"\n{ladder} {step.number}. {step.name}: {step.idea}"
            compilations = step.kernels()
            if not compilations:
                yield "  (torch's own kernels)"
            for compilation in compilations:
                if compilation.capability not in (None, divmod(capability, 10)):
                    yield f"  made for compute capability {'.'.join(map(str, compilation.capability))} alone"
                    continue
                one = ahead.compile_ahead(compilation, capability)
                yield (
                    f"  {one.name}: num_warps {one.num_warps}, {one.registers} registers a thread, "
                    f"{one.spilled_bytes} bytes spilled, {one.shared_bytes:,} bytes of shared memory"
                )
                yield "    " + ", ".join(f"{number} x {name}" for name, number in one.instructions.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "nothing is bound, because this torch was built without CUDA"
    return "nothing is bound, because torch sees no CUDA device"
