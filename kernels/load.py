"""What is compiled, when and for which device; the compiler's error is shown, never swallowed.

A device is bound once per process, by `load(device)` or by the first call of an op on that device:

    cpu    every `cpu.cpp` below this folder is compiled for the machine at hand and loaded; the .cpp registers its
           kernels with torch itself (`STABLE_TORCH_LIBRARY_IMPL`). The shared objects are cached, so that the
           compiler runs once per source, compiler, flags and torch release.
    cuda   the Triton launchers are imported and registered. Triton compiles a kernel at its first launch and caches it.
           `launch.cpp` and `autograd.cpp`, compiled as the above, spare later calls the launchers' and autograd's
           Python; where they cannot be compiled, a line says so and both stay in Python. `load` waits for the compiler;
           the first call of an op does not: until it is done, that process launches from Python.

Where a compiler (or Triton) is missing, one visible line says so and the reference implementations are bound.
`TOY_LM_KERNELS=fused` makes that an error; `TOY_LM_KERNELS=reference` asks for the references.

Two processes that build at once are kept apart by a file lock that the operating system releases when its holder dies,
and a finished library is moved into place in one step: a killed build leaves nothing that a later one would wait for
or load.

Knows torch and the C++ compiler; knows nothing of what an op computes.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

HERE = pathlib.Path(__file__).parent
OP_FOLDERS = ("flash_attention", "top_k", "decode_step", "layer", "orthogonalize")
DEVICE_TYPES = ("cpu", "cuda")
CPU_CAPABILITIES = ("native", "plain", "avx2", "avx512", "avx512_bf16")
# torch's stable ABI of release 2.11: one source builds against 2.11 and later.
_CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
_CAPABILITY_FLAGS = {
    "native": ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",),
    "plain": ("-DTOY_LM_PLAIN",),
    "avx2": ("-march=haswell",),
    "avx512": ("-march=skylake-avx512",),
    # Products of bf16 pairs without AMX, also on CPUs where they are no faster than fp32.
    "avx512_bf16": ("-march=cooperlake", "-DTOY_LM_FORCE_BF16_PAIRS"),
}


class BuildError(RuntimeError):
    """A C++ source could not be compiled; the message holds the command and what the compiler printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binding:
    """What was bound for one device type: `kind` is "fused" or "reference", `line` says it in words."""

    device_type: str
    kind: str
    line: str


_bindings: dict[str, Binding] = {}
_lock = threading.RLock()
_libraries: dict[str, list[torch.library.Library]] = {}  # by device; one unregisters its kernels when it is collected
_launch_build: "subprocess.Popen | None" = None  # runs `build_launch` while CUDA's kernels are launched from Python


def load(device: str | torch.device, wait: bool = True) -> Binding:
    """Compile and bind every kernel for `device` now, and return what was bound (`.line` says it in one line).

    wait   False: as at an op's first call, what launches CUDA's kernels from C++ is compiled in the background

    Raises ValueError for a device these kernels do not run on, RuntimeError where the device is absent, and BuildError
    if `TOY_LM_KERNELS=fused` and the kernels cannot be built.
    """
    return _load(torch.device(device).type, patient=wait)


def _load(device_type: str, patient: bool) -> Binding:
    """`load`; if not patient, what launches CUDA's kernels from C++ is left to a process of its own to compile."""
    global _launch_build
    with _lock:
        running = _launch_build
        if device_type == "cuda" and running is not None and (patient or running.poll() is not None):
            running.wait()
            _launch_build = None
            for library in _libraries.pop("cuda"):
                library._destroy()
            _bindings["cuda"] = _bind("cuda", patient=True)
        elif device_type not in _bindings:
            _bindings[device_type] = _bind(device_type, patient)
    return _bindings[device_type]


def ensure(device_type: str) -> None:
    """Bind `device_type` unless that is done already: what every public op calls first."""
    if device_type not in _bindings or (_launch_build is not None and _launch_build.poll() is not None):
        _load(device_type, patient=False)


