"""Hopper's kernels of a decode step: what the compiler makes of them, and when they are chosen."""

import pytest
import torch

import kernels
from tests.kernels.compile_ahead import resources
from tests.kernels.test_decode_step import EPS, SHAPES, arguments
from tests.kernels.test_gluon import disassemble

pytest.importorskip("triton.experimental.gluon")

FLOATS = ("x_ptr", "parts_ptr", "new_x_ptr", "out_ptr", "cos_ptr", "sin_ptr")
NANOGPT = {"DIM": 384, "BLOCK": 512}
HEADS = {"num_heads": 6, "num_kv_heads": 6}


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


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("name", ["attend", "mlp", "logits"])
def test_weights_are_loaded_before_it_is_the_kernels_turn(name: str, sequences: int, tmp_path):
    from kernels.decode_step import gluon_decode_step

    constants = {"SEQUENCES": sequences, "PARTS": 6, **NANOGPT}
    constants |= {"attend": {"token_ptr": None, **HEADS}, "mlp": {"MLP_DIM": 1024, "WIDTH": 8}, "logits": {}}[name]
    compiled = compile_kernel(getattr(gluon_decode_step, name), constants)
    before, after = disassemble(compiled, tmp_path).split("ACQBULK")  # griddepcontrol.wait
    used = resources(compiled)
    assert used.spilled_bytes <= 32 and used.shared_bytes <= 227 * 1024
    assert before.count("LDSM") >= 24 and "HMMA" not in before  # the weights are where the matrix units take them from
    assert "HMMA" in after and "LDG.E.U16" not in after
    # What is still copied are keys beyond the first 512; what is still loaded are x and the parts.
    copies = 8 if name == "attend" else 0
    assert after.count("LDGSTS") == copies
    assert ("PREEXIT" in before) == (name != "logits")  # griddepcontrol.launch_dependents


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
