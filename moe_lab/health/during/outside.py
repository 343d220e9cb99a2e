"""What lies outside of the optimizer: tables of positions, buffers that a forward pass adds to, batches that come back."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling import Waiting, elements, plain, sample_positions
from ..torch_private import is_in_backward
from .casts import Casts
from .clips import Clips
from .copies import Copies, Followers, Statistics, is_16_bit
from .heard import tensors_of
from .listener import Listener
from .reached import Reached, alive
from .routing import Routing, Terms
from .tracking import Tracked

SLOW = 2e-3  # momentum of a batch norm below which a tenth of what there was first is left after 1000 updates
HASTY = 0.5  # … above which the last few batches are all that evaluation knows; 1 is taken on purpose, to measure anew
COUNTED = 1 << 16  # elements of the largest buffer that is called a count
FIRST, RECENT = 20, 20  # updates that must be without a repetition, and batches that are judged
MOST = 10_000  # fingerprints that are kept


class Outside(Listener):
    """All of it, with the choices among experts and the scalars on the way."""

    where, what = "modules", "experts, counts and scalars are not looked at"

    def __init__(self, model: nn.Module, waiting: Waiting):
        super().__init__()
        self.model, self.copies, self.statistics, self.followers = model, Copies(), Statistics(model), Followers(model)
        self.counts, self.averages, self.repeats, self.clips, self.casts = (
            part(model, waiting) for part in (Counts, Averages, Repeats, Clips, Casts)
        )
        self.routing, self.terms, self.reached = (part(model, waiting) for part in (Routing, Terms, Reached))
        self.positions: dict[str, float] | None = None  # by table, how far the last ones are off
        self.rounded: list[str] = []  # buffers

    def hooks(self, hook: Callable) -> Iterator[Any]:
        for part in (self.counts, self.routing, self.terms, self.repeats, self.averages, self.clips, self.casts):
            yield from part.hooks(hook)
        yield self.model.register_forward_hook(hook(self.reached.answered))

    def before_update(self, n: int) -> None:
        """Before update n of those seen, from 1."""
        self.counts.added = {}
        self.terms.before_update(n)
        self.casts.before_update()

    def look(self, tracked: Sequence[Tracked], step: int, n_seen: int, longest: int) -> None:
        """At what no pass shows."""
        self.reached.judge()
        living = cache(partial(alive, (Tensor, nn.Module)))  # what the process holds is gone through once, if at all
        self.copies.look(tracked, step, n_seen, living)
        self.statistics.look(tracked, n_seen, living)
        self.followers.look(tracked, n_seen, living)
        if self.positions is None:
            self.positions, self.rounded = rough_positions(self.model, longest), rounded_buffers(self.model)


class Counts:
    """Buffers that a forward pass adds to, and whether the pass that recomputes it for the backward one adds the same again."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting = model, waiting
        self.before: dict[str, Tensor] = {}  # by the buffer's name
        self.added: dict[str, list[Tensor]] = {}  # by passes forward since the last update
        self.doubled: dict[str, list[bool]] = {}

    def hooks(self, hook: Callable) -> Iterator[Any]:
        for name, module in self.model.named_modules():
            buffers = module.named_buffers(recurse=False)
            own = {f"{name}.{key}": key for key, b in buffers if 1 < b.numel() <= COUNTED and b.dtype != torch.bool}
            if own:
                yield module.register_forward_pre_hook(hook(partial(self.begin, own)))
                # a recomputed pass stops by an exception once it has what is needed
                yield module.register_forward_hook(hook(partial(self.end, own)), always_call=True)

    def begin(self, own: Mapping[str, str], module: nn.Module, args: tuple) -> None:
        if self.waiting.is_look:
            self.before |= {name: getattr(module, key).clone() for name, key in own.items()}

    def end(self, own: Mapping[str, str], module: nn.Module, args: tuple, output: object) -> None:
        for name, before in [(name, self.before.pop(name)) for name in own if name in self.before]:
            added = getattr(module, own[name]) - before
            if not is_in_backward():
                self.added.setdefault(name, []).append(added)
            elif name in self.added:
                again = [torch.isclose(added, first, rtol=1e-3).all() for first in self.added[name][-4:]]
                looks = self.doubled.setdefault(name, [])
                self.waiting.add(torch.stack(again).any() & (added != 0).any(), looks.append)


