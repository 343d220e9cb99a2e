"""Figures of notebook 06: curves of the patients, what bugs cost, a commit taken apart, and which check names which bug."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from checks.rows import row_axes
from moe_lab.failures.results import Spread
from moe_lab.show import style
from moe_lab.show.plots import smooth
from moe_lab.show.style import draw_floors, label_right, new_axes, new_figure

Shown = tuple[Figure, str, str]
SHORT = {  # what a row's label says of a bug; THE_CASE.md says it in a sentence
    "B01": "bf16 parameters",
    "B02": "rate of another optimizer",
    "B03": "MoD adds the residual twice",
    "B04": "MoD's choice unsorted",
    "B05": "MoD's router untrained",
    "B06": "MoD off in evaluation",
    "B07": "micro-batches count as steps",
    "B08": "random tokens",
    "B09": "Mamba without a state",
    "B10": "weight decay on norms",
    "B11": "padding in the loss",
    "B12": "divided once too often",
    "B13": "old rate comes back",
    "B15": "experts collapse",
    "B16": "compared with another start",
    "B17": "MoD's positions are ranks",
    "B18": "warm-up off by one",
    "B19": "Mamba forgets at once",
    "B20": "keys that nothing reads",
    "B21": "documents unshuffled",
    "B22": "four heads as one perplexity",
    "B23": "a comment that lies",
    "B24": "bf16 tables of RoPE",
    "B25": "data restart on resume",
    "B26": "no validation split",
}


def labelled(rows: Iterable[str]) -> list[str]:
    """Rows of bugs by id and name; every other row as it is."""
    return [f"{row} {SHORT[row]}" if row in SHORT else row for row in rows]


def curves(
    losses: Mapping[str, Sequence[float]], ends: Mapping[str, float], floors: Mapping[str, float], caption: str
) -> Shown:
    """Training losses over updates; a mark at the end for the validation loss on text where `ends` has one."""
    figure = new_figure(9, 4)
    axes = new_axes(figure, (0.07, 0.13, 0.68, 0.77), "Training loss", "update", "nats per token")
    every = [loss for run in losses.values() for loss in run] + list(ends.values())
    axes.set_ylim(min(every) - 0.2, max(every) + 0.25)
    labels, said = draw_floors(axes, floors), []
    for (name, run), (colour, line, marker) in zip(losses.items(), style.SERIES, strict=False):
        updates = list(range(1, len(run) + 1))
        means = smooth(np.array(run))
        axes.plot(updates, run, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(updates, means, color=colour, linestyle=line, linewidth=1.6)
        labels.append((means[-1], name, colour))
        said.append(f"{name}: {run[0]:.2f} at update 1, {run[-1]:.2f} at {len(run)}")
        if name in ends:
            axes.plot([updates[-1]], [ends[name]], color=colour, marker=marker, markersize=8, clip_on=False)
            labels.append((ends[name], f"{name}: validation", colour))
            said[-1] += f", validation {ends[name]:.2f}"
    label_right(axes, labels)
    return figure, "Training loss over updates, with lines at the tables' losses. " + "; ".join(said) + ".", caption


def with_noise(found: Mapping[str, tuple[Spread, Spread]], ln_v: float) -> Shown:
    """Validation loss by what was done: of runs on text, and of the same on random tokens."""
    axes = row_axes(
        list(found), "The same change, on text and on random tokens", "validation loss on text, nats per token"
    )
    for y, (text, random) in enumerate(found.values()):
        axes.plot([text.mean, random.mean], [y, y], color=style.PALE, linewidth=2, zorder=1)
        axes.plot([text.mean], [y], "o", color=style.BLUE, markersize=8, label="trained on text" if y == 0 else None)
        axes.plot(
            [random.mean],
            [y],
            "s",
            color=style.VERMILION,
            markersize=8,
            label="trained on random tokens" if y == 0 else None,
        )
    axes.axvline(ln_v, color=style.GREY, linestyle=":", linewidth=1.2)
    axes.text(ln_v, -0.62, " ln V", color=style.GREY, fontsize=8.5, va="bottom")
    axes.legend(loc="lower left", frameon=False, fontsize=8.5)
    said = "; ".join(
        f"{name}: {text.mean:.2f} on text, {random.mean:.2f} on random tokens" for name, (text, random) in found.items()
    )
    alt = f"Two marks a row, mean validation loss on text, three seeds. {said}. A line at ln V, {ln_v:.2f}."
    return (
        axes.figure,
        alt,
        "Every square lies at ln V, whatever was changed: with random tokens there is nothing to gain.",
    )


def costs(found: Mapping[str, Spread], predicted: Mapping[str, float]) -> Shown:
    """A bar a bug: what it costs alone, with its standard deviation, and a tick where it was predicted."""
    axes = row_axes(
        labelled(found), "Each bug alone, and where it was predicted (|)", "nats per token above the healthy run"
    )
    for y, (id, one) in enumerate(found.items()):
        axes.barh(y, one.mean, height=0.6, color=style.VERMILION if one.mean > 0.05 else style.GREY, alpha=0.75)
        axes.errorbar(one.mean, y, xerr=one.sd, color=style.INK, linewidth=1, capsize=2)
        axes.plot([predicted[id]], [y], "|", color=style.BLUE, markersize=13, markeredgewidth=2)
        axes.text(
            max(one.mean + one.sd, predicted[id], 0) + 0.05,
            y,
            f"{one.mean:+.2f}",
            va="center",
            fontsize=8.5,
            color=style.INK,
        )
    axes.axvline(0, color=style.INK, linewidth=0.8)
    said = "; ".join(f"{id} {one} (predicted {predicted[id]:.2f})" for id, one in found.items())
    alt = f"Bars, nats above the healthy run, mean and SD over three seeds. {said}."
    return axes.figure, alt, "A few bugs cost a lot. Most cost nothing that 150 updates of this size could show."


def parts(found: Mapping[str, Mapping[str, Spread]], title: str, unit: str, caption: str) -> Shown:
    """Rows of several marks, each a mean with its standard deviation over seeds: {row: {what: value}}."""
    axes = row_axes(labelled(found), title, unit)
    for i, (what, (colour, _, marker)) in enumerate(zip(next(iter(found.values())), style.SERIES, strict=False)):
        for y, row in enumerate(found.values()):
            place = y + (i - (len(row) - 1) / 2) * 0.2
            look = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 1.2, "capsize": 2}
            axes.errorbar(
                row[what].mean, place, xerr=row[what].sd, label=what if y == 0 else None, linestyle="", **look
            )
    axes.axvline(0, color=style.INK, linewidth=0.8)
    if len(row) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5)
    said = "; ".join(
        f"{row}: " + ", ".join(f"{what} {value}" for what, value in one.items()) for row, one in found.items()
    )
    return axes.figure, f"Marks with their SD over three seeds, {unit}. {said}.", caption


def rounded(places: Sequence[int], off: Mapping[str, Sequence[float]], limit: float) -> Shown:
    """Errors over positions; `limit`: from where on the watch's rule warns."""
    figure = new_figure(9, 3.2)
    axes = new_axes(figure, (0.08, 0.16, 0.66, 0.72), "What bfloat16 does to positions", "position", "error")
    axes.set(xscale="log", yscale="log")
    labels = [(limit, "the watch warns from here", style.INK)]
    for (what, error), (colour, line, marker) in zip(off.items(), style.SERIES, strict=False):
        axes.plot(places, error, color=colour, linestyle=line, marker=marker, markersize=5)
        labels.append((error[-1], what, colour))
    axes.axhline(limit, color=style.INK, linewidth=0.8, linestyle=":")
    label_right(axes, labels)
    said = "; ".join(
        f"{what}: {error[0]:.2g} at {places[0]}, {error[-1]:.2g} at {places[-1]}" for what, error in off.items()
    )
    alt = f"Two lines, error over position, both logarithmic. {said}. The watch warns from {limit:g} radians on."
    return (
        figure,
        alt,
        "A rounded table of cosines is off by as much at any position. A rounded frequency is off by more at each.",
    )


