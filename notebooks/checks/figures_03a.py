"""Figures that notebook 03a alone draws. Each function returns the figure, its alt text and its caption, for `show`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from checks.figures_00 import curve
from checks.rows import row_axes
from moe_lab.failures.results import Results
from moe_lab.health.during.rules_updates import LOST_ERROR, LOST_WARNING
from moe_lab.show import style
from moe_lab.show.style import draw_floors, label_right, new_axes, new_figure

Drawn = tuple[Figure, str, str]
Spread = tuple[float, float]  # mean, standard deviation over seeds (NaN for a single one)


def curves(result: Results, floors: Mapping[str, float]) -> Drawn:
    """Training loss of the three points, in float32 and bf16, mean over seeds, with the tables' losses."""
    figure = new_figure(10, 4.2)
    axes = new_axes(figure, (0.065, 0.13, 0.66, 0.79), "Training loss, mean of 3 seeds", "update", "nats per token")
    labels, seen = [], []
    for point, colour in (("failure", style.VERMILION), ("cure", style.BLUE), ("centre", style.GREEN)):
        ends = []
        for parameters, line in (("float32", "-"), ("bf16", "--")):
            steps, losses = curve(result, f"{point}, {parameters}")
            means = losses.mean(axis=0)
            axes.plot(steps, means, color=colour, linestyle=line, linewidth=1.7)
            labels.append((means[-1], f"{point}, {parameters} {means[-1]:.2f}", colour))
            ends.append(f"{means[-1]:.2f} in {parameters}")
        seen.append(f"{point} ends at {' and '.join(ends)}")
    axes.set_ylim(4.2, 7.9)
    label_right(axes, [*labels, *draw_floors(axes, floors)])
    caption = "Solid: float32 parameters. Dashed: bf16. Grey: the losses of tables of counts (notebook 01)."
    return figure, "Training loss over 200 updates. " + "; ".join(seen) + ".", caption


def cost_over_width(costs: Mapping[int, Spread]) -> Drawn:
    """What bf16 costs at the cure's learning rates, by width; a hollow point is a single seed."""
    figure = new_figure(10, 3.2)
    title = "What bf16 parameters cost at the report's cure"
    axes = new_axes(figure, (0.065, 0.17, 0.6, 0.72), title, "width, log scale", "nats per token")
    axes.set_xscale("log")
    axes.plot(list(costs), [mean for mean, _ in costs.values()], color=style.BLUE, linewidth=1, linestyle=":")
    seen = []
    for width, (mean, sd) in costs.items():
        alone = math.isnan(sd)
        face = "white" if alone else style.BLUE
        axes.errorbar(width, mean, 0 if alone else sd, marker="o", color=style.BLUE, markerfacecolor=face, capsize=3)
        axes.annotate(f"{mean:.3f}", (width, mean), (8, -10), textcoords="offset points", fontsize=9, color=style.INK)
        seen.append(f"{mean:.3f} at {width}" + (" (one seed)" if alone else f" ± {sd:.3f}"))
    axes.set_xticks(list(costs), [str(width) for width in costs])
    axes.minorticks_off()
    axes.set_ylim(0, 1.2 * max(mean for mean, _ in costs.values()))
    caption = (
        "Filled: four layers, 200 updates, 3 seeds with their spread. Hollow: one block, 150 updates, one seed. It points "
        "upwards; the points differ in more than width."
    )
    return figure, "Nats that bf16 costs: " + ", ".join(seen) + ".", caption


def arrived_bars(shares: Mapping[str, float]) -> Drawn:
    """Realised over intended displacement by kind of tensor, the least at the top. Signs and lines stand at the limits of a
    `health.Watch`."""
    entries = sorted((share, name) for name, share in shares.items())
    lost = [name for share, name in entries if share < LOST_ERROR]
    some = [name for share, name in entries if LOST_ERROR <= share < LOST_WARNING]
    signs = dict.fromkeys(lost, (style.VERMILION, "X")) | dict.fromkeys(some, (style.INK, "^"))
    few, most = f"{100 * LOST_ERROR:g} %", f"{100 * LOST_WARNING:g} %"
    title = f"Share of the intended displacement that arrived (✕ under {few}, ▲ under {most}, ● the rest)"
    axes = row_axes([name for _, name in entries], title, "realised / intended, no unit")
    for place, (share, name) in enumerate(entries):
        colour, marker = signs.get(name, (style.BLUE, "o"))
        axes.plot([0, share], [place, place], color=colour, linewidth=2, alpha=0.4)
        axes.plot(share, place, marker=marker, color=colour, markersize=8, clip_on=False)
        axes.annotate(f"{share:.2f}", (share, place), (9, -3), textcoords="offset points", fontsize=9, color=style.INK)
    axes.set_xlim(0, 1.1 * max([1.0, *shares.values()]))
    for limit in (LOST_ERROR, LOST_WARNING):
        axes.axvline(limit, color=style.GREY, linewidth=0.5, linestyle="--", zorder=0)
    listed = ", ".join(f"{name} {share:.2f}" for share, name in entries)
    caption = f"Lines stand where a watch begins to warn, {most}, and to call it an error, {few}."
    return axes.figure, f"Share of the intended displacement that arrived: {listed}.", caption


