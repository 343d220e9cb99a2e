"""What a loss asks of a model's outputs, read off their gradients: targets for all rows at once, logits squashed on the way.

The gradient of a loss tells its shape, wherever it is computed. Of a loss per row it is a function of the row's output and of
the row's own target; of a cross-entropy it is w · (p − onehot), and through a softmax before it that times the softmax's slope.
"""

# Shapes: N outputs of one number a row, R rows of V numbers.

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import fmean, median, pstdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..findings import grouped
from ..sampling import Waiting
from .heard import named_tensors

MOST, LEAST = 32, 5  # passes that are heard, and that must agree
CROSSED, APART = 3, 0.8  # passes in which some outputs are to rise and others to fall; share of targets that differ
ROWS, ELEMENTS = 8, 2**15  # outputs of a pass at least, and numbers that are kept of it
OUTPUTS = 3  # tensors of an answer that are heard: the first
LEVELS, ROUNDED = 4, 32  # gradients that must be told apart in a pass, and roundings within which two are the same
# of the targets' way from pass to pass, what one target for all rows leaves of a pass; own targets leave √N
SHARED = 0.01
# share of the gradient, squared, that the right loss leaves, and beside what the plain one does
EXACT, AHEAD = 1e-4, 0.01
ROUNDING = 1e-9  # … that is rounding in float32
SUM = 0.01  # how far shares may be from adding up to 1

Slope = Callable[[Tensor, Tensor], Tensor]  # (what came out, gradient there) → gradient of what went in
SQUASHES: dict[str, tuple[Callable[[Tensor], Tensor], Slope]] = {
    "nothing": (lambda x: x, lambda s, g: g),
    "a softmax": (lambda x: x.softmax(-1), lambda s, g: s * (g - (s * g).sum(-1, keepdim=True))),
    "a sigmoid": (torch.sigmoid, lambda s, g: s * (1 - s) * g),
}


class OneNumber(NamedTuple):
    """Of a pass whose outputs are one number a row."""

    target: float  # where the line of gradients over outputs is zero
    below: float  # how far that is under the outputs' mean
    rest: float  # RMS of what the line leaves, in the outputs' unit
    spread: float  # standard deviation of the outputs
    is_ordered: bool  # whether a larger output has no smaller gradient
    n_levels: float  # gradients that are told apart
    both_ways: bool  # whether some are to rise and others to fall


class Aims:
    """Listens to what the whole model answers; a few numbers a pass wait on their device."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting, self.n_heard = model, waiting, 0
        self.ones: dict[str, list[OneNumber]] = {}  # by the output's place in the answer
        # … what lay before each pass's cross-entropy, "" where nothing is told
        self.squashed: dict[str, list[str]] = {}

    def hooks(self, hook: Callable) -> Iterator[Any]:
        yield self.model.register_forward_hook(hook(partial(self.note, hook)))

    def note(self, hook: Callable, module: nn.Module, args: tuple, output: Any) -> None:
        heard = [pair for pair in named_tensors(output) if is_scored(pair[1])][:OUTPUTS]
        self.n_heard += bool(heard)
        for name, x in heard if self.n_heard <= MOST else ():
            rows = rows_of(x)
            stride = -(-rows.numel() // ELEMENTS)
            x.register_hook(hook(partial(self.answer, name or "the output", rows[::stride].clone(), stride)))

    def answer(self, name: str, x: Tensor, stride: int, gradient: Tensor) -> None:
        x, g, rough = x.float(), rows_of(gradient)[::stride].float(), torch.finfo(gradient.dtype).eps
        g = g / g.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        if x.shape[1] == 1:
            self.waiting.add(one_number(x[:, 0], g[:, 0], rough), partial(self.take_one, name))
        self.waiting.add(rests(x, g), partial(self.take_rests, name))

    def take_one(self, name: str, numbers: list[float]) -> None:
        self.ones.setdefault(name, []).append(OneNumber(*numbers))

    def take_rests(self, name: str, numbers: list[float]) -> None:
        found = what_squashes(dict(zip(KINDS, numbers, strict=False)), bool(numbers[-3]), numbers[-2:])
        self.squashed.setdefault(name, []).append(found)

    def shared(self) -> dict[str, int]:
        """Outputs of one number a row that are all held against one target, another one in each pass, with their passes."""
        return {name: len(passes) for name, passes in self.ones.items() if is_shared(passes)}

    def twice(self) -> dict[str, tuple[str, int]]:
        """Outputs that most passes squash before a loss that squashes, with how, and the passes."""
        found = {}
        for name, told in self.squashed.items():
            most, mine = max(grouped(told, str).items(), key=lambda pair: len(pair[1]))
            if most and len(mine) >= LEAST:
                found[name] = most, len(mine)
        return found


def is_scored(x: Tensor) -> bool:
    return x.requires_grad and x.is_floating_point() and x.ndim > 0 and rows_of(x).shape[0] >= ROWS


def rows_of(x: Tensor) -> Tensor:
    """(R, V), without its graph; of (B,) each is a row."""
    return x.detach().reshape(-1, x.shape[-1] if x.ndim > 1 else 1)


def one_number(x: Tensor, g: Tensor, rough: float) -> Tensor:
    """(7,) float32: `OneNumber` of outputs and gradients (N,). What lies within `rough` of the largest gradient is the same."""
    near = ROUNDED * rough * g.abs().max()
    steps = g[x.argsort()].diff()
    away, pull = x - x.mean(), g - g.mean()
    slope = (away * pull).sum() / away.square().sum().clamp(min=1e-30)
    rest = (pull - slope * away).square().mean().sqrt() / slope
    below = g.mean() / slope
    both = (g > near).any() & (g < -near).any()
    is_ordered, n_levels = ~(steps < -near).any(), (g.sort().values.diff() > near).sum() + 1
    told = x.mean() - below, below, rest, x.std(), is_ordered, n_levels, both
    return torch.stack([number.float() for number in told])


def is_shared(passes: list[OneNumber]) -> bool:
    """A line, as of squares, has no rest; other losses keep the order, and that says something where own targets would have had
    more say than the outputs. A target that stays, is one of a few, or follows the outputs' own mean, is meant."""
    told = [one for one in passes if math.isfinite(one.target) and one.n_levels >= LEVELS]
    if len(told) < LEAST:
        return False
    middle = median(one.target for one in told)
    way = median(abs(one.target - middle) for one in told)
    n_apart = len({round((one.target - middle) / (SHARED * way or 1.0)) for one in told})
    if n_apart < APART * len(told) or pstdev(one.below for one in told) < SHARED * way:
        return False
    if all(0 <= one.rest < SHARED * way for one in told):
        return True
    own = way * math.sqrt(ROWS)  # at least, would be the deviation of own targets
    says_more = own > fmean(one.spread for one in told) and sum(one.both_ways for one in told) >= CROSSED
    return says_more and all(one.is_ordered for one in told)


