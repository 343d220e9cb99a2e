"""What the watch hangs on a model: hooks that no error of its own gets past, and parts that listen through them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ..torch_private import is_transformed


class Hook:
    """What the watch registers with torch. No error of the watch gets past it: the hook falls silent, and `failed` is called.

    It stays behind when its module is copied or saved: there it becomes a function that does nothing.
    """

    is_repeating = False  # a pass that a watch itself asks for is none of the training's, and no hook hears it

    def __init__(self, function: Callable, failed: Callable[[Exception], None]):
        self.function, self.failed = function, failed
        self.is_silent = False

    @torch.no_grad()
    def __call__(self, *args: Any) -> None:
        if self.is_silent or Hook.is_repeating:
            return
        try:
            if not is_transformed():
                self.function(*args)
        except Exception as error:
            self.is_silent = True
            self.failed(error)

    def __reduce__(self) -> tuple:
        return getattr, (nullcontext(), "__exit__")  # takes anything, returns None, and is in every Python


class Listener:
    """A part of a watch that hears what happens through hooks; an error in one of them ends the part, and is told."""

    where, what = "", ""  # the words for that: what is listened to, and what is missed without

    def __init__(self) -> None:
        self.handles: list = []

    def hooks(self, hook: Callable[[Callable], Hook]) -> Iterator[Any]:
        """The handles of hooks, each registered when it is asked for."""
        raise NotImplementedError

    def listen(self, fail: Callable) -> None:
        failed = partial(fail, where=self.where, what=self.what, stop=self.close)
        self.handles = list(self.hooks(partial(Hook, failed=failed)))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def close(self) -> None:
        self.detach()
        self.forget()

    def forget(self) -> None:
        """Let go of what was kept of the last pass."""
