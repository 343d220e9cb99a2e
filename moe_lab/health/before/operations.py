"""What single operations of a loss's own code show: terms without a gradient that are added to it, rows that others overwrite."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..findings import Finding

ADDS = {"add", "add_", "sub", "sub_", "rsub", "__radd__", "__rsub__", "__iadd__", "__isub__"}
SAME = 1e-6  # relative: sums in another order are apart by less
MAKE_IT_OF_SCORES = (
    "argmax, rounding, counting, item(), detach() and no_grad cut it off: make the term of scores, or leave it out"
)
ADD_UP = "where places may come again, use index_add_, scatter_add_, or index_put_ with accumulate=True"


class Operations(TorchFunctionMode):
    """Hears additions of single numbers, and assignments to places that are given as indices."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[Tensor | float] = []  # without a graph, added to one that has a graph
        self.overwritten: tuple[int, int] | None = None  # rows that others took the place of, of how many

    def __torch_function__(self, func: Callable, types: Sequence, args: tuple = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ADDS and len(args) > 1:
            pairs = [one for one in (args[:2], args[1::-1]) if is_taught(one[0]) and is_number(one[1])]
            self.terms += [b.detach() if isinstance(b, Tensor) else float(b) for _, b in pairs]
        elif name == "__setitem__" and len(args) == 3 and isinstance(args[2], Tensor) and args[2].requires_grad:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            rows = [p for p in places if isinstance(p, Tensor) and p.ndim == 1 and not p.is_floating_point()]
            if len(rows) == len(places) and rows[0].dtype != torch.bool and args[2].ndim:
                n, left = len(rows[0]), torch.stack([row.expand(len(rows[0])) for row in rows]).unique(dim=1).shape[1]
                self.overwritten = (n - left, n) if left < n else self.overwritten
        return answer


def is_taught(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1 and x.requires_grad


def is_number(x: Any) -> bool:
    return not x.requires_grad and x.numel() == 1 if isinstance(x, Tensor) else isinstance(x, float)


@torch.no_grad()
def negate(model: nn.Module) -> None:
    for p in model.parameters():
        p.neg_()


def overwritten(trial: Any) -> Iterator[Finding]:
    if trial.operations.overwritten:
        lost, n = trial.operations.overwritten
        message = (
            f"{lost} of {n} rows are assigned to places that another row is assigned to, too: what they held is lost"
        )
        yield Finding("no_effect", "warning", "places", message, ADD_UP, lost, 0)


def untaught_terms(trial: Any) -> Iterator[Finding]:
    """Numbers without a gradient that are added to the loss, and are other ones under other weights: all weights are negated for one
    pass, which can be undone to the bit. Raises ValueError where there are some and no pass is left."""
    if not (before := trial.operations.terms):
        return
    negate(trial.model)
    try:
        with Operations() as again:
            trial.loss_of(trial.batch)
    finally:
        negate(trial.model)
    is_alike = len(before) == len(again.terms)  # else other ways were taken
    pairs = [(float(a), float(b)) for a, b in zip(before, again.terms, strict=True)] if is_alike else []
    if told := [a for a, b in pairs if math.isfinite(b) and not math.isclose(a, b, rel_tol=SAME, abs_tol=1e-12)]:
        message = (
            f"{told[0]:.3g} is added to the loss, follows the model's weights and has no gradient: nothing learns by it"
        )
        yield Finding("no_gradient", "warning", "loss", message, MAKE_IT_OF_SCORES, round(told[0], 6), 0)
