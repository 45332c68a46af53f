"""AdamW for everything, or Muon for the matrices between embedding and logits and AdamW for the rest.

The learning rate is a tensor on the device, so that a captured graph reads the step's own.

Knows torch and the names of the parameters; knows nothing of data or of the loop.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from toy_lm.config import TrainConfig

# Five rounds of this quintic bring the singular values of a matrix near 1 (Keller Jordan, "Muon", 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each matrix moves along the nearest half-orthogonal matrix to its averaged gradient.

    Equal to torch.optim.Muon with adjust_lr_fn="match_rms_adamw" but for rounding. Matrices of one shape are
    orthogonalised together, as one batch of matrix products: 45 of them for a decoder of any depth, not 15 a matrix.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: Tensor, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(shape, parameters, group)

    def _step_shape(self, shape: torch.Size, parameters: list[Tensor], group: dict) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov
        update = orthogonalize(torch.stack(ahead))  # (matrices, rows, columns)
        # An orthogonal update has entries of about 1 / sqrt(max(rows, columns)); AdamW's are about 0.2.
        update = update.to(parameters[0].dtype) * (-0.2 * max(shape) ** 0.5 * group["lr"])
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, update.unbind())


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

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
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
                Muon(muon, lr=self.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
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
        """Every tensor of the state as {"optimizer.KEY.PARAMETER": tensor}."""
        return {
            f"optimizer.{key}.{name}": value
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
            optimizer.state[parameter][key] = value.to(parameter.device)
