"""Figures of notebook 04a: losses of sick runs beside the floors, a loss over both learning rates, and shares of fixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checks.rows import row_axes
from moe_lab.show import style
from moe_lab.show.style import draw_floors, label_right, new_axes, new_figure

Shown = tuple[Figure, str, str]


class Surface(NamedTuple):
    """One panel of `lr_surface`. Learning rates are plain numbers, losses nats per token."""

    points: Mapping[tuple[float, float], float]  # measured: (Muon's LR, AdamW's LR) → loss
    predict: Callable[[np.ndarray], np.ndarray]  # fitted loss (n,) at points (n, 2) of log10 LRs
    optimum: tuple[float, float]  # LRs of the fit's least loss
    intervals: tuple[tuple[float, float], tuple[float, float]]  # of the optimum's LRs, Muon's then AdamW's
    marks: Mapping[str, tuple[float, float, float]]  # named runs: two LRs and loss; they may lie outside of the fit


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Mapping[int, float]]]], floors: Mapping[str, float], caption: str
) -> Shown:
    """Training losses over updates, a line a run's mean over seeds with the band of its seeds, a panel a title."""
    figure, width = new_figure(10, 4.2), 0.92 / len(panels)
    every = [loss for runs in panels.values() for seeds in runs.values() for run in seeds for loss in run.values()]
    said = []
    for i, (title, runs) in enumerate(panels.items()):
        unit = "training loss, nats per token" if i == 0 else ""
        axes = new_axes(figure, (0.06 + i * width, 0.13, width - 0.17, 0.78), title, "update", unit)
        axes.set_ylim(min(min(every), floors["trigram"]) - 0.1, max(every) + 0.1)
        labels = draw_floors(axes, floors)
        for (name, seeds), (colour, line, _) in zip(runs.items(), [*style.SERIES, (style.INK, "-", "v")], strict=False):
            updates = list(seeds[0])
            losses = np.array([list(run.values()) for run in seeds])
            axes.fill_between(updates, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            mean = losses.mean(axis=0)
            axes.plot(updates, mean, color=colour, linestyle=line, linewidth=1.8)
            labels.append((mean[-1], name, colour))
            said.append(f"{title}, {name}: {mean[0]:.2f} at update {updates[0]}, {mean[-1]:.2f} at {updates[-1]}")
        label_right(axes, labels)
    return figure, "Training loss over updates, with lines at the tables' losses. " + "; ".join(said) + ".", caption


def live_pair(losses: Mapping[str, Sequence[float]], floors: Mapping[str, float]) -> Shown:
    """The losses of two runs from their first update on."""
    runs = {name: [dict(enumerate(values, 1))] for name, values in losses.items()}
    return curves({"Side by side": runs}, floors, "Same start values, same data, same budget; one number differs.")


def share_bars(shares: Mapping[str, Mapping[str, tuple[float, float]]]) -> Shown:
    """A stacked bar a row: what each fix earned, (mean, SD over seeds) in nats."""
    axes = row_axes(list(shares), "What each fix earned, averaged over the orders of fixing", "nats per token")
    said = []
    hatches = ("", "///", "...")
    for y, (row, parts) in enumerate(shares.items()):
        left = 0.0
        for (name, (mean, _)), (colour, *_), hatch in zip(parts.items(), style.SERIES, hatches, strict=False):
            look = {"color": colour, "alpha": 0.75, "hatch": hatch, "edgecolor": "white"}
            axes.barh(y, mean, left=left, height=0.6, label=name if y == 0 else None, **look)
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
            middle = {"ha": "center", "va": "center", "fontsize": 7.5, "color": style.INK, "bbox": paper}
            axes.text(left + mean / 2, y, f"{mean:.2f}", **middle)
            left += mean
        said.append(f"{row}: " + ", ".join(f"{name} {mean:.2f} ± {sd:.2f}" for name, (mean, sd) in parts.items()))
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9)
    alt = "Stacked bars, nats per token, mean and SD over three seeds. " + "; ".join(said) + "."
    return axes.figure, alt, "AdamW's learning rate earns most in every row; Muon's part grows with the width."


def lr_surface(panels: Mapping[str, Surface]) -> Shown:
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
    alt = "Validation loss in nats per token over both learning rates. " + ". ".join(lines) + "."
    return (
        figure,
        alt,
        "Dots: one run each, with its loss. Cross: the fitted optimum and its 95 % intervals. Darker: a higher fitted loss.",
    )


def draw_surface(axes: Axes, surface: Surface) -> None:
    tested = np.log10(list(surface.points))  # (n, 2)
    a, b = np.linspace(tested.min(axis=0), tested.max(axis=0), 60).T
    grid = np.stack(np.meshgrid(a, b), axis=-1)  # (60, 60, 2)
    fitted = surface.predict(grid.reshape(-1, 2)).reshape(60, 60)
    levels = math.floor(fitted.min() * 10) / 10 + np.array([0, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4])
    axes.contourf(10**a, 10**b, fitted, levels=levels, cmap="Greys", alpha=0.45, extend="max")
    points = [(*lrs, f"{loss:.2f}", style.BLUE, "o") for lrs, loss in surface.points.items()]
    points += [(x, y, f"{name} {loss:.2f}", style.VERMILION, "s") for name, (x, y, loss) in surface.marks.items()]
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}  # lines must not run through numbers
    for x, y, text, colour, marker in points:
        axes.plot(x, y, color=colour, marker=marker, markersize=5)
        look = {"fontsize": 7.5, "color": style.INK, "bbox": paper, "zorder": 4}
        axes.annotate(text, (x, y), (6, 4), textcoords="offset points", **look)
    best_a, best_b = surface.optimum
    for thickness, colour in ((3, "white"), (1.4, style.INK)):
        axes.plot(surface.intervals[0], [best_b, best_b], color=colour, linewidth=thickness)
        axes.plot([best_a, best_a], surface.intervals[1], color=colour, linewidth=thickness)
    axes.plot(best_a, best_b, marker="X", color=style.INK, markersize=8)
    x, y, *_ = zip(*points, strict=True)
    axes.axhline(min(y), color=style.GREY, linewidth=0)
    axes.set_xlim(min(x) / 1.6, max(x) * 4)  # room for the numbers right of the points
    axes.set_ylim(min(y) / 1.6, max(y) * 1.8)
