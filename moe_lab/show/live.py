"""A training run that you watch and steer from a notebook.

    run = LiveRun(trainer, floors).start()     # the cell under which the controls and the figure stand
    summary = await run.finished()             # a later cell; buttons work meanwhile (ipykernel >= 7.4)

The trainer runs in a worker thread, and buttons only set its locked controls. The figure is a plain picture under a
display id, so it survives saving, reloading and papermill. Headless there are no widgets, one figure at the end, and a
line of progress every tenth of the run; in a plain script those lines alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from IPython import get_ipython
from IPython.display import display

from moe_lab.show.plots import next_token_weight, training_figure
from moe_lab.show.style import to_html
from moe_lab.train.record import read_record

REDRAW_S = 1.0  # the least time between two pictures, seconds
SILENT_S = 3.0  # the most, headless, between two lines during an evaluation
_active: LiveRun | None = None  # a kernel trains one model at a time; see LiveRun.start


def is_interactive() -> bool:
    """Whether a person watches: MOE_LAB_INTERACTIVE if set, else a front end's session variable."""
    asked = os.environ.get("MOE_LAB_INTERACTIVE")
    if asked is not None:
        return asked.strip().lower() not in ("", "0", "false", "no")
    return any(os.environ.get(name) for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"))


def keep_live(widget: Any) -> None:
    """Let a slider move more than once while a cell awaits.

    ipykernel 7.4.0 serves such messages but sends no "idle" status for them, and the front end holds back the next
    change of a widget until one comes. Sending the missing status opens it again; a second one is ignored.
    """
    try:
        kernel = get_ipython().kernel
        lock, publish = kernel._main_asyncio_lock, kernel._publish_status
    except AttributeError:  # another kernel: nothing to mend
        return

    def acknowledge(_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and lock.locked():
            publish("idle", "shell")

    widget.observe(acknowledge, names="value")


def release_thread_pool() -> None:
    """Free the OpenMP workers that belong to this thread, if torch's library is GNU's.

    Every thread that computes keeps workers of its own. With those of an idle notebook thread beside those of the
    training thread there are more than cores, and then the workers sleep instead of spin between two operations: a
    training step of the lab's model takes half as long again. The workers come back with this thread's next operation.
    """
    torch.get_num_threads()  # loads the library
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else ()  # Linux
    for library in {line.split()[-1] for line in lines if "libgomp" in line}:
        pause = getattr(ctypes.CDLL(library), "omp_pause_resource_all", None)
        if pause is not None:
            pause(1)  # 1: omp_pause_soft


class LiveRun:
    """Runs `trainer.fit()` in a thread, shows it, and hands its summary to the cell that waits.

    `floors` are lines for the loss panel (nats per token by name; None: the trainer's). There are buttons if somebody
    watches. `rows` are the record's, those of a resumed run's past too; `training` holds the summary, or the error.
    """

    def __init__(self, trainer: Any, floors: Mapping[str, float] | None = None):
        self.trainer, self.floors = trainer, floors or trainer.floors
        self.can_show = get_ipython() is not None  # not in a plain script
        self.controls = self.can_show and is_interactive()
        self.rows: list[dict[str, Any]] = []
        self.training: Future[dict[str, Any]] = Future()
        self._threads = [threading.Thread(target=self._train, daemon=True)]

    def start(self) -> LiveRun:
        """Show the controls and the figure here and begin to train. A run that is still going is stopped first, so
        the cell may be run again."""
        global _active
        if _active is not None:
            _active.stop_and_join()
        _active = self
        self.rows += [row for row in read_record(self.trainer.run_dir) if row["step"] <= self.trainer.step]
        self.trainer.listeners.append(self.rows.append)
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

    def stop_and_join(self) -> None:
        """Let the update in flight end and the trainer save."""
        if not self.training.done():
            self.trainer.stop()
        for thread in self._threads:
            thread.join()

    async def finished(self) -> dict[str, Any]:
        """Await the end in a cell: the controls work meanwhile, and Interrupt stops the run gracefully."""
        printed, printed_at = 0, time.monotonic()  # tenths of the run, headless; and when
        try:
            while not self.training.done():
                await asyncio.sleep(0.05)
                row = self._last_step()
                tenth = 10 * row["step"] // self.trainer.n_steps if row else 0
                silent = self.trainer.controls.evaluated < 1 and time.monotonic() - printed_at > SILENT_S
                if (tenth > printed or silent) and not self.controls:
                    printed, printed_at = tenth, time.monotonic()
                    print(f"{10 * tenth:3d} %  {self.status()}", file=sys.stderr, flush=True)
        except (asyncio.CancelledError, KeyboardInterrupt):
            self.trainer.stop()
        for thread in self._threads:  # a second Interrupt gives up waiting
            thread.join()
        self._close()  # again, from this cell: headless clients drop what a thread sends after its cell is over
        return self.training.result()

    def status(self) -> str:
        """One line: state, progress, loss, speed, time left."""
        controls, n_steps, row = self.trainer.controls, self.trainer.n_steps, self._last_step()
        state = "paused" if controls.paused else "running"
        if controls.evaluated < 1:
            state = f"evaluating, {controls.evaluated:.0%}"
        if self.training.done():
            state = "failed" if self.training.exception() else self.training.result()["status"]
        if row is None:
            return f"{state} · step 0/{n_steps}"
        loss = row["losses"]["next_token"] / next_token_weight(self.trainer.config)
        text = f"{state} · step {row['step']}/{n_steps} · loss {loss:.3f}"
        speed = row.get("tokens_per_s")
        if speed and not self.training.done():
            left_s = row["tokens"] * (n_steps / row["step"] - 1) / speed
            text += f" · {speed:,.0f} tokens/s · {left_s // 60:.0f} min {left_s % 60:02.0f} s left"
        return text if controls.lr_scale == 1 else f"{text} · LR × {controls.lr_scale:.3g}"

    def _last_step(self) -> dict[str, Any] | None:
        return next((row for row in reversed(self.rows) if "losses" in row), None)

    # ---- in the worker thread and the drawing thread: no print, no pyplot ----

    def _train(self) -> None:
        try:
            with torch.enable_grad():  # grad mode belongs to a thread, so the notebook's does not reach here
                self.training.set_result(self.trainer.fit())
        except BaseException as error:  # raised again in the waiting cell instead of lost in the thread
            self.training.set_exception(error)

    def _draw(self) -> None:
        n_drawn = 0
        while wait([self.training], REDRAW_S).not_done:
            self._status.value = self.status()
            if len(self.rows) > n_drawn:
                n_drawn = len(self.rows)
                self._redraw()
        self._close()

    # ---- output ----

    def _redraw(self) -> None:
        if self.can_show:
            figure, description = training_figure(list(self.rows), self.floors, self.trainer.config)
            self._picture.update(to_html(figure, description), raw=True)

    def _close(self) -> None:
        """The last picture, and text in place of the controls: a saved notebook would show them as errors."""
        self._redraw()
        if self.controls:
            self._handle.update({"text/plain": self.status()}, raw=True)
            self._box.close()

    def _widgets(self) -> Any:
        import ipywidgets as widgets

        controls = self.trainer.controls

        def pause(button: widgets.Button) -> None:
            controls.resume() if controls.paused else controls.pause()
            button.description = "Resume" if controls.paused else "Pause"

        row = []
        for text, tooltip, act in (
            ("Pause", "Pause after this step, or resume", pause),
            ("Stop", "Stop after this step and save", lambda _: self.trainer.stop()),
            ("Checkpoint", "Save a checkpoint after this step", lambda _: controls.save()),
        ):
            row.append(widgets.Button(description=text, tooltip=tooltip, layout={"width": "110px"}))
            row[-1].on_click(act)
        row[1].button_style = "danger"
        options = {"description": "LR ×", "readout_format": ".2f", "continuous_update": False}
        slider = widgets.FloatLogSlider(1.0, base=2, min=-4, max=2, step=0.5, **options)
        slider.observe(lambda change: controls.set_lr_scale(change["new"]), names="value")
        keep_live(slider)
        self._status = widgets.Label(self.status())
        return widgets.VBox([widgets.HBox([*row, slider]), self._status])
