"""Newton-Schulz rounds in plain torch, in the dtype of the matrices."""

import torch
from torch import Tensor

# Five rounds of this quintic bring the singular values of a matrix near 1 (Keller Jordan, "Muon", 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
SMALLEST_NORM = 1e-7


def orthogonalize(x: Tensor, scale: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return scale * (x.mT if tall else x).to(scale.dtype)
