"""AdamW for everything, or Muon for the matrices between embedding and logits and AdamW for the rest.

The learning rate is a tensor on the device, so that a captured graph reads the step's own.

Knows torch, the names of the parameters, and kernels through `import kernels`; knows nothing of data or of the loop.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import kernels
from toy_lm import distributed
from toy_lm.config import TrainConfig


def _with_gradients(params: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that have a gradient, and the gradients."""
    pairs = [(parameter, parameter.grad) for parameter in params if parameter.grad is not None]
    return [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]


class AdamW:
    """torch's fused AdamW, without torch.optim, the first use of which imports all of torch.compile: seconds."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: Tensor, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.params, self.lr, self.betas, self.weight_decay = list(params), lr, betas, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        params, gradients = _with_gradients(self.params)
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
            gradients,
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

    Equal to torch.optim.Muon with adjust_lr_fn="match_rms_adamw" but for rounding. The matrices are of one shape and
    orthogonalised together: fifteen batches of products for a decoder of any depth, not fifteen a matrix.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: Tensor, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        self.params, self.lr, self.momentum, self.weight_decay = list(params), lr, momentum, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        params, gradients = _with_gradients(self.params)
        if not params:
            return
        for parameter in params:
            if parameter not in self.state:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        averages = [self.state[parameter]["momentum_buffer"] for parameter in params]
        torch._foreach_lerp_(averages, gradients, 1.0 - self.momentum)
        ahead = list(torch._foreach_lerp(gradients, averages, self.momentum))  # Nesterov
        if _is_sliced(ahead[0]):
            ahead = [distributed.whole(x.bfloat16()) for x in ahead]
        rounded = ahead[0].new_empty((len(ahead), *ahead[0].shape), dtype=torch.bfloat16)
        torch._foreach_copy_(rounded.unbind(), ahead)
        # An orthogonal update has entries of about 1 / sqrt(max(rows, columns)); AdamW's are about 0.2.
        updates = kernels.orthogonalize(rounded, -0.2 * max(ahead[0].shape) ** 0.5 * self.lr)
        torch._foreach_mul_(params, 1.0 - self.lr * self.weight_decay)
        torch._foreach_add_(
            params, [distributed.sliced_like(x, p) for x, p in zip(updates.unbind(), params, strict=True)]
        )


def _is_sliced(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


class Optimizer:
    """What updates a model: AdamW alone, or with Muon. Norms' scales do not decay."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.learning_rate = torch.zeros((), device=device)
        self.named = dict(model.named_parameters())
        by_shape: dict[torch.Size, list[Tensor]] = {}
        matrices: list[Tensor] = []
        scales: list[Tensor] = []
        for name, parameter in self.named.items():
            if parameter.dim() < 2:
                scales.append(parameter)
            elif config.optimizer == "muon" and "embed_tokens" not in name:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            else:
                matrices.append(parameter)
        betas = (config.beta1, config.beta2)
        self.optimizers: list[AdamW | Muon] = [
            AdamW(matrices, lr=self.learning_rate, betas=betas, weight_decay=config.weight_decay),
            AdamW(scales, lr=self.learning_rate, betas=betas, weight_decay=0.0),
        ]
        self.optimizers += [
            Muon(muon, lr=self.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
            for muon in by_shape.values()
        ]
        # Where they are sliced, the optimizers gather one after the other.
        aside = device.type == "cuda" and not _is_sliced(next(model.parameters()))
        self.streams = [torch.cuda.Stream(device) for _ in self.optimizers] if aside else []

    def set_learning_rate(self, rate: Tensor) -> None:
        self.learning_rate.copy_(rate.view(()))

    def step(self) -> None:
        """On a GPU each optimizer has a stream of its own: none of them keeps it busy by itself."""
        for optimizer, stream in itertools.zip_longest(self.optimizers, self.streams):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # None: the current one
                optimizer.step()
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)

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
