"""Several processes that train one model: what `torchrun` started, or just this one.

Every process has the whole model and takes an equal share of each batch; gradients are added up over all of them. The
batch as a whole, and so the loss curve, is that of one process, but for rounding.

Knows torch.distributed; knows nothing of models or files.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from torch import Tensor


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
        """Rank 0 goes through the block before the others do."""
        if self.count > 1 and self.rank > 0:
            torch.distributed.barrier()
        yield
        if self.count > 1 and self.rank == 0:
            torch.distributed.barrier()


ALONE = Workers()


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[tuple[Workers, torch.device]]:
    """The workers that torchrun's environment speaks of, connected by NCCL or gloo, and the device of this one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE, device
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
    )
    try:
        yield Workers(rank=rank, count=count), device
    finally:
        torch.distributed.destroy_process_group()
