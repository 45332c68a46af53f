"""What Muon makes of averaged gradients: the nearest half-orthogonal matrices, for many of one shape at once.

Fifteen products of matrices each; on a GPU a Triton kernel computes half of each symmetric product, and what is added
and scaled with it. On the CPU, and where there is no Triton, plain torch.

Knows torch and its own folder; knows nothing of optimizers.
"""

import torch
from torch import Tensor

from kernels.load import is_fused
from kernels.orthogonalize import reference

_library = torch.library.Library("kernels", "FRAGMENT")
_library.define("orthogonalize(Tensor x, Tensor scale) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def orthogonalize(x: Tensor, scale: Tensor) -> Tensor:
    """scale U V^T, about, in fp32, of each x = U S V^T: by five Newton-Schulz rounds in bf16.

    x      (matrices, rows, columns) bf16
    scale  () fp32

    Raises ValueError naming the argument, what it got and what it allows.
    """
    if x.dim() != 3 or x.dtype != torch.bfloat16:
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, needs bfloat16 (matrices, rows, columns)")
    if scale.dim() or scale.dtype != torch.float32:
        raise ValueError(f"scale: got {scale.dtype} of shape {tuple(scale.shape)}, needs one float32")
    if x.is_cuda and is_fused("cuda"):
        return torch.ops.kernels.orthogonalize(x.contiguous(), scale)
    return reference.orthogonalize(x, scale)


torch.library.register_fake(
    "kernels::orthogonalize", lambda x, scale: torch.empty_like(x, dtype=torch.float32), lib=_library
)


def bind_reference(library: torch.library.Library) -> None:
    """Nothing to register: where the kernel is not bound, the public function calls the reference itself."""


def bind_cuda(library: torch.library.Library) -> None:
    """Register the Triton launcher; Triton is imported here, where a CUDA kernel is first needed."""
    from kernels.orthogonalize import triton_orthogonalize

    library.impl("orthogonalize", triton_orthogonalize.orthogonalize)
