"""Leaves of a loss's graph that the model's `parameters()` do not hold: does anybody move them?"""

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..sampling import WHOLE, Waiting, plain
from .forward import is_sharded
from .heard import tensors_of
from .tracking import held_by

MOST = 100_000  # nodes of a graph that are walked
LEAST = 5  # updates in which somebody might have moved them
OUTSIDE = "tensors outside of the model's parameters() get gradients, and no optimizer holds them: {names}"
ADVICE = (
    "keep layers in an nn.ModuleList, make a parameter of what to() gives and not before it, hand a loss's own weights to the"
    " optimizer; a network that only judges needs requires_grad_(False)"
)


def leaves(root: Tensor) -> Iterator[Tensor]:
    """What could be trained by this number: a single number without a module, too, but no batch that gradients are asked of."""
    waiting, seen = [root.grad_fn], {None}
    while waiting and len(seen) < MOST:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting += (inner for inner, _ in node.next_functions)
            leaf = getattr(node, "variable", None)
            if leaf is not None and (isinstance(leaf, nn.Parameter) or leaf.numel() == 1):
                yield leaf


def alive(kind: type) -> list:
    """All objects of a class. An object that a proxy stands for is asked for its own class alone."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def untaught(tensors: Sequence[Tensor], copies: Mapping[int, Any] = MappingProxyType({})) -> dict[str, str]:
    """Those that no optimizer of the process holds, nor what they are `copies` of, by the module that has them → severity: an info
    where all of these modules are in evaluation mode, as a network is that judges and is not trained."""
    held = held_by(alive(Optimizer)) if tensors else []
    held = {id(copies.get(id(p), p)) for p in held}
    names, trains = {id(t): "a tensor" for t in tensors if id(t) not in held}, False
    for module in alive(nn.Module) if names else ():
        for key, value in (*vars(module).get("_parameters", {}).items(), *vars(module).items()):
            if id(value) in names:
                names[id(value)] = f"{type(module).__name__}.{key}"
                trains |= module.training
    trains |= "a tensor" in names.values()
    told = [f"{names[id(t)]} {tuple(t.shape)}" for t in tensors if id(t) in names]
    return dict.fromkeys(told, "error" if trains else "info")


class Reached:
    """Looks at the first answer of a model, and at the first, the tenth, the hundredth … loss."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting = model, waiting
        self.n, self.next, self.has_heard = 0, 1, False
        self.seen: dict[int, tuple[weakref.ref, Tensor, int]] = {}  # leaf, what it was, and before which update
        self.told: dict[str, str] = {}

    def answered(self, module: nn.Module, args: tuple, output: Any) -> None:
        for tensor in () if self.has_heard else tensors_of(output):
            self.look(tensor)
            self.has_heard |= tensor.requires_grad

    def observe(self, loss: Tensor | float) -> None:
        self.n += 1
        if self.n == self.next:
            self.next *= 10
            if isinstance(loss, Tensor):
                self.look(loss)

    def look(self, root: Tensor) -> None:
        known = {id(p) for p in self.model.parameters()} | self.seen.keys()
        for leaf in leaves(root) if root.requires_grad and not is_sharded(self.model) else ():
            if id(leaf) not in known:
                sample = plain(leaf.detach()).flatten()[:WHOLE].clone()
                self.seen[id(leaf)] = weakref.ref(leaf), sample, self.waiting.update

    def untaught(self) -> dict[str, str]:
        """Of those that were seen some updates ago: what gets a gradient, and is what it was."""
        due = [key for key, (_, _, update) in self.seen.items() if self.waiting.update - update >= LEAST]
        still = []
        for leaf, then in [(reference(), then) for reference, then, _ in map(self.seen.pop, due)]:
            is_taught = leaf is not None and leaf.grad is not None
            still += [leaf] if is_taught and torch.equal(plain(leaf.detach()).flatten()[:WHOLE], then) else []
        self.told |= untaught(still)
        return self.told
