"""Top-K and sampling as torch sees them: schemas, argument checks and fakes, for every device alike.

    top_k     the k largest of each row, sorted       differentiable in the values
    sample    one token id per row of logits          no derivatives

The tensor's device picks the kernel: `cpu.cpp` registers itself, `bind_cuda` registers the Triton launchers, and
`bind_reference` registers plain torch. Every kernel is given arguments that were checked here.

Every parameter of `sample` is in the schema twice: as a number, which costs no tensor and no copy to the device, and
as an optional tensor with a value per row, which is read by the kernel alone and so may change under a CUDA graph.

Knows torch and its own folder; knows nothing of models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.load import ensure
from kernels.top_k import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INFINITY = float("inf")
MAX_VOCAB_SIZE = 2**20  # so that a row's weights, 2^40 each at most, add up below 2^61

_library = torch.library.Library("kernels", "FRAGMENT")
for _schema in (
    "top_k(Tensor x, int k) -> (Tensor, Tensor)",
    "sample(Tensor logits, float temperature, int top_k, float top_p, float min_p, SymInt seed, SymInt step, "
    "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? seeds, Tensor? steps, "
    "bool return_logprobs) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops = torch.ops.kernels


class Sampled(NamedTuple):
    """What `sample` returns with `return_logprobs`: three tensors (batch,)."""

    token_ids: Tensor  # int64
    raw_logprobs: Tensor  # fp32, of the logits as they came
    processed_logprobs: Tensor  # fp32, of the distribution that was drawn from


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, and where they stand. Exact for every k.

    x   (..., n), any strides; fp32, fp16 or bf16
    k   1 to n

    Returns values (..., k) in x's dtype and indices (..., k) int64. Ties go to the lower index; NaN counts as the
    largest, as in torch.topk; -0.0 equals 0.0 and comes back as 0.0. Differentiable in x through the values.

    Raises ValueError naming the argument, what it got and what it allows.
    """
    _check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x: got a single number, needs at least one dimension")
    if not isinstance(k, int) or not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k: got {k!r}, needs a whole number from 1 to {x.shape[-1]}, the length of a row")
    ensure(x.device.type)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (batch, n)
    values, indices = _ops.top_k.default(_unit_stride(rows.detach()), k)
    if x.dim() != 2:
        values, indices = values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
    if x.requires_grad and torch.is_grad_enabled():
        values = x.gather(-1, indices)  # the same values, with torch's own derivative
    return values, indices


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor,
    step: int | Tensor = 0,
    return_logprobs: bool = False,
) -> Tensor | Sampled:
    """Draw one token per row from the filtered softmax of the logits. The same token on every device.

    logits       (batch, vocab_size), vocab_size up to 2^20; fp32, fp16 or bf16; never written. -inf is never drawn
    temperature  >= 0: the logits are divided by it. 0 takes the largest logit (ties: the lowest id)
    top_k        keep the k likeliest (ties: lower id), 1 to vocab_size
    top_p        then keep the fewest tokens, likeliest first, whose renormalised probabilities reach p, in (0, 1]
    min_p        then keep those at least min_p times as likely as the likeliest, in [0, 1]
    seed, step   whole numbers from 0 to 2^63 - 1: the only source of randomness (Philox4x32-10). A row's token depends
                 on its own logits, parameters, seed and step, not on its batch, its position, or the device

    None switches a filter off. Each parameter is a number, or a tensor (batch,) or () with a value per row: fp32 for
    temperature, top_p and min_p, int64 for top_k, seed and step (others are converted). Tensors may change between
    replays of a CUDA graph; in a top_k tensor vocab_size keeps all.

    Returns token_ids (batch,) int64, or with `return_logprobs` a `Sampled`: also each chosen token's log-probability
    under the raw logits, and under the filtered and scaled ones (0 at temperature 0). Not differentiable.
    A row that holds NaN or +inf or nothing finite, or whose entry in a parameter tensor is outside what is allowed,
    gives token -1 and logprobs NaN; the other rows are not affected, and nothing waits for the device.

    Probabilities are exact up to fp32 rounding of each weight; tokens 2^40 times less likely than the likeliest
    (after temperature) count as impossible.

    Raises ValueError for a number outside what is allowed, naming the argument, what it got and what it allows.
    """
    _check_tensor("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, needs (batch, vocab_size)")
    vocab_size = logits.shape[1]
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"logits: got a vocabulary of {vocab_size}, needs 1 to {MAX_VOCAB_SIZE}")
    numbers: list[float] = []
    tensors: list[Tensor | None] = []
    for parameter, value in zip(_PARAMETERS, (temperature, top_k, top_p, min_p, seed, step), strict=True):
        if isinstance(value, Tensor):
            numbers.append(parameter.off)
            tensors.append(_per_row(parameter, value, logits))
        else:
            numbers.append(_number(parameter, value, vocab_size))
            tensors.append(None)
    ensure(logits.device.type)
    token_ids, logprobs = _ops.sample.default(_unit_stride(logits.detach()), *numbers, *tensors, return_logprobs)
    return Sampled(token_ids, *logprobs.unbind()) if return_logprobs else token_ids


