"""Several processes that train one model: what `torchrun` started, or just this one.

Every process takes an equal share of each batch; gradients are added up over all of them. The batch as a whole, and so
the loss curve, is that of one process, but for rounding. Every process has the whole model, or, where it is sharded
(FSDP2, Zhao et al., arXiv:2304.11277), a slice of each weight, its gradient and its optimizer state.

Knows torch.distributed; knows nothing of models or files.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

_PATIENCE = datetime.timedelta(days=2)  # NCCL's own ten minutes are less than a large text takes to be tokenised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes of a run, seen from one of them; `rank` 0 writes the files."""

    rank: int = 0
    count: int = 1

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all workers in the place of each tensor; all go in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true for any worker; waits for all of them."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag), device=device)
        torch.distributed.all_reduce(flags)
        return bool(flags.item() > 0)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others do, who wait for it as long as a corpus may take."""
        if self.count == 1:
            yield
            return
        patient = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        if self.rank > 0:
            torch.distributed.barrier(patient)
        yield
        if self.rank == 0:
            torch.distributed.barrier(patient)


ALONE = Workers()


def silent(line: str) -> None:
    """What the workers behind the first one say."""


def shard(model: nn.Module, layers: Sequence[nn.Module], forward_method: str) -> None:
    """Leave each worker a slice of every weight; a layer's weights are gathered while it computes.

    forward_method  what is called of the model in place of `forward`; behind it, until the backward pass, the weights
                    that belong to no layer are whole
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    for module in (*layers, model):
        fully_shard(module)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # the loss is a part of the whole batch's mean: gradients add up
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
    register_fsdp_forward_method(model, forward_method)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each worker may have a slice; every worker has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sliced_like(tensor: Tensor, like: Any) -> Tensor:
    """What this worker holds of `tensor`, the same everywhere, if it is sliced as `like` is."""
    if not hasattr(like, "full_tensor") or tensor.dim() == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[tuple[Workers, torch.device]]:
    """The workers that torchrun's environment speaks of, connected by NCCL or gloo, and the device of this one.

    A process group that there is already is used, and left.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE, device
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    begun_here = not torch.distributed.is_initialized()
    if begun_here:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
        )
    try:
        yield Workers(rank=rank, count=count), device
    finally:
        if begun_here:
            torch.distributed.destroy_process_group()
