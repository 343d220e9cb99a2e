"""What happens between two updates, and to which gradients: do they arrive, pile up, or go before the step?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sampling import plain
from .listener import Listener
from .tracking import Scalars, Tracked


class Events(Listener):
    """Listens to the backward passes at one small tensor; nothing is fetched from its device before a check."""

    where, what = "gradients", "the order of backward passes and updates is not looked at"

    def __init__(self, tensors: Sequence[Tracked]) -> None:
        super().__init__()
        self.tensors = tensors
        self.n_losses = self.n_observed = 0  # since the last update, and in all: losses may come in bunches
        self.probe: Tracked | None = None
        self.incoming: Tensor | None = None  # what the present backward pass brings
        # since the last update, the least that lay there before a pass, over what it brought
        self.least: Tensor | None = None
        self.waiting = Scalars(), Scalars()
        self.left: list[float] = []  # of each update, that least
        self.gone: list[float] = []  # of each update, 1 where a gradient had arrived and there is none at the step

    def hooks(self, hook: Callable) -> Iterator[Any]:
        trained = [t for t in self.tensors if t.owner and t.param.requires_grad and not t.is_master]
        whole = [t for t in trained if t.param.is_leaf and not hasattr(t.param, "to_local")]  # sharded: another gets it
        self.probe = min(whole, key=lambda t: t.param.numel(), default=None)
        if self.probe is not None:
            yield self.probe.param.register_hook(hook(self.arrives))
            yield self.probe.param.register_post_accumulate_grad_hook(hook(self.accumulated))

    def arrives(self, gradient: Tensor | None) -> None:
        """None comes of an autograd.Function that returns it; of sparse gradients nothing is told."""
        told = gradient is not None and not gradient.is_sparse
        self.incoming = plain(gradient).clone() if told else None

    def accumulated(self, p: Tensor) -> None:
        if self.incoming is None:
            return
        before, brought = (plain(p.grad) - self.incoming).float().norm(), self.incoming.float().norm()
        left = torch.where(brought > 0, before / brought, 0.0)  # a pass that brings nothing tells nothing
        self.least = left if self.least is None else torch.minimum(left, self.least)

    def observe(self) -> None:
        self.n_losses, self.n_observed = self.n_losses + 1, self.n_observed + 1

    def before_update(self, optimizer: Optimizer) -> None:
        self.n_losses = 0
        if self.least is not None and optimizer is self.probe.optimizer:
            gradient = self.probe.param.grad
            nothing = torch.ones_like(self.least).bool() if gradient is None else (plain(gradient) == 0).all()
            for scalars, value in zip(self.waiting, (self.least, nothing & (self.incoming != 0).any()), strict=True):
                scalars.add(value.float())
            self.least = None

    def fetch(self) -> None:
        left, gone = (scalars.fetch() for scalars in self.waiting)
        self.left += left
        self.gone += gone

    def forget(self) -> None:
        self.incoming = self.least = None
