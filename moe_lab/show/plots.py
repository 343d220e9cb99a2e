"""The figures of a run, drawn from the rows of its record and from nothing else; and numbers beside each other.

Each function returns the figure and a text description made from the same numbers, for whoever cannot see the figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.config import Config
from moe_lab.health.during.rules_updates import LOST_ERROR, LOST_WARNING
from moe_lab.show.style import BLUE, GREY, INK, PALE, VERMILION, label_right, new_axes, new_figure

Rows = Sequence[Mapping[str, Any]]
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
FLOOR_STYLES = {"uniform": ":", "unigram": (0, (1, 3)), "bigram": "-.", "trigram": "--"}


def column(rows: Rows, name: str, term: str | None = None) -> Curve:
    """Steps and values of one field (or of one loss term) in the rows that have it; None counts as not a number."""
    pairs = [(row["step"], row[name] if term is None else row[name].get(term)) for row in rows if name in row]
    steps = np.array([step for step, _ in pairs], dtype=float)
    return steps, np.array([math.nan if value is None else value for _, value in pairs], dtype=float)


def last_tick(steps: np.ndarray, n_steps: int) -> float:
    """Where the axis of steps ends: at `n_steps`, or, early in a run, at the half, quarter … that holds the curve."""
    end, reached = float(max(n_steps, 1)), max(steps.max(initial=1), 10)
    while end / 2 >= reached:
        end /= 2
    return end


def thin(x: np.ndarray, y: np.ndarray, limit: int = 1000) -> Curve:
    """At most `limit` points of a curve: the least and the greatest of each stretch, so that no spike is lost."""
    if len(x) <= limit:
        return x, y
    stretches = np.array_split(np.arange(len(x)), limit // 2)
    filled = np.nan_to_num(y, nan=0.0)
    keep = sorted({i for s in stretches for i in (s[filled[s].argmin()], s[filled[s].argmax()])})
    return x[keep], y[keep]


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a twentieth of the run (at least 5 rows) around each value; the window is shorter at the start, where
    the loss falls so fast that a longer one would show a lag."""
    n, half = len(values), max(5, len(values) // 20) // 2
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    index = np.arange(n)
    reach = np.minimum(half, index)
    starts, ends = index - reach, np.minimum(index + reach + 1, n)
    return np.where(np.isfinite(values), (sums[ends] - sums[starts]) / (ends - starts), math.nan)


def relative_load(rows: Rows) -> np.ndarray:
    """(MoE layers, experts): each expert's tokens over the even share, in the latest row that has a load; 1 is even."""
    loads = [row["expert_load"] for row in rows if row.get("expert_load")]
    if not loads:
        return np.zeros((0, 0))
    load = np.array(loads[-1], dtype=float)
    return load / load.mean(axis=1, keepdims=True)


def next_token_weight(config: Config) -> float:
    """A record holds weighted terms: the next token's over this is nats per token."""
    return config.model.aux_loss_weights[0] / sum(config.model.aux_loss_weights)


def training_figure(rows: Rows, floors: Mapping[str, float] | None, config: Config) -> tuple[Figure, str]:
    """Loss, norm weights, gradient norm and expert load of a run so far; any number of rows will do.

    `floors` are losses in nats per token by name (uniform, unigram, bigram, trigram).
    """
    n_steps = config.n_steps
    steps, losses = column(rows, "losses", "next_token")
    training, floors = (steps, losses / next_token_weight(config)), floors or {}
    evaluations = column(rows, "validation_loss")
    figure = new_figure()
    axes = new_axes(figure, (0.065, 0.57, 0.335, 0.37), "Loss", "step", "nats per token")
    draw_loss(axes, training, evaluations, floors, n_steps)
    norms = new_axes(figure, (0.62, 0.57, 0.35, 0.37), "Norm weights: largest |w − 1|", "step", "no unit, log scale")
    draw_positive(norms, *column(rows, "norm_deviation"), n_steps, "exactly 0: no norm weight has moved")
    grad = new_axes(figure, (0.065, 0.09, 0.335, 0.34), "Gradient norm, before clipping", "step", "no unit, log scale")
    draw_positive(grad, *column(rows, "grad_norm"), n_steps, "exactly 0: nothing learns", config.training.max_grad_norm)
    draw_load(figure, rows)
    return figure, describe(rows, training, evaluations, floors, n_steps)


def set_steps(axes: Axes, steps: np.ndarray, n_steps: int) -> None:
    axes.set_xlim(0, last_tick(steps, n_steps))
    axes.locator_params(axis="x", nbins=5, integer=True)


def draw_loss(axes: Axes, training: Curve, evaluations: Curve, floors: Mapping[str, float], n_steps: int) -> None:
    (steps, losses), (evaluated_at, validation) = training, evaluations
    set_steps(axes, steps, n_steps)
    labels = [(loss, f"{name} {loss:.2f}", GREY) for name, loss in floors.items()]
    for name, loss in floors.items():
        axes.axhline(loss, color=GREY, linestyle=FLOOR_STYLES.get(name, ":"), linewidth=1)
    axes.plot(*thin(steps, losses), color=BLUE, linewidth=0.7, alpha=0.4, marker="o" if len(steps) == 1 else None)
    means = smooth(losses)
    axes.plot(*thin(steps, means), color=BLUE, linewidth=1.8)
    axes.plot(*thin(evaluated_at, validation), color=VERMILION, linestyle="--", linewidth=1, marker="o", markersize=4)
    shown = np.concatenate([losses, validation, list(floors.values())])
    shown = shown[np.isfinite(shown)]
    if len(shown):
        margin = 0.05 * (shown.max() - shown.min()) or 0.5
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    for values, name, colour in ((means, "training", BLUE), (validation, "validation", VERMILION)):
        if len(values) and math.isfinite(values[-1]):
            labels.append((values[-1], f"{name} {values[-1]:.2f}", colour))
    label_right(axes, labels)


def draw_positive(
    axes: Axes, steps: np.ndarray, values: np.ndarray, n_steps: int, zero: str, clip: float | None = None
) -> None:
    """A curve on a log scale. Zeros have no place there: they are left out, and a curve of zeros says so in words."""
    set_steps(axes, steps, n_steps)
    positive = np.isfinite(values) & (values > 0)
    if not positive.any():
        axes.set_yticks([])
        text = zero if len(values) and (values == 0).all() else "no reading yet"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=INK, fontsize=9)
        return
    axes.set_yscale("log")
    marker = "o" if positive.sum() <= 30 else None
    axes.plot(*thin(steps[positive], values[positive]), color=BLUE, linewidth=1.2, marker=marker, markersize=3)
    shown = [*values[positive], *([clip] if clip else [])]
    axes.set_ylim(min(shown) / 1.5, max(shown) * 1.5)  # room even where the curve is flat
    between = "25" if max(shown) < 100 * min(shown) else ""  # over few decades, the ticks at 2 and 5 have labels too
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in between else "")
    if clip:
        axes.axhline(clip, color=VERMILION, linestyle="--", linewidth=1.2)
        place = (1, clip), (5, -3), ("axes fraction", "data"), "offset points"
        axes.annotate(f"clip at {clip:g}", *place, color=VERMILION, fontsize=8.5)


