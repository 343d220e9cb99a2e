"""Figures of tables of runs: losses over a sweep with their spread, and a surface over two learning rates.

Each function returns the figure and a text description made from the same numbers, for whoever cannot see the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.show.style import (
    BLUE,
    GREY,
    INK,
    SERIES,
    VERMILION,
    draw_floors,
    label_right,
    new_axes,
    new_figure,
)

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
    figure, width = new_figure(10, 3.9), 0.9 / len(panels)
    every = np.concatenate([[*sweep.values()] for methods in panels.values() for sweep in methods.values()])
    every = every[np.isfinite(every)]
    lines = []
    for i, (title, methods) in enumerate(panels.items()):
        unit = "nats per token" if i == 0 else ""  # all panels share its limits
        axes = new_axes(figure, (0.06 + i * width, 0.14, width - 0.15, 0.76), title, "learning rate", unit)
        axes.set_xscale("log")
        axes.set_ylim(every.min() - 0.15, every.max() + 0.15)
        labels = draw_floors(axes, floors or {})
        for (name, sweep), style in zip(methods.items(), SERIES[: len(methods)], strict=True):
            lrs, (colour, line, marker) = sorted(sweep), style
            losses = np.array([sweep[lr] for lr in lrs], dtype=float)  # (LRs, seeds)
            losses[np.isinf(losses)] = math.nan
            means = losses.mean(axis=1)  # NaN where a seed diverged
            axes.fill_between(lrs, losses.min(axis=1), losses.max(axis=1), color=colour, alpha=0.2, linewidth=0)
            axes.plot(lrs, means, color=colour, linestyle=line, linewidth=1.6)
            axes.plot(lrs, losses, linestyle="none", marker=marker, markersize=3.5, color=colour)
            last = means[-1] if math.isfinite(means[-1]) else every.max()
            labels.append((last, name, colour))
            best = np.nanargmin(means)
            lines.append(f"{title}, {name}: best {means[best]:.3f} at {lrs[best]:g}")
        label_right(axes, labels)
    return figure, "Validation loss in nats per token over the learning rate.\n" + "; ".join(lines) + "."


def lr_surface(panels: Mapping[str, Surface]) -> tuple[Figure, str]:
    """Contours of a fitted loss over Muon's and AdamW's learning rate within the box of the measured points, these points
    with their losses, the optimum with its intervals, and named runs, which may lie outside of the box."""
    figure, width = new_figure(10, 4.9), 0.96 / len(panels)
    lines = []
    for i, (title, surface) in enumerate(panels.items()):
        box = (0.07 + i * width, 0.12, width - 0.1, 0.79)
        axes = new_axes(figure, box, title, "Muon's learning rate", "AdamW's learning rate")
        axes.grid(False)
        axes.set(xscale="log", yscale="log")
        draw_surface(axes, surface)
        (a, b), ((low_a, high_a), (low_b, high_b)) = surface.optimum, surface.intervals
        muon, adamw = f"Muon {a:.2g} ({low_a:.2g} to {high_a:.2g})", f"AdamW {b:.2g} ({low_b:.2g} to {high_b:.2g})"
        marks = [f"{name} {loss:.2f} at {x:g} and {y:g}" for name, (x, y, loss) in surface.marks.items()]
        lines.append("; ".join([f"{title}: fitted optimum at {muon} and {adamw}", *marks]))
    return figure, "Validation loss in nats per token over both learning rates.\n" + ". ".join(lines) + "."


def draw_surface(axes: Axes, surface: Surface) -> None:
    tested = np.log10(list(surface.points))  # (n, 2)
    a, b = np.linspace(tested.min(axis=0), tested.max(axis=0), 60).T
    grid = np.stack(np.meshgrid(a, b), axis=-1)  # (60, 60, 2)
    fitted = surface.predict(grid.reshape(-1, 2)).reshape(60, 60)
    levels = math.floor(fitted.min() * 10) / 10 + np.array([0.1, 0.2, 0.4, 0.8, 1.2, 1.6])
    lines = axes.contour(10**a, 10**b, fitted, levels=levels, colors=GREY, linewidths=0.8)
    axes.clabel(lines, fmt="%.1f", fontsize=7)
    points = [(*lrs, f"{loss:.2f}", BLUE, "o") for lrs, loss in surface.points.items()]
    points += [(x, y, f"{name} {loss:.2f}", VERMILION, "s") for name, (x, y, loss) in surface.marks.items()]
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}  # lines must not run through numbers
    for x, y, text, colour, marker in points:
        axes.plot(x, y, color=colour, marker=marker, markersize=5)
        style = {"fontsize": 7.5, "color": colour, "bbox": paper, "zorder": 4}
        axes.annotate(text, (x, y), (6, 4), textcoords="offset points", **style)
    best_a, best_b = surface.optimum
    axes.plot(surface.intervals[0], [best_b, best_b], color=INK, linewidth=1.2)
    axes.plot([best_a, best_a], surface.intervals[1], color=INK, linewidth=1.2)
    axes.plot(best_a, best_b, marker="X", color=INK, markersize=8)
    x, y, *_ = zip(*points, strict=True)
    axes.set_xlim(min(x) / 1.6, max(x) * 4)  # room for the numbers right of the points
    axes.set_ylim(min(y) / 1.6, max(y) * 1.8)
