"""Clipping, heard where it is called: torch's own function tells who listens, and then does what it did."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling import WHOLE, Waiting, plain

HEARD, LOOKED_AT = 30, 16  # calls, after which nothing is listened to any more; tensors of each


class Clips:
    """How many calls there were, and how many that found no gradient."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting, self.n_calls = model, waiting, 0
        self.n = self.n_empty = 0  # of those of which it is known whether they found any
        self.note: Callable = ignore

    def hooks(self, hook: Callable) -> Iterator["Clips"]:
        self.note = hook(self.clipped)
        LISTENING.add(self)
        attend()
        yield self

    def remove(self) -> None:
        self.note = ignore
        LISTENING.discard(self)
        attend()

    def clipped(self, tensors: list[Tensor]) -> None:
        own = set(map(id, self.model.parameters()))
        if tensors and not any(id(t) in own for t in tensors):  # another training's
            return
        gradients = [t.grad for t in tensors if t.grad is not None]
        dense = [plain(g) for g in gradients if g.layout is torch.strided and g.device == gradients[0].device]
        if dense:
            self.waiting.add(torch.stack([g.flatten()[:WHOLE].any() for g in dense[:LOOKED_AT]]).any(), self.take)
        else:
            self.take(bool(gradients))
        self.n_calls += 1
        if self.n_calls >= HEARD:
            self.remove()

    def take(self, has_gradients: bool) -> None:
        self.n, self.n_empty = self.n + 1, self.n_empty + (not has_gradients)


LISTENING: weakref.WeakSet["Clips"] = weakref.WeakSet()
REPLACED: list[Callable] = []  # what stood there, and what stands there now


def ignore(*args: Any) -> None:
    """What is called before anybody listens."""


def heard(own: Callable, parameters: Any, *args: Any, **kwargs: Any) -> Tensor:
    if LISTENING and not torch.compiler.is_compiling():
        is_tensor, is_generator = isinstance(parameters, Tensor), isinstance(parameters, GeneratorType)
        tensors = [parameters] if is_tensor else list(parameters)
        for clips in list(LISTENING):
            clips.note(tensors)
        if not is_tensor:  # a generator can be gone through once
            parameters = (t for t in tensors) if is_generator else tensors
    return own(parameters, *args, **kwargs)


def attend() -> None:
    """Put that in the place of torch's function with the first that listens, and take it away with the last, unless another is there."""
    if LISTENING and not REPLACED:
        own = nn.utils.clip_grad_norm_
        nn.utils.clip_grad_norm_ = wraps(own)(partial(heard, own))
        REPLACED.extend([own, nn.utils.clip_grad_norm_])
    elif REPLACED and not LISTENING:
        own, mine = REPLACED
        nn.utils.clip_grad_norm_ = own if nn.utils.clip_grad_norm_ is mine else nn.utils.clip_grad_norm_
        REPLACED.clear()
