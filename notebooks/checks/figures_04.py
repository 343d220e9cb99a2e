"""Figures of notebook 04: a step before and after it is orthogonalised, AdamW's own step, the sweep, the horizon, and two
explorables. Each returns the figure, an alt text that says what is seen, and a caption that says what it means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from checks.explorables import Choice, Slider, explore
from moe_lab.health.conventions import GPT3, adamw_equivalent, muon_element_step
from moe_lab.show import style
from moe_lab.show.style import draw_floors, label_right, new_axes, new_figure

Shown = tuple[Figure, str, str]
Sweep = Mapping[float, Sequence[float]]  # learning rate → losses, one a seed; infinite where a run diverged
QUINTIC = (3.4445, -4.7750, 2.0315)
BAND = (0.65, 1.25)  # where five iterations bring what was above a hundredth


class Best(NamedTuple):
    """A best learning rate with its interval."""

    lr: float
    low: float
    high: float


def spectra(spectra: Mapping[str, Sequence[float]]) -> Shown:
    """Singular values, largest first, a line a name."""
    figure = new_figure(10, 3.6)
    axes = new_axes(
        figure, (0.07, 0.15, 0.72, 0.74), "Singular values of one step", "rank", "singular value, log scale"
    )
    axes.set_yscale("log")
    axes.axhspan(*BAND, color=style.PALE, alpha=0.6, linewidth=0)
    labels, said = [], []
    every = np.concatenate([np.asarray(values) for values in spectra.values()])
    axes.set_ylim(max(every.min(), 1e-4) / 1.5, every.max() * 1.5)
    for (name, values), (colour, line, _) in zip(spectra.items(), style.SERIES, strict=False):
        axes.plot(range(1, len(values) + 1), values, color=colour, linestyle=line, linewidth=1.8)
        labels.append((values[-1], name, colour))
        said.append(f"{name} from {values[0]:.2g} down to {values[-1]:.2g}")
    label_right(axes, labels)
    alt = (
        "Singular values by rank, on a logarithmic scale: "
        + "; ".join(said)
        + f". A band marks {BAND[0]} to {BAND[1]}."
    )
    return (
        figure,
        alt,
        "Newton–Schulz makes strong directions of the gradient equally strong; the weakest ones stay behind.",
    )


def step_sizes(rms: Mapping[str, Mapping[int, float]], liu: float = 0.2) -> Shown:
    """RMS of AdamW's step over its LR, after each update, a line a kind of tensor."""
    figure = new_figure(10, 3.6)
    axes = new_axes(figure, (0.07, 0.15, 0.68, 0.74), "How far AdamW moves an element", "update", "RMS of a step / LR")
    axes.axhline(liu, color=style.GREY, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.1)
    labels, said = [(liu, f"{liu:g}, as published", style.GREY)], []
    for (name, values), (colour, line, marker) in zip(rms.items(), style.SERIES, strict=False):
        axes.plot(*zip(*values.items(), strict=True), color=colour, linestyle=line, marker=marker, markersize=4)
        last = list(values)[-1]
        labels.append((values[last], name, colour))
        said.append(f"{name} {values[min(values)]:.2f} at update {min(values)} and {values[last]:.2f} at update {last}")
    label_right(axes, labels)
    alt = "RMS of AdamW's step over its learning rate: " + "; ".join(said) + f". A dashed line marks {liu:g}."
    return figure, alt, "The first update moves every element by one LR; noisy gradients then make steps shorter."


