"""Figures of what became of updates: which share arrived in which tensors, and what that costs in loss."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from moe_lab.health.during.rules_updates import LOST_ERROR, LOST_WARNING
from moe_lab.show.plots import dot_chart
from moe_lab.show.style import BLUE, GREY, INK, PALE, SERIES, VERMILION, new_axes, new_figure


def arrived_bars(shares: Mapping[str, float]) -> tuple[Figure, str]:
    """Realised over intended displacement by kind of tensor: 1 is all of it. The least is at the top. Signs and lines stand
    at the limits of a `health.Watch`."""
    entries = sorted((share, name) for name, share in shares.items())
    signs = {
        name: (VERMILION, "X") if s < LOST_ERROR else (INK, "^") if s < LOST_WARNING else (BLUE, "o")
        for s, name in entries
    }
    few, most = f"{100 * LOST_ERROR:g} %", f"{100 * LOST_WARNING:g} %"
    title = f"Share of the intended displacement that arrived (✕ under {few}, ▲ under {most}, ● the rest)"
    figure = dot_chart([(share, name, signs[name]) for share, name in entries], title, "realised / intended, no unit")
    for limit in (LOST_ERROR, LOST_WARNING):
        figure.axes[0].axvline(limit, color=PALE, linewidth=1, linestyle="--", zorder=0)
    lost = ", ".join(name for share, name in entries if share < LOST_ERROR) or "none"
    some = ", ".join(name for share, name in entries if LOST_ERROR <= share < LOST_WARNING) or "none"
    first = "Share of the intended displacement that arrived: " + ", ".join(f"{n} {s:.2f}" for s, n in entries) + "."
    return figure, f"{first}\nUnder {few}: {lost}. From there to {most}: {some}."


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
