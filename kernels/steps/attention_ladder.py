"""The steps of the attention ladder, what was expected of each before it was measured, and why.

Predictions are for the headline sizes, forward and causal: on a GPU batch 4, 16 heads of 128, 4096 tokens, bf16 (an
H200 copies 4.3 TB/s, multiplies bf16 matrices at 0.75 PFLOP/s and fp32 numbers at 67 TFLOP/s); on a CPU batch 1, 8
heads of 64, 1024 tokens, fp32.

All steps take q, k and v (batch, num_heads, seqlen, head_dim) of one shape, contiguous; the last step alone takes
anything.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.steps import Compilation, Step, attention_cpu

HEAD_DIMS = (16, 32, 64, 128)
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HOPPER = (9, 0)
MAX_PAIRS = 65535  # heads of all sequences: the second and third dimension of a grid are not longer


def steps(device: torch.device) -> Sequence[Step]:
    """The seven steps of a GPU, or the six of a CPU."""
    return _gpu_steps() if device.type == "cuda" else _cpu_steps()


def checked(function: Callable[..., Any], dtypes: Sequence[torch.dtype] = GPU_DTYPES) -> Callable[..., Any]:
    """The same function; raises ValueError for what the steps do not take."""

    @functools.wraps(function)
    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Any:
        if q.dim() != 4 or q.shape[-1] not in HEAD_DIMS:
            allowed = ", ".join(map(str, HEAD_DIMS))
            raise ValueError(f"q: got {tuple(q.shape)}, needs (batch, num_heads, seqlen, head_dim of {allowed})")
        if not 1 <= q.shape[0] * q.shape[1] <= MAX_PAIRS or q.shape[2] < 1:
            raise ValueError(f"q: got {tuple(q.shape)}, needs 1 to {MAX_PAIRS} heads in all, and a token or more")
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.shape != q.shape or not x.is_contiguous():
                raise ValueError(f"{name}: got {tuple(x.shape)}, strides {x.stride()}, needs q's shape, contiguous")
            if x.dtype not in dtypes or x.dtype != q.dtype:
                allowed = ", ".join(str(dtype)[6:] for dtype in dtypes)
                raise ValueError(f"{name}: got {x.dtype}, needs q's dtype, one of {allowed}")
        return function(q, k, v, causal)

    return run


def _gpu_steps() -> Sequence[Step]:
    """Triton is imported here, where the steps of a GPU are asked for."""
    from kernels.steps import (
        attention_1_classic,
        attention_2_fused,
        attention_3_online,
        attention_4_tensor_cores,
        attention_5_fewer_flops,
        attention_6_causal,
        attention_7_hopper,
    )

    return (
        Step(
            number=1,
            name="classic",
            idea="Three launches: S = Q K^T, P = softmax(S), O = P V, with S and P in memory.",
            predicted_gain=None,
            why="where the ladder starts.",
            run=checked(attention_1_classic.attention),
            bytes_moved=lambda b, h, s, d: b * h * (4 * 4.0 * s * s + _transposed_first(s, d)),
            flops=lambda b, h, s, d: b * h * 4.0 * s * s * d,
            kernels=lambda: [
                _compilation(attention_1_classic.scores, attention_1_classic),
                _compilation(attention_1_classic.softmax, attention_1_classic, BLOCK=4096),
                _compilation(attention_1_classic.values, attention_1_classic),
            ],
        ),
        Step(
            number=2,
            name="tiled and fused",
            idea="One launch: a program owns some queries, and computes S a tile at a time, three times over.",
            predicted_gain=0.6,
            why="17 GB less to move (4 ms), but twice the operations (16 ms more, at half of 67 TFLOP/s).",
            run=checked(attention_2_fused.attention),
            bytes_moved=lambda b, h, s, d: b * h * _transposed_first(s, d),
            flops=lambda b, h, s, d: b * h * 8.0 * s * s * d,
            kernels=lambda: [_compilation(attention_2_fused.attend, attention_2_fused)],
        ),
        Step(
            number=3,
            name="online softmax",
            idea="Keep a running maximum and sum, and rescale O when they change: one pass over K and V.",
            predicted_gain=2.0,
            why="S once in place of three times: half of the operations.",
            run=checked(attention_3_online.attention),
            bytes_moved=lambda b, h, s, d: b * h * _transposed_first(s, d),
            flops=lambda b, h, s, d: b * h * 4.0 * s * s * d,
            kernels=lambda: [_compilation(attention_3_online.attend, attention_3_online)],
        ),
        Step(
            number=4,
            name="tensor cores",
            idea="Multiply tiles of bf16 in the matrix unit, with sums in fp32.",
            predicted_gain=8.0,
            why="A ceiling 11 times as high, but a third of it in place of a half: nothing runs beside anything else.",
            run=checked(attention_4_tensor_cores.attention),
            bytes_moved=lambda b, h, s, d: b * h * _tensors(s, d),
            flops=lambda b, h, s, d: b * h * 4.0 * s * s * d,
            kernels=lambda: [_compilation(attention_4_tensor_cores.attend, attention_4_tensor_cores)],
        ),
        Step(
            number=5,
            name="fewer other operations",
            idea="Divide once at the end, exponentials as powers of two, lse in place of maximum and sum.",
            predicted_gain=1.2,
            why="A billion scores with ten instructions less each, at 30 T instructions a second: 0.4 ms of 2.",
            run=_out_of(checked(attention_5_fewer_flops.attention)),
            bytes_moved=lambda b, h, s, d: b * h * (_tensors(s, d) + 4.0 * s),
            flops=lambda b, h, s, d: b * h * 4.0 * s * s * d,
            kernels=lambda: [_compilation(attention_5_fewer_flops.attend, attention_5_fewer_flops)],
        ),
        Step(
            number=6,
            name="skip, size, pipeline",
            idea="Skip the tiles that a causal mask hides, take larger tiles, and load the next ones early.",
            predicted_gain=2.5,
            why="Half of the operations, and a quarter more from loads that no longer stop the products.",
            run=_out_of(checked(attention_6_causal.attention)),
            bytes_moved=lambda b, h, s, d: b * h * (_tensors(s, d) + 4.0 * s),
            flops=lambda b, h, s, d: b * h * 2.0 * s * (s + 128) * d,  # the diagonal's tiles wholly: 128 queries wide
            kernels=_causal_kernels,
        ),
        Step(
            number=7,
            name="Hopper's own (kernels.flash_attention)",
            idea="Let units work on their own: TMA fetches, wgmma multiplies, warps take one role each.",
            predicted_gain=1.5,
            why="Softmax beside the products, not after them: from half of the ceiling to three quarters.",
            run=functools.partial(attention_7_hopper.flash_attention, causal=True),
            bytes_moved=lambda b, h, s, d: b * h * (_tensors(s, d) + 4.0 * s),
            flops=lambda b, h, s, d: b * h * 2.0 * s * (s + 128) * d,
            needs=_why_not_hopper,
            kernels=_hopper_kernels,
        ),
    )


def _tensors(seqlen: int, head_dim: int) -> float:
    """Bytes of one head's q, k, v and out in bf16, each once. What is read again comes from the L2 cache."""
    return 4 * 2.0 * seqlen * head_dim


