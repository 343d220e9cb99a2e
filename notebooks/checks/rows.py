"""Axes with a row for each name."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from moe_lab.show.style import INK, new_axes, new_figure


def row_axes(names: Sequence[str], title: str, unit: str, width: float = 10) -> Axes:
    """Axes of a figure of their own, `width` inches wide, with a row for each name, the first on top."""
    height = 1 + 0.34 * len(names)
    box = (2.4 / width, 0.57 / height, 0.84 - 2.4 / width, 1 - 0.92 / height)  # names need as much room at any width
    axes = new_axes(new_figure(width, height), box, title, unit, "")
    axes.grid(False)
    axes.set_yticks(range(len(names)), names, fontsize=9, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return axes
