"""The ops between a decoder's matrix products, against their definitions differentiated in fp64."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.layer import reference
from tests.kernels.compile_ahead import compile_kernel, resources

ROOT = pathlib.Path(__file__).parents[2]
EPS = 1e-6


def add_norm_inputs(shape, threshold):
    key = torch.randint(1 << 62, (2,)) if threshold else None
    return [torch.randn(shape), torch.randn(shape), key, torch.rand(shape[-1]) + 0.5, threshold]


def norm_rotary_inputs(batch, seqlen, num_heads, num_kv_heads, head_dim, batch_of_angles=1):
    angles = 10 * torch.rand(batch_of_angles, seqlen, head_dim // 2)
    qkv = torch.randn(batch, seqlen, (num_heads + 2 * num_kv_heads) * head_dim)
    norms = torch.rand(2, head_dim) + 0.5
    return [qkv, *norms, angles.cos(), angles.sin(), num_heads, num_kv_heads]


def cross_entropy_inputs(shape, vocab_size):
    return [torch.randn(*shape, vocab_size), torch.randint(vocab_size, shape)]


CASES = [
    ("add_norm", lambda: add_norm_inputs((2, 37, 48), 51)),
    ("add_norm", lambda: add_norm_inputs((3, 5, 130), 0)),
    ("add_norm", lambda: add_norm_inputs((1, 1, 7), 255)),
    ("add_norm", lambda: add_norm_inputs((3, 700), 51)),
    ("norm_rotary", lambda: norm_rotary_inputs(2, 5, 6, 6, 64)),
    ("norm_rotary", lambda: norm_rotary_inputs(3, 37, 4, 2, 32, batch_of_angles=3)),
    ("norm_rotary", lambda: norm_rotary_inputs(1, 17, 3, 1, 10)),
    ("swiglu", lambda: [torch.randn(3, 7, 2 * 43)]),
    ("swiglu", lambda: [torch.randn(1, 2)]),
    ("cross_entropy", lambda: cross_entropy_inputs((3, 37), 256)),
    ("cross_entropy", lambda: cross_entropy_inputs((2, 3), 10_001)),
    ("cross_entropy", lambda: cross_entropy_inputs((1,), 33)),
]
WITH_EPS = ("add_norm", "norm_rotary")
NAMES = [f"{name}{number}" for number, (name, _) in enumerate(CASES)]


def differentiate(name, make, dtype, device):
    """Inputs and gradients of the outputs in dtype; outputs and gradients in fp64 and by plain torch in dtype.

    What is scaled or turned by stays in fp32, as in training under autocast.
    """
    torch.manual_seed(0)
    first = make()
    cast = 2 if name == "add_norm" else 1
    inputs = [
        x.to(device, dtype if i < cast else None) if isinstance(x, torch.Tensor) else x for i, x in enumerate(first)
    ]
    options = {"eps": EPS} if name in WITH_EPS else {}
    differentiable = {"add_norm": (0, 1, 3), "norm_rotary": (0, 1, 2)}.get(name, (0,))

    def run(precision):
        values = [
            x.to(precision or x.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
        ]
        for i in differentiable:
            values[i] = values[i].detach().requires_grad_()
        outs = getattr(reference, name)(*values, **options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return outs, [values[i] for i in differentiable]

    outs, leaves = run(torch.float64)
    result = torch.float32 if name == "cross_entropy" else dtype
    gradients = [torch.randn(x.shape, dtype=torch.float64).to(device, result) for x in outs]
    exact = (*outs, *torch.autograd.grad(outs, leaves, [g.double() for g in gradients]))
    outs, leaves = run(None)
    plain = (*outs, *torch.autograd.grad(outs, leaves, gradients))
    return inputs, gradients, exact, plain


def too_far_off(ours, exact, plain, dtype) -> list[tuple[int, float, float]]:
    """Which of ours err by more than twice plain torch's error, plus one rounding: number, error, bound."""

    def error(x, truth):
        return (x.double() - truth).norm() / truth.norm().clamp(min=1e-30)

    bounds = [2 * error(x, truth) + torch.finfo(dtype).eps / 2 for x, truth in zip(plain, exact, strict=True)]
    errors = [error(x, truth) for x, truth in zip(ours, exact, strict=True)]
    pairs = enumerate(zip(errors, bounds, strict=True))
    return [(number, float(error), float(bound)) for number, (error, bound) in pairs if not error <= bound]


