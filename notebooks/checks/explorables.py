"""Figures to play with: controls over a figure where somebody watches, else one still figure.

An explorable is a function that draws and a line that names its controls, in whichever file owns the lesson:

    def decay(rate: float, kind: str) -> tuple[Figure, str, str]:  # the figure, alt text, caption: what `show` takes
        ...

    def explore_decay() -> None:
        explore(decay, rate=Slider("rate", 0.5, 0, 1, 0.01), kind=Choice("kind", {"sum": "sum", "mean": "mean"}))

The notebook's cell is `explore_decay()`. Headless it shows the start position, or what `still()` draws. The alt text
says what is seen now: a line in EXPLORABLES of tests/browser/test_explorables_browser.py tries real keys and clicks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from moe_lab.show.front import is_interactive, keep_live
from moe_lab.show.style import show, to_html


class Slider(NamedTuple):
    """A number to move. With a `base`, the slider is logarithmic: `low`, `high` and `step` are exponents of it."""

    label: str
    value: float  # at the start
    low: float
    high: float
    step: float
    base: float | None = None

    def widget(self) -> Any:
        import ipywidgets

        limits = {"min": self.low, "max": self.high, "step": self.step}
        options = {"description": self.label, "readout_format": ".4r", "layout": {"width": "32em"}}
        options |= {"style": {"description_width": "9em"}}
        if self.base is None:
            return ipywidgets.FloatSlider(self.value, **limits, **options)
        steps = (math.log(self.value, self.base) - self.low) / self.step  # a browser moves a value to the nearest step
        limits["min"] += (steps % 1) * self.step if abs(steps - round(steps)) > 1e-9 else 0
        return ipywidgets.FloatLogSlider(self.value, base=self.base, **limits, **options)


class Choice(NamedTuple):
    """Buttons of which one is pressed. The texts must differ; the first is pressed at the start."""

    label: str
    options: Mapping[str, Any]  # a button's text → the value it stands for

    @property
    def value(self) -> Any:
        return next(iter(self.options.values()))

    def widget(self) -> Any:
        import ipywidgets

        style = {"button_width": "auto", "description_width": "9em"}
        return ipywidgets.ToggleButtons(options=list(self.options.items()), description=self.label, style=style)


moved: dict[str, Any] = {}  # where a reader left each control: a cell that is run again begins there


def explore(
    draw: Callable[..., tuple[Figure, str, str]],
    still: Callable[[], tuple[Figure, str, str]] | None = None,
    **controls: Slider | Choice,
) -> None:
    """Show `draw(**values)`, and again at each move of one of `controls`, which bear its arguments' names."""
    if not is_interactive():
        show(*(still() if still else draw(**{name: control.value for name, control in controls.items()})))
        return
    import ipywidgets
    from IPython.display import display

    widgets = {name: control.widget() for name, control in controls.items()}
    place = f"{draw.__module__}.{draw.__qualname__}"
    for name, widget in widgets.items():
        widget.value = moved.get(f"{place}({name})", widget.value)

    def picture() -> dict[str, str]:
        return to_html(*draw(**{name: widget.value for name, widget in widgets.items()}))

    display(ipywidgets.VBox([*widgets.values()]))
    name_sliders()
    handle = display(picture(), raw=True, display_id=True)

    def redraw(_: Any) -> None:
        moved.update({f"{place}({name})": widget.value for name, widget in widgets.items()})
        handle.update(picture(), raw=True)

    for widget in widgets.values():
        keep_live(widget)
        widget.observe(redraw, names="value")


def name_sliders() -> None:
    """Give every slider on the page the label beside it as its name for screen readers; ipywidgets gives none.

    Call it after the sliders are displayed. A saved notebook keeps nothing of it that shows.
    """
    from IPython.display import display

    code = """for (const ms of [200, 1000, 4000]) setTimeout(() => {
      for (const slider of document.querySelectorAll('.widget-slider, .widget-hslider')) {
        const label = slider.querySelector('.widget-label');
        for (const handle of slider.querySelectorAll('.noUi-handle'))
          if (label) handle.setAttribute('aria-label', label.textContent);
      }}, ms)"""
    display({"application/javascript": code, "text/plain": ""}, raw=True)
