"""Newton-Schulz rounds on a GPU: three batches of matrix products a round, each one launch.

    G = X X^T        P = c G G + b G        X' = P X + a X

G and P are symmetric: the tiles above the diagonal are those below it, transposed. The first round's G and X' are
scaled by what normalises X, the last X' by what the caller asks for.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launched
from kernels.orthogonalize.reference import COEFFICIENTS, ROUNDS, SMALLEST_NORM

# Six layers of width 384 (24 matrices of 384 x 384, 12 of 1024 x 384, 6 of 384 x 1024) take 300 us on an H200, a shape
# a stream, and 518 in torch; one shape after the other 540, and 646 in torch.
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def product_kernel(a, b, c, out, scales, alpha, beta, rows, columns, inner, a_matrix, a_row, a_inner,
                   b_matrix, b_inner, b_column, c_matrix, c_row, c_column, out_matrix, out_row, out_column,
                   SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """out = scale (alpha a b + beta c) of each matrix; c and scales (matrices,) may be missing."""
    i, j, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if (j > i) & SYMMETRIC:
        return
    offs_m, offs_n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_tile = a + matrix * a_matrix + offs_m[:, None] * a_row + offs_k[None, :] * a_inner
    b_tile = b + matrix * b_matrix + offs_k[:, None] * b_inner + offs_n[None, :] * b_column
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        exists = offs_k < inner - start
        x = tl.load(a_tile, mask=(offs_m < rows)[:, None] & exists[None, :], other=0.0)
        y = tl.load(b_tile, mask=exists[:, None] & (offs_n < columns)[None, :], other=0.0)
        total = tl.dot(x, y, total)
        a_tile += BLOCK_K * a_inner
        b_tile += BLOCK_K * b_inner
    mask = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    total *= alpha
    if c is not None:
        at = c + matrix * c_matrix + offs_m[:, None] * c_row + offs_n[None, :] * c_column
        total += beta * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        total *= tl.load(scales + matrix)
    total = total.to(out.dtype.element_ty)
    out += matrix * out_matrix
    tl.store(out + offs_m[:, None] * out_row + offs_n[None, :] * out_column, total, mask=mask)
    if (j < i) & SYMMETRIC:
        tl.store(out + offs_m[:, None] * out_column + offs_n[None, :] * out_row, total, mask=mask)


def _product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    scales: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    matrices, rows, columns = out.shape
    grid = (-(-rows // TILE["BLOCK_M"]), -(-columns // TILE["BLOCK_N"]), matrices)
    strides = (*a.stride(), *b.stride(), *(out if c is None else c).stride(), *out.stride())
    arguments: tuple[Any, ...] = (a, b, c, out, scales, alpha, beta, rows, columns, a.shape[2], *strides, symmetric)
    compiled = product_kernel[grid](*arguments, **TILE)
    launched(compiled, grid, (*arguments, *(TILE[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))))
    return out


def orthogonalize(x: Tensor, scale: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    matrices, rows, _ = x.shape
    inverse = 1 / torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32).clamp(min=SMALLEST_NORM)
    gram_scales, scales = [inverse.square()] + [None] * (ROUNDS - 1), [inverse] + [None] * (ROUNDS - 1)
    scales[-1] = scale.expand(matrices).contiguous()
    dtypes = [x.dtype] * (ROUNDS - 1) + [scale.dtype]
    gram, polynomial = x.new_empty((2, matrices, rows, rows))
    for gram_scale, x_scale, dtype in zip(gram_scales, scales, dtypes, strict=True):
        _product(x, x.mT, None, gram, scales=gram_scale, symmetric=True)
        _product(gram, gram, gram, polynomial, alpha=c, beta=b, symmetric=True)
        x = _product(polynomial, x, x, torch.empty_like(x, dtype=dtype), beta=a, scales=x_scale)
    return x.mT if tall else x
