"""Building and binding: what is cached, what is said where something is missing, and that no build harms another."""

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from kernels.load import BuildError, build, compiler

USE_AN_OP = """
import torch, kernels
x = torch.tensor([[1.0, 3.0, 2.0]])
assert kernels.top_k(x, 2)[1].tolist() == [[1, 2]]
print(kernels.load("cpu").kind)
"""
BUILD = "import pathlib, sys; from kernels.load import build; print(build([pathlib.Path(sys.argv[1])])[0])"


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "answer" / "cpu.cpp"
    path.parent.mkdir()
    path.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n')
    return path


@pytest.fixture
def counting_compiler(tmp_path: pathlib.Path) -> pathlib.Path:
    """The real compiler, behind a script that notes each compilation in calls.txt and takes its time over it."""
    path = tmp_path / "compiler"
    calls = tmp_path / "calls.txt"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo call >> "{calls}"; sleep 1; }}\nexec {compiler()} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_a_library_is_built_once(source, tmp_path, counting_compiler, monkeypatch):
    monkeypatch.setenv("TOY_LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(counting_compiler))
    (first,) = build([source])
    (second,) = build([source])
    assert first == second and ctypes.CDLL(str(first)).answer() == 42
    assert (tmp_path / "calls.txt").read_text().split() == ["call"]
    source.write_text(source.read_text().replace("42", "43"))
    (changed,) = build([source])
    assert changed != first and ctypes.CDLL(str(changed)).answer() == 43


def test_two_processes_that_start_at_once_build_once(source, tmp_path, counting_compiler):
    environment = os.environ | {"TOY_LM_CACHE": str(tmp_path / "cache"), "CXX": str(counting_compiler)}
    command = [sys.executable, "-c", BUILD, str(source)]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].strip() for process in both]
    assert printed[0] == printed[1] and pathlib.Path(printed[0]).exists()
    assert (tmp_path / "calls.txt").read_text().split() == ["call"]


def test_a_killed_build_does_not_hinder_the_next(source, tmp_path):
    endless = tmp_path / "endless"
    endless.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {compiler()} --version\ntouch {tmp_path / "begun"}\nsleep 600\n'
    )
    endless.chmod(0o755)
    environment = os.environ | {"TOY_LM_CACHE": str(tmp_path / "cache"), "CXX": str(endless)}
    command = [sys.executable, "-c", BUILD, str(source)]
    killed = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline, "the compiler was never started"
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)  # the process that holds the lock; the compiler it started lives on
    killed.wait()
    try:
        next_build = python(BUILD, str(source), TOY_LM_CACHE=str(tmp_path / "cache"), CXX=compiler())
        assert next_build.returncode == 0, next_build.stderr
        assert ctypes.CDLL(next_build.stdout.strip()).answer() == 42
    finally:
        os.killpg(killed.pid, signal.SIGKILL)


def test_the_compilers_own_words_are_shown(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_LM_CACHE", str(tmp_path / "cache"))
    source.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(BuildError, match="forty_two"):
        build([source])
    assert list((tmp_path / "cache").glob("*.so")) == []


def test_a_cache_that_cannot_be_written_is_named(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TOY_LM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="TOY_LM_CACHE"):
        build([source])


def test_without_a_compiler_the_references_run_and_a_line_says_so():
    done = python(USE_AN_OP, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference"
    assert "no C++ compiler found (looked for no-such-compiler)" in done.stderr and "install one" in done.stderr


def test_without_a_compiler_fused_kernels_are_refused():
    done = python(USE_AN_OP, CXX="no-such-compiler", TOY_LM_KERNELS="fused")
    assert done.returncode != 0 and "no C++ compiler found" in done.stderr


def test_the_references_can_be_asked_for():
    done = python(USE_AN_OP, TOY_LM_KERNELS="reference")
    assert done.stdout.strip() == "reference" and done.stderr == ""


@pytest.mark.parametrize("name", ["TOY_LM_KERNELS", "TOY_LM_CPU_CAPABILITY"])
def test_unknown_settings_are_refused_by_name(name):
    done = python(USE_AN_OP, **{name: "nonsense"})
    assert done.returncode != 0 and f"{name}: got 'nonsense', allowed are" in done.stderr


def test_devices_without_kernels_are_refused_by_name():
    done = python("import kernels; kernels.load('meta')")
    assert done.returncode != 0 and "device: got 'meta', the kernels run on cpu and cuda" in done.stderr


CALL_TWICE = """
import sys, torch, kernels
q = torch.randn(1, 2, 100, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

def gradient():
    return torch.autograd.grad(kernels.flash_attention(q, q, q).sum(), q)[0]

early = gradient()
print(sys.modules["kernels.load"]._bindings["cuda"].line)
print(kernels.load("cuda").line)
assert torch.equal(gradient(), early) and torch.equal(gradient(), early)
"""


@pytest.mark.gpu
def test_the_first_call_on_cuda_does_not_wait_for_the_compiler(tmp_path):
    done = python(CALL_TWICE, TOY_LM_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    early, late = done.stdout.splitlines()
    assert early.endswith("launched from Python until launch.cpp is compiled") and late.endswith("launched from C++")
