"""What this machine offers and what is bound to it: the first thing to read, and to paste into a report.

Knows versions, devices and `kernels.load`; knows nothing of models.
"""

import importlib.metadata
import os
import platform

import torch

import kernels
from kernels.load import cache_folder

_PACKAGES = ("torch", "triton", "tokenizers", "safetensors", "numpy", "matplotlib")
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
