"""What choices a forward pass makes: how many tokens each expert gets, and scalars on the way that may be terms of the loss."""

# Shapes: N tokens, K choices a token, E experts.

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..choices import Choices
from ..sampling import LOOK_EVERY, Waiting
from ..torch_private import is_elsewhere, is_in_backward
from .heard import named_tensors

READINGS, SEARCHES = 40, 3  # looks at the scalars at most, and those that search all modules for them
KEPT = 400  # looks at a module, which has several of them an update where gradients are accumulated
UNSEEN = 3  # looks without a choice after which a module is let alone
CHOICES = ("topk", "argmax", "max", "multinomial")


class Load(NamedTuple):
    step: int  # the update that comes next
    counts: list[int]  # (E,) choices that fell on each
    n_choices: int  # K


class Experts:
    """One module with E alike experts and a score for each, and what fell on each at every look."""

    def __init__(self, name: str, sizes: set[int]):
        self.name, self.sizes = name, sizes
        self.loads: list[Load] = []
        self.n_looks = 0

    def take(self, update: int, k: int, counts: list[int]) -> None:
        self.loads = [*self.loads[1 - KEPT :], Load(update, counts, k)]


class Routing:
    """Listens to modules of experts at every fifth update, by the choices that are made in their forward pass."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.waiting = waiting
        found = {} if any(map(is_elsewhere, model.modules())) else expert_modules(model)
        self.modules = [(module, Experts(name, sizes)) for name, (module, sizes) in found.items()]
        self.active: list[Choices] = []

    @property
    def experts(self) -> list[Experts]:
        return [experts for _, experts in self.modules if experts.loads]

    def hooks(self, hook: Callable) -> Iterator[Any]:
        for module, experts in self.modules:
            count = hook(partial(self.count, experts))
            yield module.register_forward_pre_hook(hook(partial(self.begin, experts, count)))
            yield module.register_forward_hook(hook(self.end), always_call=True)

    def begin(self, experts: Experts, count: Callable, module: nn.Module, args: tuple) -> None:
        is_due = self.waiting.is_look and module.training
        is_in_vain = experts.n_looks >= UNSEEN and not experts.loads
        if is_due and not (is_in_vain or is_in_backward() or torch.compiler.is_compiling()):
            self.active.append(Choices(CHOICES, count))
            self.active[-1].__enter__()
            experts.n_looks += 1

    def count(self, experts: Experts, scores: Tensor, chosen: Tensor) -> None:
        # over another dimension the answer has another shape
        if scores.ndim and scores.shape[-1] in experts.sizes and scores.shape[:-1] in (chosen.shape[:-1], chosen.shape):
            k = chosen.shape[-1] if chosen.ndim == scores.ndim and chosen.shape != scores.shape[:-1] else 1
            counts = torch.bincount(chosen.flatten(), minlength=scores.shape[-1])
            self.waiting.add(counts, partial(experts.take, self.waiting.update, k))

    def end(self, module: nn.Module, args: tuple, output: object) -> None:
        if self.active:
            self.active.pop().__exit__(None, None, None)


def expert_modules(model: nn.Module) -> dict[str, tuple[nn.Module, set[int]]]:
    """The innermost modules that hold both E alike experts (in a list, or stacked in one tensor) and a matrix with E rows."""
    found: dict[str, tuple[nn.Module, set[int]]] = {}

    def look(name: str, module: nn.Module) -> tuple[set[int], set[int], bool]:
        """Sizes of stacks, numbers of rows, and whether the module or one inside of it was taken."""
        own = [p for p in module.parameters(recurse=False) if not isinstance(module, nn.modules.conv._ConvNd)]
        stacks = {p.shape[0] for p in own if p.ndim >= 3}
        rows = {p.shape[0] for p in own if p.ndim == 2}
        if len([p for p in own if p.ndim >= 3]) == len([p for p in own if p.ndim == 2 and p.shape[0] in stacks]):
            rows -= stacks  # a bias for each stack
        inner = [look(f"{name}.{key}".removeprefix("."), child) for key, child in module.named_children()]
        shapes = {tuple(tuple(p.shape) for p in child.parameters()) for child in module.children()}
        if len(inner) > 1 and len(shapes) == 1 and shapes != {()} and isinstance(module, nn.ModuleList | nn.ModuleDict):
            return {len(inner)}, set(), any(taken for *_, taken in inner)
        stacks, rows = stacks.union(*(s for s, *_ in inner)), rows.union(*(r for _, r, _ in inner))
        taken = any(t for *_, t in inner)
        if not taken and stacks & rows - {1}:
            found[name] = module, stacks & rows
            return set(), set(), True
        return stacks, rows, taken

    look("", model)
    return found


def scalars_of(given: Any, name: str) -> dict[str, Tensor]:
    """Single numbers with a gradient behind them, in what a forward pass gives or a module keeps."""
    return {
        key: value.detach().reshape(())
        for key, value in named_tensors(given, name)
        if value.numel() == 1 and value.grad_fn is not None and value.dtype.itemsize >= 4
    }


class Terms:
    """Scalars with a graph that modules keep, or that the model and modules of experts give: do they vary at all?"""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting = model, waiting
        self.modules = {"output": model, **{name: module for name, (module, _) in expert_modules(model).items()}}
        self.keepers: dict[str, nn.Module] = {}  # modules that keep some, once they were looked for
        self.given: dict[str, Tensor] = {}
        self.values: dict[str, list[float]] = {}

    def hooks(self, hook: Callable) -> Iterator[Any]:
        for name, module in self.modules.items():
            yield module.register_forward_hook(hook(partial(self.keep, name)))

    def keep(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self.is_due(self.waiting.update):
            self.given |= scalars_of(output, name)

    def is_due(self, n: int) -> bool:
        return n % LOOK_EVERY == 1 and n <= LOOK_EVERY * READINGS

    def before_update(self, n: int) -> None:
        if not self.is_due(n):
            return
        is_search = n <= LOOK_EVERY * SEARCHES
        for name, module in self.model.named_modules() if is_search else self.keepers.items():
            kept = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
            if found := scalars_of(kept, name):
                self.keepers[name] = module
                self.given |= {key.removeprefix("."): value for key, value in found.items()}
        for name, value in self.given.items():
            self.waiting.add(value, self.values.setdefault(name, []).append)
        self.given = {}
