"""What every live training has: a worker thread, a figure, controls, and findings in red. `live.py` has what is trained."""

import asyncio
import html
import itertools
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from moe_lab.health.during.watch import Watch
from moe_lab.health.findings import SEVERITIES, Finding, grouped
from moe_lab.show.front import Waiting, is_interactive, keep_live, release_thread_pool, request
from moe_lab.show.style import to_html

REDRAW_S = 1.0  # the least time between two pictures, seconds
SILENT_S = 3.0  # the most, headless, between two lines during an evaluation
RED, AMBER = "#C62828", "#B26A00"
# The picture is there twice: as a widget, which comes back when the page is loaded again, and as plain HTML, which is saved
# and outlives the kernel. The second is seen where the first is not, and the place of widgets that are gone stays empty.
STYLE = """<style>body:has(.moe-live-{n}) .moe-still-{n} {{display: none}}
.jp-OutputArea:has(.moe-still-{n}) .jp-OutputArea-output:is(.jupyter-widgets, [data-mime-type*=widget]):not(:has(*))
{{display: none}}</style>"""
_numbers = itertools.count()
_active: "Live | None" = None  # a kernel trains one thing at a time; see Live.start


def told(news: Sequence[tuple[str, Finding]]) -> dict[str, str]:
    """Findings as HTML and as text, errors first: each rule once, by its first finding, with whose and how many."""
    shown = {"text/html": "", "text/plain": ""}
    ranked = sorted(news, key=lambda named: SEVERITIES.index(named[1].severity))
    for (severity, rule), same in grouped(ranked, lambda named: (named[1].severity, named[1].rule)).items():
        names, (_, first) = dict.fromkeys(name for name, _ in same), same[0]
        when = f" at step {first.step}" if first.step else ""
        often = f" ({len(same)} findings)" if len(same) > len(names) else ""
        head = f"{', '.join(names) if all(names) else ''} {severity}: {rule}{when}{often}:".strip()
        words = " ".join(f"{first.message}. {first.advice}".split())
        colour = {"error": RED, "warning": AMBER}.get(severity, "currentColor")
        # a quarter of the page's own ink: darker on white paper, lighter in a dark theme
        style = f"color:{colour};color:color-mix(in srgb,{colour} 75%,currentColor)"
        shown["text/html"] += f'<div><strong style="{style}">{html.escape(head)}</strong> {html.escape(words)}</div>'
        shown["text/plain"] += f"\n{head} {words}"
    return shown


