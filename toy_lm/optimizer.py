"""AdamW for everything, or Muon for the matrices between embedding and logits and AdamW for the rest.

The learning rate is a tensor on the device, so that a captured graph reads the step's own.

Knows torch and the names of the parameters; knows nothing of data or of the loop.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from toy_lm import distributed
from toy_lm.config import TrainConfig

# Five rounds of this quintic bring the singular values of a matrix near 1 (Keller Jordan, "Muon", 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
# torch 2.11 ends in an assertion where it looks for an order of loops in ops on lists of tensors.
_COMPILE_OPTIONS: dict[str, Any] = {"loop_ordering_after_fusion": False}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each matrix moves along the nearest half-orthogonal matrix to its averaged gradient.

    Equal to torch.optim.Muon with adjust_lr_fn="match_rms_adamw" but for rounding. Matrices of one shape, or of that
    shape transposed, are orthogonalised together, as one batch of matrix products: 30 of them for a decoder of any
    depth, not 15 a matrix. With `compile` the element-wise work around them is fused by torch.compile.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.move = move
        if compile:
            self.move = torch.compile(move, fullgraph=True, dynamic=False, options=_COMPILE_OPTIONS)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for parameters in by_shape.values():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                self.move(parameters, gradients, averages, group["lr"], group["momentum"], group["weight_decay"])


def move(
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of Muon for matrices of one shape, some of them transposed; changes parameters and averages."""
    torch._foreach_lerp_(averages, gradients, 1.0 - momentum)
    ahead = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov
    # (matrices, rows, columns); whole matrices, also where workers hold slices of them
    update = orthogonalize(torch.stack([_wide(distributed.whole(x.bfloat16())) for x in ahead]))
    # An orthogonal update has entries of about 1 / sqrt(max(rows, columns)); AdamW's are about 0.2.
    update = update.to(parameters[0].dtype) * (-0.2 * max(parameters[0].shape) ** 0.5 * lr)
    torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
    moves = [x if x.shape == p.shape else x.mT for x, p in zip(update.unbind(), parameters, strict=True)]
    torch._foreach_add_(parameters, [distributed.sliced_like(x, p) for x, p in zip(moves, parameters, strict=True)])


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[-2] > x.shape[-1] else x


def orthogonalize(x: Tensor) -> Tensor:
    """Of x = U S V^T (matrices, rows, columns), about U V^T, in bf16, by Newton-Schulz rounds."""
    a, b, c = _NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """What updates a model: one torch optimizer, or two. Norms' scales do not decay."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, *, compile: bool = False) -> None:
        self.learning_rate = torch.zeros((), device=device)
        self.named = dict(model.named_parameters())
        muon: list[Tensor] = []
        matrices: list[Tensor] = []
        scales: list[Tensor] = []
        for name, parameter in self.named.items():
            if parameter.dim() < 2:
                scales.append(parameter)
            elif config.optimizer == "muon" and "embed_tokens" not in name:
                muon.append(parameter)
            else:
                matrices.append(parameter)
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": scales, "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                groups,
                lr=self.learning_rate,
                betas=(config.beta1, config.beta2),
                fused=True,
                capturable=device.type == "cuda",
            )
        ]
        if muon:
            self.optimizers.append(
                Muon(
                    muon,
                    lr=self.learning_rate,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                    compile=compile,
                )
            )

    def set_learning_rate(self, rate: Tensor) -> None:
        self.learning_rate.copy_(rate.view(()))

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state as {"optimizer.KEY.PARAMETER": tensor}, whole: every worker has to ask."""
        return {
            f"optimizer.{key}.{name}": distributed.whole(value)
            for name, parameter in self.named.items()
            for optimizer in self.optimizers
            if parameter in optimizer.state
            for key, value in optimizer.state[parameter].items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave; other names are left alone."""
        of_parameter = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for full_name, value in state.items():
            kind, _, rest = full_name.partition(".")
            if kind != "optimizer":
                continue
            key, _, name = rest.partition(".")
            parameter = self.named[name]
            optimizer = of_parameter[id(parameter)]
            optimizer.state[parameter][key] = distributed.sliced_like(value.to(parameter.device), parameter)
