"""A training run that you watch and steer from a notebook.

    run = LiveRun(trainer, floors).start()     # the cell under which the controls and the figure stand
    summary = await run.finished()             # a later cell; buttons work meanwhile (ipykernel >= 7.4)

The trainer runs in a worker thread, and buttons only set its locked controls. The figure is a plain picture under a
display id, so it survives saving, reloading and papermill. Headless there are no widgets, one figure at the end, and a
line of progress every tenth of the run. A wrong guess of `is_interactive` costs some metadata and nothing else.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_lab.show.plots import next_token_weight, training_figure
from moe_lab.show.style import to_html
from moe_lab.train.record import read_record

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
        from IPython import get_ipython

        kernel = get_ipython().kernel
        lock, publish = kernel._main_asyncio_lock, kernel._publish_status
    except AttributeError:  # another kernel, or none: nothing to mend
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
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return
    for library in {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}:
        pause = getattr(ctypes.CDLL(library), "omp_pause_resource_all", None)
        if pause is not None:
            pause(1)  # 1: omp_pause_soft


class LiveRun:
    """Runs `trainer.fit()` in a thread, shows it, and hands its summary to the cell that waits.

    `floors` are lines for the loss panel (nats per token by name; None: the trainer's), `every_s` is the least time
    between two redraws in seconds, and `controls` is whether buttons are shown (None: if `is_interactive()`).
    """

    def __init__(
        self,
        trainer: Any,
        floors: Mapping[str, float] | None = None,
        every_s: float = 1.0,
        controls: bool | None = None,
    ):
        self.trainer, self.floors, self.every_s = trainer, floors, every_s
        self.controls = is_interactive() if controls is None else controls
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []
        self._drawn = -1  # rows in the latest picture
        self._tenth = 0  # tenths of the run printed, headless

    def start(self) -> LiveRun:
        """Show the controls and the figure here and begin to train. A run that is still going is stopped first, so
        the cell may be run again."""
        from IPython.display import display

        global _active
        if _active is not None:
            _active.stop_and_join()
        _active = self
        if self.controls:
            self._box = self._widgets()
            self._handle = display(self._box, display_id=True)
        self._picture = display({"text/plain": "(the figure comes with the first readings)"}, raw=True, display_id=True)
        self.trainer.listeners.append(self._listen)
        targets = (self._train, self._draw) if self.controls else (self._train,)
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        release_thread_pool()
        for thread in self._threads:
            thread.start()
        return self

    def stop_and_join(self) -> None:
        """Let the update in flight end and the trainer save."""
        if any(thread.is_alive() for thread in self._threads):
            self.trainer.stop()
        for thread in self._threads:
            thread.join()

    async def finished(self) -> dict[str, Any]:
        """Await the end in a cell: the controls work meanwhile, and Interrupt stops the run gracefully."""
        try:
            while not self._done.is_set():
                await asyncio.sleep(0.05)
                self._print_progress()
        except (asyncio.CancelledError, KeyboardInterrupt):
            self.trainer.stop()
        return self._end()

    def status(self) -> str:
        """One line: state, progress, loss, speed, time left."""
        state = "paused" if self.trainer.controls.paused else "running"
        if self._done.is_set():
            state = "failed" if self.error else self.summary["status"]
        row = self._last_step()
        if row is None:
            return f"{state} · step 0/{self.trainer.n_steps}"
        loss = row["losses"]["next_token"] / next_token_weight(self.trainer.config)
        text = f"{state} · step {row['step']}/{self.trainer.n_steps} · loss {loss:.3f}"
        speed = row.get("tokens_per_s")
        if speed and not self._done.is_set():
            left_s = row["tokens"] * (self.trainer.n_steps / row["step"] - 1) / speed
            text += f" · {speed:,.0f} tokens/s · {left_s // 60:.0f} min {left_s % 60:02.0f} s left"
        if self.trainer.controls.lr_scale != 1:
            text += f" · LR × {self.trainer.controls.lr_scale:.3g}"
        return text

    def _last_step(self) -> dict[str, Any] | None:
        return next((row for row in reversed(self.rows) if "losses" in row), None)

    # ---- in the worker thread and the drawing thread: no print, no pyplot ----

    def _train(self) -> None:
        try:
            with torch.enable_grad():  # grad mode belongs to a thread, so the notebook's does not reach here
                self.summary = self.trainer.fit()
        except BaseException as error:  # raised again in the waiting cell instead of lost in the thread
            self.error = error
        finally:
            if self.summary is not None:  # a resumed run's earlier rows as well, if the trainer keeps a record
                self.rows[:] = read_record(self.trainer.run_dir) or self.rows
            self._done.set()

    def _listen(self, row: dict[str, Any]) -> None:
        if not self.rows and row["step"] > 1:  # resumed: the figure begins where the record does
            self.rows += [old for old in read_record(self.trainer.run_dir) if old["step"] < row["step"]]
        self.rows.append(row)

    def _draw(self) -> None:
        while not self._done.wait(self.every_s):
            self._status.value = self.status()
            if len(self.rows) > self._drawn:
                self._redraw()
        self._close()

    # ---- output ----

    def _redraw(self) -> None:
        if self._picture is None:  # a plain script: there is nowhere to show it
            return
        rows, floors = list(self.rows), self.floors or getattr(self.trainer, "floors", None)
        self._picture.update(to_html(*training_figure(rows, floors, self.trainer.config)), raw=True)
        self._drawn = len(rows)

    def _close(self) -> None:
        """The last picture, and text in place of the controls: a saved notebook would show them as errors."""
        self._redraw()
        if self.controls and self._handle is not None:
            self._handle.update({"text/plain": self.status()}, raw=True)
            self._box.close()

    def _end(self) -> dict[str, Any]:
        for thread in self._threads:  # a second Interrupt gives up waiting
            thread.join()
        self._close()  # again, from this cell: headless clients drop what a thread sends after its cell is over
        if self.error is not None:
            raise self.error
        return self.summary

    def _print_progress(self) -> None:
        row = self._last_step()
        tenth = 10 * row["step"] // max(self.trainer.n_steps, 1) if row else 0
        if not self.controls and tenth > self._tenth:
            self._tenth = tenth
            print(f"{10 * tenth:3d} %  {self.status()}", file=sys.stderr, flush=True)

    def _widgets(self) -> Any:
        import ipywidgets as widgets

        controls = self.trainer.controls

        def pause(button: widgets.Button) -> None:
            controls.resume() if controls.paused else controls.pause()
            button.description = "Resume" if controls.paused else "Pause"

        row = []
        for text, (tooltip, act) in {
            "Pause": ("Pause after this step, or resume", pause),
            "Stop": ("Stop after this step and save", lambda _: self.trainer.stop()),
            "Checkpoint": ("Save a checkpoint after this step", lambda _: controls.save()),
        }.items():
            row.append(widgets.Button(description=text, tooltip=tooltip, layout={"width": "110px"}))
            row[-1].on_click(act)
        row[1].button_style = "danger"
        options = {"description": "LR ×", "readout_format": ".2f", "continuous_update": False}
        slider = widgets.FloatLogSlider(1.0, base=2, min=-4, max=2, step=0.5, **options)
        slider.observe(lambda change: controls.set_lr_scale(change["new"]), names="value")
        keep_live(slider)
        self._status = widgets.Label(self.status())
        return widgets.VBox([widgets.HBox([*row, slider]), self._status])
