"""What a front end needs to be told, so that what a cell shows stays alive while a cell waits."""

import asyncio
import ctypes
import os
import threading
from pathlib import Path
from typing import Any

import torch
from IPython import get_ipython

_waiting: list[dict] = []  # requests of the cells that wait, the latest last


def is_interactive() -> bool:
    """Whether a person watches: MOE_LAB_INTERACTIVE if set, else a front end's session variable."""
    asked = os.environ.get("MOE_LAB_INTERACTIVE")
    if asked is not None:
        return asked.strip().lower() not in ("", "0", "false", "no")
    return any(os.environ.get(name) for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"))


def request() -> dict[str, Any]:
    """The request of the cell that runs: its message, or nothing outside a kernel."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel.get_parent("shell") if kernel else {}


def keep_live(widget: Any) -> None:
    """Let a slider move more than once while a cell awaits: ipykernel 7.4.0 sends no "idle" for such messages, and the front
    end holds back the next change until one comes. The "busy" after it is for the front end's status line."""
    try:
        kernel = get_ipython().kernel
        lock, publish = kernel._main_asyncio_lock, kernel._publish_status
    except AttributeError:  # another kernel: nothing to mend
        return

    def acknowledge(_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and lock.locked():
            publish("idle", "shell")
            for parent in _waiting[-1:]:
                publish("busy", "shell", parent)

    widget.observe(acknowledge, names="value")


class Waiting:
    """Around the loop of a cell that awaits: `asked_again(cell)` says whether that other cell is to be run again.

    Its output is cleared when it is queued, and it runs only after the cell that waits: who shows controls there must end.
    """

    def __enter__(self) -> "Waiting":
        _waiting.append(request())
        return self

    def __exit__(self, *_: object) -> None:
        _waiting.pop()

    def asked_again(self, cell: str | None) -> bool:
        session = getattr(getattr(get_ipython(), "kernel", None), "session", None)
        if cell is None or session is None:
            return False
        mine = _waiting[-1]["header"]["msg_id"]
        for task in asyncio.all_tasks():  # ipykernel 7.4 keeps each request that has come in a task of its own
            frame = getattr(task.get_coro(), "cr_frame", None)
            message = frame and frame.f_code.co_name == "shell_main" and frame.f_locals.get("msg")
            if message:
                _, parts = session.feed_identities(message, copy=False)
                # not deserialize: it refuses a message that it has seen, and those that are carried out are among these
                header, metadata = (session.unpack(parts[n].bytes) for n in (1, 3))
                if metadata.get("cellId") == cell and header["msg_id"] != mine:
                    return True
        return False


def release_thread_pool() -> None:
    """Free the OpenMP workers that belong to this thread, if torch's library is GNU's, until its next operation. With
    those of an idle notebook thread beside those of the training thread there are more than cores, and then they sleep
    instead of spin between two operations: a training step of the lab's model takes half as long again."""
    torch.get_num_threads()  # loads the library
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else ()  # Linux
    for library in {line.split()[-1] for line in lines if "libgomp" in line}:
        pause = getattr(ctypes.CDLL(library), "omp_pause_resource_all", None)
        if pause is not None:
            pause(1)  # 1: omp_pause_soft