def call(name, inputs):
    if name == "add_norm":
        *tensors, threshold = inputs
        return kernels.add_norm(*tensors, threshold=threshold, eps=EPS)
    if name == "norm_rotary":
        *tensors, num_heads, num_kv_heads = inputs
        return kernels.norm_rotary(*tensors, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=EPS)
    return (getattr(kernels, name)(*inputs),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "make"), CASES, ids=NAMES)
def test_equals_the_definition(name, make, dtype, device):
    inputs, gradients, exact, plain = differentiate(name, make, dtype, device)
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    leaves = leaves[: len(exact) - len(gradients)]
    for other in ((0, 0), (-min(2, gradients[0].dim()), -1), (0, -1)):  # gradients of other strides
        outs = call(name, inputs)
        strided = [g.transpose(*other).contiguous().transpose(*other) for g in gradients]
        ours = (*outs, *torch.autograd.grad(outs, leaves, strided))
        assert too_far_off(ours, exact, plain, dtype) == []


def test_a_target_outside_the_vocabulary_is_no_loss(device):
    logits, targets = torch.randn(4, 9, device=device), torch.tensor([-1, 0, 8, 9], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"Target -?[19] is out of bounds"):
            kernels.cross_entropy(logits, targets)
    else:
        assert kernels.cross_entropy(logits, targets).isnan().tolist() == [True, False, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "make"), CASES, ids=NAMES)
def test_compiles_into_one_graph(name, make):
    """And gives the same bits, twice."""
    torch.compiler.reset()  # which compiles no function for more than eight kinds of arguments
    inputs, gradients, _, _ = differentiate(name, make, torch.bfloat16, "cuda")
    inputs[0].requires_grad_()

    def run(function):
        outs = function(name, inputs)
        return (*outs, *torch.autograd.grad(outs, inputs[0], gradients))

    once = run(call)
    for function in (call, torch.compile(call, fullgraph=True)):
        assert all(torch.equal(x, y) for x, y in zip(run(function), once, strict=True))


@pytest.mark.gpu
def test_ops_pass_opcheck():
    for name, make in CASES:
        inputs, *_ = differentiate(name, make, torch.float32, "cuda")
        inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
        kernels.load("cuda")
        options = (EPS,) if name in WITH_EPS else ()
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        cos_and_sin = slice(3, 5) if name == "norm_rotary" else slice(0)
        for x in inputs[cos_and_sin]:
            x.requires_grad_(False)
        torch.library.opcheck(getattr(torch.ops.kernels, name).default, (*inputs, *options), test_utils=checks)


