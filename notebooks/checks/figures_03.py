"""Figures that notebook 03 alone draws. Each function returns the figure, its alt text and its caption, for `show`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from checks.explorables import Choice, Slider, explore
from checks.explore_03 import bf16_between
from moe_lab.optim.rounding import stochastic_round
from moe_lab.show.style import GREY, PALE, SERIES, draw_floors, label_right, new_axes, new_figure

N_UPDATES = 100  # of the explorable's weight
LOWEST = -16  # powers of two that the histogram shows; what is smaller counts as this
Drawn = tuple[Figure, str, str]


def pair_figure(runs: Mapping[str, Any]) -> Drawn:
    """Loss and furthest norm weight of runs side by side, so far, and nothing of what a watch has found."""
    figure, labels, seen = new_figure(10, 3.3), ([], []), []
    loss = new_axes(figure, (0.065, 0.16, 0.3, 0.73), "Training loss", "update", "nats per token")
    norm = new_axes(figure, (0.52, 0.16, 0.25, 0.73), "Norm weights: largest |w − 1|", "update", "no unit")
    for (name, run), (colour, line, _), width in zip(runs.items(), SERIES, (3.5, 1.5), strict=False):
        steps = [row["step"] for row in run.rows]
        for axes, field, texts in ((loss, "loss", labels[0]), (norm, "furthest", labels[1])):
            values = [row[field] for row in run.rows]
            axes.plot(steps, values, color=colour, linestyle=line, linewidth=width)
            texts += [(value, f"{name} {value:.3f}", colour) for value in values[-1:]]
        last = run.rows[-1]
        seen.append(f"{name}: loss {last['loss']:.3f}, furthest norm weight {last['furthest']:.4f} from 1")
    floors = next(iter(runs.values())).trainer.floors
    loss.set_ylim(min(text[0] for text in labels[0]) - 0.15, floors["uniform"] + 0.25)
    labels[0].extend(draw_floors(loss, floors))
    norm.set_ylim(bottom=-1e-4)
    label_right(loss, labels[0])
    label_right(norm, labels[1])
    caption = "Both runs share start values, data and order; they differ in one line of code."
    return figure, f"After {last['step']} updates, " + "; ".join(seen) + ".", caption


def norm_paths(panels: Mapping[str, Mapping[str, list[float]]]) -> Drawn:
    """One norm weight over the updates in several runs, a panel a weight; pale lines are the numbers of bf16."""
    figure, width, seen = new_figure(10, 3.3), 0.9 / len(panels), []
    every = [value for paths in panels.values() for path in paths.values() for value in path]
    low, high = min(every) - 0.002, max(*every, 1.009) + 0.001
    for i, (title, paths) in enumerate(panels.items()):
        box = (0.065 + i * width * 1.05, 0.16, width - 0.18, 0.73)
        axes = new_axes(figure, box, title, "update", "weight" if i == 0 else "")
        axes.grid(False)
        axes.set_ylim(low, high)
        for number in bf16_between(low, high):
            axes.axhline(number, color=PALE, linewidth=0.8, zorder=0)
        labels = []
        for (name, path), (colour, line, _) in zip(paths.items(), SERIES, strict=False):
            axes.step(range(len(path)), path, where="post", color=colour, linestyle=line, linewidth=1.6)
            labels.append((path[-1], f"{name} {path[-1]:.4f}", colour))
        label_right(axes, labels)
        seen.append(f"{title}: " + ", ".join(f"{name} ends at {path[-1]:.4f}" for name, path in paths.items()))
    caption = "Pale lines are the numbers that bf16 has; below 1 they lie twice as close as above."
    return figure, ". ".join(seen) + ".", caption


def ulp_histogram(ratios: Mapping[str, Tensor]) -> Drawn:
    """How the size of one update compares with the gap of bf16 at its weight, by kind of tensor, on a log scale."""
    figure, seen, bins = new_figure(10, 3.2), [], torch.linspace(LOWEST, 6, 89)
    for place, ((name, ratio), (colour, _, _)) in enumerate(zip(ratios.items(), SERIES, strict=False)):
        under = (ratio < 0.5).float().mean().item()
        box, y = (0.07 + 0.237 * place, 0.17, 0.19, 0.66), "share of the elements" if place == 0 else ""
        axes = new_axes(figure, box, f"{name}\n{under:.0%} under ½", "|Δ| / ulp, log scale", y)
        axes.axvspan(2.0**LOWEST, 0.5, color=PALE, alpha=0.6, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xlim(2.0**LOWEST, 2.0**6)
        shares = torch.histogram(ratio.log2().clamp(LOWEST, 6), bins).hist / len(ratio)
        axes.stairs(shares.numpy(), 2 ** bins.numpy(), color=colour, linewidth=1.6)
        axes.set_ylim(bottom=0)
        seen.append(f"{name} {under:.0%}")
    caption = (
        "|Δ| / ulp is one update over the gap between bf16 numbers at its weight; each panel has a scale of its own. Left of ½, in "
        "grey, an update is rounded away; right of it, it arrives, rounded to whole gaps."
    )
    return figure, "Share of the elements whose update is under half a gap: " + ", ".join(seen) + ".", caption


def under_updates(lr: float, way: float, seed: int = 0) -> dict[str, list[float]]:
    """A weight that starts at 1 after each of 100 updates of size `lr` in each way of adding. `way` is the share of the
    updates that go up."""
    generator = torch.Generator().manual_seed(seed)
    exact, plain, kahan, chance = torch.ones(4).unbind()
    rest, paths = torch.zeros(()), {name: [1.0] for name in ("float32", "bf16", "Kahan", "stochastic")}
    for _ in range(N_UPDATES):
        update = lr if torch.rand((), generator=generator) < way else -lr
        exact, plain = exact + update, (plain + update).bfloat16().float()
        whole = kahan + rest + update
        kahan = whole.bfloat16().float()
        rest = (whole - kahan).bfloat16().float()
        chance = stochastic_round(chance + update, generator).float()
        for path, value in zip(paths.values(), (exact, plain, kahan, chance), strict=True):
            path.append(value.item())
    return paths


def weight_under_updates(lr: float, way: float) -> Drawn:
    """`under_updates` as four lines."""
    paths, figure = under_updates(lr, way), new_figure(10, 3.4)
    title = f"A weight of 1 under {N_UPDATES} updates of size {lr:.2g}"
    axes = new_axes(figure, (0.065, 0.16, 0.7, 0.73), title, "update", "weight")
    labels = []
    for (name, path), (colour, line, _) in zip(paths.items(), SERIES, strict=True):
        axes.step(range(len(path)), path, where="post", color=colour, linestyle=line, linewidth=1.7)
        labels.append((path[-1], f"{name} {path[-1]:.4f}", colour))
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
    spread = max(0.002, *(abs(value - 1) for path in paths.values() for value in path))
    axes.set_ylim(1 - 1.1 * spread, 1 + 1.1 * spread)
    label_right(axes, labels)
    alt = f"After {N_UPDATES} updates of {lr:.3g}: " + ", ".join(f"{name} {p[-1]:.4f}" for name, p in paths.items())
    return figure, alt + ".", "Four ways of adding the same updates to the same weight."


def explore_weight() -> None:
    """Move the learning rate, and choose which way the updates go."""
    ways = {"all down": 0.0, "all up": 1.0, "two of three down": 1 / 3}
    start = math.log10(3e-4)  # one of the steps of the slider
    slider = Slider("learning rate", 3e-4, start - 1.2, start + 1.8, 0.05, base=10)
    explore(weight_under_updates, lr=slider, way=Choice("updates", ways))
