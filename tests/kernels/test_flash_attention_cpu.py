"""What is the CPU's alone: every instruction set, the vector functions, threads, sanitizers and the build.

What attention must compute is tested in test_flash_attention.py, for CPU and GPU alike.
"""

import importlib
import itertools
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.flash_attention import reference

load = importlib.import_module("kernels.load")  # kernels.load is the function of that name

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "kernels" / "flash_attention" / "cpu.cpp"
X86 = platform.machine() in ("x86_64", "AMD64")
# capability -> what /proc/cpuinfo must name for the machine to run it
NEEDS = {"plain": "", "avx2": "avx2", "avx512": "avx512vl", "avx512_bf16": "avx512_bf16"}


def run_attention(function, tensors, dout, dlse):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    gradients = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))


def assert_close(got, plain, exact, what):
    """At most twice plain torch's error, one rounding of the largest value and a few of fp32's own roundings more."""
    for name, value in got.items():
        error = (value.double() - exact[name]).nan_to_num(nan=0.0).abs().max().item()
        allowed = 2 * (plain[name].double() - exact[name]).nan_to_num(nan=0.0).abs().max().item()
        largest = exact[name].nan_to_num(neginf=0.0).abs().max().item()
        allowed += largest * torch.finfo(value.dtype).eps + 1e-5 * (value.dtype != torch.float64) + 1e-12
        assert not value.isnan().any() and error <= allowed, f"{what}: {name} is off by {error}, allowed {allowed}"