def _transposed_first(seqlen: int, head_dim: int) -> float:
    """The same, and q and k each read and written once more."""
    return 2 * _tensors(seqlen, head_dim)


def _out_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The same, without lse."""
    return lambda q, k, v, causal=True: function(q, k, v, causal)[0]


def _why_not_hopper(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == HOPPER:
        return None
    return f"needs compute capability 9.0, this card has {capability[0]}.{capability[1]}; there step 6 is what ships"


_TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16:16"),
    **dict.fromkeys(("s_ptr", "p_ptr", "lse_ptr"), "*fp32:16"),
    **dict.fromkeys(("softmax_scale", "scale_log2"), "fp32"),
    "seqlen": "i32:16",
}


def _compilation(kernel: Any, module: Any, **others: int) -> Compilation:
    """At the headline size, with the module's own tile."""
    constants = {"CAUSAL": True, "HEAD_DIM": 128, "BLOCK_M": module.BLOCK_M, "BLOCK_N": module.BLOCK_N}
    constants |= {name: getattr(module, name) for name in ("SLICE_D", "SLICE_N") if hasattr(module, name)} | others
    types = {name: _TYPES[name] for name in kernel.arg_names if name in _TYPES}
    constants = {name: constants[name] for name in kernel.arg_names if name not in types}
    return Compilation(kernel=kernel, types=types, constants=constants, num_warps=module.NUM_WARPS, num_stages=1)


