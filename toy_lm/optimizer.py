"""AdamW for everything, or Muon for the matrices between embedding and logits and AdamW for the rest.

The learning rate is a tensor on the device, so that a captured graph reads the step's own.

Knows torch and the names of the parameters; knows nothing of data or of the loop.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from toy_lm import distributed
from toy_lm.config import TrainConfig

# Five rounds of this quintic bring the singular values of a matrix near 1 (Keller Jordan, "Muon", 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class AdamW:
    """torch's fused AdamW, without torch.optim, the first use of which imports all of torch.compile: seconds."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: Tensor, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.params, self.lr, self.betas, self.weight_decay = list(params), lr, betas, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        params = [parameter for parameter in self.params if parameter.grad is not None]
        if not params:
            return
        for parameter in params:
            if parameter not in self.state:
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        averages, squares, steps = (
            [self.state[parameter][key] for parameter in params] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        torch._foreach_add_(steps, 1.0)
        torch._fused_adamw_(
            params,
            [parameter.grad for parameter in params if parameter.grad is not None],
            averages,
            squares,
            [],
            steps,
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


class Muon:
    """Momentum, orthogonalised: each matrix moves along the nearest half-orthogonal matrix to its averaged gradient.

    Equal to torch.optim.Muon with adjust_lr_fn="match_rms_adamw" but for rounding. Matrices of one shape, or of that
    shape transposed, are orthogonalised together, as one batch of matrix products: 30 of them for a decoder of any
    depth, not 15 a matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        self.params, self.lr, self.momentum, self.weight_decay = list(params), lr, momentum, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in self.params:
            if parameter.grad is None:
                continue
            if parameter not in self.state:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        for parameters in by_shape.values():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            move(parameters, gradients, averages, self.lr, self.momentum, self.weight_decay)


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
    """What updates a model: AdamW alone, or with Muon. Norms' scales do not decay."""

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
        betas = (config.beta1, config.beta2)
        self.optimizers: list[AdamW | Muon] = [
            AdamW(matrices, lr=self.learning_rate, betas=betas, weight_decay=config.weight_decay),
            AdamW(scales, lr=self.learning_rate, betas=betas, weight_decay=0.0),
        ]
        if muon:
            decay = config.weight_decay
            self.optimizers.append(Muon(muon, lr=self.learning_rate, momentum=config.momentum, weight_decay=decay))

    def set_learning_rate(self, rate: Tensor) -> None:
        self.learning_rate.copy_(rate.view(()))

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None

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
        of_parameter = {parameter: optimizer for optimizer in self.optimizers for parameter in optimizer.params}
        for full_name, value in state.items():
            kind, _, rest = full_name.partition(".")
            if kind != "optimizer":
                continue
            key, _, name = rest.partition(".")
            parameter = self.named[name]
            optimizer_state = of_parameter[parameter].state.setdefault(parameter, {})
            optimizer_state[key] = distributed.sliced_like(value.to(parameter.device), parameter)
