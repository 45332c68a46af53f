"""The Triton attention kernels without a GPU: run by the interpreter, and compiled for each kind of card."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")

from kernels.flash_attention import tiles, triton_backward, triton_decode, triton_forward
from tests.kernels.compile_ahead import CAPABILITIES, compile_kernel, resources

KERNELS = {
    tiles.FORWARD: triton_forward.forward_kernel,
    tiles.BACKWARD_DQ: triton_backward.dq_kernel,
    tiles.BACKWARD_DKDV: triton_backward.dkdv_kernel,
    tiles.DECODE: triton_decode.decode_kernel,
    tiles.DECODE_MANY: triton_decode.decode_kernel,
}
CARDS = {80: "large", 89: "small", 90: "hopper", 100: "large", 120: "small"}
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MATRIX_INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
ROWS_OF_FP32 = ("lse_ptr", "delta_ptr", "dlse_ptr")


def compile_attention(name, head_dim, causal, capability, dtype=torch.bfloat16):
    kernel, block_d = KERNELS[name], triton_forward.padded(head_dim)
    tile = tiles.table_tile(name, CARDS[capability], head_dim, dtype, causal)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "CAUSAL": causal,
        "WINDOW": False, "SOFTCAP": False, "SCALE_FIRST": False, "VARLEN": False, "SPLIT": False,
        "EARLY": capability == 90,
        "cu_seqlens_q": None, "cu_seqlens_k": None,
    }  # fmt: skip
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types, aligned = {}, []
    for number, argument in enumerate(kernel.arg_names):
        if argument.startswith("stride_"):
            if argument.endswith("d"):
                constants[argument] = 1
            else:
                types[argument] = "i32"
                aligned.append(number)
        elif argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument in ROWS_OF_FP32 else f"*{element}"
            aligned.append(number)
        elif argument == "cache_seqlens":
            types[argument] = "*i32"
        elif argument in ("softmax_scale", "softcap"):
            types[argument] = "fp32"
        elif argument not in constants:
            types[argument] = "i32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compile_kernel(kernel, types, constants, capability=capability, aligned=aligned, **options)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_every_card_without_spills(name, head_dim, capability):
    compiled = compile_attention(name, head_dim, True, capability)
    # A decoding tile has fewer rows than wgmma and tcgen05 take.
    wanted = "mma.sync" if KERNELS[name] is triton_decode.decode_kernel else MATRIX_INSTRUCTION[capability]
    assert wanted in compiled.asm["ptx"]
    used = resources(compiled)
    assert used.spilled_bytes == 0
    assert used.shared_bytes <= SHARED_BYTES[capability]


def test_interpreted_kernels_agree_with_plain_torch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpret_attention"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all agree") == 2