def lr_sweep(
    panels: Mapping[str, Mapping[str, Sweep]],
    floors: Mapping[str, float] | None = None,
    optima: Mapping[str, Mapping[str, float]] | None = None,
) -> Shown:
    """Mean loss over the learning rate, on a log scale, a line a method and a panel a setting; the band reaches from the
    best seed to the worst. A dot is one run, a star the fitted optimum. Lines of `floors` are drawn where they fit."""
    figure, width = new_figure(10, 4.2), 0.9 / len(panels)
    every = np.concatenate([[*sweep.values()] for methods in panels.values() for sweep in methods.values()])
    every = every[np.isfinite(every)]
    lines, few = [], all(len(sweep) <= 4 for methods in panels.values() for sweep in methods.values())
    for i, (title, methods) in enumerate(panels.items()):
        unit = "nats per token" if i == 0 else ""
        axes = new_axes(figure, (0.06 + i * width, 0.13, width - 0.15, 0.78), title, "learning rate", unit)
        axes.set_xscale("log")
        if few:  # a closer look: limits of its own, and each rate named
            inside = np.concatenate([list(sweep.values()) for sweep in methods.values()])
            axes.set_ylim(inside.min() - 0.02, inside.max() + 0.02)
            named = sorted({lr for sweep in methods.values() for lr in sweep})
            axes.set_xticks(named, [f"{lr:g}" for lr in named])
            axes.minorticks_off()
        else:
            axes.set_ylim(every.min() - 0.4, every.max() + 0.15)
        labels = draw_floors(axes, floors or {})
        for (name, sweep), (colour, line, marker) in zip(methods.items(), style.SERIES[: len(methods)], strict=True):
            lrs = sorted(sweep)
            losses = np.array([sweep[lr] for lr in lrs], dtype=float)  # (LRs, seeds)
            losses[np.isinf(losses)] = math.nan
            means = losses.mean(axis=1)  # NaN where a seed diverged
            axes.fill_between(lrs, losses.min(axis=1), losses.max(axis=1), color=colour, alpha=0.2, linewidth=0)
            axes.plot(lrs, means, color=colour, linestyle=line, linewidth=1.6)
            axes.plot(lrs, losses, linestyle="none", marker=marker, markersize=3.5, color=colour)
            best = np.nanargmin(means)
            if optimum := (optima or {}).get(title, {}).get(name):
                axes.plot(optimum, means[best], marker="*", markersize=13, color=colour, markeredgecolor=style.INK)
            last = means[-1] if math.isfinite(means[-1]) else every.max()
            shown = "AdamW alone" if name == "adamw" else name
            labels.append((last, shown, colour))
            lines.append(f"{title}, {shown}: best {means[best]:.3f} at {lrs[best]:g}")
        label_right(axes, labels)
    alt = "Validation loss in nats per token over the learning rate.\n" + "; ".join(lines) + "."
    stars = "Stars: optima of a parabola in log LR. " if optima else ""
    return figure, alt, f"{stars}Bands: from the best to the worst of three seeds."


def horizon(optima: Mapping[str, Mapping[int, Best]], reference: float = -0.32) -> Shown:
    """Best learning rates over the number of updates, with intervals, and a published slope beside each series."""
    figure = new_figure(10, 4.2)
    axes = new_axes(figure, (0.08, 0.13, 0.66, 0.78), "The best LR of a run", "updates of 256 tokens", "best LR")
    axes.set(xscale="log", yscale="log")
    labels, said = [], []
    for (name, by_length), (colour, line, marker) in zip(optima.items(), style.SERIES, strict=False):
        updates, found = list(by_length), list(by_length.values())
        lrs = [best.lr for best in found]
        reach = [[b.lr - b.low for b in found], [b.high - b.lr for b in found]]
        look = {"color": colour, "linestyle": line, "marker": marker, "capsize": 4, "markersize": 7}
        axes.errorbar(updates, lrs, yerr=reach, **look)
        power = [lrs[0] * (n / updates[0]) ** reference for n in updates]
        axes.plot(updates, power, color=colour, linestyle=":", linewidth=1)
        labels.append((lrs[-1], name, colour))
        texts = [f"{b.lr:.2g} ({b.low:.2g} to {b.high:.2g}) after {n}" for n, b in by_length.items()]
        said.append(f"{name} " + ", ".join(texts))
    axes.set_xticks(updates, [f"{n:,}" for n in updates])
    axes.minorticks_off()
    label_right(axes, labels)
    alt = "Best learning rate over the number of updates, both axes logarithmic. " + "; ".join(said) + "."
    return (
        figure,
        alt,
        f"Bars: 95 % intervals. Dotted: what others published, a fall as the tokens to the power {reference:g}.",
    )


