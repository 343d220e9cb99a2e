"""What a watch takes from one optimizer's step: the gradients that arrive, and what the step is meant to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sampling import Bank, Tracked, plain
from ..torch_private import norms
from . import intended
from .tracking import choose_replayed


class Gradients:
    """Who has a gradient, how large, and which sampled elements; norms stay on their device until `fetch`."""

    def __init__(self) -> None:
        self.waiting: list[tuple[list[Tracked], Tensor, Tensor | None]] = []

    def read(self, tensors: Sequence[Tracked], banks: Sequence[Bank], optimizer: Optimizer) -> None:
        dense = set()
        for t in tensors:
            if t.param.grad is None:
                t.no_gradient += t.param.requires_grad
            elif t.param.grad.is_sparse:
                t.sparse = True
                t.with_gradient += 1
            else:
                dense.add(id(t))
        # a fused optimizer under a loss scaler is handed scaled gradients, and skips its step if one is infinite
        scale, skipped = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        for bank in banks:
            for narrow in (True, False):
                here = [t for t in bank.tensors if id(t) in dense and (t.param.grad.dtype.itemsize < 4) == narrow]
                if not here:
                    continue
                bank.touch(here)
                # the norm of a float16 gradient may be beyond float16
                grads = [plain(t.param.grad) for t in here]
                sizes = norms(grads, torch.float32 if narrow else None)
                self.waiting.append((here, sizes if scale is None else sizes / scale.to(sizes.device), skipped))

    def fetch(self) -> None:
        for tensors, sizes, skipped in self.waiting:
            if skipped is not None and skipped.item():
                continue
            for t, norm in zip(tensors, sizes.tolist(), strict=True):
                t.finite &= math.isfinite(norm)
                t.grad_norm = max(t.grad_norm, norm if math.isfinite(norm) else 0.0)
                t.with_gradient += norm != 0
                t.zero_gradient += norm == 0
        self.waiting = []


class Replays:
    """The intended steps of 16-bit tensors, added up in their banks."""

    def __init__(self, n_matrices: int) -> None:
        self.n_matrices = n_matrices
        self.of: dict[int, list[tuple[Bank, Tracked]]] = {}  # by the optimizer's id
        self.failed: set[int] = set()  # optimizers that could not be replayed

    def choose(self, tracked: Sequence[Tracked], banks: Sequence[Bank]) -> None:
        bank_of = {id(t): bank for bank in banks for t in bank.tensors}
        self.of = {}
        for t in choose_replayed(tracked, self.n_matrices):
            if id(t.optimizer) not in self.failed:
                self.of.setdefault(id(t.optimizer), []).append((bank_of[id(t)], t))

    def add(self, optimizer: Optimizer, tell: Callable[[Exception], None]) -> None:
        """Add the step that is about to be taken. If it cannot be replayed, it is given up, and `tell` is called."""
        try:
            self.replay(optimizer)
        except Exception as error:  # it goes by a known name, and needs more than one tensor and its state
            self.failed.add(id(optimizer))
            for _, t in self.of.pop(id(optimizer)):
                t.intended_known = False
            tell(error)

    def replay(self, optimizer: Optimizer) -> None:
        batches: dict[tuple, list[tuple[Bank, Tracked]]] = {}
        for bank, t in self.of.get(id(optimizer), ()):
            if t.param.grad is None or t.param.grad.is_sparse:
                continue
            if t.param.ndim == 0 or intended.kind_of(optimizer) == "muon":
                bank.intend(t, t.sample(intended.replay_whole(optimizer, t.group, t.param)))
            else:  # one replay for a group's tensors of the same age
                key = (id(bank), t.group_number, t.age, bool(optimizer.state.get(t.param)))
                batches.setdefault(key, []).append((bank, t))
            t.age += 1
        for batch in batches.values():
            tensors = [t for _, t in batch]
            params, indices = [t.param for t in tensors], [t.index for t in tensors]
            moved = intended.replay_elements(optimizer, tensors[0].group, params, indices)
            for (bank, t), part in zip(batch, moved.split([len(i) for i in indices]), strict=True):
                bank.intend(t, part)
