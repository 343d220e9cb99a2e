"""Two explorables of notebook 01: what a first and a last loss say together, and where a loss starts.

With a reader there are sliders, which the keyboard moves as well; headless there is a figure of a few chosen positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checks.explorables import Slider, explore
from moe_lab.show.style import BLUE, GREEN, GREY, INK, LETTERS, PALE, VERMILION, new_axes, new_figure

START_OFF = 0.2  # nats between a first loss and where it should be: the limit of the watch's rule `initial_loss`
AT_LN_V = 0.05  # nats: a loss as near to ln V as this has found nothing
# (first loss, last loss, V, half the variance of the logits) of the headless figure
POSITIONS = ((7.0, 5.0, 50257, 0.31), (11.13, 10.83, 50257, 0.31), (7.66, 6.9, 2048, 0.04), (7.66, 9.4, 2048, 0.04))
Figures = tuple[Figure, str, str]  # a figure, what is seen, what it means


class Verdict(NamedTuple):
    """What two losses and a vocabulary say."""

    kind: str  # another number, it rises, nothing learned, below ln V
    sentence: str


def loss_verdict(first: float, last: float, vocab_size: float, half_variance: float = 0.0) -> Verdict:
    """Of the loss before update 1 and the last one, nats per token. The start is read first, since without it the end means
    nothing. Below ln V the tables of counts decide, which two losses do not know."""
    log_v = math.log(vocab_size)
    start = log_v + half_variance
    if abs(first - start) > START_OFF:
        factor = start / first if first > 0 else math.inf
        times = f", {factor:.1f} times too small" if factor > 1 else f", {1 / factor:.1f} times too large"
        words = (
            f"the first loss is {first:.2f} and should be {start:.2f}{times}: find out what is shown before you read on"
        )
        return Verdict("another number", words)
    if last > first + START_OFF:
        return Verdict(
            "it rises", f"the loss rose by {last - first:.2f}: a learning rate that is too high, or a broken step"
        )
    if last > log_v - AT_LN_V:
        words = f"the loss is still at ln V = {log_v:.2f}: nothing is learned yet, or there is nothing to learn. Look at the tokens"
        return Verdict("nothing learned", words)
    words = f"the loss is {log_v - last:.2f} below ln V: something is learned. Hold it against the tables of your text"
    return Verdict("below ln V", words)


def loss_lines(positions: Sequence[tuple[float, float, float, float]] = POSITIONS) -> Figures:
    """A line for each (first, last, V, half variance): where the loss should start, ln V, and what was shown."""
    height = 0.2 + 1.05 * len(positions)
    figure, lines = new_figure(10, height), []
    for row, position in enumerate(positions):
        box = (0.04, 1 - (1.05 * (row + 1) - 0.3) / height, 0.92, 0.42 / height)
        lines.append(draw_line(new_axes(figure, box, "", "", ""), *position))
    return (
        figure,
        "\n".join(lines),
        "Read the start first: the end of a loss means something only if its start is right.",
    )


def draw_line(axes: Axes, first: float, last: float, vocab_size: float, half_variance: float) -> str:
    """Draw one line; returns what is seen on it."""
    log_v, verdict = math.log(vocab_size), loss_verdict(first, last, vocab_size, half_variance)
    start, good = log_v + half_variance, verdict.kind == "below ln V"
    axes.set(xlim=(0, max(first, last, start) * 1.08 + 0.5), ylim=(-0.6, 1), yticks=[])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axvspan(start - START_OFF, start + START_OFF, ymin=0.15, ymax=0.6, color=PALE, linewidth=0)
    axes.plot([log_v] * 2, [-0.35, 0.35], color=INK, linewidth=1.4)
    axes.annotate("ln V", (log_v, -0.55), ha="center", va="top", fontsize=8, color=INK, annotation_clip=False)
    colour = GREEN if good else VERMILION
    axes.annotate("", (last, 0.4), (first, 0.4), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.6})
    axes.plot(first, 0, marker="o", color=BLUE, markersize=8)
    axes.plot(last, 0, marker="s" if good else "X", color=colour, markersize=8)
    axes.set_title(f"V = {vocab_size:,.0f}: {verdict.sentence}.", loc="left", fontsize=9, color=LETTERS[colour])
    return f"First loss {first:.2f}, last {last:.2f}, V = {vocab_size:,.0f}, expected start {start:.2f}: {verdict.sentence}."


def start_figure(vocab_size: float, d_model: float, init_std: float) -> Figures:
    """The expected start over the width, beside ln V, and the place of one model on it."""
    figure = new_figure(10, 3.2)
    axes = new_axes(figure, (0.07, 0.17, 0.72, 0.72), "Loss at step 0", "width d_model", "nats per token")
    widths, log_v = np.geomspace(32, 8192, 60), math.log(vocab_size)
    start = log_v + d_model * init_std**2 / 2
    axes.plot(widths, log_v + widths * init_std**2 / 2, color=BLUE)
    axes.axhline(log_v, color=GREY, linestyle=":")
    axes.plot(d_model, start, marker="o", color=VERMILION, markersize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(log_v - 0.3, max(log_v + 1.5, start + 0.3))
    axes.text(1.02, (log_v - axes.get_ylim()[0]) / np.ptp(axes.get_ylim()), f"ln V = {log_v:.2f}", color=INK,
              fontsize=8.5, va="center", transform=axes.transAxes)  # fmt: skip
    axes.annotate(f"{start:.2f}", (d_model, start), (0, 9), textcoords="offset points", ha="center", color=INK)
    alt = (
        f"A line that rises with the width from ln V = {log_v:.2f}, at init_std {init_std:.3g}. At width {d_model:,.0f} a "
        f"model starts at {start:.2f} nats."
    )
    return figure, alt, "A wider model, or larger start values, begins further above ln V, and has learned no less."


def one_line(first: float, last: float, log_v: float, half_variance: float) -> Figures:
    return loss_lines([(first, last, math.exp(log_v), half_variance)])


def explore_losses() -> None:
    """First loss, last loss, vocabulary and half the logits' variance → what they mean."""
    explore(
        one_line,
        loss_lines,
        first=Slider("first loss", 7.0, 0, 15, 0.05),
        last=Slider("last loss", 5.0, 0, 15, 0.05),
        log_v=Slider("ln V", 10.8, 3, 12.5, 0.05),
        half_variance=Slider("half variance", 0.3, 0, 2, 0.02),
    )


def explore_start(vocab_size: int, d_model: int, init_std: float) -> None:
    """Vocabulary, width and start values → the loss at step 0. The sliders begin at a model's own numbers."""
    explore(
        start_figure,
        vocab_size=Slider("vocabulary V", vocab_size, 6, 18, 0.25, base=2),
        d_model=Slider("width", d_model, 5, 13, 0.25, base=2),
        init_std=Slider("init_std", init_std, 0.002, 0.1, 0.002),
    )
