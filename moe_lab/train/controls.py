"""What a person may change while a run goes on: a small locked record that the loop reads once an update."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path

from moe_lab.train.record import read_jsonl

CONTROLS = "controls.jsonl"


class Controls:
    """Callers on any thread ask; the loop obeys between two updates and writes what it did to controls.jsonl."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.asked: list[dict] = []
        self.scheduled: list[dict] = []
        self.paused = self.stopped = False
        self.lr_scale = 1.0
        self.evaluated = 1.0  # share of the validation targets scored by an evaluation; 1: none is going on
        self.saved = ""  # the file of the last checkpoint
        self.acts: dict[str, Callable[[], None]] = {}  # what else may be asked for, by name: done between two updates
        self.looks = False  # whether somebody looks, and so does not want to wait for the next `log_interval`

    def ask(self, action: str, **value: float) -> None:
        with self.lock:
            self.asked.append({"action": action, **value})
            if action in ("pause", "resume", "stop"):
                self.paused = action == "pause"
                self.stopped = self.stopped or action == "stop"
                self.lock.notify_all()

    stop, pause = partialmethod(ask, "stop"), partialmethod(ask, "pause")
    resume, save = partialmethod(ask, "resume"), partialmethod(ask, "save")

    def set_lr_scale(self, scale: float) -> None:
        """Multiply every learning rate with `scale` > 0 from the next update on."""
        if not scale > 0:
            raise ValueError(f"lr_scale={scale} must be more than 0")
        self.ask("lr_scale", value=float(scale))

    def replay(self, path: str | Path) -> None:
        """Repeat a run that was steered by hand: the actions of its controls.jsonl, at their steps."""
        known = {"stop", "save", "lr_scale", *self.acts}
        self.scheduled = [row for row in read_jsonl(Path(path)) if row["action"] in known]

    def take(self, step: int) -> list[dict]:
        """Rows for what was asked since the last call, `step` updates done; applies LR changes."""
        with self.lock:
            asked = self.asked + [row for row in self.scheduled if row["step"] == step]
            self.asked = []
            self.scheduled = [row for row in self.scheduled if row["step"] > step]
            for row in asked:
                self.lr_scale = row.get("value", self.lr_scale)
                self.stopped = self.stopped or row["action"] == "stop"
            return [{"step": step, **row} for row in asked]

    def decision(self) -> bool | None:
        """Whether to stop; None while paused, or while something is asked that nobody has taken yet."""
        with self.lock:
            return None if self.paused or self.asked else self.stopped

    def wait_while_paused(self, seconds: float) -> None:
        with self.lock:
            if self.paused:
                self.lock.wait(seconds)


@contextlib.contextmanager
def signals_ask_to_stop(controls: Controls) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a stop, once: an interrupted optimizer.step() would leave half the tensors moved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals; whoever waits for this one passes them on
        return
    with contextlib.ExitStack() as earlier:  # handlers, which its close puts back

        def ask(number, frame):
            print("stopping after this update and saving; press Ctrl-C again to quit at once", file=sys.stderr)
            controls.stop()
            earlier.close()

        for name in (signal.SIGINT, signal.SIGTERM):
            earlier.callback(signal.signal, name, signal.signal(name, ask))
        yield
