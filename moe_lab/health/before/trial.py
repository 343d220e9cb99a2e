"""The copy of a model that is examined, and the forward passes that may be spent on it."""

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.optim import Optimizer

from ..during.forward import ForwardProbe, unwrapped
from ..during.heard import tensors_of
from ..during.reached import asked, leaves, left_out, nodes
from ..findings import Finding
from ..random_state import RandomState
from .listening import Listening
from .operations import Operations
from .structure import TO_SAVE

PASSES = 10  # forward passes of the batch
KEPT = 5  # of them, for modes and causality: the others are for tensors without a gradient, then for arguments
CUT_OFF = (
    "learning is cut off: look for detach, no_grad, an integer index, or a backward or checkpointing that returns None"
)
NO_GRAPH = "the loss has no graph: backward() fails, or reaches none of the model's parameters"
HOLDERS = (nn.Module, Tensor, MethodType, partial, list, tuple, dict)  # of modules or tensors


class Trial:
    """The copy that is examined, what was heard of its one pass forward and backward, and the passes that follow."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: Callable, optimizers: list[Optimizer]):
        self.given, self.copies = unwrapped(model), {}
        self.model = twin_of(self.given, self.copies)
        self.model.zero_grad(set_to_none=True)
        self.batch, self.loss_fn, self.optimizers, self.left = batch, loss_fn, optimizers, PASSES
        self.state = RandomState([*model.parameters(), *model.buffers()])
        self.probe, self.listening = ForwardProbe(self.model, True), Listening(self.model)
        self.heard, self.operations = self.probe.heard, Operations()
        self.heard.elements = sys.maxsize  # all logits: the loss is compared
        self.apart: Finding | None = None  # how training and evaluation differ
        # is it in training → the last two logits, with other random numbers each time
        self.answers: dict[bool, deque[Tensor]] = {mode: deque(maxlen=2) for mode in (True, False)}

    def hear(self, fail: Callable) -> Iterator[Finding]:
        """Of a model that could be trained: a loss that cannot train it. Raises ValueError after it."""
        with ExitStack() as stack:
            for ear in (self.probe, self.listening):
                stack.callback(ear.detach)
                ear.listen(fail)
            shown: list[Any] = []  # where the model's answers stand in the graph
            note = self.model.register_forward_hook(
                lambda *call: shown.extend(t.grad_fn for t in numbers_of(call[-1])[:1])
            )
            stack.callback(note.remove)
            with self.listening.ranks, self.operations:
                self.loss = self.loss_of(self.batch)  # of which there is a graph
            if getattr(self.loss, "grad_fn", None) is None and any(p.requires_grad for p in self.model.parameters()):
                yield Finding("no_gradient", "error", "loss", NO_GRAPH, CUT_OFF, 0, 1)
                raise ValueError("the loss has no graph")
            self.graph = nodes(self.loss)
            self.has_other_terms = bool(shown) and any(True for _ in leaves(nodes(self.loss, without=shown)))
            self.has_own_backward = any(isinstance(node, BackwardCFunction) for node in self.graph)
            # while it holds its numbers
            self.asked, self.left_out = list(asked(self.graph)), list(left_out(self.graph))
            self.loss.backward()
            self.heard.fetch()

    def spend(self, passes: float = 1) -> None:
        """Raises ValueError where fewer are left."""
        if passes > self.left:
            raise ValueError(TO_SAVE)
        self.left -= passes

    @property
    def spare(self) -> int:
        """Passes that modes and causality do not need."""
        return max(0, int(self.left) - KEPT)

    @torch.no_grad()
    def answer(self, in_training: bool, batch: Any) -> Tensor:
        """To what the loss gave the model; of several tensors the logits, or the first. Raises ValueError where there is none."""
        self.spend()
        model = self.training() if in_training else self.model.eval()
        args, kwargs = self.probe.inputs or (None, {})
        output = forward(model, batch) if args is None else model(*args, **kwargs)
        self.answers[in_training].append(first_numbers(output))
        return self.answers[in_training][-1]

    def repeats(self, in_training: bool) -> bool:
        """Whether the last two answers are known to be the same."""
        answers = self.answers[in_training]
        return len(answers) == 2 and torch.equal(*answers)

    def training(self) -> nn.Module:
        """In training mode, without dropout."""
        for module in self.model.train().modules():
            module.train("drop" not in type(module).__name__.lower())
        return self.model

    @torch.enable_grad()  # kernels may differ without, in their last bits
    def loss_of(self, batch: Any) -> Tensor:
        """In training, with the same random numbers each time."""
        self.spend()
        self.state.put_back()
        return self.loss_fn(self.training(), batch)

    def again(self) -> Tensor:
        """The loss of the batch once more. Raises ValueError where it is another, and so shows nothing beside the first."""
        if not torch.equal(loss := self.loss_of(self.batch), self.loss):
            raise ValueError("two passes with torch's random numbers held give two losses")
        return loss


def twin_of(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, in which functions that were set on a module, such as the `forward` of a wrapper, hold the copy's modules:
    `copy.deepcopy` leaves functions as they are, and these would compute with the model itself. `memo`, empty, becomes id → copy."""
    held = [value for module in model.modules() for value in vars(module).values()]
    held = [t for value in held for t in (value if isinstance(value, (list, tuple)) else [value])]
    # torch copies no tensor that was computed; of a parameter that was moved, and so is none, the loss hears even so
    memo |= {id(t): nn.Parameter(t.detach().clone()) for t in held if isinstance(t, Tensor) and t.grad_fn is not None}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        own = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        vars(module).update({name: rebound(function, memo) for name, function in own.items()})
    return twin


def rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with copies in its closure, and in those of the functions that it holds."""
    if not function.__closure__ or id(function) in memo:
        return memo.get(id(function), function)
    cells = tuple(CellType() for _ in function.__closure__)
    twin = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__, memo[id(function)] = function.__kwdefaults__, twin
    for cell, old in zip(cells, function.__closure__, strict=True):
        value = old.cell_contents
        if isinstance(value, FunctionType):
            cell.cell_contents = rebound(value, memo)
        else:  # what is no holder of modules or tensors may be anything, a lock or a file too
            cell.cell_contents = copy.deepcopy(value, memo) if isinstance(value, HOLDERS) else value
    return twin


def numbers_of(output: Any) -> list[Tensor]:
    """Of several tensors the logits, or all."""
    return [t for t in tensors_of(getattr(output, "logits", output)) if t.is_floating_point()]


def first_numbers(output: Any) -> Tensor:
    """A model's answer. Raises ValueError where there is none."""
    if not (found := numbers_of(output)):
        raise ValueError(f"the forward pass gives {type(output).__name__}, which holds no numbers")
    return found[0]


def forward(model: nn.Module, batch: Any) -> Any:
    """The forward pass on what of the batch is its input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
