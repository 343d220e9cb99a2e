"""Two trainings side by side, with a figure, controls and what watches find.

pair = LivePair({"float32": healthy, "bf16": sick}).start()    # trainers; a watch on each is made here
rows = await pair.finished()                                   # the record of each, by name
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_lab.config import Config
from moe_lab.health.during.watch import Watch
from moe_lab.show.dashboard import Live
from moe_lab.show.live import found_by, last_with_loss, left, loss_of, observing
from moe_lab.show.plots import Mark, Rows, column, draw_marks, loss_curves, set_loss_limits, smooth
from moe_lab.show.style import SERIES, draw_floors, label_right, new_axes, new_figure


class LivePair(Live):
    """Trains `trainers` (two, by name) in turn, an update each, and hands the record of each to the cell that waits.

    Give them the same seed and data, and directories of their own. Each is evaluated when `fit` would do it, saved only
    by the button, and its rows are those of a run alone (seconds apart). `until` counts updates from the run's first;
    None: all of them. `watches` are made here for trainers that have none.
    """

    caption = (
        "What differs between the runs shows in the panel whose curves part; curves that lie together do not show it."
    )

    def __init__(
        self, trainers: Mapping[str, Any], watches: Mapping[str, Watch] | None = None, until: int | None = None
    ):
        given = watches or {}
        made = {n: given.get(n) or Watch(t.model, t.optimizers, t.n_steps, quiet=True) for n, t in trainers.items()}
        super().__init__(trainers.values(), made)
        self.named, self.until = dict(trainers), until or self.trainers[0].n_steps
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trainers}
        self.began = time.monotonic()
        for name, trainer in trainers.items():
            every = trainer.config.training.log_interval
            trainer.listeners += [self.rows[name].append, observing(self.watches[name], every, self.until)]

    def work(self) -> dict[str, list[dict[str, Any]]]:
        with contextlib.ExitStack() as stack:
            for trainer in self.trainers:
                stack.enter_context(trainer.opened())
                trainer.evaluate_if_due()
            turns = [stack.enter_context(contextlib.closing(t.steps(self.until))) for t in self.trainers]
            for _ in zip(*turns, strict=False):
                for trainer in self.trainers:
                    trainer.evaluate_if_due()
        return self.rows

    def share(self) -> float:
        return min(trainer.step for trainer in self.trainers) / self.until

    def figure(self) -> tuple[Figure, str]:
        rows = {name: list(rows) for name, rows in self.rows.items()}
        marks = {name: found_by(watch) for name, watch in self.watches.items()}
        return pair_figure(rows, self.trainers[0].floors, self.trainers[0].config, marks)

    def status(self) -> str:
        step = min(trainer.step for trainer in self.trainers)
        text = f"{self.state()} · step {step}/{self.until}"
        for name, rows in self.rows.items():
            last = last_with_loss(rows)
            text += f" · {name}: last batch {loss_of(last, self.named[name].config):.3f}" if last else ""
        if step and not self.training.done():
            text += left((time.monotonic() - self.began) * (self.until / step - 1))
        return text


def pair_figure(
    rows: Mapping[str, Rows], floors: Mapping[str, float], config: Config, marks: Mapping[str, Sequence[Mark]]
) -> tuple[Figure, str]:
    """Loss and norm weights of runs beside each other, by name, with what happened in each."""
    figure = new_figure(10, 3.8)
    loss = new_axes(figure, (0.065, 0.14, 0.34, 0.75), "Training loss (marks: validation)", "step", "nats per token")
    norm = new_axes(figure, (0.63, 0.14, 0.2, 0.75), "Norm weights: largest |w − 1|", "step", "0 is the lowest value")
    norm.set_yscale("symlog", linthresh=1e-4)
    texts, labels, norms, everything = [], [], [], []
    for (name, some), (colour, line, marker) in zip(rows.items(), SERIES, strict=False):
        (steps, losses), (evaluated_at, evaluated) = loss_curves(some, config)
        loss.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.3)
        loss.plot(steps, smooth(losses), color=colour, linewidth=1.8, linestyle=line)
        loss.plot(evaluated_at, evaluated, color=colour, linestyle="", marker=marker, markersize=4)
        moved = column(some, "norm_deviation")
        norm.plot(*moved, color=colour, linewidth=1.8, linestyle=line)
        everything += [losses, evaluated]
        labels += [(value, f"{name} {value:.2f}", colour) for value in smooth(losses)[-1:] if math.isfinite(value)]
        norms += [(value, f"{name} {value:.2g}", colour) for value in moved[1][-1:]]
        if len(steps):
            words = [f"training loss {smooth(losses)[-1]:.3f}", f"norm weights moved by up to {moved[1][-1]:.2g}"]
            words += [f"{text} at step {step}" for step, text, _ in marks.get(name, ())]
            texts.append(f"{name}: step {steps[-1]:.0f}, {', '.join(words)}.")
    set_loss_limits(loss, np.concatenate(everything), floors)
    colours = dict(zip(rows, (colour for colour, _, _ in SERIES), strict=False))
    draw_marks(loss, [(s, f"{n}: {text}", colours[n]) for n in rows for s, text, _ in marks.get(n, ())], named=True)
    label_right(loss, labels + draw_floors(loss, floors))
    norm.set_ylim(-2e-5, None)
    label_right(norm, norms)
    return figure, "\n".join(texts) or "No update yet."
