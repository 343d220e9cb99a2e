"""Pure measures on tensors and numbers: what a weight did, what it was meant to do, and what a loss says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from |x| to the next larger number of `dtype`, float32, same shape; x in any float dtype.

    Next to a power of two the distance downwards is half of it: from 1.0 in bfloat16 the next number is 1 + 2^-7
    upwards and 1 - 2^-8 downwards, so that an update is lost up to 2^-8 and down to 2^-9.
    """
    tiny = torch.finfo(dtype).tiny
    _, exponent = torch.frexp(x.float().abs().clamp(min=tiny))  # |x| = m · 2^exponent, m in [0.5, 1)
    return torch.finfo(dtype).eps * torch.exp2((exponent - 1).float())


def is_lost(weight: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether `weight + update`, rounded to `dtype`, is `weight` again although the update is not zero. Bool, same shape.

    `weight` must hold numbers of `dtype`; the sum is taken in float32, as optimizers do for 16-bit weights.
    """
    weight = weight.float()
    return ((weight + update.float()).to(dtype).float() == weight) & (update != 0)


def realised_share(realised: Tensor, intended: Tensor) -> float:
    """ρ = ⟨realised, intended⟩ / ⟨intended, intended⟩: 1 when every update arrived, 0 when none did. NaN for no intent."""
    realised, intended = realised.double().flatten(), intended.double().flatten()
    square = (intended @ intended).item()
    return (realised @ intended).item() / square if square else math.nan


class Prediction(NamedTuple):
    lost: float  # share of the elements whose update is rounded away, 0 to 1
    realised: float  # expected ρ of one update


def predict_lost(weight: Tensor, step_rms: float, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Prediction:
    """What one update of root mean square `step_rms` would lose if `weight` were kept in `dtype`, before any training.

    Updates are drawn from a normal distribution, independent of the weights: Muon's elements are close to that, AdamW's
    are larger in the middle (most are near ±LR late, fewer early), so take it as a size and not as a forecast.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = weight.detach().flatten().float().cpu().to(dtype).float()
    update = torch.randn(kept.shape, generator=generator) * step_rms
    realised = (kept + update).to(dtype).float() - kept
    return Prediction(is_lost(kept, update, dtype).float().mean().item(), realised_share(realised, update))


def unchanged_share(now: Tensor, then: Tensor) -> float:
    """Share of the elements that are bit-identical, 0 to 1."""
    return (now == then).float().mean().item()


def direction_bias(now: Tensor, then: Tensor) -> float:
    """(down - up) / (down + up) over the elements that moved: 1 when all fell, 0 when balanced. NaN when none moved."""
    down, up = (now < then).sum().item(), (now > then).sum().item()
    return (down - up) / (down + up) if down + up else math.nan


def adam_reach(lrs: Sequence[float], betas: tuple[float, float] = (0.9, 0.95)) -> float:
    """The most that an element can move under Adam(W) without decay, given the LR of each update, whatever the gradients.

    The step of update t is LR · m̂ / sqrt(v̂). By Cauchy–Schwarz on the two weighted sums over past gradients,
    (m̂/sqrt(v̂))² ≤ Σ_s a_s² / b_s with a_s, b_s the bias-corrected weights of gradient s in m̂ and v̂; at t = 1 it is 1.
    """
    b1, b2 = betas
    total = 0.0
    ratio_sum = 0.0  # Σ_s ((1 - b1) b1^(t-s))² / ((1 - b2) b2^(t-s))
    for t, lr in enumerate(lrs, start=1):
        ratio_sum = ratio_sum * b1**2 / b2 + (1 - b1) ** 2 / (1 - b2)
        total += lr * math.sqrt(ratio_sum * (1 - b2**t)) / (1 - b1**t)
    return total


def expected_start(vocab_size: int, logit_variance: float) -> float:
    """Expected cross-entropy of an untrained model, nats per token: ln V + var(logits) / 2."""
    return math.log(vocab_size) + logit_variance / 2


class Trend(NamedTuple):
    slope: float  # per update
    error: float  # its standard error, from the residuals


def trend(losses: Sequence[float]) -> Trend:
    """Least-squares line through losses of consecutive updates; needs at least 3, else NaN."""
    n = len(losses)
    if n < 3:
        return Trend(math.nan, math.nan)
    y = torch.tensor(losses, dtype=torch.float64)
    x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    slope = (x @ y / (x @ x)).item()
    residual = y - y.mean() - slope * x
    return Trend(slope, math.sqrt((residual @ residual).item() / (n - 2) / (x @ x).item()))


class Reading(NamedTuple):
    """What a watch knows of one tensor at one moment, from its sampled elements. Sums are over touched elements: those
    whose gradient has been non-zero at least once (an embedding's row counts from its first gradient on)."""

    name: str
    kind: str  # the name with its numbers replaced by *: layers.*.seq_norm.weight
    group: str  # the optimizer's group, or "" for a tensor in no optimizer
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_elements: int  # sampled
    n_touched: int
    unchanged: int  # touched elements bit-identical since the watch began
    unchanged_lately: int  # … since the last reading
    up: int
    down: int
    meant_down: int  # of the elements that moved, those whose intended displacement is downwards
    moved_square: float  # Σ (now - start)²
    weight_square: float  # Σ start² over all sampled elements
    realised_intended: float | None  # Σ r u of the window; None where the intended update is not known
    intended_square: float | None  # Σ u²
    moments: tuple[float, float, float]  # Σ r²u², Σ r u³, Σ u⁴, for the standard error of ρ
    ulps_square: float  # Σ (u / ulp)²
    grad_norm: float  # the largest seen, whole tensor
    with_gradient: int  # gradient readings that were not zero
    zero_gradient: int
    no_gradient: int
    constant: bool  # all sampled elements were one value when the watch began, as in a fresh norm


class Share(NamedTuple):
    rho: float
    error: float  # standard error over elements
    intended_ulps: float  # root mean square of the window's intended displacement, in ULPs of the weight


def share_of(readings: Sequence[Reading]) -> Share | None:
    """ρ over several tensors with its standard error; None where the intended updates are not known or zero."""
    known = [r for r in readings if r.intended_square]
    if not known:
        return None
    square = sum(r.intended_square for r in known)
    rho = sum(r.realised_intended for r in known) / square
    rr, ru, uu = (sum(r.moments[i] for r in known) for i in range(3))
    error = math.sqrt(max(0.0, rr - 2 * rho * ru + rho**2 * uu)) / square
    n = sum(r.n_touched for r in known)
    return Share(rho, error, math.sqrt(sum(r.ulps_square for r in known) / max(n, 1)))
