"""Figures that only notebook 01 draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from checks.figures_00 import floors_of
from checks.rows import row_axes
from moe_lab.show.plots import smooth
from moe_lab.show.style import BLUE, GREY, INK, SERIES, VERMILION, label_right, new_axes, new_figure

Figures = tuple[Figure, str, str]  # a figure, what is seen, what it means
committed_floors = floors_of


def floor_steps(floors: Mapping[str, float], models: Mapping[str, float]) -> Figures:
    """Losses of tables of counts from the top down, with what each takes off the one before; models stand below."""
    rows = [(name, loss, GREY, "s") for name, loss in floors.items()] + [
        (name, loss, BLUE, "o") for name, loss in models.items()
    ]
    title = "Loss on the validation split, nats per token (■ table of counts, ● model)"
    axes = row_axes([name for name, *_ in rows], title, "nats per token, lower is better")
    values = [loss for _, loss, _, _ in rows]
    axes.set_xlim(min(values) - 0.6, max(values) + 0.45)
    drops = []
    for place, (before, after) in enumerate(pairwise(floors.values()), start=1):
        axes.plot([before, before], [place - 1, place], color=GREY, linewidth=0.8, linestyle=":")
        arrow = {"arrowstyle": "->", "color": VERMILION, "linewidth": 1.8}
        axes.annotate("", (after, place), (before, place), arrowprops=arrow)
        axes.annotate(f"−{before - after:.2f}", ((before + after) / 2, place), (0, 5), textcoords="offset points",
                      ha="center", fontsize=9, color=VERMILION, fontweight="bold")  # fmt: skip
        drops.append(before - after)
    for place, (_, loss, colour, marker) in enumerate(rows):
        axes.plot(loss, place, marker=marker, color=colour, markersize=8)
        side = {"xytext": (9, -3)} if colour == BLUE or not place else {"xytext": (-9, -3), "ha": "right"}
        axes.annotate(f"{loss:.2f}", (loss, place), textcoords="offset points", fontsize=9, color=INK, **side)
    listed = ", ".join(f"{name} {loss:.2f}" for name, loss, _, _ in rows)
    alt = f"A staircase of four tables, each further left than the one above, and a model. {listed}."
    caption = (
        "Arrows: what each table takes off the one above it. A model is worth training once it goes below the last."
    )
    return axes.figure, alt, caption


def two_curves(
    runs: Mapping[str, Sequence[float]], levels: Mapping[str, float], title: str, n_updates: int | None = None
) -> Figures:
    """Training losses by run, smoothed over a thin line of the raw ones, with level lines. `n_updates`: of the whole run,
    while it is still going."""
    figure = new_figure(10, 3.6)
    axes = new_axes(figure, (0.065, 0.15, 0.72, 0.74), title, "update", "nats per token")
    shown = [value for losses in runs.values() for value in losses] + list(levels.values())
    axes.set(xlim=(0, n_updates or max(map(len, runs.values()))), ylim=(min(shown) - 0.08, max(shown) + 0.08))
    labels, seen = [], []
    for (name, losses), (colour, line, _) in zip(runs.items(), SERIES[: len(runs)], strict=True):
        values = np.array(losses, dtype=float)
        if not len(values):
            continue
        steps, means = np.arange(1, len(values) + 1), smooth(values)
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(steps, means, color=colour, linestyle=line, linewidth=2)
        labels.append((means[-1], name, colour))
        seen.append(f"{name} from {means[0]:.2f} to {means[-1]:.2f}")
    for name, level in levels.items():
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1)
        labels.append((level, f"{name} {level:.2f}", GREY))
    label_right(axes, labels)
    alt = f"{title}: {'; '.join(seen) or 'no update yet'}. Level lines: {', '.join(levels) or 'none'}."
    return figure, alt, "Thin lines: each batch's loss. Thick lines: the mean over neighbouring updates."