def translate(lr: float, convention: str, rows: float, columns: float) -> Shown:
    """Where a Muon number lies on AdamW's scale, in its convention and in the other one."""
    shape = (round(rows), round(columns))
    other = "match_rms_adamw" if convention == "original" else "original"
    figure = new_figure(10, 2.6)
    axes = new_axes(figure, (0.04, 0.26, 0.92, 0.5), "", "the AdamW learning rate that moves an element as far", "")
    axes.set(xscale="log", xlim=(1e-6, 1), ylim=(0, 1), yticks=[])
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    published = [rate for _, rate in GPT3]
    hot = [adamw_equivalent(rate, shape, "original") for rate in (0.02, 0.05)]
    for (low, high), colour, text, place in (
        ((min(published), max(published)), style.BLUE, "AdamW in GPT-3's table", 0.12),
        (hot, style.GREEN, "Muon 0.02 to 0.05, original", 0.86),
    ):
        axes.axvspan(low, high, color=colour, alpha=0.18, linewidth=0)
        axes.text(math.sqrt(low * high), place, text, fontsize=8, color=style.INK, ha="center", va="center")
    said = []
    for name, colour, marker in ((convention, style.VERMILION, "o"), (other, style.GREY, "x")):
        step, twin = muon_element_step(lr, shape, name), adamw_equivalent(lr, shape, name)
        axes.plot(twin, 0.5, marker=marker, color=colour, markersize=11, markeredgewidth=2.5)
        said.append(f"{name}: RMS step {step:.2g}, like AdamW at {twin:.2g}")
    axes.set_title(f"● {said[0]}", loc="left", fontsize=10, color=style.INK, fontweight="bold")
    alt = f"Muon at {lr:.3g} on a matrix of {shape[0]} × {shape[1]}. {said[0]}. The same number in {said[1]}."
    return figure, alt, "Dot: this number in this convention. Cross: the same number in the other one."


def explore_translator() -> None:
    """Which AdamW learning rate is a Muon number like? LR, convention and shape can be moved."""
    explore(
        translate,
        lr=Slider("Muon's LR", 0.02, -5, 0, 0.05, base=10),
        convention=Choice("convention", {"original": "original", "match_rms_adamw": "match_rms_adamw"}),
        rows=Slider("outputs", 768, 4, 14, 0.25, base=2),
        columns=Slider("inputs", 768, 4, 14, 0.25, base=2),
    )


def polynomial(values: np.ndarray, steps: int) -> np.ndarray:
    """What Newton–Schulz makes of singular values; it treats each by itself."""
    a, b, c = QUINTIC
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


def iterate(steps: float, smallest: float) -> Shown:
    """Singular values between `smallest` and 1 before and after some iterations."""
    steps, before = round(steps), np.geomspace(smallest, 1, 400)
    after = polynomial(before, steps)
    figure = new_figure(10, 3.6)
    axes = new_axes(
        figure, (0.07, 0.15, 0.86, 0.74), f"After {steps} iterations", "singular value before", "singular value after"
    )
    axes.set_xscale("log")
    axes.axhspan(*BAND, color=style.PALE, linewidth=0)
    axes.axhline(1, color=style.GREY, linestyle="--", linewidth=1)
    axes.plot(before, before, color=style.GREY, linestyle=":", linewidth=1.2)
    axes.plot(before, after, color=style.BLUE, linewidth=2)
    axes.set_ylim(0, 1.3)
    inside = ((after > BAND[0]) & (after < BAND[1])).mean()
    alt = f"After {steps} iterations singular values from {smallest:.2g} to 1 lie between {after.min():.2g} and "
    alt += f"{after.max():.2g}; {inside:.0%} of them, evenly in logs, between {BAND[0]} and {BAND[1]}."
    return (
        figure,
        alt,
        "Five iterations lift what was at least a hundredth into the grey band; smaller ones stay behind.",
    )


def explore_newton_schulz() -> None:
    """How many iterations does a small singular value need?"""
    explore(iterate, steps=Slider("iterations", 2, 0, 10, 1), smallest=Slider("smallest", 1e-3, -5, -1, 0.1, base=10))