class Live:
    """Trainers in a worker thread, a figure of them, and controls where somebody watches. A subclass says what is done
    there (`work`), what the figure is and what the line under the buttons says (`status`). `training` holds what `work`
    returned, or its error; `watches` are those of the trainers that have one, by name."""

    def __init__(
        self, trainers: Sequence[Any], watches: Mapping[str, Watch], acts: Mapping[str, Callable] | None = None
    ):
        self.trainers, self.watches, self.acts = list(trainers), dict(watches), dict(acts or {})
        self.can_show = get_ipython() is not None  # not in a plain script
        self.controls = self.can_show and is_interactive()
        self.training: Future[Any] = Future()
        self._threads = [threading.Thread(target=self._train, daemon=True)]
        self._number, self._cell = next(_numbers), None
        self._told: list[tuple[str, Finding]] = []

    caption: str  # what the figure means; what it shows, `figure` says
    work: Callable[[], Any]
    figure: Callable[[], tuple[Figure, str]]
    status: Callable[[], str]

    def start(self):
        """Show the controls and the figure here and begin to train. Returns itself. What is still going on is stopped
        first, so the cell may be run again, also while another one waits for the end."""
        global _active
        if _active is not None:
            if not _active.training.done():
                _active.stop()
            _active._join()
        _active = self
        self._cell = request().get("metadata", {}).get("cellId")
        if self.controls:
            self._box = self._widgets()
            self._handle = display(self._box, display_id=True)
            self._threads.append(threading.Thread(target=self._draw, daemon=True))
        if self.can_show:
            text = {"text/plain": "(the figure comes with the first readings)"}
            self._picture = display(text, raw=True, display_id=True)
        release_thread_pool()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        for trainer in self.trainers:
            trainer.stop()

    async def finished(self) -> Any:
        """Await the end in a cell: the controls work meanwhile, and Interrupt stops the run gracefully."""
        tenths, spoken = 0, time.monotonic()  # headless: tenths of the run, and when
        try:
            with Waiting() as waiting:
                while not self.training.done():
                    await asyncio.sleep(0.05)
                    if waiting.asked_again(self._cell):
                        self.stop()
                    tenth = int(10 * self.share())
                    silent = self.is_evaluating() and time.monotonic() - spoken > SILENT_S
                    if not self.controls and (tenth > tenths or silent):
                        tenths, spoken = tenth, time.monotonic()
                        print(f"{10 * tenth:3d} %  {self.status()}", file=sys.stderr, flush=True)
                    self._tell()
        except (asyncio.CancelledError, KeyboardInterrupt):
            self.stop()
        self._join()  # a second Interrupt gives up waiting
        self._tell()
        self._close()  # again, from this cell: headless clients drop what a thread sends after its cell is over
        return self.training.result()

    def show(self) -> None:
        """Show it here as well: the controls and the figure while it goes on, the last figure afterwards."""
        if self.controls and not self.training.done():
            display(self._box)
        elif self.can_show:
            display(self._bundle(), raw=True)

    def findings(self) -> list[tuple[str, Finding]]:
        """So far, with the name of the watch that has it."""
        return [(name, finding) for name, watch in self.watches.items() for finding in list(watch.findings)]

    def share(self) -> float:
        """Of the updates, done."""
        return min(trainer.step / trainer.n_steps for trainer in self.trainers)

    def is_evaluating(self) -> bool:
        return any(trainer.controls.evaluated < 1 for trainer in self.trainers)

    def state(self) -> str:
        """One word, or two."""
        controls = [trainer.controls for trainer in self.trainers]
        if self.training.done():
            ended = "interrupted" if any(c.stopped for c in controls) else "finished"
            return "failed" if self.training.exception() else self.training.result().get("status", ended)
        if any(c.stopped for c in controls):
            return "stopping"
        if self.is_evaluating():
            return f"evaluating, {min(c.evaluated for c in controls):.0%}"
        return "paused" if any(c.paused for c in controls) else "running"

    def _join(self) -> None:
        """Until the update in flight has ended and the trainer has saved."""
        for thread in self._threads:
            thread.join()

    # ---- in the worker thread and the drawing thread: no print, no pyplot ----

    def _train(self) -> None:
        try:
            with torch.enable_grad():  # grad mode belongs to a thread, so the notebook's does not reach here
                self.training.set_result(self.work())
        except BaseException as error:  # raised again in the waiting cell instead of lost in the thread
            self.training.set_exception(error)

    def _draw(self) -> None:
        drawn, not_before = [0] * (1 + len(self.trainers)), 0.0  # no empty axes; a tenth of the time is drawn, at most
        while wait([self.training], REDRAW_S).not_done:
            self._status.value = self.status()
            for trainer in self.trainers:
                trainer.controls.looks = True
            there = [len(self.findings()), *(trainer.step for trainer in self.trainers)]
            if there != drawn and time.monotonic() > not_before:
                began, drawn = time.monotonic(), there
                self._redraw()
                not_before = 10 * time.monotonic() - 9 * began
        self._close()

    # ---- output ----

    def _tell(self) -> None:
        """Headless: what was found since the last call."""
        for news in () if self.controls else self.findings():
            if news not in self._told:
                self._told.append(news)
                print(*" ".join(map(str, news)).split(), file=sys.stderr, flush=True)

    def _bundle(self) -> dict[str, str]:
        bundle, news = to_html(*self.figure(), self.caption), told(self.findings())
        return {kind: bundle[kind] + news[kind] for kind in bundle}

    def _redraw(self) -> None:
        if not self.can_show:
            return
        bundle = self._bundle()
        if self.controls:
            self._image.value = bundle["text/html"]
            style = STYLE.format(n=self._number)
            still = f'{style}<div class="moe-still-{self._number}">{bundle["text/html"]}</div>'
            bundle = bundle | {"text/html": still}
        self._picture.update(bundle, raw=True)

    def _close(self) -> None:
        """The last picture, and text in place of the controls, which would outlive the kernel as errors. A page that was loaded
        again meanwhile has lost that place and keeps the widgets: picture and status."""
        self._redraw()
        if self.controls:
            self._status.value = self.status()
            self._box.children = [self._status, self._image]
            self._handle.update({"text/plain": self.status()}, raw=True)

    def _widgets(self) -> Any:
        import ipywidgets as widgets

        controls = [trainer.controls for trainer in self.trainers]

        def pause() -> None:
            for one in controls:
                one.resume() if one.paused else one.pause()
            buttons[0].description = "Resume" if controls[0].paused else "Pause"

        def stop() -> None:
            self.stop()
            for one in buttons:
                one.disabled = True

        def save() -> None:
            for one in controls:
                one.saved = "…"
                one.save()

        def button(text: str, tooltip: str, act: Callable[[], None], style: str = "") -> widgets.Button:
            layout = {"width": "auto", "min_width": "6em"}
            made = widgets.Button(description=text, tooltip=tooltip, button_style=style, layout=layout)
            made.on_click(lambda _: act())
            made.on_click(lambda _: setattr(self._status, "value", self.status()))
            return made

        buttons = [
            button("Pause", "Pause after this step, or resume", pause),
            button("Stop", "Stop after this step and save", stop, "danger"),
            button("Checkpoint", "Save a checkpoint after this step", save),
        ]
        options = {"description": "LR ×", "readout_format": ".3g", "continuous_update": False}
        slider = widgets.FloatLogSlider(1.0, base=2, min=-4, max=2, step=0.5, layout={"min_width": "22em"}, **options)
        slider.observe(lambda change: [one.set_lr_scale(change["new"]) for one in controls], names="value")
        keep_live(slider)
        planted = [button(name, f"{name}, after this step", partial(self.plant, name)) for name in self.acts]
        self._status, self._image = widgets.Label(self.status()), widgets.HTML(layout={"min_height": "22em"})
        self._image.add_class(f"moe-live-{self._number}")
        wrap = {"flex_flow": "row wrap"}
        rows = [widgets.HBox([*buttons, slider], layout=wrap)]
        rows += [widgets.HBox([widgets.Label("sabotage:"), *planted], layout=wrap)] if planted else []
        buttons += planted
        return widgets.VBox([*rows, self._status, self._image])

    def plant(self, name: str) -> None:
        """Ask every trainer for one of `acts`, after the update in progress."""
        for trainer in self.trainers:
            trainer.controls.ask(name)
