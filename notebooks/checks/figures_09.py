"""Figures that notebook 09 alone draws. Each function returns the figure, its alt text and its caption, for `show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from moe_lab.plan import Memory
from moe_lab.show.style import BLUE, GREEN, GREY, INK, VERMILION, label_right, new_axes, new_figure

Drawn = tuple[Figure, str, str]
COLOURS = {"weights": BLUE, "gradients": GREEN, "optimizer": VERMILION, "activations": GREY, "logits": INK}


def memory_bars(plans: Mapping[str, Memory]) -> Drawn:
    """A bar a number format, by kind of memory, with the sizes of two cards."""
    figure = new_figure(10, 3.4)
    axes = new_axes(figure, (0.2, 0.16, 0.66, 0.74), "Memory at the fullest moment of an update", "GB", "")
    for place, held in enumerate(plans.values()):
        left = 0.0
        for number, (kind, colour) in enumerate(COLOURS.items()):
            size = getattr(held, kind) / 1e9
            hatch = ("", "//", "..", "xx", "")[number]
            axes.barh(
                place, size, left=left, color=colour, hatch=hatch, edgecolor="white", label=None if place else kind
            )
            left += size
        axes.annotate(
            f"{sum(held) / 1e9:.1f}",
            (left, place),
            (6, -4),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.axvline(24, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(plans)), list(plans))
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False)
    listed = ", ".join(f"{name} {sum(held) / 1e9:.1f} GB" for name, held in plans.items())
    return (
        figure,
        f"Planned memory: {listed}.",
        "Dashed: a card of 24 GB. Each format with blocks kept and computed again.",
    )


def first_losses(runs: Mapping[int, Sequence[float]], expected: Mapping[int, float]) -> Drawn:
    """Loss of a token over the first updates, a line a width; crosses are what was expected of the first."""
    figure = new_figure(10, 3.6)
    axes = new_axes(
        figure, (0.065, 0.15, 0.66, 0.76), "Loss of the four heads, without the routers' terms", "update", "nats"
    )
    labels = []
    for (width, losses), colour, line in zip(
        runs.items(), (GREY, GREEN, BLUE, VERMILION), (":", "-.", "--", "-"), strict=False
    ):
        axes.plot(range(1, len(losses) + 1), losses, line, color=colour, marker="o", markersize=3, linewidth=1.4)
        axes.plot([1], [expected[width]], color=colour, marker="x", markersize=9)
        labels.append((losses[-1], f"width {width}", colour))
    axes.locator_params(axis="x", integer=True)
    label_right(axes, labels)
    listed = ", ".join(f"width {w} {losses[0]:.2f} (expected {expected[w]:.2f})" for w, losses in runs.items())
    return figure, f"First losses: {listed}.", "Crosses: ln V + var/2, what each was expected to begin at."


def shares_by_width(shares: Mapping[str, Mapping[int, float]], foretold: Mapping[str, float], mark: int) -> Drawn:
    """Share of the intended displacement that arrived after `mark` updates, over width, a line a kind of tensor; rings at the
    last width are what was `foretold` of it."""
    figure = new_figure(10, 3.6)
    title = f"What arrives after {mark} updates"
    axes = new_axes(figure, (0.065, 0.16, 0.62, 0.74), title, "width, log scale", "share")
    axes.set_xscale("log")
    labels = []
    colours = (VERMILION, BLUE, GREEN, GREY, INK)
    for (kind, by_width), colour, line in zip(shares.items(), colours, ("-", "--", "-.", ":", "-"), strict=False):
        axes.plot(list(by_width), list(by_width.values()), color=colour, linestyle=line, marker="o", markersize=4)
        axes.plot([max(by_width)], [foretold[kind]], "o", color=colour, fillstyle="none", markersize=10)
        labels.append((list(by_width.values())[-1], kind, colour))
    widths = list(next(iter(shares.values())))
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(-0.05, 1.05)
    label_right(axes, labels)
    ends = ", ".join(
        f"{kind} {list(by.values())[-1]:.2f} (foretold {foretold[kind]:.2f})" for kind, by in shares.items()
    )
    caption = "Rings: what was foretold of the true width. An element moves as far at each width as there."
    return figure, f"Share that arrived at the true width: {ends}.", caption
