"""Triton kernels launched again, at a fraction of the time on the host.

Triton looks at every argument of every launch, to see whether the kernel has to be compiled anew: tens of microseconds
of Python, longer than many kernels take. A launch that differs from an earlier one only in the addresses of its tensors
needs none of that:

    if not again(key, tensors):
        compiled = kernel[grid](*tensors, *scalars, num_warps=..., num_stages=...)
        remember(key, compiled, grid, scalars)

`key` has to tell apart all that the kernel, its grid and its scalars depend on; `layout` is what the tensors add to it.

Knows no kernel.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

MAX_LAUNCHES = 4096  # remembered; more than that, of a program whose shapes never repeat, are forgotten together
_launches: dict[Hashable, tuple[Callable[..., None], tuple]] = {}


def layout(*tensors: Tensor | None) -> tuple:
    """All that a kernel and its scalar arguments can depend on of these tensors, short of what they hold."""
    return tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.get_device()) for x in tensors
    )


def again(key: Hashable, tensors: Sequence[Any]) -> bool:
    """Launch what was remembered under the key, on these tensors or descriptors of tensors; False if nothing was."""
    launch = _launches.get(key)
    if launch is None:
        return False
    run, scalars = launch
    run(*tensors, *scalars)
    return True


def remember(key: Hashable, compiled: Any, grid: tuple[int, ...], scalars: tuple) -> None:
    """Keep what a kernel's launch returned, with all its arguments, in order, that are not tensors."""
    if compiled is None:  # from Triton's interpreter
        return
    if len(_launches) >= MAX_LAUNCHES:
        _launches.clear()
    _launches[key] = (compiled[(*grid, 1, 1)[:3]], scalars)