MARKS = {"error": ("●", style.VERMILION), "warning": ("○", style.BLUE), "info": ("▪", style.GREEN)}


def matrix(found: Mapping[str, Mapping[str, str]], calls: Sequence[str]) -> Shown:
    """A row a bug, a column a call that named one: the highest severity with which it did, in all seeds."""
    calls = [call for call in calls if any(call in row for row in found.values())]
    figure = new_figure(10, 0.8 + 0.23 * len(found))
    height = 1 - 0.65 / figure.get_figheight()
    axes = figure.add_axes((0.22, 0.02, 0.76, height))
    axes.set_xlim(-0.5, len(calls) - 0.5)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_yticks(range(len(found)), labelled(found), fontsize=8.5, color=style.INK)
    axes.set_xticks(range(len(calls)), [call.replace(", ", ",\n") for call in calls], fontsize=8, color=style.INK)
    axes.xaxis.tick_top()
    axes.set_title("Which call names which bug", loc="left", fontsize=10, color=style.INK, fontweight="bold", pad=20)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for y, (_, row) in enumerate(found.items()):
        axes.axhline(y + 0.5, color=style.PALE, linewidth=0.5)
        for x, call in enumerate(calls):
            if call in row:
                sign, colour = MARKS[row[call]]
                axes.text(x, y, sign, ha="center", va="center", color=colour, fontsize=12)
    said = "; ".join(
        f"{id}: {', '.join(f'{call} ({severity})' for call, severity in row.items()) or 'none'}"
        for id, row in found.items()
    )
    return (
        figure,
        f"Which call names which bug in every seed that was run. {said}.",
        "An empty row is a bug that no check names. ●: an error; ○: a warning; ▪: an info.",
    )