class Averages:
    """Batch norms whose momentum keeps what a fresh model starts with: how far are they from the batches, in these' own terms?"""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.waiting, kinds = waiting, nn.modules.batchnorm._BatchNorm
        norms = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m.running_mean is not None}
        self.hasty = [n for n, m in norms.items() if m.momentum is not None and HASTY < m.momentum < 1]
        self.slow = {n: m for n, m in norms.items() if m.momentum is not None and 0 < m.momentum < SLOW}
        self.off: dict[str, list[float]] = {}  # looks

    def hooks(self, hook: Callable) -> Iterator[Any]:
        for name, module in self.slow.items():
            yield module.register_forward_pre_hook(hook(partial(self.look, name)))

    def look(self, name: str, module: nn.Module, args: tuple) -> None:
        """Standard deviations between the means, or factors of two between the variances, of the middle channel."""
        if module.training and self.waiting.is_look:
            variance, mean = torch.var_mean(args[0].float(), [d for d in range(args[0].ndim) if d != 1])
            away = (mean - module.running_mean).abs() / (variance + module.eps).sqrt()
            apart = ((variance + module.eps) / (module.running_var + module.eps)).log2().abs()
            self.waiting.add(torch.maximum(away, apart).median(), self.off.setdefault(name, []).append)


class Repeats:
    """A fingerprint of each training batch, whole numbers, so that no order of additions matters: does one come back that came a
    short while ago, though none did at first?"""

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


ROUGH = 0.05  # radians of error in an angle, 25 times the rounding of its cosine in bfloat16


def rough_positions(model: nn.Module, longest: int) -> dict[str, float]:
    """Tables of 16 bits in which positions run together, by name: the error in radians at `longest`, or how many are the same
    as their neighbour's (from 1 on)."""
    found = {}
    for name, module in model.named_modules():
        for key, tensor in (*module._buffers.items(), *vars(module).items()):
            if isinstance(tensor, Tensor) and is_16_bit(tensor) and tensor.numel() > 3:
                values = plain(tensor).squeeze()
                size = rough_angle(values, longest) if values.ndim == 1 else 0.0
                size = size if size > ROUGH else run_together(values)
                if size:
                    found[f"{name}.{key}".removeprefix(".")] = size
    return found


def rounded_buffers(model: nn.Module) -> list[str]:
    """Of 16 bits, in a model whose parameters have more."""
    if any(is_16_bit(p) or not p.is_floating_point() for p in model.parameters()):
        return []
    return [name for name, buffer in model.named_buffers() if is_16_bit(buffer) and buffer.numel() > 3]


def rough_angle(values: Tensor, longest: int) -> float:
    """How far frequencies, which fall geometrically from 1 or less, are off at the last position."""
    values = values.cpu().double()
    if not (values > 0).all() or values[0] > 1 or values[-1] > 0.1 * values[0]:
        return 0.0
    logs, at = (values / values[0]).log(), torch.arange(len(values), dtype=torch.float64)
    fit = values[0] * (logs @ at / (at @ at) * at).exp()  # the first, mostly 1, is exact
    is_geometric = (values / fit - 1).abs().max() < 2 * torch.finfo(torch.bfloat16).eps
    return float((values - fit).abs().max() * longest) if is_geometric else 0.0


def run_together(values: Tensor) -> int:
    """Places of a table that are the same as the one before, where the first eight are all different, or count evenly."""
    rows = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    same = (rows[1:] == rows[:-1]).all(1).cpu()
    steps = rows[1:9].float() - rows[:8].float() if len(rows) > 8 else rows[:0]
    regular = len(steps) and not same[:8].any() and (rows.shape[1] > 1 or bool((steps == steps[0]).all()))
    return int(same.sum()) if regular else 0