def cross_entropy(s: Tensor, g: Tensor) -> Tensor:
    """Gradient at logits (R, V), of the class whose own is the most negative; 0 in rows that ask for none."""
    least, target = g.min(-1, keepdim=True)
    return (s.softmax(-1) - torch.zeros_like(s).scatter_(-1, target, 1.0)) * (least < 0)


def binary(s: Tensor, g: Tensor) -> Tensor:
    """Gradient of a binary cross-entropy at logits: what is to rise is true."""
    return s.sigmoid() - (g < 0).to(s.dtype)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": cross_entropy, "binary": binary}
KINDS = [(loss, squash) for loss in LOSSES for squash in SQUASHES if (loss, squash) != ("binary", "a softmax")]


def rests(x: Tensor, g: Tensor) -> Tensor:
    """(len(KINDS) + 3,): of each kind of loss the share of the gradient (R, V), squared, that is not explained; then whether the
    outputs add up to 1; and, for each loss, whether they lie between 0 and 1 and the gradient can be told from others'."""
    whole, found = g.square().sum().clamp(min=1e-30), []
    for loss, squash in KINDS:
        forward, slope = SQUASHES[squash]
        asked = LOSSES[loss](forward(x), g)
        shape = slope(forward(x), asked)
        # a row has a weight of its own where it has numbers enough to show it
        dims = [-1] if loss == "cross-entropy" and x.shape[1] > 2 else [0, 1]
        both, own = (g * shape).sum(dims, keepdim=True), shape.square().sum(dims, keepdim=True)
        weight = both.clamp(min=0) / own.clamp(min=1e-30) * (loss != "binary" or (g > 0).any() & (g < 0).any())
        found.append((g - weight * shape).square().sum() / whole)
    inside = ((x >= 0) & (x <= 1)).all() & (x.max() > x.min())  # logits that are all zero show nothing
    balanced = (g.sum(-1).abs() < 0.1 * g.abs().amax(-1)) | (g == 0).all(-1)  # of log-probabilities it is not
    are_shares = ((x.sum(-1) - 1).abs() < SUM).all()
    is_told = inside & ((g > 0).sum() >= ROWS) & ((g < 0).sum() >= ROWS)
    return torch.stack([*found, *(fact.to(x.dtype) for fact in (are_shares, inside & balanced.all(), is_told))])


def what_squashes(rest: Mapping[tuple[str, str], float], are_shares: bool, told: list[float]) -> str:
    """What lies before a loss that squashes by itself; "" where nothing does, or it cannot be told."""
    for loss, is_inside in zip(LOSSES, told, strict=True):
        plain = rest[loss, "nothing"]
        best = min((key for key in rest if key[0] == loss), key=rest.__getitem__)
        if is_inside and plain < EXACT:
            return "a softmax" if are_shares and loss == "cross-entropy" else "a sigmoid"
        if best[1] != "nothing" and rest[best] < min(EXACT, AHEAD * plain) and plain > ROUNDING:
            return best[1]
    return ""
