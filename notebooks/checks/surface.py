"""Statistics of notebooks 04 and 04a: where a loss surface has its optimum, who earned which share, the case's learning rates.

Shapes: n points, R resamples, S seeds, L learning rates. Losses are nats per token; a run that diverged has infinity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_lab.config import ConfigError

TERMS = 6  # 1, a, b, a², ab, b²


class Quadratic(NamedTuple):
    """`c0 + c1·a + c2·b + c3·a² + c4·ab + c5·b²`, fitted to n points."""

    coefficients: NDArray  # (6,)
    points: NDArray  # (n, 2), those with a finite loss
    losses: NDArray  # (n,)

    @property
    def box(self) -> NDArray:
        """(2, 2): the least a and b of the points, then the largest."""
        return np.stack([self.points.min(axis=0), self.points.max(axis=0)])

    @property
    def residual_sd(self) -> float:
        """With n - 6 degrees of freedom; NaN for n = 6."""
        square, freedom = ((self.losses - self.predict(self.points)) ** 2).sum(), len(self.losses) - TERMS
        return math.sqrt(square / freedom) if freedom else math.nan

    @property
    def is_minimum(self) -> bool:
        """Whether the surface curves upwards in every direction."""
        *_, aa, ab, bb = self.coefficients
        return bool(aa > 0 and 4 * aa * bb > ab * ab)

    @property
    def is_inside(self) -> bool:
        """Whether the point where the gradient is 0 lies strictly inside the box."""
        return bool(inside(stationary_points(self.coefficients[None]), self.box).all())

    def predict(self, x: ArrayLike) -> NDArray:
        """Losses (n,) at points (n, 2)."""
        return terms(np.asarray(x, dtype=float)) @ self.coefficients


class Interval(NamedTuple):
    low: float
    high: float


class Optimum(NamedTuple):
    """The least predicted loss within the box, with its 95 % bootstrap intervals."""

    a: float
    b: float
    loss: float
    a_interval: Interval
    b_interval: Interval
    loss_interval: Interval
    share_at_edge: float  # of the resamples: theirs lay on the box's edge, so the optimum may lie beyond it


class GridBest(NamedTuple):
    """The best learning rate of a grid by the mean over seeds, and what a parabola through it and its neighbours says."""

    at_edge: bool  # the optimum is not bracketed: widen the grid
    lr: float  # on the grid
    loss: float  # mean over seeds
    optimum_lr: float | None = None  # of the parabola; None at an edge or beside a run that diverged


def fit_quadratic(x: ArrayLike, y: ArrayLike) -> Quadratic:
    """Least squares of losses y (n,) on points x (n, 2): in the lab, log10 of Muon's and of AdamW's learning rate.

    Points with an infinite loss are dropped. Raises ConfigError if those that are left cannot determine six coefficients.
    """
    points, losses = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    points, losses = points[~np.isinf(losses)], losses[~np.isinf(losses)]
    # centred: log10 of LRs lie far from 0, where their powers look alike
    if len(points) < TERMS or np.linalg.matrix_rank(terms(points - points.mean(axis=0))) < TERMS:
        raise ConfigError(f"{len(points)} points with finite losses do not determine a quadratic; add settings")
    return Quadratic(np.linalg.lstsq(terms(points), losses, rcond=None)[0], points, losses)


def bootstrap_optimum(x: ArrayLike, y: ArrayLike, n_resamples: int = 2000, seed: int = 0) -> Optimum:
    """Optimum within the box of the points, with 2.5–97.5 % intervals of a residual bootstrap.

    Points stay, residuals are drawn anew with replacement: the settings were chosen, not sampled. They are widened by
    sqrt(n / (n - 6)), since a fit makes its residuals smaller than the errors. Rows count as independent: where all
    settings of a seed share its luck, take the seed's mean off its rows first.
    Raises ConfigError as `fit_quadratic`, and for fewer than 7 finite points.
    Source: Davison & Hinkley 1997, Bootstrap Methods and their Application, ch. 6, resampling errors.
    """
    fit = fit_quadratic(x, y)
    fitted, n = fit.predict(fit.points), len(fit.points)
    if n <= TERMS:
        raise ConfigError(f"{n} points with finite losses leave no residual to resample; 7 or more are needed")
    residuals = (fit.losses - fitted) * math.sqrt(n / (n - TERMS))
    draws = np.random.default_rng(seed).choice(residuals, (n_resamples, n))  # (R, n)
    coefficients = np.linalg.lstsq(terms(fit.points), (fitted + draws).T, rcond=None)[0].T  # (R, 6)
    optima = least_in_box(coefficients, fit.box)  # (R, 3)
    intervals = map(Interval, *np.quantile(optima, (0.025, 0.975), axis=0).tolist())
    least = least_in_box(fit.coefficients[None], fit.box)[0].tolist()
    at_edge = ~inside(optima[:, :2], fit.box)
    return Optimum(*least, *intervals, share_at_edge=at_edge.mean().item())


def best_on_grid(lrs: ArrayLike, losses_by_seed: ArrayLike) -> GridBest:
    """Best of three or more learning rates (L,), ascending, by losses (S, L); a diverged run's loss is infinite.

    Raises ConfigError if at each learning rate a run diverged.
    """
    grid, mean = np.asarray(lrs, dtype=float), np.mean(losses_by_seed, axis=0)  # infinite where one seed diverged
    if not (mean < math.inf).any():
        raise ConfigError("at each learning rate a run diverged; add lower ones")
    i = int(mean.argmin())
    best = GridBest(i in (0, len(grid) - 1), grid[i].item(), mean[i].item())
    near = slice(i - 1, i + 2)
    if best.at_edge or not np.isfinite(mean[near]).all() or not np.ptp(mean[near]):
        return best
    square, linear, _ = np.polyfit(np.log(grid[near]), mean[near], 2)
    return best._replace(optimum_lr=math.exp(-linear / (2 * square)))


def shapley(values: Mapping[frozenset[str], float], factors: Collection[str]) -> dict[str, float]:
    """Each factor's share of v(all) - v(none): its marginal value, averaged over all orders of adding factors.

    `values` holds v of every subset of `factors`, in any unit: 2^n of them. The shares sum to the whole.
    Raises ConfigError that names a subset which is missing or not finite.
    Source: Shapley 1953, A Value for n-Person Games, sec. 3.
    """
    shares, orders = dict.fromkeys(factors, 0.0), list(permutations(factors))
    for order in orders:
        chain = [frozenset(order[:n]) for n in range(len(order) + 1)]
        for subset in chain:
            if not math.isfinite(values.get(subset, math.nan)):
                raise ConfigError(f"no finite value for the coalition {{{', '.join(sorted(subset))}}}")
        for name, before, after in zip(order, chain, chain[1:], strict=False):
            shares[name] += (values[after] - values[before]) / len(orders)
    return shares


def case_lrs(n_updates: int, peak: float, warmup: int = 100) -> NDArray:
    """Learning rates (n_updates,) of the case's warm-up, constant at `peak` after it.

    By the case's bug B18 a scheduler sets the LR only after an update: update 1 still runs at the optimizer's own, which is
    the peak, then update n at (n - 1) / warmup of it, so that 102 updates sum to 1 + (0.01 + … + 1.00) + 1 = 52.5 peaks.
    The case's cosine after the warm-up spans 24 million updates: over the few that were run it takes off less than 1e-9 of
    the peak, and is left out.
    """
    shares = np.minimum(np.arange(n_updates) / warmup, 1.0)
    shares[:1] = 1.0
    return peak * shares


def terms(points: NDArray) -> NDArray:
    """(…, 2) → (…, 6)."""
    a, b = points[..., 0], points[..., 1]
    return np.stack([np.ones_like(a), a, b, a * a, a * b, b * b], axis=-1)


def inside(points: NDArray, box: NDArray) -> NDArray:
    """(…, 2) → (…,) bool."""
    return ((box[0] < points) & (points < box[1])).all(axis=-1)


def stationary_points(coefficients: NDArray) -> NDArray:
    """Where the gradient is 0, (R, 6) → (R, 2); not finite where it is so nowhere or along a line."""
    _, a, b, aa, ab, bb = coefficients.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([ab * b - 2 * bb * a, ab * a - 2 * aa * b], axis=1) / (4 * aa * bb - ab * ab)[:, None]


def least_in_box(coefficients: NDArray, box: NDArray) -> NDArray:
    """(R, 6) → (R, 3): a, b and the least value in the box. It lies where the surface or one of the four edges is level, or
    in a corner; every candidate counts, since none within the box can be too low."""
    _, a1, b1, aa, ab, bb = coefficients.T
    corners = list(product(*box.T))
    with np.errstate(divide="ignore", invalid="ignore"):
        edges = [(a, -(b1 + ab * a) / (2 * bb)) for a in box[:, 0]]
        edges += [(-(a1 + ab * b) / (2 * aa), b) for b in box[:, 1]]
    candidates = [stationary_points(coefficients).T, *edges, *corners]
    points = np.stack([np.stack(np.broadcast_arrays(a, b, aa)[:2], axis=1) for a, b in candidates], axis=1)  # (R, 9, 2)
    points = np.clip(np.nan_to_num(points), *box)
    values = np.einsum("rct,rt->rc", terms(points), coefficients)
    best = np.arange(len(points)), values.argmin(axis=1)
    return np.concatenate([points[best], values[best][:, None]], axis=1)
