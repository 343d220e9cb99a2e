"""Figures of notebook 10: training curves side by side, and a picture of those measurements that have one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from checks.rows import row_axes
from checks.ward import Patient, Result
from moe_lab.show import style
from moe_lab.show.style import draw_floors, label_right, new_axes, new_figure, show

WIDTH = 7  # inches: half a window, as the desk has it beside the checklist, shows them unshrunk
GAIN = 0.05  # nats that a branch must gain: the checklist's limit


def beside(patients: Mapping[str, Patient]) -> None:
    """Training losses of a few runs in one picture."""
    figure = new_figure(10, 3.4)
    axes = new_axes(figure, (0.07, 0.16, 0.72, 0.74), "Training loss", "update", "nats per token")
    labels, said = [], []
    for (name, patient), (colour, line, _) in zip(patients.items(), style.SERIES, strict=False):
        steps, losses = patient.record["step"], patient.record["loss"]
        axes.plot(steps, losses, color=colour, linestyle=line, linewidth=1.5)
        last = float(np.mean(losses[-5:]))
        labels.append((last, f"{name} {last:.2f}", colour))
        said.append(f"{name} from {losses[0]:.2f} to {last:.2f}")
    label_right(axes, labels)
    alt = f"Two falling curves of the training loss over 240 updates: {'; '.join(said)} nats per token."
    show(figure, alt, "Same seed, same text, same config. One of the two hardly learns.")


def twelve(patients: Mapping[str, Patient]) -> None:
    """The training loss of every run of a ward, on one scale."""
    figure, said = new_figure(10, 6.6), []
    top = max(max(patient.record["loss"]) for patient in patients.values())
    for number, (name, patient) in enumerate(patients.items()):
        row, column = divmod(number, 4)
        box = (0.06 + 0.24 * column, 0.73 - 0.32 * row, 0.19, 0.2)
        axes = new_axes(figure, box, name, "update" if row == 2 else "", "nats per token" if column == 0 else "")
        axes.plot(patient.record["step"], patient.record["loss"], color=style.BLUE, linewidth=1.2)
        axes.set_ylim(0, min(top, 8) * 1.05)
        said.append(f"{name} {patient.record['loss'][0]:.1f} to {np.mean(patient.record['loss'][-5:]):.1f}")
    alt = f"Twelve small panels with one falling curve each, training loss in nats per token: {', '.join(said)}."
    show(figure, alt, "What everybody looks at first. It is free, and it is not enough.")


def show_result(run: str, what: str, result: Result) -> None:
    """The figure of an ordered measurement, if it has one."""
    if draw := {"floors": floors, "record": load, "perturbation": heard, "branch_probe": branches}.get(what):
        show(*draw(run, result))


def floors(run: str, result: Result) -> tuple[Figure, str, str]:
    """Both losses beside the tables of counts, which stand in the first line."""
    figure = new_figure(WIDTH, 3.4)
    axes = new_axes(figure, (0.09, 0.16, 0.66, 0.74), f"{run}: loss of the next token", "update", "nats per token")
    training, validation = (np.array(result.drawn[name]).T for name in ("training", "validation"))
    axes.plot(*training, color=style.BLUE, linewidth=1.3)
    axes.plot(*validation, color=style.VERMILION, linestyle="--", marker="s", markersize=5)
    tables = {
        name: float(value) for name, value in (text.split() for text in result.lines[0].split(": ")[1].split(", "))
    }
    axes.set_ylim(min(training[1].min(), validation[1].min(), tables["trigram"]) - 0.2, training[1].max() + 0.3)
    ends = [(training[1][-5:].mean(), "training", style.BLUE), (validation[1][-1], "validation", style.VERMILION)]
    labels = [(value, f"{name} {value:.2f}", colour) for value, name, colour in ends]
    label_right(axes, draw_floors(axes, tables) + labels)
    alt = f"{run}: training ends at {ends[0][0]:.2f}, validation at {ends[1][0]:.2f} nats; {result.lines[0]}."
    return figure, alt, "A model that knows more than frequencies is below the unigram table on text it has not read."


def load(run: str, result: Result) -> tuple[Figure, str, str]:
    """Each expert's load over time, a panel a layer."""
    loads = np.array(result.drawn)  # (times, layers, experts)
    names = [line.partition(":")[0] for line in result.lines if line.startswith("MoE layer")]
    figure, said = new_figure(WIDTH, 2.9), []
    for layer, name in enumerate(names):
        box = (0.08 + 0.44 * layer, 0.2, 0.37, 0.64)
        axes = new_axes(figure, box, f"{run}: {name}", "share of the run", "expert" if layer == 0 else "")
        axes.grid(False)
        extent = (0, 1, loads.shape[2] - 0.5, -0.5)
        image = axes.imshow(loads[:, layer].T, cmap="cividis", vmin=0, vmax=4, aspect="auto", extent=extent)
        axes.set_yticks(range(loads.shape[2]))
        last = loads[-1, layer]
        said.append(f"{name} ends between {last.min():.2f} and {last.max():.2f} of the even share")
    bar = figure.colorbar(image, cax=figure.add_axes((0.93, 0.2, 0.015, 0.64)), ticks=range(5))
    bar.ax.set_title("load", fontsize=9, color=style.INK)
    alt = f"{run}: tables of colours, experts by time, dark for few tokens and bright for many; {'; '.join(said)}."
    return (
        figure,
        alt,
        f"Each of {len(loads)} columns is a mean over its part of the run; 1 is the even share. A row that stays darkest is an "
        "expert that nobody asks any more.",
    )


def heard(run: str, result: Result) -> tuple[Figure, str, str]:
    """Who hears of a changed token."""
    values = {name: value for name, value in result.drawn.items() if name != "loss"}
    axes = row_axes(list(values), f"{run}: change of an earlier logit", "standard deviations of the logits", WIDTH)
    for place, value in enumerate(values.values()):
        axes.plot([0, value], [place, place], color=style.VERMILION if value else style.BLUE, linewidth=4)
        axes.annotate(f"{value:.2g}", (value, place), (8, -3), textcoords="offset points", fontsize=9, color=style.INK)
    axes.set_xlim(0, 1.15 * max([0.1, *values.values()]))
    alt = f"{run}: " + "; ".join(f"{name} {value:.2g}" for name, value in values.items()) + "."
    return (
        axes.figure,
        alt,
        "Only the first and the last bar must be zero: while it trains, a top-k over time looks ahead.",
    )


def branches(run: str, result: Result) -> tuple[Figure, str, str]:
    """What three times each learning rate gains."""
    rows = [(name, gain, error) for name, gain, error in result.drawn if gain is not None and abs(gain) < 100]
    axes = row_axes(
        [name for name, _, _ in rows], f"{run}: gained by three times the LR", "nats after 30 updates", WIDTH
    )
    for place, (_, gain, error) in enumerate(rows):
        axes.errorbar(
            gain, place, xerr=3 * error, color=style.BLUE if gain < GAIN else style.VERMILION, marker="o", capsize=3
        )
    axes.axvline(GAIN, color=style.GREY, linestyle="--", linewidth=1)
    axes.axvline(0, color=style.GREY, linewidth=0.6)
    alt = f"{run}: " + "; ".join(f"{name} {gain:+.3f} ± {error:.3f}" for name, gain, error in rows) + " nats."
    return axes.figure, alt, "Right of the dashed line a raised learning rate has proved that it was too low."
