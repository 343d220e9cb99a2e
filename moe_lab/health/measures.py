"""Pure measures on tensors and numbers: what a weight did, what it was meant to do, and what a loss says."""

import math
from collections.abc import Sequence
from statistics import linear_regression
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sampling import plain


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from |x| to the next larger number of `dtype`, same shape, float32 (float64 for float64); x in any float dtype.

    Below a power of two the next smaller one is at half of it: from 1.0 in bfloat16 an update is lost up to 2^-8, down to 2^-9.
    """
    x = x.double() if torch.finfo(dtype).bits == 64 else x.float()
    bits, exponent = (torch.int64, 0x7FF << 52) if x.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    # the exponent's bits alone are the power of two below |x|; `frexp` has no kernel for Apple's GPUs
    power = (x.abs().clamp(min=torch.finfo(dtype).tiny).view(bits) & exponent).view(x.dtype)
    return torch.finfo(dtype).eps * power


def is_lost(weight: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether `weight + update`, rounded to `dtype`, is `weight` again although the update is not zero. Bool, same shape.

    `weight` must hold numbers of `dtype`; the sum is taken in float32, as optimizers do for 16-bit weights.
    """
    weight = weight.float()
    return ((weight + update.float()).to(dtype).float() == weight) & (update != 0)


def realised_share(realised: Tensor, intended: Tensor) -> float:
    """ρ = ⟨realised, intended⟩ / ⟨intended, intended⟩: 1 when every update arrived, 0 when none did. NaN for no intent."""
    # float64 on the CPU: Apple's GPUs have none
    realised, intended = (t.detach().flatten().cpu().double() for t in (realised, intended))
    square = (intended @ intended).item()
    return (realised @ intended).item() / square if square else math.nan


def predict_lost(weight: Tensor, step_rms: float, dtype: torch.dtype = torch.bfloat16) -> float:
    """Share of the elements that one update of root mean square `step_rms` would not move if `weight` were kept in `dtype`.

    Updates are drawn from a normal distribution, independent of the weights: Muon's elements are close to that, AdamW's
    are larger in the middle (most are near ±LR late, fewer early), so take it as a size and not as a forecast.
    """
    generator = torch.Generator().manual_seed(0)
    kept = weight.detach().flatten().float().cpu().to(dtype).float()
    update = torch.randn(kept.shape, generator=generator) * step_rms
    return is_lost(kept, update, dtype).float().mean().item()


def adam_ratio_bound(t: float, betas: Sequence[float] = (0.9, 0.95)) -> float:
    """The largest |m̂|/sqrt(v̂) that any gradients can give at Adam's update t, from 1, or in the limit: t = math.inf.

    At update t, m̂ = Σ a_k·g and v̂ = Σ c_k·g² over ages k = 0 … t-1 of the gradients, with weights that sum to 1:
    a_k = (1-β1)·β1^k / (1-β1^t) and c_k likewise with β2. By Cauchy–Schwarz (Σ a·g)² ≤ Σ a²/c · Σ c·g², equal for
    g ∝ a/c, so the bound sqrt(Σ a²/c) is reached. In the limit it is infinite if β1² ≥ β2; a constant gradient gives 1.
    Raises ValueError for betas outside of 0 ≤ β1 < 1, 0 < β2 < 1. Adam: Kingma & Ba 2015, alg. 1 and sec. 2.1.
    """
    b1, b2 = betas
    if not (0 <= b1 < 1 and 0 < b2 < 1):
        raise ValueError(f"betas={tuple(betas)} must lie in [0, 1) and (0, 1)")
    ratio = b1**2 / b2
    if ratio == 1:
        ages = t  # Σ_k ratio^k, k < t
    elif ratio > 1 and t * math.log(ratio) > 700:
        return math.inf  # beyond float64
    else:
        ages = (1 - ratio**t) / (1 - ratio)
    return (1 - b1) / (1 - b1**t) * math.sqrt((1 - b2**t) / (1 - b2) * ages)


def adam_reach(lrs: Sequence[float], betas: tuple[float, float] = (0.9, 0.95)) -> float:
    """A distance that no element can exceed under Adam(W) after updates at these learning rates, whatever its gradients are:
    Σ LR × `adam_ratio_bound`, without weight decay, which would add up to Σ LR · decay · |weight|.

    One sequence of gradients cannot reach it all, and a constant one travels Σ LR. Raises ValueError for a learning rate that
    is negative or not finite, and for impossible betas.
    """
    if not all(math.isfinite(lr) and lr >= 0 for lr in lrs):
        raise ValueError("lrs must hold finite learning rates of 0 or more")
    return math.fsum(lr * adam_ratio_bound(t, betas) for t, lr in enumerate(lrs, 1))


def collisions(ids: Tensor, vocab_size: int) -> float:
    """Share of equal pairs among whole numbers of any shape, drawn without replacement, times `vocab_size`: 1 on average where
    each is drawn evenly and by itself, more wherever some are frequent."""
    counts, n = torch.bincount(ids.flatten(), minlength=vocab_size).double(), ids.numel()
    return float((counts * (counts - 1)).sum() / (n * (n - 1)) * vocab_size)


def expected_start(vocab_size: int, logit_variance: float) -> float:
    """Expected cross-entropy of an untrained model, nats per token: ln V + var(logits) / 2."""
    return math.log(vocab_size) + logit_variance / 2


def trend(losses: Sequence[float]) -> tuple[float, float]:
    """Slope per update of the least-squares line through at least 3 losses, and its standard error, from the residuals."""
    n = len(losses)
    slope, start = linear_regression(range(n), losses)
    rest = math.fsum((loss - start - slope * update) ** 2 for update, loss in enumerate(losses))
    return slope, math.sqrt(rest / (n - 2) * 12 / (n**3 - n))


class Share(NamedTuple):
    rho: float
    error: float  # standard error over elements
    intended_ulps: float  # root mean square of the window's intended displacement, in ULPs of the weight


def share_of(readings: Sequence[Any]) -> Share | None:
    """ρ over several tensors, of their `Bank.sums`, and its standard error; None where no intended update is known."""
    known = [r for r in readings if r.intended_square]
    if not known:
        return None
    names = ("intended_square", "realised_intended", "moments_rruu", "moments_ruuu", "moments_uuuu")
    square, both, rruu, ruuu, uuuu = (sum(getattr(r, name) for r in known) for name in names)
    rho = both / square
    rest = rruu - 2 * rho * ruuu + rho**2 * uuuu
    ulps = math.sqrt(sum(r.ulps_square for r in known) / max(sum(r.n_touched for r in known), 1))
    return Share(rho, math.sqrt(max(0.0, rest)) / square, ulps)


def is_decay_rates(p: Tensor) -> bool:
    """Whether a matrix holds ln 1, ln 2, …, ln N in its rows, as a state space model's fresh A_log does."""
    values = plain(p)[:: max(1, len(p) - 1)]  # the first row and the last
    if not values.numel() or values.shape[-1] < 2 or not values.is_floating_point():
        return False
    wanted = torch.arange(1, values.shape[-1] + 1, device=values.device).float().log()
    return bool((values.float() - wanted).abs().max() < 0.02)
