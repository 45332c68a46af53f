"""CUDA ops called again, at a fraction of the time on the host.

A launcher written in Python takes tens of microseconds to check, allocate and launch, longer than many kernels take.
What it does depends on the layout of its arguments alone, so it is watched once and then done again from C++, by
`launch.cpp`, whenever the op is called with arguments of the same layout:

    library = Replaying()                      # in place of torch.library.Library("kernels", "IMPL", "CUDA")
    library.impl("some_op", launcher)

    def launcher(x, scale):                    # all that it does to the GPU is
        out = torch.empty_like(x)              # to allocate memory, zeroed or not, and
        compiled = kernel[grid](x, out, scale, num_warps=4)
        launched(compiled, grid, (x, out, scale))   # to launch kernels, each of which it reports
        return out

The numbers in FREE are no part of the layout: a launcher may do no more with them than to hand them on to kernels, as
parameters of the same name. A launcher that does anything else to the GPU, a copy for example, or a launch that it does
not report, goes on running in Python: nothing has to be declared.

Knows Triton's compiled kernels and no kernel of this project.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ALLOCATE = {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}
_ALLOCATE_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_VIEW = {_aten.view.default, _aten.detach.default, _aten.select.int, _aten.slice.Tensor, _aten.transpose.int}
_NUMBER, _ADDRESS, _TENSOR_MAP, _ARGUMENT = range(4)  # launch.cpp's Kind
FREE = ("seed", "step")
_watching = threading.local()


class Replaying:
    """Registers CUDA kernels of this project's ops, which are replayed from C++ once they have been watched.

    Needs `launch.cpp` to be loaded.
    """

    def __init__(self) -> None:
        self.library = torch.library.Library("kernels", "FRAGMENT")

    def impl(self, name: str, launcher: Callable[..., Any]) -> None:
        """Register the launcher as `name`'s kernel."""

        def in_python(*arguments_and_watch: Any) -> Any:
            *arguments, watch = arguments_and_watch
            return Watch(arguments, free).run(launcher) if watch else launcher(*arguments)

        schema = getattr(torch.ops.kernels, name).default._schema
        free = {argument.name: i for i, argument in enumerate(schema.arguments) if argument.name in FREE}
        arguments, returns = str(schema).removeprefix(f"kernels::{name}(").split(") -> ")
        self.library.define(f"{name}_in_python({arguments}, bool watch) -> {returns}")
        self.library.impl(f"{name}_in_python", in_python, "CUDA")
        torch.ops.kernels.replay(name, f"{name}_in_python", list(free.values()))


class Watch(TorchDispatchMode):
    """What a launcher does with its arguments: the memory it asks for and the kernels it launches on it."""

    def __init__(self, arguments: Sequence[Any], free: dict[str, int]):
        super().__init__()
        self.slots: list[Any] = list(arguments)  # the allocations follow
        self.free = free  # indices of arguments by their names
        self.num_arguments = len(arguments)
        self.zeroed: list[int] = []
        self.launches: list[list[int]] = []  # that were reported
        self.num_launches = 0
        self.understood = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import all of torch.compile, for seconds, to keep it away from what it never sees."""
        return False

    def run(self, launcher: Callable[..., Any]) -> Any:
        """launcher(*arguments), and hand over to C++ what it did if that can be done again."""
        _watching.watch = self
        triton.knobs.runtime.launch_enter_hook.add(_count)
        try:
            with self:
                results = launcher(*self.slots)
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(_count)
            _watching.watch = None
        self.understood &= self.num_launches == len(self.launches)
        outputs = [self._slot(x) for x in (results if isinstance(results, tuple) else (results,))]
        if self.understood and all(slot >= self.num_arguments and offset == 0 for slot, offset in outputs):
            numbers = [len(self.launches), *(number for launch in self.launches for number in launch)]
            indices = [slot - self.num_arguments for slot, _ in outputs]
            torch.ops.kernels.record_plan(self.slots[self.num_arguments :], self.zeroed, indices, numbers)
        return results

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATE or func in _ALLOCATE_ZEROS:
            if func in _ALLOCATE_ZEROS:
                self.zeroed.append(len(self.slots) - self.num_arguments)
            self.slots.append(result)
        elif func not in _VIEW:
            self.understood = False
        return result

    def launch(self, compiled: Any, grid: tuple[int, ...], values: Sequence[Any]) -> None:
        metadata = compiled.metadata
        plain = metadata.num_ctas == 1 and not metadata.launch_cooperative_grid
        if not plain or metadata.global_scratch_size or metadata.profile_scratch_size:
            self.understood = False
            return
        maps = iter(metadata.tensordesc_meta or ())
        parameters = [
            parameter
            for (name, type_), value in zip(compiled.src.signature.items(), values, strict=True)
            if type_ != "constexpr"
            for parameter in self._parameters(name, type_, value, maps)
        ]
        sizes = (*grid, 1, 1)[:3]
        header = [compiled.function, *sizes, 32 * metadata.num_warps, metadata.shared, int(metadata.launch_pdl)]
        numbers = [number for parameter in parameters for number in parameter]
        self.launches.append([*header, len(parameters), *numbers])

    def _parameters(self, name: str, type_: str, value: Any, maps: Any) -> list[list[int]]:
        """The numbers of the parameter, or parameters, that one argument of a kernel becomes."""
        if type_.startswith("*"):
            return [[_ADDRESS, *self._slot(value)]]
        if type_.startswith("tensordesc"):
            slot, offset = self._slot(value.base)
            meta = next(maps)
            host_types = {8: 10, 9: 8, 10: 9}  # of an element, where Triton and CUDA's driver count differently
            element = [host_types.get(meta["elem_type"], meta["elem_type"]), meta["swizzle"], meta["elem_size"]]
            shape, strides = list(value.shape), list(value.strides)
            view = [_TENSOR_MAP, slot, offset, *element, len(shape), *meta["block_size"], *shape, *strides]
            return [view, *([_NUMBER, number] for number in shape + strides)]
        if type_ in ("fp32", "f32"):
            return [[_NUMBER, int.from_bytes(struct.pack("<f", value), "little")]]
        if name in self.free:
            self.understood &= value == self.slots[self.free[name]]
            return [[_ARGUMENT, self.free[name]]]
        if type_[0] in "iu":
            return [[_NUMBER, int(value)]]
        self.understood = False
        return []

    def _slot(self, x: Any) -> tuple[int, int]:
        """Where a tensor lies: the index of an argument or an allocation, and bytes from its first element."""
        for slot, candidate in enumerate(self.slots):
            if x is candidate:
                return slot, 0
        owners = [
            slot
            for slot, candidate in enumerate(self.slots)
            if isinstance(x, Tensor)
            and isinstance(candidate, Tensor)
            and x.untyped_storage().data_ptr() == candidate.untyped_storage().data_ptr()
        ]
        if len(owners) != 1:  # memory from elsewhere, or arguments that share theirs today
            self.understood = False
            return -1, 0
        return owners[0], x.data_ptr() - self.slots[owners[0]].data_ptr()


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before still runs, for whose end it then waits itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _count(_metadata: object) -> None:
    watch = getattr(_watching, "watch", None)
    if watch is not None:
        watch.num_launches += 1


def launched(compiled: Any, grid: tuple[int, ...], values: Sequence[Any]) -> None:
    """Report a launch: what `kernel[grid](*values, ...)` returned, its grid, and all its arguments in order."""
    watch = getattr(_watching, "watch", None)
    if watch is not None:
        watch.launch(compiled, grid, values)