def check_small_odd_sizes():
    """Forward, backward, packed documents and decoding at sizes that fill no tile, for every dtype and option."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    sizes = ((3, 70, 1), (65, 33, 40), (130, 129, 72))  # seqlen_q, seqlen_k, head_dim
    options = (
        {"causal": False},
        {"causal": True},
        {"causal": True, "window_size": 5, "softcap": 3.0},
        {"causal": False, "window_size": 30, "softmax_scale": -0.2},
    )
    for dtype, (seqlen_q, seqlen_k, head_dim), option in itertools.product(dtypes, sizes, options):
        q = torch.randn(2, 4, seqlen_q, head_dim).to(dtype)
        k = torch.randn(2, seqlen_k, 2, head_dim).to(dtype).transpose(1, 2)
        v = torch.randn(2, 2, seqlen_k, 2 * head_dim).to(dtype)[..., ::2]
        dout, dlse = torch.randn(2, 4, seqlen_q, head_dim).to(dtype), torch.randn(2, 4, seqlen_q)

        def classic(*x, option=option):
            return reference.classic_attention(*x, return_lse=True, **option)

        def fused(*x, option=option):
            return kernels.flash_attention(*x, return_lse=True, **option)

        exact = run_attention(classic, [x.double() for x in (q, k, v)], dout, dlse)
        got = run_attention(fused, (q, k, v), dout, dlse)
        assert_close(got, run_attention(classic, (q, k, v), dout, dlse), exact, (dtype, q.shape, k.shape, option))

    for dtype in dtypes:
        check_documents(dtype)
        check_decoding(dtype)


def check_documents(dtype):
    lengths_q, lengths_k = torch.tensor([0, 5, 0, 70, 1, 33]), torch.tensor([0, 7, 9, 66, 0, 1])
    cu_q, cu_k = lengths_q.cumsum(0).int(), lengths_k.cumsum(0).int()
    q, k, v = (torch.randn(int(cu[-1]), heads, 24).to(dtype) for cu, heads in ((cu_q, 4), (cu_k, 2), (cu_k, 2)))
    dout, dlse = torch.randn_like(q), torch.randn(4, q.shape[0])

    def classic(*x):
        return reference.classic_attention_varlen(*x, cu_q, cu_k, causal=True, return_lse=True)

    def fused(*x):
        options = {"max_seqlen_q": 70, "max_seqlen_k": 66, "causal": True, "return_lse": True}
        return kernels.flash_attention_varlen(*x, cu_q, cu_k, **options)

    exact = run_attention(classic, [x.double() for x in (q, k, v)], dout, dlse)
    assert_close(
        run_attention(fused, (q, k, v), dout, dlse), run_attention(classic, (q, k, v), dout, dlse), exact, dtype
    )


def check_decoding(dtype):
    """Where the cache is copied (head_dim 40) and where it is read as it lies, small and as from memory (33 MB)."""
    lengths, several = [0, 3, 600], {"window_size": 70}
    check_decoding_of_size(dtype, lengths, num_kv_heads=2, groups=1, seqlen_q=1, head_dim=40)
    check_decoding_of_size(dtype, lengths, num_kv_heads=2, groups=4, seqlen_q=3, head_dim=40, **several)
    check_decoding_of_size(dtype, lengths, num_kv_heads=2, groups=2, seqlen_q=20, head_dim=40, softcap=5.0)
    check_decoding_of_size(dtype, lengths, num_kv_heads=2, groups=1, seqlen_q=1, head_dim=64)
    check_decoding_of_size(dtype, lengths, num_kv_heads=2, groups=2, seqlen_q=3, head_dim=160, **several)
    if dtype in (torch.float32, torch.bfloat16):
        check_decoding_of_size(dtype, [4110, 4101], num_kv_heads=8, groups=1, seqlen_q=1, head_dim=128)
        several = {"window_size": 1500, "softmax_scale": -0.1}
        check_decoding_of_size(dtype, [4110, 4101], num_kv_heads=8, groups=2, seqlen_q=3, head_dim=128, **several)


def check_decoding_of_size(dtype, lengths, *, num_kv_heads, groups, seqlen_q, head_dim, **options):
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32)
    q = torch.randn(len(lengths), num_kv_heads * groups, seqlen_q, head_dim).to(dtype)
    cache = len(lengths), num_kv_heads, max(lengths), head_dim
    k_cache, v_cache = (torch.randn(cache).to(dtype) for _ in range(2))
    for i, length in enumerate(lengths):
        k_cache[i, :, length:] = v_cache[i, :, length:] = float("nan")  # never read
    readable = (q, k_cache.nan_to_num(), v_cache.nan_to_num())
    exact = reference.classic_decode(*(x.double() for x in readable), cache_seqlens, **options)
    plain = reference.classic_decode(*readable, cache_seqlens, **options)
    got = kernels.decode_attention(q, k_cache, v_cache, cache_seqlens, **options)
    assert_close({"out": got}, {"out": plain}, {"out": exact}, (dtype, q.shape, cache, options))


def run_checks(capability, environment=None):
    """check_small_odd_sizes in a process of its own, which builds the attention kernels alone."""
    command = [sys.executable, "-m", "tests.kernels.test_flash_attention_cpu", capability]
    # Threads that wait without spinning: the test may share its cores with others.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "every size agrees" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("capability", NEEDS)
def test_every_instruction_set_computes_attention(capability):
    if capability != "plain" and not X86:
        pytest.skip("an instruction set of x86")
    if NEEDS[capability] not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU lacks {NEEDS[capability]}")
    run_checks(capability)


def test_address_and_undefined_behaviour_sanitizers_are_silent(tmp_path):
    compiler = load.compiler()
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("the compiler has no libasan")
    wrapper = tmp_path / "sanitizing-compiler"
    wrapper.write_text(
        f'#!/bin/sh\nexec {compiler} "$@" -O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined\n'
    )
    wrapper.chmod(0o755)
    environment = {
        "CXX": str(wrapper),
        "TOY_LM_CACHE": str(tmp_path),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself leaks
    }
    run_checks("native", environment)


VECTOR_CHECKS = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "flash_attention/microkernels.h"

double ulps(float got, double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return std::abs(got - exact) / std::ldexp(1.0, exponent - 24);
}

int main() {
  double exp2_error = 0, rough_error = 0, tanh_error = 0, log_error = 0;
  for (int i = 0; i <= 4000000; ++i) {
    const float x = -126.0f + 134.0f * i / 4000000, y = std::ldexp(1.0f + i / 4000000.0f, i % 60 - 20);
    const float t = (i % 2 ? 12.0f : 0.01f) * (i - 2000000) / 2000000;
    exp2_error = std::fmax(exp2_error, ulps(exp2(broadcast(x))[0], std::exp2((double)x)));
    rough_error = std::fmax(rough_error, std::abs(exp2_rough(broadcast(x))[0] / std::exp2((double)x) - 1));
    if (t != 0) tanh_error = std::fmax(tanh_error, ulps(tanh(broadcast(t))[0], std::tanh((double)t)));
    const double log_y = std::log((double)y);
    log_error = std::fmax(log_error, std::abs(log(broadcast(y))[0] - log_y) / (1 + std::abs(log_y)));
  }
  const float infinity = std::numeric_limits<float>::infinity();
  bool exact = exp2(broadcast(-infinity))[0] == 0 && exp2(broadcast(0.0f))[0] == 1 && exp2(broadcast(7.0f))[0] == 128;
  exact &= std::isnan(exp2(broadcast(NAN))[0]) && exp2_rough(broadcast(-infinity))[0] == 0;
  exact &= exp2_rough(broadcast(0.0f))[0] == 1 && std::isnan(log(broadcast(NAN))[0]) && tanh(broadcast(50.0f))[0] == 1;

  bool products = true, transposes = true;
  for (int rows : {1, 3, 8, 21})
    for (int depth : {1, 7, 33})
      for (int columns = kWidth<float>; columns <= 7 * kWidth<float>; columns += kWidth<float>) {
        std::vector<float> a(rows * depth), b(depth * columns), c(rows * columns), t(depth * (rows + 16), -1.0f);
        for (float& x : a) x = rand() % 9 - 4;  // small whole numbers: every order of addition gives the same sum
        for (float& x : b) x = rand() % 9 - 4;
        for (float& x : c) x = rand() % 9 - 4;
        std::vector<float> expected = c;
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < columns; ++j)
            for (int l = 0; l < depth; ++l) expected[i * columns + j] += a[i * depth + l] * b[l * columns + j];
        Plain<float>::multiply(rows, columns, depth, {a.data(), depth, 1}, b.data(), columns, c.data(), columns, false);
        products &= c == expected;
        transpose(a.data(), depth, rows, depth, t.data(), rows + 16 - rows % 16);
        for (int i = 0; i < rows; ++i)
          for (int l = 0; l < depth; ++l) transposes &= t[l * (rows + 16 - rows % 16) + i] == a[i * depth + l];
      }
  std::printf("%g %g %g %g %d %d %d\n", exp2_error, rough_error, tanh_error, log_error, exact, products, transposes);
}
"""