def test_interpreted():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.interpret_layer"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == len(CASES)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_ahead_nothing_spills(capability):
    pytest.importorskip("triton")
    from kernels.layer import triton_layer as layer

    types = dict.fromkeys(("weight", "dw", "q_norm", "k_norm", "cos", "sin", "nats", "dnats", "lse"), "*fp32")
    types |= dict.fromkeys(("parts", "sums"), "*fp32")
    types |= {"key": "*i64", "targets": "*i64", "scale": "fp32", "eps": "fp32"}
    types |= dict.fromkeys(("rows", "threshold", "tokens", "seqlen", "num_angles"), "i32")
    types |= {f"{x}_{stride}": "i32" for x in "qkv" for stride in ("batch", "token", "head")}
    add_norm = {"DROP": True, "WIDTH": 384, "BLOCK": 512}
    norm_rotary = {"HQ": 6, "HK": 6, "HALF": 32, "BLOCK": 32}
    wide = {**layer.ADD_NORM_BACKWARD, "num_warps": 8}
    vocabulary = {"WIDTH": 256, "BLOCK": 256, "ROWS": 16}
    for kernel, constants, tile in (
        (layer.add_norm_forward_kernel, add_norm, layer.ADD_NORM),
        (layer.add_norm_backward_kernel, {"DROP": True, "WIDTH": 384, "PARTS": 2}, layer.ADD_NORM_BACKWARD),
        (layer.add_norm_backward_kernel, {"DROP": True, "WIDTH": 2048, "PARTS": 8}, wide),
        (layer.column_sums_kernel, {"WIDTH": 384}, layer.COLUMN_SUMS),
        (layer.norm_rotary_forward_kernel, norm_rotary, layer.NORM_ROTARY),
        (layer.norm_rotary_backward_kernel, norm_rotary, layer.NORM_ROTARY_BACKWARD),
        (layer.swiglu_forward_kernel, {"WIDTH": 1024}, layer.SWIGLU),
        (layer.swiglu_backward_kernel, {"WIDTH": 1024}, layer.SWIGLU),
        (layer.cross_entropy_forward_kernel, vocabulary, layer.CROSS_ENTROPY),
        (layer.cross_entropy_backward_kernel, vocabulary, layer.CROSS_ENTROPY),
    ):
        given = constants | {name: tile[name] for name in ("ROWS", "BLOCK", "PART") if name in tile}
        signature = {name: types.get(name, "*bf16") for name in kernel.arg_names if name not in given}
        aligned = [i for i, name in enumerate(kernel.arg_names) if signature.get(name, "fp32") != "fp32"]
        compiled = compile_kernel(
            kernel, signature, given, capability=capability, aligned=aligned, num_warps=tile["num_warps"]
        )
        assert resources(compiled).spilled_bytes == 0, kernel
        assert "ld.global.v4" in compiled.asm["ptx"], "sixteen bytes at a time"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernels.swiglu(x[..., :3]), "gate_up: got 3 columns, needs an even number"),
        (lambda x: kernels.swiglu(x.long()), "gate_up: got torch.int64, allowed are float32"),
        (lambda x: kernels.cross_entropy(x, x[..., 0]), "targets: got torch.float32 of shape .*, needs torch.int64 of"),
        (lambda x: kernels.cross_entropy(x, x[0].long()), r"targets: .* of shape \(3, 4\), needs .* shape \(2, 3"),
        (lambda x: kernels.add_norm(x, x[0], None, x[0, 0], eps=EPS), r"branch: got shape \(3, 4\), x has \(2, 3, 4\)"),
        (lambda x: kernels.add_norm(x, x.half(), None, x[0, 0], eps=EPS), "branch: got torch.float16, x is"),
        (lambda x: kernels.add_norm(x, x, x, x[0, 0], eps=EPS), "key: got torch.float32 of shape .*, needs int64"),
        (lambda x: kernels.add_norm(x, x, None, x[0, 0, :3], eps=EPS), r"weight: got shape \(3,\), needs \(4,\)"),
        (lambda x: kernels.add_norm(x, x, None, x[0, 0], threshold=256, eps=EPS), "threshold: got 256, needs 0 to 255"),
        (lambda x: rotary(x, x[0, 0], x[0]), r"qkv: got shape \(2, 3, 4\), needs \(batch, seqlen, \(1 \+ 2 "),
        (lambda x: rotary(x[..., :3], x[0, 0, :1], x[0]), r"cos: got shape \(3, 4\), needs \(1 or 2, 3, 0\)"),
    ],
)  # fmt: skip
def test_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4))


def rotary(qkv, norm, angles):
    return kernels.norm_rotary(qkv, norm, norm, angles, angles, num_heads=1, num_kv_heads=1, eps=EPS)
