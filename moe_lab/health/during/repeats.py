"""Does a batch come back that came a short while ago, though none did at first?"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling import Waiting, elements, plain, sample_positions
from .heard import tensors_of

FIRST, RECENT = 20, 20  # updates that must be without a repetition, and batches that are judged
MOST = 10_000  # fingerprints that are kept


class Repeats:
    """A fingerprint of each training batch: whole numbers, so that no order of additions matters."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting = model, waiting
        self.last: dict[int, tuple[int, int]] = {}  # by fingerprint, when it was last seen: the update, and its number
        self.n, self.n_early = 0, 0  # batches so far, and repetitions among the first
        self.recent: deque[bool] = deque(maxlen=RECENT)  # whether it came back too soon
        self.positions: dict[tuple, tuple[Tensor, Tensor]] = {}

    def hooks(self, hook: Callable) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(hook(self.note), with_kwargs=True)

    def note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [t for t in tensors_of([args, kwargs]) if t.numel() > 1 and t.layout is torch.strided]
        if module.training and given and not any(t.requires_grad for t in given):
            first, *rest = [self.fingerprint(t) for t in given]
            whole = sum((part.to(first.device) for part in rest), first)
            self.waiting.add(whole, partial(self.take, self.waiting.update))

    def fingerprint(self, tensor: Tensor) -> Tensor:
        key = (*tensor.shape, tensor.device)
        if key not in self.positions:
            at = sample_positions(tensor.shape).to(tensor.device)
            self.positions[key] = at, torch.arange(1, len(at) + 1, device=at.device) * 2654435761 % 2**31
        at, factors = self.positions[key]
        values = elements(plain(tensor), at)
        bits = values.float().view(torch.int32) if values.is_floating_point() else values
        return (bits.to(torch.int64) * factors).sum()

    def take(self, update: int, number: int) -> None:
        then, place = self.last.get(number, (0, 0))
        if then == update:  # used again for one update
            return
        self.n += 1
        self.n_early += bool(then) and update <= FIRST
        # a second round through the data has all of it in between
        self.recent.append(bool(then) and 2 * (self.n - place) <= len(self.last))
        self.last[number] = update, self.n
        if len(self.last) > MOST:
            del self.last[next(iter(self.last))]

    @property
    def share(self) -> float:
        """Of the last batches that came back too soon, where none did at first."""
        known = self.n > FIRST and not self.n_early and len(self.recent) == RECENT
        return sum(self.recent) / RECENT if known else 0.0
