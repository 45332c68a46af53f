"""`toy-lm self-test`: what a user can check on their own machine in under a minute, with a report to paste.

    attention   out and gradients against fp64, for causal and full attention of odd sizes
    cache       a text read through the cache, token by token, against one forward pass
    sampler     a million draws against the exact distribution of the filtered logits (chi-square)
    devices     with a GPU: the same seeds draw the same tokens there as on the CPU

Knows the ops and the model; knows nothing of run folders.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from toy_lm import info
from toy_lm.config import ModelConfig
from toy_lm.device import autocast_dtype, pick_device
from toy_lm.model import ATTENTION, KVCache, Transformer

_DRAWS = 1_000_000


def run(device: str = "auto", log: Callable[[str], None] = print) -> int:
    """Print the machine, then a line for each check; returns how many failed.

    Raises ValueError for a device that is not there.
    """
    where = pick_device(device)
    log(info.describe())
    checks: list[tuple[str, Callable[[torch.device], tuple[bool, str]]]] = [
        ("attention", check_attention),
        ("cache", check_cache),
        ("sampler", check_sampler),
    ]
    if where.type == "cuda":
        checks.append(("devices", check_devices))
    failed = 0
    for name, check in checks:
        begin = time.perf_counter()
        passed, words = check(where)
        failed += not passed
        log(
            f"{name} on {where.type}: {'passed' if passed else 'FAILED'}, {words} ({time.perf_counter() - begin:.1f} s)"
        )
    return failed


def check_attention(device: torch.device) -> tuple[bool, str]:
    """Fused attention's error (root mean square) must be at most twice classic attention's, plus one rounding."""
    worst, dtype = 0.0, autocast_dtype(device) or torch.float32
    for causal in (False, True):
        for seqlen_q, seqlen_k, head_dim in ((1, 77, 32), (63, 63, 64), (113, 257, 40), (200, 129, 128)):
            generator = torch.Generator().manual_seed(seqlen_q)
            q, k, v = (torch.randn(2, 4, n, head_dim, generator=generator) for n in (seqlen_q, seqlen_k, seqlen_k))
            tensors = [x.to(dtype) for x in (q, k, v)]
            exact = _out_and_gradients("classic", [x.double() for x in tensors], causal)
            errors = {}
            for kind in ("classic", "fused"):
                got = _out_and_gradients(kind, [x.to(device) for x in tensors], causal)
                errors[kind] = [(x.cpu().double() - y).square().mean().sqrt() for x, y in zip(got, exact, strict=True)]
            for classic, fused, x in zip(errors["classic"], errors["fused"], exact, strict=True):
                rounding = 0.5 * torch.finfo(dtype).eps * x.abs().max()
                worst = max(worst, float(fused / (2 * classic + rounding)))
    return worst <= 1.0, f"error of out, dq, dk, dv at most {worst:.2f} of what is allowed"


def _out_and_gradients(kind: str, tensors: list[Tensor], causal: bool) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = ATTENTION[kind](*leaves, causal=causal)
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


@torch.inference_mode()
def check_cache(device: torch.device) -> tuple[bool, str]:
    """Logits of texts of unequal length, read in two parts and then token by token, against one forward pass."""
    config = ModelConfig(
        vocab_size=300,
        model_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        max_seqlen=50,
    )
    torch.manual_seed(0)
    model = Transformer(config).to(device).eval()
    token_ids = torch.randint(300, (3, 50)).to(device)
    expected = model(token_ids)
    starts = torch.tensor([5, 17, 30], device=device)
    cache = KVCache(config, 3, 50, device=device, dtype=torch.float32)
    model(token_ids[:, :30], cache)
    cache.set_seqlens(starts, 30)
    apart = 0.0
    for step in range(20):
        columns = starts[:, None] + step
        got = model(token_ids.gather(1, columns), cache)[:, 0]
        wanted = expected.gather(1, columns[..., None].expand(-1, -1, 300))[:, 0]
        apart = max(apart, (got - wanted).abs().max().item())
    return apart < 1e-3, f"logits at most {apart:.1e} apart"


def check_sampler(device: torch.device) -> tuple[bool, str]:
    """Draws of top-k 20, top-p 0.9 at temperature 1.3 over 257 tokens; tokens outside the filters must never come."""
    logits = torch.randn(257, generator=torch.Generator().manual_seed(3)) * 2.0
    scaled = logits.double() / 1.3
    order = scaled.sort(descending=True, stable=True).indices[:20]
    probabilities = scaled[order].softmax(dim=0)
    kept = int((probabilities.cumsum(dim=0) < 0.9).sum()) + 1
    order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    rows = logits.to(device).expand(10_000, -1)
    counts = torch.zeros(257, dtype=torch.int64)
    for step in range(_DRAWS // len(rows)):
        seeds = torch.arange(len(rows), device=device)
        drawn = kernels.sample(rows, temperature=1.3, top_k=20, top_p=0.9, seed=seeds, step=step)
        assert isinstance(drawn, Tensor)
        counts += drawn.cpu().bincount(minlength=257)
    outside = int(counts.sum() - counts[order].sum())
    expected = probabilities * _DRAWS
    chi_square = float(((counts[order] - expected).square() / expected).sum())
    p = _chi_square_tail(chi_square, kept - 1)
    return outside == 0 and p > 1e-6, f"chi-square {chi_square:.1f} over {kept} tokens, p = {p:.3f}, {outside} outside"


def _chi_square_tail(x: float, degrees: int) -> float:
    """P(a chi-square variable of so many degrees of freedom exceeds x)."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), torch.tensor(x / 2).double()))


def check_devices(device: torch.device) -> tuple[bool, str]:
    """The same logits, seeds and steps on the CPU and on the GPU."""
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(4))
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "step": 7}
    drawn = []
    for where in (torch.device("cpu"), device):
        tokens = kernels.sample(logits.to(where), seed=torch.arange(500, device=where), **settings)  # type: ignore[arg-type]
        assert isinstance(tokens, Tensor)
        drawn.append(tokens.cpu())
    differing = int((drawn[0] != drawn[1]).sum())
    return differing == 0, f"{differing} of 500 tokens differ from the CPU's"
