"""The Hopper kernels: what the compiler makes of them, and, on a Hopper GPU, that they are right to the last row."""

import os
import pathlib
import re
import subprocess

import pytest
import torch

from kernels.flash_attention.reference import classic_attention, classic_backward

pytest.importorskip("triton.experimental.gluon")

NO_OPTIONS = {"window_size": 0, "softcap": 0.0}
# batch_size, num_heads, num_kv_heads, seqlen_q, seqlen_k
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 4, 2, 1000, 1000),
    (1, 4, 1, 113, 700),
    (1, 2, 2, 700, 113),  # causal: the first 587 queries see no key
    (3, 2, 2, 2049, 4097),
    (1, 2, 1, 4300, 4100),
    (1, 8, 8, 128, 64),
    (5, 16, 8, 600, 600),  # 200 tiles of keys: several for each program
]


def compile_gluon(kernel, signature, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = GluonASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def tile_type(rows, head_dim):
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for([rows, head_dim], gl.bfloat16)
    return f"tensordesc<bf16[1, 1, {rows}, {head_dim}],{layout!r}>"


def disassemble(compiled, folder):
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [os.fspath(tool), "--dump-sass", os.fspath(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loops(sass):
    """The innermost loops that multiply matrices, each as its list of instructions."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = []
    for last, text in lines:
        jump = re.match(r"@!?U?P\d BRA 0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < last:
            instructions = [text for at, text in lines if int(jump[1], 16) <= at <= last]
            if any("HGMMA" in text for text in instructions):
                loops.append((int(jump[1], 16), last, instructions))
    return [
        instructions
        for first, last, instructions in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b, _ in loops)
    ]


def check_hopper_instructions(compiled, folder):
    """TMA, wgmma, registers moved between the warps; returns the disassembly."""
    ptx = compiled.asm["ptx"]
    for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg.dec", "setmaxnreg.inc"):
        assert instruction in ptx
    sass = disassemble(compiled, folder)
    # A compiler that cannot follow the registers of an asynchronous product waits after every single one.
    assert sass.count("WARPGROUP.DEPBAR") * 4 < sass.count("HGMMA")
    assert compiled.metadata.shared <= 227 * 1024
    return sass


@pytest.mark.parametrize("tiles", ["TILES", "SHORT_TILES"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward_compiles_for_hopper_and_neither_spills_nor_permutes_in_its_loop(head_dim, causal, tiles, tmp_path):
    from kernels.flash_attention import gluon_forward

    tile = getattr(gluon_forward, tiles)[head_dim, causal]
    types = dict.fromkeys(gluon_forward.forward_kernel.arg_names[6:13], "i32")
    types |= {"q_desc": tile_type(64, head_dim), "out_desc": tile_type(64, head_dim)}
    types |= {"k_desc": tile_type(tile.block_n, head_dim), "v_desc": tile_type(tile.block_n, head_dim)}
    types |= {"lse_ptr": "*fp32", "scale_log2": "fp32"}
    constants = {"CONSUMERS": tile.consumers, "STAGES": tile.stages}
    constants |= {"CAUSAL": causal, "REGISTERS": tile.registers}
    compiled = compile_gluon(gluon_forward.forward_kernel, types, constants)
    loops = main_loops(check_hopper_instructions(compiled, tmp_path))
    assert len(loops) == tile.consumers
    for instructions in loops:
        assert not any(re.search(r"\b(LDL|STL|PRMT)\b", text) for text in instructions)


def random_inputs(batch_size, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, dtype):
    """q with its heads after its positions in memory, so that strides are what a model's projections give."""
    q = torch.randn(batch_size, seqlen_q, num_heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, batch_size, num_kv_heads, seqlen_k, head_dim, device="cuda", dtype=dtype)
    return q, k, v


def error(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_right_as_plain_torch(shape, head_dim, causal, dtype):
    from kernels.flash_attention import gluon_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    q, k, v = random_inputs(*shape, head_dim, dtype)
    scale = head_dim**-0.5
    out, lse = gluon_forward.forward(q, k, v, scale, causal, **NO_OPTIONS)
    exact, exact_lse = classic_attention(q.double(), k.double(), v.double(), causal=causal, return_lse=True)
    plain = classic_attention(q, k, v, causal=causal)
    assert error(out, exact) <= 2 * error(plain, exact) + torch.finfo(dtype).eps / 2
    seen = ~torch.isinf(exact_lse)
    assert torch.equal(torch.isinf(lse), ~seen)
    assert ((lse - exact_lse)[seen].abs() < 1e-4).all()
    assert (out.transpose(1, 2)[~seen.transpose(1, 2)] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_compiles_for_hopper(head_dim, causal, tmp_path):
    from kernels.flash_attention import gluon_backward

    tile = gluon_backward.TILES[head_dim, causal]
    types = dict.fromkeys(gluon_backward.backward_kernel.arg_names[10:18], "i32")
    types |= {"q_desc": tile_type(tile.block_m, head_dim), "dout_desc": tile_type(tile.block_m, head_dim)}
    types |= {name: tile_type(64, head_dim) for name in ("k_desc", "v_desc", "dk_desc", "dv_desc")}
    types |= {
        "row_desc": f"tensordesc<fp32[{2 * tile.block_m}],{gluon_backward.ROW_LAYOUT!r}>",
        "dq_desc": f"tensordesc<fp32[1, 64, 64],{gluon_backward.SQUARE_LAYOUT!r}>",
    }
    types |= {"turn_ptr": "*i32", "softmax_scale": "fp32"}
    constants = {"STAGES": tile.stages, "CAUSAL": causal, "ROUND": not causal}
    constants |= {"REGISTERS": tile.registers}
    compiled = compile_gluon(gluon_backward.backward_kernel, types, constants)
    check_hopper_instructions(compiled, tmp_path)
    assert "cp.reduce.async.bulk.tensor" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_as_right_as_plain_torch_and_always_the_same(shape, head_dim, causal, dtype):
    from kernels.flash_attention import gluon_backward, gluon_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    q, k, v = random_inputs(*shape, head_dim, dtype)
    scale = head_dim**-0.5
    out, lse = gluon_forward.forward(q, k, v, scale, causal, **NO_OPTIONS)
    dout, dlse = torch.randn_like(q), torch.randn_like(lse)
    gradients = gluon_backward.backward(dout, dlse, q, k, v, out, lse, scale, causal, **NO_OPTIONS)
    exact = classic_backward(*(x.double() for x in (dout, dlse, q, k, v)), causal=causal)
    plain = classic_backward(dout, dlse, q, k, v, causal=causal)
    for ours, theirs, truth in zip(gradients, plain, exact, strict=True):
        assert error(ours, truth) <= 2 * error(theirs, truth) + torch.finfo(dtype).eps / 2
    for _ in range(20):
        again = gluon_backward.backward(dout, dlse, q, k, v, out, lse, scale, causal, **NO_OPTIONS)
        assert all(torch.equal(x, y) for x, y in zip(again, gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 96}, "head_dim"),
        ({"window_size": 5}, "window_size"),
        ({"softcap": 30.0}, "softcap"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
        ({"offset": 1}, "16-byte"),
    ],
)
def test_refuses_by_name_what_it_does_not_know(change, reason):
    from kernels.flash_attention import gluon_forward

    head_dim, dtype = change.get("head_dim", 64), change.get("dtype", torch.bfloat16)
    x = torch.zeros(2 * 3 * 8 * head_dim + 8, dtype=dtype)[change.get("offset", 0) :]
    x = x[: 2 * 3 * 8 * head_dim].view(2, 3, 8, head_dim)
    options = {"softmax_scale": 0.1, "causal": True, **NO_OPTIONS}
    options |= {name: value for name, value in change.items() if name in options}
    assert reason in gluon_forward.supports(x, x, x, **options)


def test_leaves_small_work_to_the_portable_kernel():
    from kernels.flash_attention import gluon_forward

    options = {"softmax_scale": 0.1, "causal": True, **NO_OPTIONS}
    small, large = (torch.empty(1, 4, seqlen, 64, dtype=torch.bfloat16) for seqlen in (64, 4096))
    assert "portable" in gluon_forward.supports(small, small, small, **options)
    assert gluon_forward.supports(large, large, large, **options) is None
