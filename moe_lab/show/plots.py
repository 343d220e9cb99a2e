"""The figures of a run, drawn from the rows of its record and from nothing else; and numbers beside each other.

Each function returns the figure and a text description made from the same numbers, for whoever cannot see the figure.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.config import Config
from moe_lab.show.style import BLUE, INK, VERMILION, draw_floors, label_right, new_axes, new_figure

Rows = Sequence[Mapping[str, Any]]
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Mark = tuple[int, str, str]  # what happened at a step: the step, a few words, a colour


def column(rows: Rows, name: str, along: str = "step") -> Curve:
    """Steps and values of one field in the rows that have it, float64; None counts as not a number."""
    pairs = [(row[along], row[name]) for row in rows if name in row]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a twentieth of the run (at least 5 rows) around each value; over fewer at the start."""
    n, half = len(values), max(5, len(values) // 20) // 2
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    index = np.arange(n)
    reach = np.minimum(half, index)
    starts, ends = index - reach, np.minimum(index + reach + 1, n)
    return np.where(np.isfinite(values), (sums[ends] - sums[starts]) / (ends - starts), math.nan)


def relative_load(rows: Rows) -> np.ndarray:
    """(MoE layers, experts): each expert's tokens over the even share, in the latest row that has a load; 1 is even."""
    latest = next((row["expert_load"] for row in reversed(rows) if row.get("expert_load")), [[]])
    load = np.array(latest, dtype=float)
    return load / load.mean(axis=1, keepdims=True) if load.size else load


def next_token_weight(config: Config) -> float:
    """A record holds weighted terms: the next token's over this is nats per token."""
    return config.model.aux_loss_weights[0] / sum(config.model.aux_loss_weights)


def loss_curves(rows: Rows, config: Config, along: str = "step") -> tuple[Curve, Curve]:
    """The next token's loss in training and in validation, nats per token."""
    terms = [{along: row[along]} | row["losses"] for row in rows if "losses" in row]
    steps, losses = column(terms, "next_token", along)
    return (steps, losses / next_token_weight(config)), column(rows, "validation_loss", along)


def training_figure(
    rows: Rows,
    floors: Mapping[str, float],
    config: Config,
    marks: Sequence[Mark] = (),
    arrived: Mapping[str, float] | None = None,
) -> tuple[Figure, str]:
    """Loss, norm weights, gradient norm and expert load of a run so far, of any number of rows. `floors` are losses in
    nats per token by name (uniform, unigram, bigram, trigram); `arrived` are shares of the intended updates that 16-bit
    weights have taken, by kind of tensor."""
    figure, scale = new_figure(), "no unit, log scale"
    loss = new_axes(figure, (0.065, 0.57, 0.335, 0.37), "Loss", "step", "nats per token")
    norm = new_axes(figure, (0.62, 0.57, 0.35, 0.37), "Norm weights: largest |w − 1|", "step", scale)
    grad = new_axes(figure, (0.065, 0.09, 0.335, 0.34), "Gradient norm, before clipping", "step", scale)
    load = new_axes(figure, (0.62, 0.09, 0.35, 0.34), "Expert load, 1 = even share", "expert", "MoE layer")
    training, validation = loss_curves(rows, config)
    steps = training[0]
    for axes in (loss, norm, grad):
        axes.set_xlim(0, steps.max(initial=10))
        axes.locator_params(axis="x", nbins=5, integer=True)
    first = draw_loss(loss, training, validation, floors)
    for axes in (loss, norm, grad):
        draw_marks(axes, marks, named=axes is loss)
    norms, grads = column(rows, "norm_deviation"), column(rows, "grad_norm")
    draw_positive(norm, norms, "exactly 0: no norm weight has moved")
    draw_positive(grad, grads, "exactly 0: nothing learns", config.training.max_grad_norm)
    parts = [f"norm weights moved by up to {value:.2g}" for value in norms[1][-1:]]
    parts += [f"gradient norm {value:.2g}" for value in grads[1][-1:]]
    if arrived:
        shares = ", ".join(f"{share:.0%} of {name}" for name, share in arrived.items())
        style = {"ha": "right", "color": VERMILION, "fontsize": 8.5, "transform": norm.transAxes}
        norm.text(0.98, 0.05, f"updates that arrive: {shares}", **style)
        parts.append(f"updates that arrive: {shares}")
    second = "; ".join(parts + draw_load(load, relative_load(rows), config.model.moe_layers))
    second += "".join(f"; {text} at step {step}" for step, text, _ in marks)
    if not len(steps):
        return figure, f"No update yet; {config.n_steps} steps are planned.\nThe figure fills as the run goes on."
    return figure, f"Step {steps[-1]:.0f} of {config.n_steps}: {first}.\n{second[:1].upper()}{second[1:]}."


def draw_marks(axes: Axes, marks: Sequence[Mark], named: bool) -> None:
    """A line at the step of each, with its words left of it, away from the curves; those of one step stand beside each other."""
    curves = [line.get_data() for line in axes.lines if len(line.get_xdata()) > 2]
    there = {}
    for step, text, colour in marks:
        axes.axvline(step, color=colour, linestyle=":", linewidth=1)
        if named:
            there[step] = there.get(step, -1) + 1
            high = bool(curves) and np.mean([np.interp(step, *curve) for curve in curves]) > np.mean(axes.get_ylim())
            y, va = (0.01, "bottom") if high else (0.99, "top")
            style = {"rotation": 90, "ha": "right", "va": va, "fontsize": 7.5, "color": colour}
            style["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(text, (step, y), (-2 - 10 * there[step], 0), **place, **style)


def set_loss_limits(axes: Axes, losses: np.ndarray, floors: Mapping[str, float]) -> None:
    """Room for the losses, which take at least a third of the height, and for the floors that lie near enough."""
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return
    low, high = losses.min(), losses.max()
    span = max(high - low, 1.0)
    shown = [low, high, *(floor for floor in floors.values() if low - span <= floor <= high + span)]
    margin = 0.05 * np.ptp(shown) or 0.5
    axes.set_ylim(min(shown) - margin, max(shown) + margin)


def draw_loss(axes: Axes, training: Curve, validation: Curve, floors: Mapping[str, float]) -> str:
    """Returns the latest losses in words."""
    (steps, losses), (evaluated_at, evaluated) = training, validation
    means = smooth(losses)
    axes.plot(steps, losses, color=BLUE, linewidth=0.7, alpha=0.4, marker="o" if len(steps) == 1 else None)
    axes.plot(steps, means, color=BLUE, linewidth=1.8)
    axes.plot(evaluated_at, evaluated, color=VERMILION, linestyle="--", linewidth=1, marker="o", markersize=4)
    set_loss_limits(axes, np.concatenate([losses, evaluated]), floors)
    labels = draw_floors(axes, floors)
    for values, name, colour in ((means, "training", BLUE), (evaluated, "validation", VERMILION)):
        labels += [(value, f"{name} {value:.2f}", colour) for value in values[-1:] if math.isfinite(value)]
    label_right(axes, labels)
    text = f"training loss {means[-1]:.3f} nats per token, a mean of the last updates" if len(steps) else ""
    if len(evaluated):
        text += f", validation loss {evaluated[-1]:.3f} at step {evaluated_at[-1]:.0f}"
        if "trigram" in floors:
            above = evaluated[-1] - floors["trigram"]
            side = "below" if above < 0 else "above"
            text += f", {abs(above):.3f} {side} the trigram table ({floors['trigram']:.3f})"
    return text


def draw_positive(axes: Axes, curve: Curve, zero: str, clip: float | None = None) -> None:
    """A curve on a log scale. Zeros have no place there: they are left out, and a curve of zeros says so in words."""
    steps, values = curve
    positive = np.isfinite(values) & (values > 0)
    if not positive.any():
        write_in(axes, zero if len(values) and (values == 0).all() else "no reading yet")
        return
    steps, values = steps[positive], values[positive]
    axes.set_yscale("log")
    axes.plot(steps, values, color=BLUE, linewidth=1.2, marker="o" if len(steps) <= 30 else None, markersize=3)
    shown = [*values, clip or values[0]]
    low, high = min(shown), max(shown)
    axes.set_ylim(low / 1.5, high * 1.5)  # room even where the curve is flat
    between = "25" if high < 100 * low else ""  # over few decades, the ticks at 2 and 5 have labels too
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in between else "")
    if clip:
        axes.axhline(clip, color=VERMILION, linestyle="--", linewidth=1.2)
        axes.text(1.02, clip, f"clip at {clip:g}", color=VERMILION, fontsize=8.5, transform=axes.get_yaxis_transform())


def write_in(axes: Axes, text: str) -> None:
    """Say in empty axes why there is nothing."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=INK, fontsize=9)


def draw_load(axes: Axes, load: np.ndarray, layers: Sequence[int]) -> list[str]:
    """A table of colours, `layers` × experts, where 1 is the even share; with numbers where they fit. Returns which expert
    is the busiest, in words, if there is one."""
    axes.grid(False)
    if not load.size:
        axes.set_xticks([])
        write_in(axes, "no MoE layer, or no reading yet")
        return []
    axes.set(xlabel="expert (orange: fewer tokens, purple: more)", yticks=range(len(load)), yticklabels=layers)
    axes.imshow(load, cmap="PuOr", vmin=0, vmax=2, aspect="auto")
    axes.locator_params(axis="x", nbins=12, integer=True)
    axes.spines[:].set_visible(False)
    if load.shape[1] <= 16 and len(load) <= 12:
        for (layer, expert), value in np.ndenumerate(load):
            colour = INK if 0.35 < value < 1.5 else "white"
            axes.text(expert, layer, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    row, expert = np.unravel_index(load.argmax(), load.shape)
    return [f"busiest expert: MoE layer {layers[row]}, expert {expert}, {load.max():.2f} times the even share"]