def draw_load(figure: Figure, rows: Rows) -> None:
    """A table of colours, layers × experts, where 1 is the even share; with numbers where they fit."""
    load = relative_load(rows)
    n_layers, n_experts = load.shape
    title = f"Expert load, 1 = even share ({100 / n_experts:.3g} %)" if n_experts else "Expert load"
    x = "expert (orange: fewer tokens, purple: more)" if n_experts else "expert"
    axes = new_axes(figure, (0.62, 0.09, 0.35, 0.34), title, x, "MoE layer")
    axes.grid(False)
    if not load.size:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no MoE layer, or no reading yet", ha="center", color=INK, fontsize=9)
        return
    axes.imshow(load, cmap="PuOr", vmin=0, vmax=2, aspect="auto")
    axes.set_xticks(range(0, n_experts, max(1, n_experts // 16)))
    axes.set_yticks(range(0, n_layers, max(1, n_layers // 12)))
    axes.spines[:].set_visible(False)
    if n_experts <= 16 and n_layers <= 12:
        for (layer, expert), value in np.ndenumerate(load):
            colour = INK if 0.35 < value < 1.5 else "white"
            axes.text(expert, layer, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)


def describe(rows: Rows, training: Curve, evaluations: Curve, floors: Mapping[str, float], n_steps: int) -> str:
    """Two lines of text that say what `training_figure` shows at its last step."""
    (steps, losses), (evaluated_at, validation) = training, evaluations
    if not len(steps):
        return f"No update yet; {n_steps} steps are planned.\nThe figure fills as the run goes on."
    first = f"Step {steps[-1]:.0f} of {n_steps}: training loss {losses[-1]:.3f} nats per token"
    if len(evaluated_at):
        first += f", validation loss {validation[-1]:.3f} at step {evaluated_at[-1]:.0f}"
        if "trigram" in floors:
            first += f", {beside(validation[-1], floors['trigram'])} the trigram table ({floors['trigram']:.3f})"
    texts = {"norm_deviation": "norm weights moved by up to", "grad_norm": "gradient norm"}
    parts = [f"{text} {column(rows, name)[1][-1]:.2g}" for name, text in texts.items() if len(column(rows, name)[1])]
    load = relative_load(rows)
    if load.size:
        layer, expert = np.unravel_index(load.argmax(), load.shape)
        parts.append(f"busiest expert: MoE layer {layer}, expert {expert}, {load.max():.2f} times the even share")
    second = "; ".join(parts)
    return f"{first}.\n{second[:1].upper()}{second[1:]}."


def dot_chart(rows: Sequence[tuple[float, str, tuple[str, str]]], title: str, unit: str) -> Figure:
    """A line and a dot a row, from the top down: its value, its name, its colour and marker."""
    height = 1.0 + 0.3 * max(len(rows), 1)
    figure = new_figure(10, height)
    axes = new_axes(figure, (0.26, 0.57 / height, 0.65, 1 - 0.92 / height), title, unit, "")
    axes.grid(False)
    for place, (value, _, (colour, marker)) in enumerate(rows):
        axes.plot([0, value], [place, place], color=colour, linewidth=2, alpha=0.4)
        axes.plot(value, place, marker=marker, color=colour, markersize=8)
        axes.annotate(
            f"{value:.2f}", (value, place), (9, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
    axes.set_yticks(range(len(rows)), [name for _, name, _ in rows], fontsize=9, color=INK)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * max([1.0, *(value for value, *_ in rows)]))
    return figure


def loss_bars(floors: Mapping[str, float], models: Mapping[str, float]) -> tuple[Figure, str]:
    """Losses of tables of counts and of models on one scale, in nats per token; the best is at the bottom."""
    rows = [(loss, name, (GREY, "s")) for name, loss in floors.items()]
    rows = sorted(rows + [(loss, name, (BLUE, "o")) for name, loss in models.items()], key=lambda row: -row[0])
    title = "Loss on the validation split, lower is better (■ table of counts, ● model)"
    figure = dot_chart(rows, title, "nats per token")
    first = "Loss in nats per token, highest first: " + ", ".join(f"{name} {loss:.3f}" for loss, name, _ in rows) + "."
    second = "No model yet."
    if models and floors:
        best, floor = min(models, key=models.get), min(floors, key=floors.get)
        distance = beside(models[best], floors[floor])
        second = f"The best model, {best}, is {distance} the lowest floor, {floor}."
    return figure, f"{first}\n{second}"


def beside(loss: float, floor: float) -> str:
    return f"{abs(loss - floor):.3f} {'below' if loss < floor else 'above'}"


def arrived_bars(shares: Mapping[str, float]) -> tuple[Figure, str]:
    """Realised over intended displacement by kind of tensor: 1 is all of it. The least is at the top. Signs and lines stand
    at the limits of a `health.Watch`."""
    entries = sorted((share, name) for name, share in shares.items())
    signs = [
        (VERMILION, "X") if s < LOST_ERROR else (INK, "^") if s < LOST_WARNING else (BLUE, "o") for s, _ in entries
    ]
    few, most = f"{100 * LOST_ERROR:g} %", f"{100 * LOST_WARNING:g} %"
    title = f"Share of the intended displacement that arrived (✕ under {few}, ▲ under {most}, ● the rest)"
    rows = [(*entry, sign) for entry, sign in zip(entries, signs, strict=True)]
    figure = dot_chart(rows, title, "realised / intended, no unit")
    for limit in (LOST_ERROR, LOST_WARNING):
        figure.axes[0].axvline(limit, color=PALE, linewidth=1, linestyle="--", zorder=0)
    lost = ", ".join(name for share, name in entries if share < LOST_ERROR) or "none"
    some = ", ".join(name for share, name in entries if LOST_ERROR <= share < LOST_WARNING) or "none"
    first = "Share of the intended displacement that arrived: " + ", ".join(f"{n} {s:.2f}" for s, n in entries) + "."
    return figure, f"{first}\nUnder {few}: {lost}. From there to {most}: {some}."
