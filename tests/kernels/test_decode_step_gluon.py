"""Hopper's kernels of a decode step: what the compiler makes of them, and when they are chosen."""

import pytest
import torch

import kernels
from tests.kernels.compile_ahead import resources
from tests.kernels.test_decode_step import EPS, SHAPES, arguments
from tests.kernels.test_gluon import disassemble

pytest.importorskip("triton.experimental.gluon")

FLOATS = ("x_ptr", "parts_ptr", "new_x_ptr", "projected_ptr", "cos_ptr", "sin_ptr")
NANOGPT = {"DIM": 384, "BLOCK": 512}
HEADS = {"num_heads": 6, "num_kv_heads": 6}
PROJECT = {"token_ptr": None, "new_x_ptr": None, **NANOGPT}
MANY = {"parts_ptr": None, "PARTS": 0, "SEQUENCES": 16, "WIDTH": 16, "LAST": False}
# What is compiled, and how often it copies to shared memory in its turn: keys beyond those that there was room for, or
# what the kernel before has left.
KERNELS = {
    "attend": ("attend", {"token_ptr": None, "PARTS": 16, **HEADS, **NANOGPT}, 8),
    "mlp of one": ("mlp", {"MLP_DIM": 1024, "SEQUENCES": 1, "PARTS": 6, **NANOGPT}, 0),
    "mlp": ("mlp", {"MLP_DIM": 1024, "SEQUENCES": 8, "PARTS": 6, **NANOGPT}, 0),
    "logits": ("project", {**PROJECT, "GATED": False, "LAST": True, "SEQUENCES": 1, "WIDTH": 8, "PARTS": 16}, 0),
    "q, k, v of many": ("project", {**PROJECT, **MANY, "GATED": False}, 0),
    "hidden units of many": ("project", {**PROJECT, **MANY, "GATED": True}, 0),
    "o of many": ("add", {"K": 384, "CHUNKS": 8, "DIM": 384}, 4),
    "down of many": ("add", {"K": 1024, "CHUNKS": 16, "DIM": 384}, 8),
}


def compile_kernel(kernel, constants):
    """For nanoGPT's shape, pointers and sizes as a launch finds them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name in FLOATS else "*i32" if name == "position_ptr" else "*bf16"
        else:
            types[name] = "fp32" if name in ("eps", "scale") else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = GluonASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})


@pytest.mark.parametrize("name", KERNELS)
def test_weights_are_loaded_before_it_is_the_kernels_turn(name: str, tmp_path):
    from kernels.decode_step import gluon_decode_step

    kernel, constants, copies = KERNELS[name]
    compiled = compile_kernel(getattr(gluon_decode_step, kernel), constants)
    before, after = disassemble(compiled, tmp_path).split("ACQBULK")  # griddepcontrol.wait
    used = resources(compiled)
    assert used.spilled_bytes <= 32 and used.shared_bytes <= 227 * 1024
    assert before.count("LDSM") >= 4 and "HMMA" not in before  # the weights are where the matrix units take them from
    assert "HMMA" in after and "LDG.E.U16" not in after
    assert after.count("LDGSTS") == copies
    assert ("PREEXIT" in before) == (name != "logits")  # griddepcontrol.launch_dependents


def test_older_keys_of_many_are_copied_before_it_is_the_kernels_turn(tmp_path):
    from kernels.decode_step import gluon_decode_step

    compiled = compile_kernel(gluon_decode_step.attend_many, HEADS)
    before, after = disassemble(compiled, tmp_path).split("ACQBULK")
    used = resources(compiled)
    assert used.spilled_bytes == 0 and used.shared_bytes <= 227 * 1024
    assert before.count("LDGSTS") == 48 and "HMMA" not in before and "HMMA" in after and "PREEXIT" in before


def test_what_they_take():
    from kernels.decode_step.gluon_decode_step import supports

    def taken(shape, dtype=torch.bfloat16, int8=False, offset=0) -> bool:
        _, _, k_cache, v_cache, weights = arguments(shape, 1, dtype, "cpu")
        weights = weights.to_int8() if int8 else weights
        moved = torch.empty(v_cache.numel() + offset, dtype=dtype)[offset:].view(v_cache.shape)
        return supports(weights, k_cache, moved)

    for shape in SHAPES[-3:]:
        assert taken(shape)
        assert not taken(shape, dtype=torch.float32) and not taken(shape, int8=True) and not taken(shape, offset=1)
    assert not any(taken(shape) for shape in SHAPES[:-3])
    num_layers, dim, *rest = SHAPES[-1]
    assert not taken((num_layers, dim + 128, *rest))


@pytest.mark.gpu
def test_hopper_kernels_are_chosen_by_the_model_alone(monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from kernels.decode_step import gluon_decode_step

    chosen = []
    original = gluon_decode_step.decode_step
    monkeypatch.setattr(gluon_decode_step, "decode_step", lambda *given: chosen.append(1) or original(*given))
    cases = [(SHAPES[-1], torch.bfloat16, 1), (SHAPES[-1], torch.float32, 0), (SHAPES[0], torch.bfloat16, 0)]
    for shape, dtype, count in cases:
        for batch in (1, 9):
            chosen.clear()
            kernels.decode_step(*arguments(shape, batch, dtype, "cuda"), norm_eps=EPS)
            assert len(chosen) == count
    chosen.clear()
    *tensors, weights = arguments(SHAPES[-1], 1, torch.bfloat16, "cuda")
    kernels.decode_step(*tensors, weights.to_int8(), norm_eps=EPS)
    assert not chosen
