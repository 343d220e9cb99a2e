"""Discrete choices of a forward pass (top-k, sort), recorded once and held in later passes.

A top-k over time is moved by later tokens. With its indices held, what still hears the future does so by something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOP_K = (torch.topk, Tensor.topk)  # values, indices = f(x, k, dim=-1, …)
SORT = (torch.sort, Tensor.sort)  # values, indices = f(x, dim=-1, …)
ARGSORT = (torch.argsort, Tensor.argsort)  # indices = f(x, dim=-1, …)


class HeldChoices(TorchFunctionMode):
    """`with choices:` around a first pass records, around later ones after `hold()` gives the same indices again."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Tensor] = []
        self.at: int | None = None  # None while recording

    def hold(self) -> HeldChoices:
        self.at = 0
        return self

    def __torch_function__(
        self, func: Callable, types: Sequence, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        answer = func(*args, **kwargs)
        is_choice = func in TOP_K + SORT + ARGSORT and args and args[0].is_floating_point()
        if not is_choice:
            return answer
        if self.at is None:
            self.recorded.append(answer if func in ARGSORT else answer[1])
            return answer
        index, self.at = self.recorded[self.at], self.at + 1
        if func in ARGSORT:
            return index
        place = 2 if func in TOP_K else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        return type(answer)((args[0].gather(dim, index), index))
