"""The number line of bf16 that notebook 03 plays with: where does a weight land after an update?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checks.explorables import Choice, Slider, explore
from moe_lab.health.measures import ulp
from moe_lab.show.style import BLUE, GREEN, GREY, INK, LETTERS, PALE, VERMILION, new_axes, new_figure

# (weight, update): the report's case, just lost and just kept on either side of 1, and the same update at a small weight
POSITIONS = ((1.0, -3e-4), (1.0, 0.0035), (1.0, -0.0025), (0.02, -3e-4))
MOST_TICKS = 40  # numbers of bf16 drawn one by one; where more lie in view, none is


class Sum(NamedTuple):
    """What a bf16 weight becomes when an update is added in exact arithmetic and rounded back."""

    weight: float  # the given weight, rounded to bf16
    target: float  # weight + update
    result: float  # the bf16 number nearest to it
    lost: bool
    low: float  # sums between `low` and `high` round back to the weight
    high: float


def add_in_bf16(weight: float, update: float) -> Sum:
    """A positive `weight` is rounded to bf16 first; the negative half is a mirror image."""
    kept = torch.tensor(weight, dtype=torch.float64).bfloat16()
    target = kept.double() + update
    result = target.float().bfloat16()
    neighbours = torch.nextafter(kept, torch.tensor([0.0, math.inf]).bfloat16())
    ends = ((kept.double() + neighbours.double()) / 2).tolist()
    return Sum(kept.item(), target.item(), result.item(), bool(result == kept), *ends)


def number_line(positions: Sequence[tuple[float, float]] = POSITIONS) -> tuple[Figure, str, str]:
    """One line a (weight, update): the bf16 numbers around the weight, the stretch that rounds back to it, and where the
    updated weight lands. Returns the figure, its alt text and its caption."""
    height = 0.25 + 1.3 * len(positions)
    figure = new_figure(10, height)
    lines = []
    for row, (weight, update) in enumerate(positions):
        box = (0.04, 1 - (1.3 * (row + 1) - 0.3) / height, 0.92, 0.6 / height)
        lines.append(draw_line(new_axes(figure, box, "", "", ""), add_in_bf16(weight, update), update))
    caption = (
        "The ring is the weight, the arrow its update, ticks are numbers of bf16; sums in grey round back to the ring."
    )
    return figure, "\n".join(lines), caption


def draw_line(axes: Axes, s: Sum, update: float) -> str:
    """Draw one number line; returns its sentence."""
    spacing = ulp(torch.tensor(s.weight), torch.bfloat16).item()
    reach = max(3.4 * spacing, 1.3 * abs(update))
    low, high = s.weight - reach, s.weight + reach
    axes.set(xlim=(low, high), ylim=(-0.6, 1.5), yticks=[])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.axhline(0, color=GREY, linewidth=1)
    numbers = bf16_between(low, high)
    if len(numbers) <= MOST_TICKS:
        axes.plot(numbers, [0] * len(numbers), linestyle="", marker="|", markersize=11, color=INK)
        apart = math.ceil(len(numbers) / 8)  # so that labels do not touch; the weight is one of those that have one
        axes.set_xticks(numbers[numbers.index(s.weight) % apart :: apart])
    axes.xaxis.set_major_formatter("{x:.5g}")
    axes.axvspan(s.low, s.high, ymin=0.1, ymax=0.47, color=PALE, linewidth=0)
    axes.plot(s.weight, 0, marker="o", color=BLUE, markersize=13, markerfacecolor="none", markeredgewidth=2)
    colour, marker, sign, verdict = GREEN, "s", "■", f"lands on {s.result:.6g}"
    if s.lost:
        colour, marker, sign, verdict = VERMILION, "x", "✕", "lost"
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axes.annotate("", (s.target, 1.1), (s.weight, 1.1), arrowprops=arrow)  # above the ring, and none of it in the ring
    axes.plot([s.target] * 2, [0.5, 1.1], color=colour, linewidth=1.2, linestyle=":")
    axes.plot(s.result, 0, marker=marker, color=colour, markersize=6, markeredgewidth=2, zorder=4)
    total = f"{s.weight:.6g} {'+' if update >= 0 else '−'} {abs(update):.3g} = {s.target:.7g}"
    sentence = f"{total} in exact arithmetic: {verdict}"
    axes.set_title(f"{sign} {sentence}", loc="left", fontsize=9.5, color=LETTERS[colour], fontweight="bold")
    return f"{sentence}."


def bf16_between(low: float, high: float) -> list[float]:
    """The bf16 numbers of an interval in ascending order."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()  # NaN lies in no interval
    return every[(every >= low) & (every <= high)].unique().tolist()


def explore_number_line() -> None:
    """Where does 1 − 0.0003 land? Weight, size and direction of the update can be moved."""
    explore(
        lambda weight, update, way: number_line([(weight, way * update)]),
        still=number_line,
        weight=Slider("weight", 1.0, -10, 3, 0.125, base=2),
        update=Slider("update", 3e-4, -5.5, -1, 0.02, base=10),
        way=Choice("direction", {"down": -1, "up": 1}),
    )
