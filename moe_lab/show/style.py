"""One style for every figure, and the way from a figure to a cell's output.

Figures are `Figure` objects, never pyplot: its global state is shared by all threads. Margins are fixed, since
constrained layout doubles the time of a redraw. A series is told apart by colour, by line style or marker, and by a
label beside it, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, safe for the common forms of colour blindness. https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#6B6B6B", "#DDDDDD"
# (colour, line style, marker) of the n-th series
SERIES = [
    (BLUE, "-", "o"),
    (VERMILION, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    (ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (SKY, (0, (1, 1)), "P"),
]


def new_figure(width: float = 10, height: float = 6) -> Figure:
    """An empty figure of `width` × `height` inches that draws without a window."""
    figure = Figure(figsize=(width, height), dpi=80, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(figure: Figure, box: tuple[float, float, float, float], title: str, x: str, y: str) -> Axes:
    """Axes in `box` (left, bottom, width, height as shares of the figure) with title and axis labels (with units)."""
    axes = figure.add_axes(box)
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(which="both", labelsize=8, colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) labels right of the axes at the height of their values, pushed apart where they
    would overlap. Call it after the limits of y are set."""
    low, high = axes.get_ylim()
    gap = 13 / (axes.get_position().height * axes.figure.bbox.height)  # a line of text, as a share of the axes' height
    labels = sorted(labels)
    places = [(value - low) / (high - low) for value, _, _ in labels]
    for _ in range(60):  # neighbours push each other apart until no two lines of text overlap
        for i in range(1, len(places)):
            overlap = max(0.0, gap - (places[i] - places[i - 1]))
            places[i - 1] = max(0.04, places[i - 1] - overlap / 2)
            places[i] += overlap / 2
    for place, (_, text, colour) in zip(places, labels, strict=True):
        axes.text(1.02, place, text, color=colour, fontsize=8.5, va="center", transform=axes.transAxes)


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 96 colours: a third of the usual size, in a notebook that is saved many times."""
    figure.canvas.draw()
    size = figure.canvas.get_width_height()
    image = Image.frombuffer("RGBA", size, figure.canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    buffer = io.BytesIO()
    image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as a PNG file."""
    path = Path(path)
    path.write_bytes(png(figure))
    return path


def to_html(figure: Figure, description: str) -> dict[str, str]:
    """A MIME bundle: the picture with its description as alternative text and as caption, and the text alone.

    It is HTML and not image/png because JupyterLab and nbconvert drop the alternative text of the latter.
    """
    data = base64.b64encode(png(figure)).decode()
    text = html.escape(description)
    caption = text.replace("\n", "<br>")
    picture = f'<img alt="{text}" src="data:image/png;base64,{data}" style="max-width:100%">'
    return {
        "text/html": f'<figure style="margin:0">{picture}<figcaption>{caption}</figcaption></figure>',
        "text/plain": description,
    }


def show(figure: Figure, description: str) -> None:
    """Display a figure with its text description below the cell."""
    from IPython.display import display

    display(to_html(figure, description), raw=True)
