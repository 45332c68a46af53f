"""The Triton decode_step in Triton's interpreter against its definition; run as a program, with TRITON_INTERPRET=1.

The interpreter has to be chosen before the kernels are imported, hence a process of its own.
"""

import torch

from kernels.decode_step import triton_decode_step
from tests.kernels.test_decode_step import EPS, SHAPES, arguments, by_definition

# The longest shape takes the interpreter too long; batch 17 needs a second tile of sequences.
for shape, batch, int8 in ((SHAPES[0], 1, False), (SHAPES[1], 3, True), (SHAPES[0], 17, False), (SHAPES[3], 2, False)):
    given = arguments(shape, batch, torch.float32, "cpu")
    given = (*given[:-1], given[-1].to_int8()) if int8 else given
    exact, plain = (by_definition(*given, dtype) for dtype in (torch.float64, torch.float32))
    *tensors, weights = given
    logits = triton_decode_step.decode_step(*tensors, *weights, EPS)
    for ours, theirs, truth in zip((logits, *tensors[2:]), plain, exact, strict=True):
        written = ~truth.isnan()
        assert torch.equal(ours.isnan(), ~written)
        ours, theirs, truth = ours[written].double(), theirs[written], truth[written]
        # The interpreter multiplies tiles through numpy, whose order of additions is its own: 4 roundings are allowed.
        rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + rounding, (shape, batch)
    print(shape, batch, "equal")

# The tiles of one sequence and of several add in the same order.
token_ids, positions, k_cache, v_cache, weights = arguments(SHAPES[3], 2, torch.float32, "cpu")
alone = []
for row in range(2):
    caches = [cache[:, row : row + 1].clone() for cache in (k_cache, v_cache)]
    one = slice(row, row + 1)
    alone.append(triton_decode_step.decode_step(token_ids[one], positions[one], *caches, *weights, EPS))
together = triton_decode_step.decode_step(token_ids, positions, k_cache, v_cache, *weights, EPS)
assert torch.equal(together, torch.cat(alone))
print("alone and together equal")