@pytest.mark.parametrize("capability", ["native", "plain"])
def test_vector_functions_keep_their_error_bounds(capability, tmp_path):
    source, program = tmp_path / "check.cpp", tmp_path / "check"
    source.write_text(VECTOR_CHECKS)
    flags = [flag for flag in load._flags(capability) if flag not in ("-shared", "-fPIC")]
    subprocess.run([load.compiler(), *flags, f"-I{ROOT / 'kernels'}", str(source), "-o", str(program)], check=True)
    words = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    exp2_error, rough_error, tanh_error, log_error = map(float, words[:4])
    assert exp2_error <= 2.5  # units in the last place
    assert rough_error <= 2**-13.2
    assert tanh_error <= 4.0
    assert log_error <= 2**-22
    assert words[4:] == ["1", "1", "1"]  # exact values, products, transposes


def test_the_bits_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(1, 4, 1100, 48, dtype=dtype)
        k, v = (torch.randn(1, 2, 1100, 48, dtype=dtype) for _ in range(2))
        dout, dlse = torch.randn_like(q), torch.randn(1, 4, 1100)
        lengths = torch.tensor([1100], dtype=torch.int32)
        results = []
        try:
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                got = run_attention(
                    lambda *x: kernels.flash_attention(*x, causal=True, return_lse=True), (q, k, v), dout, dlse
                )
                results.append([*got.values(), kernels.decode_attention(q[:, :, :1], k, v, lengths)])
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_decodes_to_the_same_bits_alone_and_beside_others(dtype):
    """Alone its cache (6 or 12 MB) is read as from the processor's caches, beside others (31 or 61 MB) from memory."""
    q, k_cache, v_cache = (torch.randn(5, 4, length, 128).to(dtype) for length in (1, 3000, 3000))
    cache_seqlens = torch.tensor([3000, 2999, 3000, 1, 2049], dtype=torch.int32)
    together = kernels.decode_attention(q, k_cache, v_cache, cache_seqlens)
    for i in range(5):
        one = slice(i, i + 1)
        alone = kernels.decode_attention(q[one], k_cache[one], v_cache[one], cache_seqlens[one])
        assert torch.equal(alone, together[one])


