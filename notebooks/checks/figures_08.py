"""Figures of notebook 08: what a log shows of two runs beside what it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from moe_lab.show.style import SERIES, label_right, new_axes, new_figure

Panel = tuple[str, str, Mapping[str, Sequence[float]]]  # title, unit, a value an update by run


def side_by_side(panels: Sequence[Panel], caption: str) -> tuple[Figure, str, str]:
    """A panel each, with a line a run over the updates; gaps where a value is not finite."""
    figure, width = new_figure(10, 3.9), 0.94 / len(panels)
    said = []
    for i, (title, unit, runs) in enumerate(panels):
        axes = new_axes(figure, (0.06 + i * width, 0.14, width - 0.17, 0.76), title, "update", unit)
        axes.set_xlim(0, max(map(len, runs.values())) + 1)
        labels = []
        for (name, values), (colour, line, _) in zip(runs.items(), SERIES, strict=False):
            axes.plot(range(1, len(values) + 1), values, color=colour, linestyle=line, linewidth=1.8)
            whole = [value for value in values if math.isfinite(value)]
            labels.append((whole[-1], name, colour))
            lost = "" if len(whole) == len(values) else f", not finite in {len(values) - len(whole)} updates"
            said.append(f"{title}, {name}: from {whole[0]:.2f} to {whole[-1]:.3g}{lost}")
        label_right(axes, labels)
    return figure, "Values over the updates of a run. " + "; ".join(said) + ".", caption