def _causal_kernels() -> Sequence[Compilation]:
    """With the tile of an H200."""
    from kernels.flash_attention.tiles import FORWARD, table_tile
    from kernels.steps.attention_6_causal import attend

    tile = table_tile(FORWARD, "hopper", 128, torch.bfloat16, True)
    constants = {"CAUSAL": True, "HEAD_DIM": 128, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    types = {name: _TYPES[name] for name in attend.arg_names if name in _TYPES}
    return [Compilation(kernel=attend, types=types, constants=constants, num_warps=tile.warps, num_stages=tile.stages)]


def _hopper_kernels() -> Sequence[Compilation]:
    from triton.experimental.gluon import language as gl

    from kernels.flash_attention import gluon_forward

    tile = gluon_forward.TILES[128, True]
    kernel = gluon_forward.forward_kernel
    types = {"lse_ptr": "*fp32", "scale_log2": "fp32"}
    for name, rows in (("q", 64), ("k", tile.block_n), ("v", tile.block_n), ("out", 64)):
        layout = gl.NVMMASharedLayout.get_default_for([rows, 128], gl.bfloat16)
        types[f"{name}_desc"] = f"tensordesc<bf16[1, 1, {rows}, 128],{layout!r}>"
    constants = {"CONSUMERS": tile.consumers, "STAGES": tile.stages, "CAUSAL": True, "REGISTERS": tile.registers}
    types |= dict.fromkeys(set(kernel.arg_names) - set(types) - set(constants), "i32")
    return [Compilation(kernel=kernel, types=types, constants=constants, num_warps=4, capability=HOPPER)]


def _cpu_steps() -> Sequence[Step]:
    def run(name: str) -> Callable[..., Tensor]:
        return checked(functools.partial(attention_cpu.attention, name), (torch.float32,))

    def bytes_moved(b: int, h: int, s: int, d: int) -> float:
        return b * h * 4 * 4.0 * s * d

    def flops(b: int, h: int, s: int, d: int) -> float:
        return b * h * 2.0 * s * (s + 1) * d  # a loop on a CPU simply ends at the diagonal

    return (
        Step(
            number=1,
            name="classic",
            idea="Three loops: S = Q K^T, P = softmax(S), O = P V, with S and P in memory.",
            predicted_gain=None,
            why="where the ladder starts.",
            run=run("classic"),
            bytes_moved=lambda b, h, s, d: bytes_moved(b, h, s, d) + b * h * 4 * 4.0 * s * (s + 1) / 2,
            flops=flops,
            needs=attention_cpu.why_not,
        ),
        Step(
            number=2,
            name="tiled",
            idea="A block of queries at a time, so that its scores stay in the cache.",
            predicted_gain=1.0,
            why="67 MB less to move, some 10 ms; but multiplications one after the other take hundreds.",
            run=run("tiled"),
            bytes_moved=bytes_moved,
            flops=flops,
            needs=attention_cpu.why_not,
        ),
        Step(
            number=3,
            name="online softmax",
            idea="A running maximum and sum: one pass over K and V, and scores that are used at once.",
            predicted_gain=1.0,
            why="The same arithmetic. What it wins is that nothing on the chip grows with the length.",
            run=run("online"),
            bytes_moved=bytes_moved,
            flops=flops,
            needs=attention_cpu.why_not,
        ),
        Step(
            number=4,
            name="vectors",
            idea="Queries side by side in the lanes of a vector register.",
            predicted_gain=12.0,
            why="16 products in an instruction, exponentials too; but every one also loads, and some store.",
            run=run("vectors"),
            bytes_moved=bytes_moved,
            flops=flops,
            needs=attention_cpu.why_not,
        ),
        Step(
            number=5,
            name="threads",
            idea="Whichever core is free takes the next block of queries.",
            predicted_gain=2.0,
            why="Two cores, and nothing that one has to wait for.",
            run=run("threads"),
            bytes_moved=bytes_moved,
            flops=flops,
            needs=attention_cpu.why_not,
        ),
        Step(
            number=6,
            name="register-blocked (kernels.flash_attention)",
            idea="Products of small blocks in registers: each number that is loaded is used several times.",
            predicted_gain=2.5,
            why="Two multiply-adds a cycle in place of one load and some stores for each.",
            run=functools.partial(kernels.flash_attention, causal=True),
            bytes_moved=lambda b, h, s, d: bytes_moved(b, h, s, d) + b * h * 4.0 * s,
            flops=flops,
        ),
    )
