"""Discrete choices of a forward pass (top-k, sort, a maximum, a draw), heard where they are made, and held in later passes.

A top-k over time is moved by later tokens. With its indices held, what still hears the future does so by something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ORDERS = {"topk": 2, "sort": 1, "argsort": 1}  # → the place of the dimension among the arguments


class Choices(TorchDispatchMode):
    """While it is active, `chosen(scores, indices)` is called at each operation of these names, and may give other indices."""

    def __init__(self, names: Collection[str], chosen: Callable[[Tensor, Tensor], Tensor | None]):
        super().__init__()
        self.names, self.chosen = names, chosen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        answer = func(*args, **kwargs)
        if name not in self.names:
            return answer
        is_index = isinstance(answer, Tensor)
        index = self.chosen(args[0], answer if is_index else answer[1])
        if index is None or is_index:
            return answer if index is None else index
        place = ORDERS[name]
        return args[0].gather(kwargs.get("dim", args[place] if len(args) > place else -1), index), index


class Taken(TorchDispatchMode):
    """Which tensors operations take while it is active, by id: of those that outlive it."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # no closure, as super() makes one: a test breaks each function
        self.ids: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        self.ids |= {id(x) for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])}
        return func(*args, **(kwargs or {}))


def recorded(made: list[Tensor]) -> Choices:
    """Adds the indices of every order of numbers to `made`."""
    return Choices(ORDERS, lambda scores, index: made.append(index) if scores.is_floating_point() else None)


def held(made: Sequence[Tensor]) -> Choices:
    """Gives the indices that were made, one after the other."""
    given = iter(made)
    return Choices(ORDERS, lambda scores, index: next(given) if scores.is_floating_point() else None)
