"""The first picture of the course: the case's runs, re-enacted, from committed results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from moe_lab.config import ROOT
from moe_lab.failures.results import Results
from moe_lab.show.style import INK, SERIES, draw_floors, label_right, new_axes, new_figure

NAMES = {
    "failure, bf16": "failing learning rates, bf16",
    "failure": "failing learning rates",
    "cure": "the report's cure",
    "centre": "higher learning rates",
}


def read_floors() -> dict[str, dict]:
    return json.loads((ROOT / "notebooks" / "results" / "floors.json").read_text(encoding="utf-8"))


def floors_of(profile: str = "lab") -> dict[str, float]:
    """Committed losses of the tables of counts for a profile's text, nats per token."""
    return read_floors()[profile]["floors"]


def curve(results: Results, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates (n,) and training losses (seeds, n), nats per token."""
    rows = [row["training"] for row in results.rows if row["arm"] == arm]
    steps = sorted(map(int, rows[0]))
    return np.array(steps), np.array([[row[str(step)] for step in steps] for row in rows])


def case_curves(
    results: Results, floors: Mapping[str, float], arms: Sequence[str] = tuple(NAMES)
) -> tuple[Figure, str, str]:
    """Mean loss of each arm over the updates with the band of its seeds, its validation loss at the end, and the floors."""
    figure = new_figure(10, 4.4)
    axes = new_axes(
        figure, (0.065, 0.12, 0.66, 0.79), "Four trainings of one model on one text", "update", "nats per token"
    )
    labels, seen, marks = [], [], {"o": "●", "s": "■", "^": "▲", "D": "◆"}
    for arm, (colour, line, marker) in zip(arms, SERIES, strict=True):
        steps, losses = curve(results, arm)
        end, n_steps = results.losses(arm), results.rows[0]["steps"]
        axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, losses.mean(axis=0), color=colour, linestyle=line, linewidth=1.8)
        axes.plot(n_steps, end.mean, color=colour, marker=marker, markersize=7, clip_on=False, zorder=4)
        labels.append((end.mean, f"{marks[marker]} {NAMES[arm]} {end.mean:.2f}", INK))
        seen.append(f"{NAMES[arm]}: from {losses[:, 0].mean():.2f} to {end.mean:.2f}")
    axes.set(xlim=(0, n_steps), ylim=(floors["trigram"] - 0.25, floors["uniform"] + 0.25))
    label_right(axes, [*labels, *draw_floors(axes, floors)])
    alt = f"Loss over {n_steps} updates, four falling curves beside four level lines of counts. {'; '.join(seen)}."
    caption = (
        "Lines: training loss, mean of three seeds, with the band from the best seed to the worst. Marks: validation loss at the "
        "end, of other text, so a mark may lie off its line. Level lines: what tables of counts reach on the same text. All four "
        "runs share model, text, start values and the order of the data; they differ in two learning rates and in the format of "
        "the parameters."
    )
    return figure, alt, caption
