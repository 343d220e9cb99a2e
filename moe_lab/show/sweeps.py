"""Figures of tables of runs: losses over a sweep with their spread, a surface over two learning rates, and differences.

Each function returns the figure and a text description made from the same numbers, for whoever cannot see the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.show.style import BLUE, GREY, INK, SERIES, VERMILION, label_right, new_axes, new_figure

Sweep = Mapping[float, Sequence[float]]  # learning rate → losses, one a seed; infinite where a run diverged


class Surface(NamedTuple):
    """One panel of `lr_surface`. Learning rates are plain numbers, losses nats per token."""

    points: Mapping[tuple[float, float], float]  # measured: (Muon's LR, AdamW's LR) → loss
    predict: Callable[[np.ndarray], np.ndarray]  # fitted loss (n,) at points (n, 2) of log10 LRs
    optimum: tuple[float, float]  # LRs of the fit's least loss
    intervals: tuple[tuple[float, float], tuple[float, float]]  # of the optimum's LRs, Muon's then AdamW's
    marks: Mapping[str, tuple[float, float, float]]  # named runs: two LRs and loss; they may lie outside of the fit


def lr_sweep(
    panels: Mapping[str, Mapping[str, Sweep]], floors: Mapping[str, float] | None = None
) -> tuple[Figure, str]:
    """Mean loss over the learning rate, on a log scale, a line a method and a panel a setting; the band reaches from the
    best seed to the worst. A dot is one run. Lines of `floors`, nats per token by name, are drawn where they fit."""
    figure = new_figure(10, 3.9)
    width = 0.9 / len(panels)
    finite = [x for p in panels.values() for s in p.values() for row in s.values() for x in row if math.isfinite(x)]
    limits = min(finite) - 0.15, max(finite) + 0.15
    lines = []
    for i, (title, methods) in enumerate(panels.items()):
        unit = "nats per token" if i == 0 else ""  # all panels share its limits
        axes = new_axes(figure, (0.06 + i * width, 0.14, width - 0.15, 0.76), title, "learning rate", unit)
        axes.set_xscale("log")
        axes.set_ylim(*limits)
        labels = []
        for (name, sweep), (colour, line, marker) in zip(methods.items(), SERIES, strict=False):
            draw_sweep(axes, sweep, colour, line, marker)
            last = np.mean(sweep[max(sweep)])
            labels.append((last if math.isfinite(last) else limits[1], name, colour))
            loss, best = min((float(np.mean(losses)), lr) for lr, losses in sweep.items())
            lines.append(f"{title}, {name}: best {loss:.3f} at {best:g}")
        for name, loss in (floors or {}).items():
            if limits[0] < loss < limits[1]:
                axes.axhline(loss, color=GREY, linestyle=":", linewidth=1)
                labels.append((loss, f"{name} {loss:.2f}", GREY))
        label_right(axes, labels)
    return figure, "Validation loss in nats per token over the learning rate.\n" + "; ".join(lines) + "."


def draw_sweep(axes: Axes, sweep: Sweep, colour: str, line: object, marker: str) -> None:
    lrs = sorted(sweep)
    rows = [[loss if math.isfinite(loss) else math.nan for loss in sweep[lr]] for lr in lrs]
    means = [math.nan if np.isnan(row).any() else float(np.mean(row)) for row in rows]
    axes.fill_between(lrs, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.2, linewidth=0)
    axes.plot(lrs, means, color=colour, linestyle=line, linewidth=1.6)
    for lr, row in zip(lrs, rows, strict=True):
        axes.plot([lr] * len(row), row, linestyle="none", marker=marker, markersize=3.5, color=colour)


def lr_surface(panels: Mapping[str, Surface]) -> tuple[Figure, str]:
    """Contours of a fitted loss over Muon's and AdamW's learning rate within the box of the measured points, these points
    with their losses, the optimum with its intervals, and named runs, which may lie outside of the box."""
    figure = new_figure(10, 4.9)
    width = 0.96 / len(panels)
    lines = []
    for i, (title, surface) in enumerate(panels.items()):
        box = (0.07 + i * width, 0.12, width - 0.1, 0.79)
        axes = new_axes(figure, box, title, "Muon's learning rate", "AdamW's learning rate")
        axes.grid(False)
        axes.set(xscale="log", yscale="log")
        draw_surface(axes, surface)
        marks = [f"{name} {loss:.2f} at {a:g} and {b:g}" for name, (a, b, loss) in surface.marks.items()]
        (low_a, high_a), (low_b, high_b) = surface.intervals
        optimum = f"Muon {surface.optimum[0]:.2g} ({low_a:.2g} to {high_a:.2g})"
        optimum += f" and AdamW {surface.optimum[1]:.2g} ({low_b:.2g} to {high_b:.2g})"
        lines.append("; ".join([f"{title}: fitted optimum at {optimum}", *marks]))
    return figure, "Validation loss in nats per token over both learning rates.\n" + ". ".join(lines) + "."


def draw_surface(axes: Axes, surface: Surface) -> None:
    tested = np.log10(list(surface.points))  # (n, 2)
    a, b = np.linspace(tested.min(axis=0), tested.max(axis=0), 60).T
    grid = np.stack(np.meshgrid(a, b), axis=-1)  # (60, 60, 2)
    fitted = surface.predict(grid.reshape(-1, 2)).reshape(60, 60)
    low = math.floor(fitted.min() * 10) / 10
    levels = [low + step for step in (0.1, 0.2, 0.4, 0.8, 1.2, 1.6)]
    lines = axes.contour(10**a, 10**b, fitted, levels=levels, colors=GREY, linewidths=0.8)
    axes.clabel(lines, fmt="%.1f", fontsize=7)
    for point, loss in surface.points.items():
        draw_point(axes, point, f"{loss:.2f}", color=BLUE, marker="o", markersize=4)
    for name, (*point, loss) in surface.marks.items():
        draw_point(axes, point, f"{name} {loss:.2f}", color=VERMILION, marker="s", markersize=6)
    (low_a, high_a), (low_b, high_b) = surface.intervals
    best_a, best_b = surface.optimum
    axes.plot([low_a, high_a], [best_b, best_b], color=INK, linewidth=1.2)
    axes.plot([best_a, best_a], [low_b, high_b], color=INK, linewidth=1.2)
    axes.plot(best_a, best_b, marker="X", color=INK, markersize=8)
    x, y = zip(*surface.points, *(mark[:2] for mark in surface.marks.values()), strict=True)
    axes.set_xlim(min(x) / 1.6, max(x) * 4)  # room for the numbers right of the points
    axes.set_ylim(min(y) / 1.6, max(y) * 1.8)


def draw_point(axes: Axes, point: Sequence[float], text: str, color: str, **style: Any) -> None:
    axes.plot(*point, color=color, **style)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}  # lines must not run through numbers
    axes.annotate(text, point, (6, 4), textcoords="offset points", fontsize=7.5, color=color, bbox=paper, zorder=4)


def cost_dots(
    costs: Mapping[str, Mapping[str, tuple[float, float]]], against: str, linear_to: float | None = None
) -> tuple[Figure, str]:
    """Differences in loss, (mean, SD over seeds) in nats, from a common reference: row → series → difference.

    With `linear_to` the axis is linear up to that many nats and logarithmic beyond, for rows of very different size.
    """
    series = list(dict.fromkeys(name for row in costs.values() for name in row))
    figure = new_figure(10, 1.1 + 0.42 * max(len(costs), 1))
    height = figure.get_figheight()
    title = f"Validation loss above {against}, mean and ± 1 SD over seeds"
    unit = "nats per token" + (f" (logarithmic beyond {linear_to:g})" if linear_to else "")
    axes = new_axes(figure, (0.22, 0.6 / height, 0.6, 1 - 0.95 / height), title, unit, "")
    axes.grid(False)
    if linear_to:
        axes.set_xscale("symlog", linthresh=linear_to)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
    for i, name in enumerate(series):
        colour, _, marker = SERIES[i % len(SERIES)]
        for row, values in enumerate(costs.values()):
            if name in values:
                place = row + 0.22 * (i - (len(series) - 1) / 2)
                mean, sd = values[name]
                axes.errorbar(mean, place, xerr=sd, color=colour, marker=marker, markersize=7, capsize=3, linewidth=1.4)
        axes.text(1.03, 0.9 - 0.16 * i, f"{'●■▲◆▼✚'[i % 6]} {name}", color=colour, fontsize=9, transform=axes.transAxes)
    axes.set_yticks(range(len(costs)), list(costs), fontsize=9, color=INK)
    axes.set_ylim(max(len(costs), 1) - 0.5, -0.5)
    lines = [
        f"{row}: " + ", ".join(f"{name} {mean:+.3f} ± {sd:.3f}" for name, (mean, sd) in values.items())
        for row, values in costs.items()
    ]
    return figure, f"Nats above {against}. " + "; ".join(lines) + "."
