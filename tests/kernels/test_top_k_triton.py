"""The Triton kernels of top_k and sample without a GPU: run by the interpreter, and compiled for each kind of card."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")

from kernels.top_k import triton_sample, triton_select, triton_top_k, triton_top_p
from tests.kernels.compile_ahead import CAPABILITIES, compile_kernel, resources

ROW = {"batch": "i32", "vocab_size": "i32", "row_stride": "i32"}
PARAMETERS = {
    "temperature": "fp32",
    "top_k": "i32",
    "top_p": "fp32",
    "min_p": "fp32",
    "seed": "i64",
    "step": "i64",
    **{f"{name}_stride": "i32" for name in ("temperature", "top_k", "top_p", "min_p", "seed", "step")},
}
SCRATCH = {
    "group_keys": "*i32",
    "partials": "*fp32",
    "chosen_groups": "*i32",
    "cuts": "*i32",
    "masses": "*fp32",
    "group_sums": "*i64",
    "num_groups": "i32",
    "num_chunks": "i32",
    "candidates": "*i64",
    "brackets": "*i32",
    "counts": "*i64",
    "listed": "*i64",
}
SAMPLE = {"logits": "*bf16", "token_ids": "*i64", "logprobs": "*fp32", **ROW, **PARAMETERS, **SCRATCH}
TOP_K = {"x": "*fp32", "values": "*fp32", "indices": "*i64", "n": "i32", "k": "i32", **ROW, **PARAMETERS, **SCRATCH}
FLAGS = {"PER_ROW": 0, "TOP_K": True, "TOP_P": True, "MIN_P": True, "LOGPROBS": True, "SUM_EXP": True, "MASS": True}

LONG = {
    "LIST": 8192,
    "LIST_ROOM": 8192 + triton_sample.MOST_SORTED,
    "BLOCK": 256,
    "SAMPLE": 2048,
    "ALONE": False,
    "WARPS": triton_sample.LEAST_WARPS,
    "MOST": triton_sample.MOST_SORTED,
    "GROUPS": triton_sample.WEIGH_GROUPS,
    "GROUP": triton_sample.GROUP,
    "NUM_CHUNKS": 8,
    "NUM_GROUPS": 64,
}

# kernel, types, constants, warps
KERNELS = [
    (triton_select.group_maxima, TOP_K, {"GROUP": 32, "CHUNK": triton_select.CHUNK}, triton_select.CHUNK_WARPS),
    (triton_sample._sample_tile, SAMPLE, {"BITS": 16, "TILE": 512, "GROUP": 0, "NUM_GROUPS": 0, "NUM_CHUNKS": 0}, 1),
    (
        triton_sample._sample_tile,
        SAMPLE,
        {"BITS": 16, "TILE": 2048, "GROUP": 32, "NUM_GROUPS": 4096, "NUM_CHUNKS": 32},
        triton_select.tile_warps(4096, triton_sample.PER_GROUPS_WARP),
    ),
    (triton_top_p.find_bracket, SAMPLE, {"NUM_CHUNKS": 32, "SAMPLE": 16384}, 16),
    (triton_sample._find_cut, SAMPLE, {"NUM_CHUNKS": 32, "BLOCK": 1024}, 4),
    (triton_top_p.weigh_groups, SAMPLE, {**LONG, "CUT": True, "TOP_P": False}, 1),
    (triton_top_p.weigh_groups, SAMPLE, {**LONG, "CUT": False}, 1),
    (triton_sample._draw_long, SAMPLE, {**LONG, "CUT": False}, 4),
    (triton_sample._draw_long, SAMPLE, {**LONG, "CUT": False, "ALONE": True, "BLOCK": 512}, triton_sample.LEAST_WARPS),
    (triton_sample._draw_long, SAMPLE, {**LONG, "CUT": True, "TOP_P": False}, 4),
    (triton_top_k._top_k_lanes, TOP_K, {"BITS": 32}, 1),
    (triton_top_k._top_k_lanes, {**TOP_K, "x": "*bf16", "values": "*bf16"}, {"BITS": 16}, 1),
    (triton_top_k._top_k_short, TOP_K, {"BITS": 32, "ROWS": 4, "BLOCK": 64}, triton_top_k.SORTED_WARPS),
    (
        triton_top_k._top_k_tile,
        TOP_K,
        {"BITS": 32, "TILE": 2048, "GROUP": 32, "NUM_GROUPS": 4096, "K": 64},
        triton_select.tile_warps(4096),
    ),
    (triton_top_k._top_k_long, TOP_K, {"BLOCK": 1024}, 4),
]


def cases():
    """Every kernel for three generations of cards; those in between get what the first launches run."""
    for kernel, *rest in KERNELS:
        common = kernel in (triton_select.group_maxima, triton_sample._sample_tile, triton_top_k._top_k_tile)
        for capability in CAPABILITIES if common else (80, 90, 120):
            yield kernel, *rest, capability


@pytest.mark.parametrize("kernel, types, constants, warps, capability", list(cases()))
def test_compiles_for_every_card(kernel, types, constants, warps, capability):
    constants = {name: value for name, value in {**FLAGS, **constants}.items() if name in kernel.arg_names}
    signature = {name: type for name, type in types.items() if name in kernel.arg_names}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = compile_kernel(kernel, signature, constants, capability=capability, **options)
    assert f"sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["ptx"].count("fma.rn.f32") % 5 == 0  # a weight's own five: nothing else may be fused
    assert resources(compiled).spilled_bytes <= 16  # a frame for a call, but no register has to leave


def test_exchanges_sort_whatever_they_are_given():
    """A network that sorts all rows of zeros and ones sorts all rows: every such row of 16, a sample of those of 32."""
    x = torch.arange(2**16)[:, None] >> torch.arange(16) & 1
    assert_sorts(x, triton_top_k.merge_exchange(16))
    assert_sorts(torch.rand(2**14, 32).round(), triton_top_k.EXCHANGES.value)
    assert_sorts(torch.rand(2**14, 32).argsort(), triton_top_k.EXCHANGES.value)
    assert len(triton_top_k.EXCHANGES.value) == 191


def assert_sorts(x, exchanges):
    expected = x.sort(dim=-1, descending=True).values
    for i, j in exchanges:
        x[:, [i, j]] = torch.stack((x[:, [i, j]].amax(-1), x[:, [i, j]].amin(-1)), -1)
    assert torch.equal(x, expected)


def test_a_thread_has_a_row_to_itself():
    """On Hopper nothing of a row of 32 is exchanged between threads before it is sorted, and no register spilled."""
    kernel = triton_top_k._top_k_lanes
    aligned = [kernel.arg_names.index(name) for name in ("x", "values", "indices", "n", "row_stride", "k")]
    for type, bits in (("fp32", 32), ("bf16", 16)):
        types = {**TOP_K, "x": f"*{type}", "values": f"*{type}"}
        signature = {name: types[name] for name in kernel.arg_names if name != "BITS"}
        compiled = compile_kernel(kernel, signature, {"BITS": bits}, capability=90, aligned=aligned, num_warps=1)
        assert "shfl" not in compiled.asm["ptx"]
        assert resources(compiled).spilled_bytes == 0


def test_interpreted_kernels_agree_with_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpret_top_k"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all agree") == 5
