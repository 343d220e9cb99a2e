"""One style for every figure, and the way from a figure to a cell's output.

Figures are `Figure` objects, never pyplot: its global state is shared by all threads. Margins are fixed, since
constrained layout doubles the time of a redraw. A series has a line style or marker and a label beside its colour.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, safe for the common forms of colour blindness. https://jfly.uni-koeln.de/color/
BLUE, GREEN, VERMILION, PURPLE = "#0072B2", "#009E73", "#D55E00", "#CC79A7"
INK, GREY, PALE = "#222222", "#6B6B6B", "#DDDDDD"
# for letters, which are thinner than lines: darker, so that their contrast on white is at least 4.5 to 1
LETTERS = {GREEN: "#007A59", VERMILION: "#B84F00", PURPLE: "#A34F80"}
# colour, line style and marker of the n-th series
SERIES = [(BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D")]
LARGEST_SVG = 90_000  # bytes; a figure whose SVG is larger becomes a PNG
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moe_lab"})  # letters stay text; ids do not change
FLOOR_STYLES = {"uniform": ":", "unigram": (0, (1, 3)), "bigram": "-.", "trigram": "--"}


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


def draw_floors(axes: Axes, floors: Mapping[str, float]) -> list[tuple[float, str, str]]:
    """Lines at those floors (nats per token by name) that lie within the limits of y; returns labels for `label_right`."""
    low, high = axes.get_ylim()
    shown = {name: loss for name, loss in floors.items() if low < loss < high}
    for name, loss in shown.items():
        axes.axhline(loss, color=GREY, linestyle=FLOOR_STYLES.get(name, ":"), linewidth=1)
    return [(loss, f"{name} {loss:.2f}", GREY) for name, loss in shown.items()]


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) labels right of the axes at the height of their values, on any scale, pushed apart where
    they would overlap. Call it after the limits of y are set."""
    gap = 13 / axes.bbox.height  # a line of text, as a share of the axes' height
    labels = sorted(labels)
    low, high, *heights = axes.yaxis.get_transform().transform([*axes.get_ylim(), *(value for value, _, _ in labels)])
    places = [max(0.04, (height - low) / (high - low)) for height in heights]
    for _ in range(60):  # neighbours push each other apart until no two lines of text overlap
        for i in range(1, len(places)):
            overlap = max(0.0, gap - (places[i] - places[i - 1]))
            places[i - 1] = max(0.04, places[i - 1] - overlap / 2)
            places[i] += overlap / 2
    style = {"fontsize": 8.5, "va": "center", "transform": axes.transAxes}
    for place, (_, text, colour) in zip(places, labels, strict=True):
        axes.text(1.02, place, text, color=LETTERS.get(colour, colour), **style)


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 96 colours with two pixels for one on a plain screen: a third of the usual size."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * figure.dpi, pil_kwargs={"compress_level": 1})
    Image.open(buffer).convert("RGB").quantize(96).save(small, "PNG", optimize=True)
    return small.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG with text as text, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_html(figure: Figure, alt: str, caption: str = "") -> dict[str, str]:
    """A MIME bundle: the picture as SVG where that is light, else as PNG, on white paper in a dark theme too. `alt`
    says what is seen, for whoever does not see it; `caption` says what it means. Without a caption `alt` stands below
    the picture too, hidden from screen readers. Front ends drop the alternative text of image/png: so HTML."""
    data, kind = svg(figure), "svg+xml"
    if len(data) > LARGEST_SVG:
        data, kind = png(figure), "png"
    width = figure.get_figwidth() * figure.dpi
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    style = f"width:{width:.0f}px;max-width:100%;background:white"
    picture = f'<img alt="{html.escape(alt)}" src="{source}" style="{style}">'
    below = html.escape(caption or alt).replace("\n", "<br>")
    hidden = "" if caption else ' aria-hidden="true"'
    return {
        "text/html": f'<figure style="margin:0">{picture}<figcaption{hidden}>{below}</figcaption></figure>',
        "text/plain": f"{alt}\n{caption}".strip(),
    }


def show(figure: Figure, alt: str, caption: str = "") -> None:
    """Display a figure below the cell; see `to_html` for its two texts."""
    from IPython.display import display

    display(to_html(figure, alt, caption), raw=True)