# torch.compile calls such a function while it traces and keeps the result, instead of tracing the build.
# (torch.compiler.assume_constant_result sets this same mark, but imports the whole of torch._dynamo to do so.)
ensure._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_fused(device_type: str) -> bool:
    """Whether the kernels of `device_type`, which is bound if it was not, are more than the references."""
    ensure(device_type)
    return _bindings[device_type].kind == "fused"


is_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _bind(device_type: str, patient: bool) -> Binding:
    if device_type not in DEVICE_TYPES:
        raise ValueError(f"device: got {device_type!r}, the kernels run on {' and '.join(DEVICE_TYPES)}")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: got 'cuda', but torch sees no CUDA device here; use 'cpu'")
    wanted = os.environ.get("TOY_LM_KERNELS", "")
    if wanted not in ("", "fused", "reference"):
        raise ValueError(f"TOY_LM_KERNELS: got {wanted!r}, allowed are 'fused', 'reference' and unset")
    if wanted == "reference":
        return _bind_references(device_type, "TOY_LM_KERNELS=reference asks for it")
    try:
        line = _bind_cpu() if device_type == "cpu" else _bind_cuda(patient)
    except (BuildError, ImportError) as error:
        if wanted == "fused":
            raise
        reason, *details = str(error).splitlines()
        binding = _bind_references(device_type, reason)
        warnings.warn("\n".join((binding.line, *details)), stacklevel=4)
        return binding
    return Binding(device_type=device_type, kind="fused", line=line)


def _bind_references(device_type: str, reason: str) -> Binding:
    for folder in OP_FOLDERS:
        library = torch.library.Library("kernels", "IMPL", device_type.upper())
        importlib.import_module(f"kernels.{folder}.op").bind_reference(library)
        _libraries.setdefault(device_type, []).append(library)
    line = f"{device_type}: the reference implementations in plain torch (slow), because: {reason}"
    return Binding(device_type=device_type, kind="reference", line=line)


def _bind_cuda(patient: bool) -> str:
    global _launch_build
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"{error}; install Triton (pip install 'triton>=3.6,<3.8')") from error

    from kernels.launch import Replaying

    how = "launched from C++"
    try:
        if patient or all(library.exists() for library in _targets(*_launch_sources())):
            for built in build_launch():
                torch.ops.load_library(built)
        else:
            command = [sys.executable, "-c", "from kernels.load import build_launch; build_launch()"]
            _launch_build = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True)
            how = "launched from Python until launch.cpp is compiled"
    except BuildError as error:
        warnings.warn(f"cuda: kernels will be launched from Python (slower), because: {error}", stacklevel=6)
        how = "launched from Python"
    from_cpp = how == "launched from C++"
    library: Any = Replaying() if from_cpp else torch.library.Library("kernels", "IMPL", "CUDA")
    _libraries["cuda"] = [library]
    for folder in OP_FOLDERS:
        importlib.import_module(f"kernels.{folder}.op").bind_cuda(library)
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"cuda: Triton {triton.__version__} kernels for {name} (sm_{major}{minor}), {how}"


def build_launch() -> list[pathlib.Path]:
    """`build` what launches CUDA's kernels from C++."""
    return build(*_launch_sources())


def _launch_sources() -> tuple[list[pathlib.Path], str, tuple[str, ...]]:
    """`build`'s arguments: torch's own classes are used, not its stable ABI; Triton brings CUDA's header."""
    import triton

    cuda = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    sources = [HERE / "launch.cpp", HERE / "flash_attention" / "autograd.cpp"]
    return sources, "native", ("-UTORCH_TARGET_VERSION", "-O1", f"-isystem{cuda}")


def _bind_cpu() -> str:
    capability = os.environ.get("TOY_LM_CPU_CAPABILITY", "native")
    if capability not in CPU_CAPABILITIES:
        raise ValueError(f"TOY_LM_CPU_CAPABILITY: got {capability!r}, allowed are {', '.join(CPU_CAPABILITIES)}")
    sources = [source for folder in OP_FOLDERS if (source := HERE / folder / "cpu.cpp").exists()]
    for library in build(sources, capability):
        torch.ops.load_library(library)
    folder = str(cache_folder()).replace(str(pathlib.Path.home()), "~", 1)  # the line goes into reports and figures
    return f"cpu: C++ kernels for {platform.machine()} ({capability}), built by {compiler()} into {folder}"


