"""The Triton kernels of a layer in Triton's interpreter against autograd's fp64; run with TRITON_INTERPRET=1.

The interpreter has to be chosen before the kernels are imported, hence a process of its own.
"""

import torch

from kernels.layer import triton_layer
from tests.kernels.test_layer import CASES, EPS, differentiate, too_far_off


def add_norm(x, branch, key, weight, threshold):
    new_x, h = triton_layer.add_norm_forward(x, branch, key, weight, threshold, EPS)

    def backward(dnew_x, dh):
        dx, dbranch, dw = triton_layer.add_norm_backward(dnew_x, dh, new_x, key, weight, threshold, EPS)
        return dx, dx if key is None else dbranch, dw

    return (new_x, h), backward


def norm_rotary(qkv, q_norm, k_norm, cos, sin, num_heads, num_kv_heads):
    outs = triton_layer.norm_rotary_forward(qkv, q_norm, k_norm, cos, sin, num_heads, num_kv_heads, EPS)

    def backward(dq, dk, dv):
        dqkv, dw = triton_layer.norm_rotary_backward(dq, dk, dv, qkv, q_norm, k_norm, cos, sin, EPS)
        return dqkv, *dw

    return outs, backward


def swiglu(gate_up):
    return (triton_layer.swiglu_forward(gate_up),), lambda dout: (triton_layer.swiglu_backward(dout, gate_up),)


def cross_entropy(logits, targets):
    nats, lse = triton_layer.cross_entropy_forward(logits, targets)
    return (nats,), lambda dnats: (triton_layer.cross_entropy_backward(dnats, logits, targets, lse),)


for tile in (triton_layer.ADD_NORM_BACKWARD, triton_layer.NORM_ROTARY_BACKWARD):
    tile["programs"] = 3  # the interpreter takes one program after another, and each has several tiles to do
KERNELS = {"add_norm": add_norm, "norm_rotary": norm_rotary, "swiglu": swiglu, "cross_entropy": cross_entropy}
for name, make in CASES:
    for dtype in (torch.float32, torch.float16):
        inputs, gradients, exact, plain = differentiate(name, make, dtype, "cpu")
        outs, backward = KERNELS[name](*inputs)
        assert too_far_off((*outs, *backward(*gradients)), exact, plain, dtype) == [], (name, dtype)
    print(name, "equal")

logits = torch.randn(4, 9)
nats, _ = triton_layer.cross_entropy_forward(logits, torch.tensor([-1, 0, 8, 9]))
assert nats.isnan().tolist() == [True, False, False, True]