REMEDIES = {  # as a reader knows them, by the runs' names
    "bf16": "bf16, no remedy",
    "masters": "float32 masters",
    "kahan": "Kahan summation",
    "stochastic": "stochastic rounding",
    "norm_lr_x10": "ten times the norms' rate",
    "norms_at_0.1": "norms that start at 0.1",
}


def cost_dots(costs: Mapping[str, Spread], linear_to: float = 0.1) -> Drawn:
    """Nats above float32 by remedy, with their spread over seeds; logarithmic beyond `linear_to`."""
    unit = f"nats per token (logarithmic beyond {linear_to:g})"
    costs = {REMEDIES.get(name, name): spread for name, spread in costs.items()}
    axes = row_axes(list(costs), "Validation loss above float32, mean and ± 1 SD over 3 seeds", unit)
    axes.set_xscale("symlog", linthresh=linear_to)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(0, color=style.GREY, linewidth=1, linestyle="--")
    for place, (mean, sd) in enumerate(costs.values()):
        axes.errorbar(mean, place, xerr=sd, color=style.BLUE, marker="o", markersize=7, capsize=3)
        axes.annotate(f"{mean:+.3f}", (mean, place), (9, -3), textcoords="offset points", fontsize=9, color=style.INK)
    listed = ", ".join(f"{name} {mean:+.3f} ± {sd:.3f}" for name, (mean, sd) in costs.items())
    return axes.figure, f"Nats above float32: {listed}.", "On the dashed line a remedy gives back all that bf16 costs."


def given_back(kinds: Mapping[str, Spread], whole: Spread) -> Drawn:
    """What each kind of tensor gives back when it alone stays in float32, beside what bf16 costs in all."""
    rows = {"all: what bf16 costs": whole} | {f"{kind} in float32": spread for kind, spread in kinds.items()}
    axes = row_axes(list(rows), "What comes back, mean and ± 1 SD over 3 seeds", "nats per token")
    axes.axvline(0, color=style.GREY, linewidth=1, linestyle="--")
    for place, (mean, sd) in enumerate(rows.values()):
        colour, marker = (style.INK, "s") if place == 0 else (style.BLUE, "o")
        axes.errorbar(mean, place, xerr=sd, color=colour, marker=marker, markersize=7, capsize=3)
        axes.annotate(f"{mean:.4f}", (mean, place), (9, 6), textcoords="offset points", fontsize=9, color=style.INK)
    listed = ", ".join(f"{name} {mean:.4f} ± {sd:.4f}" for name, (mean, sd) in rows.items())
    return axes.figure, f"Nats: {listed}.", "The square is the whole cost; a dot is what one kind alone gives back."


def freezing(moving: Sequence[float], rates: Sequence[float]) -> Drawn:
    """The share of the norm weights that each update moves, and AdamW's learning rate, over the updates."""
    figure, updates, limit = new_figure(10, 3.2), range(1, len(moving) + 1), 2**-9 / 1.165
    share = new_axes(figure, (0.065, 0.17, 0.36, 0.7), "Norm weights that an update moves", "update", "share")
    rate = new_axes(figure, (0.52, 0.17, 0.3, 0.7), "AdamW's learning rate", "update", "log scale")
    share.step(updates, moving, where="mid", color=style.VERMILION, linewidth=1.6)
    share.set_ylim(-0.02, 1.02)
    positive = [value or math.nan for value in rates]
    rate.semilogy(updates, positive, color=style.BLUE, linewidth=1.6)
    rate.axhline(limit, color=style.GREY, linestyle="--", linewidth=1)
    rate.set_ylim(limit / 20, 2 * max(rates))
    look = {"fontsize": 8.5, "color": style.GREY, "va": "center", "transform": rate.get_yaxis_transform()}
    rate.text(1.02, limit, f"{limit:.2g}: below it no\nweight of 1 can move", **look)
    last = max((update for update, value in zip(updates, moving, strict=True) if value > 0), default=0)
    alt = f"At first up to {max(moving):.0%} of the norm weights move in an update; the last that moves any is update {last}"
    return (
        figure,
        f"{alt} of {len(moving)}.",
        "The run is healthy by the report's test, and its norms are frozen at its end.",
    )