def cache_folder() -> pathlib.Path:
    """Where built libraries are kept: `$TOY_LM_CACHE`, else `$XDG_CACHE_HOME/toy_lm`, else `~/.cache/toy_lm`."""
    if folder := os.environ.get("TOY_LM_CACHE"):
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "toy_lm"


def compiler() -> str:
    """The C++ compiler: `$CXX`, else g++, else clang++. Raises BuildError where there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    mend = "install one (Debian: apt install g++; macOS: xcode-select --install) or name one in CXX"
    raise BuildError(f"no C++ compiler found (looked for {', '.join(candidates)}); {mend}")


def build(
    sources: list[pathlib.Path], capability: str = "native", extra_flags: tuple[str, ...] = ()
) -> list[pathlib.Path]:
    """Compile each source into a shared library of its own, all at once, and return the libraries in the same order.

    What is in the cache is not compiled again; a line on stderr explains the wait for what is not. Raises BuildError
    with the compiler's own words if a source fails.
    """
    cxx = compiler()
    flags = _flags(capability) + extra_flags
    folder = cache_folder()
    targets = _targets(sources, capability, extra_flags)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / "lock"):
            missing = [(s, t) for s, t in zip(sources, targets, strict=True) if not t.exists()]
            if missing:
                names = ", ".join(str(source.relative_to(HERE)) for source, _ in missing if source.is_relative_to(HERE))
                print(f"compiling {names or 'C++'} for this machine, once: some seconds", file=sys.stderr, flush=True)
            commands = [_compile_command(cxx, s, t, flags) for s, t in missing]
            jobs = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
            outputs = [job.communicate()[0] for job in jobs]
            for (_, target), command, job, output in zip(missing, commands, jobs, outputs, strict=True):
                if job.returncode != 0:
                    raise BuildError(f"{cxx} failed on {target.stem}\n{shlex.join(command)}\n{output}")
                os.replace(_unfinished(target), target)
    except OSError as error:
        raise BuildError(
            f"cannot build in {folder} ({error}); set TOY_LM_CACHE to a folder that can be written"
        ) from error
    return targets


def _targets(sources: list[pathlib.Path], capability: str, extra_flags: tuple[str, ...]) -> list[pathlib.Path]:
    """Where `build` puts the library of each source."""
    cxx = compiler()
    flags = _flags(capability) + extra_flags
    return [cache_folder() / f"{source.parent.name}_{_fingerprint(source, cxx, flags)}.so" for source in sources]


def _unfinished(target: pathlib.Path) -> pathlib.Path:
    return target.with_suffix(f".{os.getpid()}.tmp")


def _fingerprint(source: pathlib.Path, cxx: str, flags: tuple[str, ...]) -> str:
    """Sixteen hex digits of everything that decides what the library holds."""
    digest = hashlib.sha256()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    for part in (torch.__version__, version, flags, _cpu_model()):
        digest.update(repr(part).encode())
    for file in [source, *sorted(HERE.rglob("*.h"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_model() -> str:
    """What `-march=native` depends on: a cache on a shared disk must not hand one machine's code to another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _flags(capability: str) -> tuple[str, ...]:
    return _CXX_FLAGS + _CAPABILITY_FLAGS[capability]


def _compile_command(cxx: str, source: pathlib.Path, target: pathlib.Path, flags: tuple[str, ...]) -> list[str]:
    torch_folder = pathlib.Path(torch.__file__).parent
    include = torch_folder / "include"
    libraries = ("-L", str(torch_folder / "lib"), "-ltorch_cpu", "-ltorch", "-lc10")
    command = [
        cxx,
        *flags,
        f"-I{HERE}",
        f"-isystem{include}",
        str(source),
        "-o",
        str(_unfinished(target)),
        *libraries,
    ]
    if sys.platform == "darwin":
        command.append("-Wl,-undefined,dynamic_lookup")
    return command


@contextlib.contextmanager
def _exclusive(path: pathlib.Path) -> Iterator[None]:
    """Hold a lock on `path` that the operating system itself releases if this process dies."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
