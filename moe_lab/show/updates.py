"""Figures of what became of updates: which share arrived in which tensors, and what that costs in loss."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from moe_lab.show.style import GREY, INK, PALE, SERIES, VERMILION, new_axes, new_figure

FEW, MOST = 0.5, 0.95  # a health.Watch's limits: an error below the first, a warning below the second


def arrived_bars(shares: Mapping[str, float]) -> tuple[Figure, str]:
    """Realised over intended displacement by kind of tensor: 1 is all of it. The least is at the top."""
    entries = sorted(shares.items(), key=lambda entry: entry[1])
    figure = new_figure(10, 1.0 + 0.27 * max(len(entries), 1))
    height = figure.get_figheight()
    title = "Share of the intended displacement that arrived (✕ under a half, ▲ under 95 %, ● the rest)"
    box = (0.27, 0.55 / height, 0.63, 1 - 0.9 / height)
    axes = new_axes(figure, box, title, "realised / intended, no unit", "")
    axes.grid(False)
    for row, (_, share) in enumerate(entries):
        colour, marker = (VERMILION, "X") if share < FEW else (INK, "^") if share < MOST else (SERIES[0][0], "o")
        axes.plot([0, share], [row, row], color=colour, linewidth=2, alpha=0.5)
        axes.plot(share, row, marker=marker, color=colour, markersize=7)
        axes.annotate(
            f"{share:.2f}", (share, row), (8, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK
        )
    for limit in (FEW, MOST):
        axes.axvline(limit, color=PALE, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=9, color=INK)
    axes.set_ylim(max(len(entries), 1) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * max([1.0, *shares.values()]))
    few = [name for name, share in entries if share < FEW]
    some = [name for name, share in entries if FEW <= share < MOST]
    first = "Share of the intended displacement that arrived: " + ", ".join(f"{n} {s:.2f}" for n, s in entries) + "."
    second = f"Under a half: {', '.join(few) or 'none'}. From there to 95 %: {', '.join(some) or 'none'}."
    return figure, f"{first}\n{second}"


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