def _check_tensor(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: got {x.dtype}, needs float32, float16 or bfloat16")


class _Parameter(NamedTuple):
    """What a parameter of `sample` may be."""

    name: str
    kinds: tuple[type, ...]  # of a number
    dtype: torch.dtype  # of a tensor
    optional: bool  # None is allowed
    off: float | int  # the number that stands for None, and for a tensor
    is_allowed: Callable[[Any, int], bool]  # of a number and the vocabulary's size
    allowed: str


_WHOLE, _REAL = (int,), (int, float)
_ANY_WHOLE = "a whole number from 0 to 2^63 - 1"
_PARAMETERS = (
    _Parameter("temperature", _REAL, torch.float32, False, 1.0, lambda t, _: 0 <= t < INFINITY, "finite, 0 or more"),
    _Parameter("top_k", _WHOLE, torch.int64, True, 0, lambda k, n: 1 <= k <= n, "1 to {} (the vocabulary), or None"),
    _Parameter("top_p", _REAL, torch.float32, True, 1.0, lambda p, _: 0 < p <= 1, "more than 0 and at most 1, or None"),
    _Parameter("min_p", _REAL, torch.float32, True, 0.0, lambda p, _: 0 <= p <= 1, "0 to 1, or None"),
    _Parameter("seed", _WHOLE, torch.int64, False, 0, lambda n, _: 0 <= n < 2**63, _ANY_WHOLE),
    _Parameter("step", _WHOLE, torch.int64, False, 0, lambda n, _: 0 <= n < 2**63, _ANY_WHOLE),
)


def _number(parameter: _Parameter, value: Any, vocab_size: int) -> float:
    if value is None and parameter.optional:
        return parameter.off
    is_number = isinstance(value, parameter.kinds) and not isinstance(value, bool)
    if not is_number or not parameter.is_allowed(value, vocab_size):
        raise ValueError(f"{parameter.name}: got {value!r}, needs {parameter.allowed.format(vocab_size)}")
    return value


def _per_row(parameter: _Parameter, value: Tensor, logits: Tensor) -> Tensor:
    """A parameter tensor as the kernels take it: (batch,), possibly with stride 0."""
    name, dtype = parameter.name, parameter.dtype
    if value.device != logits.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, logits are on {logits.device}")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != logits.shape[0]):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, needs ({logits.shape[0]},), one value per row, or ()"
        )
    if dtype == torch.int64 and (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"{name}: got {value.dtype}, needs int64")
    if value.dtype == dtype and value.dim() == 1 and not value.requires_grad:
        return value  # each operation saved here is microseconds of a small draw
    return value.detach().to(dtype).expand(logits.shape[0])


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels take rows at any distance, but the elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


# What the ops return, without computing it.


def _fake_top_k(x, k):
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)


def _fake_sample(logits, *parameters):
    return empty_results(logits, parameters[-1])


def empty_results(logits: Tensor, return_logprobs: bool) -> tuple[Tensor, Tensor]:
    """What the op `sample` returns, to be filled: token ids (batch,), logprobs (2, batch), or (2, 0) if not asked."""
    batch = logits.shape[0]
    token_ids = logits.new_empty((batch,), dtype=torch.int64)
    return token_ids, logits.new_empty((2, batch if return_logprobs else 0), dtype=torch.float32)


torch.library.register_fake("kernels::top_k", _fake_top_k, lib=_library)
torch.library.register_fake("kernels::sample", _fake_sample, lib=_library)


def bind_reference(library: torch.library.Library) -> None:
    """Register plain torch for the device that `library` stands for."""

    def sample(logits, temperature, top_k, top_p, min_p, seed, step, *tensors_and_flag):
        *tensors, return_logprobs = tensors_and_flag
        numbers = (temperature, top_k, top_p, min_p, seed, step)
        dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
        parameters = [
            logits.new_full((logits.shape[0],), number, dtype=dtype) if tensor is None else tensor
            for number, tensor, dtype in zip(numbers, tensors, dtypes, strict=True)
        ]
        if tensors[1] is not None:
            parameters[1] = torch.where(parameters[1] == 0, -1, parameters[1])  # in a tensor, 0 is not allowed
        token_ids, raw, processed = reference.sample(logits, *parameters)
        return token_ids, torch.stack((raw, processed)) if return_logprobs else raw.new_empty((2, 0))

    library.impl("top_k", reference.top_k)
    library.impl("sample", sample)


def bind_cuda(library: torch.library.Library) -> None:
    """Register the Triton launchers; Triton is imported here, where a CUDA kernel is first needed."""
    from kernels.top_k import triton_sample, triton_top_k

    library.impl("top_k", triton_top_k.top_k)
    library.impl("sample", triton_sample.sample)
