"""Does a batch come back that came a short while ago, though none did at first? Do random numbers come again in each update?"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..random_state import RandomState
from ..sampling import Waiting, elements, plain, sample_positions
from .heard import tensors_of

FIRST, RECENT = 20, 20  # updates that must be without a repetition, and batches that are judged
MOST = 10_000  # fingerprints that are kept
ROWS, SEEDED = 8, 8  # rows of which a number each is looked at; times that it must come again


class Repeats:
    """A fingerprint of each training batch: whole numbers, so that no order of additions matters."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting = model, waiting
        self.last: dict[int, tuple[int, int]] = {}  # by fingerprint, when it was last seen: the update, and its number
        self.n, self.n_early = 0, 0  # batches so far, and repetitions among the first
        self.recent: deque[tuple[int, bool]] = deque(maxlen=RECENT)  # update, and whether it came back too soon
        self.positions: dict[tuple, tuple[Tensor, Tensor]] = {}
        # of the first updates: by place among what the model is given, fingerprints of a number for each row that looks drawn
        self.columns: dict[int, list[int]] = {}
        # … and whether generators that a pass moves stand where they stood an update ago
        self.drawn_again: list[bool] = []
        self.entered = self.left = None

    def hooks(self, hook: Callable) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(hook(self.note), with_kwargs=True)

    def note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # while a graph is captured no state can be had
        is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if module.training and self.waiting.update <= FIRST and not is_captured:
            self.entered = self.random_state()
        given = [t for t in tensors_of([args, kwargs]) if t.numel() > 1 and t.layout is torch.strided]
        if module.training and given and not any(t.requires_grad for t in given):
            first, *rest = parts = [self.fingerprint(t) for t in given]
            for i, (t, part) in enumerate(zip(given, parts, strict=True)):
                if t.numel() == len(t) >= ROWS and not t.is_complex() and self.waiting.update <= FIRST:
                    self.waiting.add(column(t.flatten(), part), partial(self.take_column, i))
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

    def take_column(self, place: int, numbers: list[int]) -> None:
        number, is_drawn = numbers
        self.columns.setdefault(place, []).extend([number] if is_drawn else [])

    def random_state(self) -> RandomState:
        return RandomState(islice(self.model.parameters(), 1))  # of its device

    def before_update(self, n: int) -> None:
        """Before update n of those seen, from 1."""
        if n <= FIRST and self.entered is not None:
            now = self.random_state()
            if self.left is not None:
                moved = [not same for same in now.parts_as_in(self.entered)]
                back = now.parts_as_in(self.left)
                self.drawn_again.append(any(m and b for m, b in zip(moved, back, strict=True)))
            self.left, self.entered = now, None

    def take(self, update: int, number: int) -> None:
        then, place = self.last.get(number, (0, 0))
        if then == update:  # used again for one update
            return
        self.n += 1
        self.n_early += bool(then) and update <= FIRST
        # a second round through the data has all of it in between
        self.recent.append((update, bool(then) and 2 * (self.n - place) <= len(self.last)))
        self.last[number] = update, self.n
        if len(self.last) > MOST:
            del self.last[next(iter(self.last))]

    @property
    def same_noise(self) -> bool:
        """Whether random numbers came again in the last few passes, or updates: a step seeds its generator anew."""
        columns = [mine for mine in self.columns.values() if len(mine) >= SEEDED and not self.n_early]
        same = any(len(set(mine[-SEEDED:])) == 1 for mine in columns)
        return same or len(self.drawn_again) >= SEEDED and all(self.drawn_again[-SEEDED:])

    @property
    def share(self) -> float:
        """Of the last batches that came back too soon, where none did at first."""
        known = self.n > FIRST and not self.n_early and len(self.recent) == RECENT
        return sum(again for _, again in self.recent) / RECENT if known else 0.0


def column(values: Tensor, fingerprint: Tensor) -> Tensor:
    """(2,) int64: a number for each row, as one number, and whether they look drawn: most are different, and in no order."""
    steps, n_different = values.diff(), (values.sort().values.diff() != 0).sum() + 1
    is_drawn = (2 * n_different > len(values)) & (steps > 0).any() & (steps < 0).any()
    return torch.stack([fingerprint, is_drawn.to(torch.int64)])
