"""What a rule is, and what the rules of a watch see: one moment's readings, learning rates and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import Finding, grouped, several
from ..measures import Reading, expected_start
from .bank import Tracked
from .forward import ForwardProbe

PRETRAINED = 1.0  # nats below an untrained model's loss from which on a model has been trained before
HISTORY = 1000  # learning rates and losses kept one by one: a long training costs no more than a short one
LR_STEADY = 10  # updates without a rise before an LR is called the peak


class GroupState:
    """The learning rate of one group over time."""

    def __init__(self, optimizer: Optimizer, number: int, name: str):
        self.optimizer, self.number, self.name = optimizer, number, name
        self.lrs: list[float] = []  # of the first HISTORY updates
        self.n, self.total, self.last = 0, 0.0, 0.0  # of all of them
        self.waiting: list[float | Tensor] = []  # an LR may be a tensor on a device: not read before a check
        self.risen_at = 0
        self.peak = 0.0

    @property
    def group(self) -> dict:
        """The optimizer's own group: looked up, since load_state_dict puts others in their place."""
        return self.optimizer.param_groups[self.number]

    def note_lr(self) -> None:
        lr = self.group.get("lr")
        if lr is not None:
            self.waiting.append(lr.detach().clone() if isinstance(lr, Tensor) else float(lr))

    def fetch(self) -> None:
        for lr in fetch(self.waiting):
            self.n, self.total, self.last = self.n + 1, self.total + lr, lr
            if self.n <= HISTORY:
                self.lrs.append(lr)
            if lr > self.peak * (1 + 1e-6):
                self.risen_at = self.n
            self.peak = max(self.peak, lr)
        self.waiting = []

    @property
    def is_steady(self) -> bool:
        return self.n - self.risen_at >= LR_STEADY


def fetch(numbers: Sequence[Tensor | float]) -> list[float]:
    """Losses or learning rates as floats; those on a device come over in one transfer."""
    if any(isinstance(number, Tensor) for number in numbers):
        device = next(number.device for number in numbers if isinstance(number, Tensor))
        return torch.stack([torch.as_tensor(number, device=device).float().mean() for number in numbers]).tolist()
    return list(numbers)


@dataclass(frozen=True)
class State:
    """What the rules see at one moment."""

    step: int  # updates of the run done
    n_seen: int  # … under this watch
    window: int  # updates in the window of intended against realised displacement
    model: nn.Module
    readings: Sequence[Reading]
    tracked: Sequence[Tracked]
    groups: Sequence[GroupState]
    outside: Sequence[str]  # trainable parameters in no optimizer
    frozen_on_purpose: set[str]
    losses: Sequence[float]  # the first HISTORY and at least as many of the last
    forward: ForwardProbe
    budget: int | None
    findings: Sequence[Finding]  # made so far

    @property
    def read(self) -> list[tuple[Tracked, Reading]]:
        """Every tensor with its reading."""
        by_name = {r.name: r for r in self.readings}
        return [(t, by_name[t.name]) for t in self.tracked if t.name in by_name]

    @property
    def expected_start(self) -> float | None:
        """Expected first loss of a language model whose head and embedding were found."""
        if self.forward.vocab_size is None or self.forward.logit_variance is None:
            return None
        return expected_start(self.forward.vocab_size, float(self.forward.logit_variance))

    @property
    def is_fresh(self) -> bool:
        """Whether the model looks newly initialised: its norms were constant when the watch began, or, without norms,
        its first loss was not far below an untrained model's."""
        if self.step > self.n_seen:  # resumed
            return False
        owners = {f"{name}.weight" for name, module in self.model.named_modules() if "Norm" in type(module).__name__}
        norms = [r.constant for r in self.readings if r.name in owners]
        if norms:
            return sum(norms) > len(norms) / 2
        return not (self.losses and self.expected_start and self.losses[0] < self.expected_start - PRETRAINED)


def n_parameters(state: State) -> int:
    return sum(p.numel() for p in state.model.parameters())


def by_kind(things: Iterable[Tracked | Reading]) -> dict[str, list]:
    """Tensors, or their readings, by the tensor's kind."""
    return grouped(things, attrgetter("kind"))


class Rule(NamedTuple):
    """One thing that can be wrong with a training.

    `when(state)` maps what is ill (kinds of tensors, groups, "loss") to what is known of it; `tell(state, ill)` puts that into
    words: where, message, advice, and the value and the limit, if there are. It is told only of what this rule did not name
    before at this severity or a higher one.
    """

    id: str  # of findings.RULES
    severity: str
    when: Callable[[State], Mapping[str, Any]]
    tell: Callable[[State, Mapping[str, Any]], tuple]
    static: bool = False  # needs no update: asked when the watch begins, too

    def finding(self, state: State, ill: Mapping[str, Any]) -> Finding:
        return Finding(self.id, self.severity, *self.tell(state, ill), step=state.step)


def of_tensors(
    message: str, advice: str, state: State, ill: Mapping[str, Sequence[Tracked]], limit: float | None = 0
) -> tuple:
    """Words about tensors by kind; `message` may use {n}, {names}, {share} of the parameters and {updates} seen."""
    tensors = [t for kind in ill.values() for t in kind]
    n, names = len(tensors), several([t.name for t in tensors])
    share = sum(t.param.numel() for t in tensors) / n_parameters(state)
    return names, message.format(n=n, names=names, share=share, updates=state.n_seen), advice, n, limit