def test_not_a_number_is_passed_on():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 1, 70, 16, dtype=dtype) for _ in range(3))
        k[0, 0, 69, 3] = float("nan")
        out, lse = kernels.flash_attention(q, k, v, causal=True, return_lse=True)
        assert out[:, :, 69].isnan().all() and lse[:, :, 69].isnan().all()
        assert out[:, :, :69].isfinite().all() and lse[:, :, :69].isfinite().all()


def test_not_a_number_stays_in_its_call():
    """Tiles that no query sees are not computed: what an earlier call left in their memory must not be used."""
    for dtype, options in itertools.product(
        (torch.float32, torch.bfloat16), ({"causal": True}, {"causal": True, "window_size": 20}, {"window_size": 20})
    ):
        tensors = [torch.randn(1, 1, 200, 32, dtype=dtype) for _ in range(3)]
        dout, dlse = torch.randn(1, 1, 200, 32, dtype=dtype), torch.randn(1, 1, 200)

        def fused(*x, options=options):
            return kernels.flash_attention(*x, return_lse=True, **options)

        def full(*x):
            return kernels.flash_attention(*x, return_lse=True)

        before = run_attention(fused, tensors, dout, dlse)
        poison = run_attention(full, [torch.full_like(x, torch.nan) for x in tensors], dout, dlse)
        assert all(value.isnan().all() for value in poison.values())
        after = run_attention(fused, tensors, dout, dlse)
        assert all(torch.equal(value, after[name]) for name, value in before.items()), (dtype, options)


def test_wrong_lengths_are_refused_by_name():
    x = torch.randn(10, 1, 8)
    right = torch.tensor([0, 4, 10], dtype=torch.int32)
    for bounds, pattern in (([0, 4, 9], "cu_seqlens_k: got 0 to 9"), ([0, 11, 10], "cu_seqlens_k: got 11 before 10")):
        wrong = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(RuntimeError, match=pattern):
            kernels.flash_attention_varlen(x, x, x, right, wrong, max_seqlen_q=11, max_seqlen_k=11)
    with pytest.raises(RuntimeError, match="max_seqlen_q: got 5, but document 1 has 6 rows"):
        kernels.flash_attention_varlen(x, x, x, right, right, max_seqlen_q=5, max_seqlen_k=6)
    cache = torch.randn(1, 1, 10, 8)
    for length in (-1, 11):
        with pytest.raises(
            RuntimeError, match=f"cache_seqlens: got {length} for sequence 0, allowed are 0 to the capacity 10"
        ):
            kernels.decode_attention(cache[:, :, :1], cache, cache, torch.tensor([length], dtype=torch.int32))


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_accept_the_source(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    flags = [*load._CXX_FLAGS, *(load._CAPABILITY_FLAGS["avx2"] if compiler == "clang++" and X86 else ())]
    include = pathlib.Path(torch.__file__).parent / "include"
    command = [compiler, *flags, "-O0", "-c", f"-I{ROOT / 'kernels'}", f"-isystem{include}", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "object")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for library in load.build([SOURCE], sys.argv[1]):
        torch.ops.load_library(library)
    load._bindings["cpu"] = load.Binding(device_type="cpu", kind="fused", line=sys.argv[1])
    torch.manual_seed(0)
    check_small_odd_sizes()
    print("every size agrees")
