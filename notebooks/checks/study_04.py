"""What notebooks 04 and 04a read out of committed runs: losses by method and seed, surfaces, corners, crossings."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from checks.designs import SWEEP_LRS
from checks.figures_04 import Best
from checks.figures_04a import Surface
from checks.surface import GridBest, Optimum, Quadratic, best_on_grid, bootstrap_optimum, fit_quadratic, shapley
from moe_lab.failures.results import Results

METHODS = ("original", "match_rms_adamw", "adamw")
FIXES = ("Muon", "AdamW", "float32")
SUBSETS = [frozenset(fix for fix, bit in zip(FIXES, bits, strict=True) if bit) for bits in np.ndindex(2, 2, 2)]


def sweep_losses(found: Results) -> dict[str, dict[float, list[float]]]:
    """Method → learning rate → losses, one a seed."""
    seeds = found.seeds(f"adamw {SWEEP_LRS[0]:g}")
    return {m: {lr: [found.loss(f"{m} {lr:g}", s) for s in seeds] for lr in SWEEP_LRS} for m in METHODS}


def sweep_best(found: Results) -> dict[str, GridBest]:
    """Method → the best of the grid and what a parabola says of it."""
    return {m: best_on_grid(SWEEP_LRS, np.transpose(list(by.values()))) for m, by in sweep_losses(found).items()}


def fit_surface(found: Results, step: int | None = None) -> tuple[Quadratic, Optimum, Surface]:
    """The quadratic in log LRs through an experiment's losses, its optimum, and a panel of the figure."""
    points = {tuple(map(float, arm.split())): found.losses(arm, step).mean for arm in found.arms()}
    x, y = np.log10(list(points)), list(points.values())
    quadratic, least = fit_quadratic(x, y), bootstrap_optimum(x, y)
    intervals = [tuple(10 ** np.array(interval)) for interval in (least.a_interval, least.b_interval)]
    return quadratic, least, Surface(points, quadratic.predict, (10**least.a, 10**least.b), intervals, {})


def over_horizons(found: Results, horizons: Iterable[int]) -> dict[str, dict[int, Best]]:
    """Optimizer → updates → the best LR of the fitted surface, one seed a point."""
    fits = {n: fit_surface(found, n)[1] for n in horizons}
    muon = {n: Best(*(10**x for x in (fit.a, *fit.a_interval))) for n, fit in fits.items()}
    adamw = {n: Best(*(10**x for x in (fit.b, *fit.b_interval))) for n, fit in fits.items()}
    return {"AdamW": adamw, "Muon": muon}


def by_schedule(found: Results) -> dict[str, dict[float, list[float]]]:
    """Schedule → learning rate → losses, one a seed, of the arms `SCHEDULE LR`."""
    sweeps: dict[str, dict[float, list[float]]] = {}
    for arm in found.arms():
        schedule, lr = arm.split()
        sweeps.setdefault(schedule, {})[float(lr)] = [found.loss(arm, seed) for seed in found.seeds(arm)]
    return sweeps


def exponent(optima: Mapping[int, Best]) -> float:
    """The power of the run's length with which a best LR goes, from its first length to its last."""
    (first, a), *_, (last, b) = optima.items()
    return float(np.log(b.lr / a.lr) / np.log(last / first))


def readings(found: Results, arm: str) -> list[dict[int, float]]:
    """Training losses by update, of each seed; one reading in ten is kept."""
    return [{int(n): loss for n, loss in row["training"].items()} for row in found.rows if row["arm"] == arm]


def crossing(run: Mapping[int, float], floor: float, window: int = 5) -> int | None:
    """The first update from which the mean of `window` readings lies below a floor; None if it never does."""
    updates, losses = list(run), list(run.values())
    means = {updates[i]: statistics.fmean(losses[i : i + window]) for i in range(len(losses) - window + 1)}
    return next((n for n, loss in means.items() if loss < floor), None)


def corner(point: str, fixed: Collection[str]) -> str:
    """The arm in which these of Muon, AdamW and float32 have been fixed, the others are as in the failure with bf16."""
    precision = "float32" if "float32" in fixed else "bf16"
    lrs = [name for name in ("Muon", "AdamW") if name in fixed]
    if len(lrs) == 1:
        return f"failure with {lrs[0]} of {point}, {precision}"
    return f"{point if lrs else 'failure'}, {precision}"


def shares(found: Results, point: str) -> list[dict[str, float]]:
    """Nats that each fix earned from the failure in bf16 to `point` in float32, a dict a seed."""
    seeds = found.seeds(corner(point, frozenset()))
    return [shapley({fixed: -found.loss(corner(point, fixed), s) for fixed in SUBSETS}, FIXES) for s in seeds]


def blocks(run: Mapping[int, float], until: int = 125, n: int = 4) -> list[float]:
    """Mean training loss of consecutive stretches up to an update."""
    return [statistics.fmean(part) for part in np.array_split([x for step, x in run.items() if step <= until], n)]
