"""Figures that notebook 05 alone draws."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from moe_lab.config import Config
from moe_lab.show.plots import Rows, draw_loss, loss_curves
from moe_lab.show.style import new_axes, new_figure


def time_figure(rows: Rows, floors: Mapping[str, float], config: Config) -> tuple[Figure, str, str]:
    """The loss over the run's own clock, which evaluations lengthen, and pauses and saves do not."""
    figure = new_figure(10, 3.4)
    axes = new_axes(figure, (0.065, 0.15, 0.75, 0.74), "Loss over time", "minutes", "nats per token")
    training, (seconds, losses) = loss_curves(rows, config, "seconds")
    draw_loss(axes, (training[0] / 60, training[1]), (seconds / 60, losses), floors)
    passed: dict[str, list[str]] = {}  # by the minute at which an evaluation found them passed
    for name, loss in floors.items():
        for at in seconds[losses < loss][:1] / 60:
            passed.setdefault(f"after {at:.1f} minutes", []).append(name)
    words = "; ".join(f"below {', '.join(names)} {when}" for when, names in passed.items())
    whole = max((row["seconds"] for row in rows), default=0.0) / 60
    alt = f"{whole:.1f} minutes in all. The validation loss was {words or 'below no table'}."
    return figure, alt, "What a minute of training gives here. Only an evaluation shows that a table has been passed."
