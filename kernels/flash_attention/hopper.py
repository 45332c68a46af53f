"""What the Hopper kernels share: tiles that travel from device memory through shared memory, and what they can run.

A `Ring` is the only way data moves between warps. It is a few buffers in shared memory, each with two mbarriers:

    one side     ring.fill(i, ...)    waits until buffer i % STAGES is empty, starts a TMA copy into it; or
                 ring.acquire(i)      waits likewise, returns the buffer to store into,
                 ring.publish(i)      and hands it on
    the other    ring.wait(i)         waits until tile i is there, returns the buffer
                 ring.release(i)      says that this warpgroup needs tile i no longer

`i` counts the tiles that have passed, from 0; a barrier's phase is the number of times round the ring, modulo 2. A TMA
copy fills what lies past the end of a sequence with zeros and does not write there.

Everything here needs compute capability 9.0: TMA and wgmma. Imported only where such a device is at hand.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from kernels.flash_attention import tiles
from kernels.flash_attention.op import NO_WINDOW

LOG2_E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # of one warpgroup's matrix product: wgmma has no other
HEAD_DIMS = (64, 128)
_GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@aggregate
class Ring:
    """Buffers data[STAGES, ...] in shared memory, and for each the barriers full[STAGES, 1] and empty[STAGES, 1]."""

    data: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, data, full, empty):
        self.data = data
        self.full = full
        self.empty = empty

    @gluon.jit
    def acquire(self, i):
        """Wait until the buffer of tile i is empty; returns it, to be written and then published."""
        STAGES: gl.constexpr = self.data.shape[0]
        mbarrier.wait(self.empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)
        return self.data.index(i % STAGES)

    @gluon.jit
    def publish(self, i):
        """What this warpgroup stored in tile i is there for other warps and for TMA to read."""
        STAGES: gl.constexpr = self.data.shape[0]
        fence_async_shared()
        mbarrier.arrive(self.full.index(i % STAGES), count=1)

    @gluon.jit
    def fill(self, i, tensor_desc, coord):
        """Start the copy of tile i from device memory, once its buffer is empty."""
        STAGES: gl.constexpr = self.data.shape[0]
        buffer = self.acquire(i)
        full = self.full.index(i % STAGES)
        mbarrier.expect(full, tensor_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(tensor_desc, coord, full, buffer)

    @gluon.jit
    def wait(self, i):
        """Wait for tile i; returns its buffer, to be read and then released."""
        STAGES: gl.constexpr = self.data.shape[0]
        mbarrier.wait(self.full.index(i % STAGES), (i // STAGES) & 1)
        return self.data.index(i % STAGES)

    @gluon.jit
    def release(self, i, pred=True):
        """This warpgroup needs tile i no longer (if pred)."""
        STAGES: gl.constexpr = self.data.shape[0]
        mbarrier.arrive(self.empty.index(i % STAGES), count=1, pred=pred)


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers whose phase ends after ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def new_ring(data, READERS: gl.constexpr):
    """An empty ring of the buffers data[STAGES, ...], each of which READERS warpgroups release."""
    return Ring(data, new_barriers(data.shape[0], 1), new_barriers(data.shape[0], READERS))


@gluon.jit
def new_tile_ring(tensor_desc, STAGES: gl.constexpr, READERS: gl.constexpr):
    """`new_ring` for the descriptor's tiles of [rows, head_dim]."""
    SHAPE: gl.constexpr = tensor_desc.block_shape[-2:]
    data = gl.allocate_shared_memory(tensor_desc.dtype, [STAGES, SHAPE[0], SHAPE[1]], tensor_desc.layout)
    return new_ring(data, READERS)


@functools.cache  # made anew, layouts would take most of the time of a launch
def tile_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile [rows, head_dim] lies in shared memory: swizzled as TMA and wgmma agree."""
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], _GLUON_DTYPES[dtype])


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """TMA's view of x (batch, num_heads, seqlen, head_dim): tiles of `rows` positions of one head."""
    return descriptor(x, [1, 1, rows, x.shape[-1]], tile_layout(rows, x.shape[-1], x.dtype))


def descriptor(x: Tensor, block_shape: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """TensorDescriptor(x, x.shape, x.stride(), block_shape, layout), without its checks, made at every launch:
    `refusal` has made them."""
    described = object.__new__(TensorDescriptor)
    described.base, described.shape, described.strides = x, x.shape, x.stride()
    described.block_shape, described.layout = block_shape, layout
    return described


def refusal(tensors: dict[str, Tensor], softmax_scale: float, window_size: int, softcap: float) -> str | None:
    """Why the Hopper kernels do not take these tensors (by name) and options, in a few words, or None if they do."""
    q = tensors["q"]
    if q.is_cuda and tiles.card(q.device) != "hopper":
        return "needs compute capability 9.0"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"takes head_dim {' and '.join(map(str, HEAD_DIMS))}, not {q.shape[-1]}"
    if window_size != NO_WINDOW:
        return "takes no window_size"
    if softcap > 0.0:
        return "takes no softcap"
    if softmax_scale <= 0.0:
        return "takes softmax_scale > 0 only"  # the row maximum is taken before the scores are scaled
    for name, x in tensors.items():
        if x.numel() == 0:
            return f"{name} is empty"
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
            return f"TMA needs {name} contiguous in head_dim and 16-byte aligned in every other dimension"
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return f"TMA needs {name} without expanded dimensions"
    return None
