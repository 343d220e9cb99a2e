"""Discrete choices of a forward pass (top-k, sort, a maximum, a draw), heard where they are made, and held in later passes.

A top-k over time is moved by later tokens. With its indices held, what still hears the future does so by something else.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TABLE = 0.02  # from a cosine to what 16 bits make of it
FEWEST = 8  # places that are chosen
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


class RankPositions(TorchFunctionMode):
    """Hears whether a top-k takes some of a dimension's places, and a table of cosines or sines has as many rows, 0 … k - 1."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: dict[int, int] = {}  # k → of how many
        self.found: tuple[int, int] | None = None

    def __torch_function__(self, func: Callable, types: Sequence, args: tuple = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "topk" and isinstance(answer, tuple):
            dim = next((d for d, (a, b) in enumerate(zip(args[0].shape, answer[0].shape, strict=True)) if a != b), None)
            if dim is not None and answer[0].shape[dim] >= FEWEST:
                self.chosen[answer[0].shape[dim]] = args[0].shape[dim]
        elif self.chosen and name in ("cos", "sin", "__getitem__", "index_select", "embedding"):
            for dim in range(answer.ndim - 1 if isinstance(answer, Tensor) else 0):
                if (k := answer.shape[dim]) in self.chosen and is_table(answer.movedim(dim, -2)):
                    self.found = k, self.chosen[k]
        return answer


@torch.no_grad()
def is_table(x: Tensor) -> bool:
    """Whether the fastest column of (…, k, F) holds cosines or sines of 0 … k - 1."""
    if not (x.is_floating_point() or x.is_complex()) or x.shape[-1] < 2 or not x.numel():
        return False
    column = (x.real if x.is_complex() else x)[..., 0].float()
    places = torch.arange(x.shape[-2], device=x.device).float()
    return bool(torch.minimum((column - places.cos()).abs(), (column - places.sin()).abs()).max() < TABLE)
