"""What a learning rate does, measured on steps that were taken: their size, their spectrum, how even they are.

A class's name does not tell: one called Muon may scale by any of five rules, and one group may hold matrices under Muon and
a head under Adam. So a step of a few tensors of each group is looked at, every few updates at first. Of 16-bit weights,
whose own displacement is rounded, the replayed step is taken instead, where there is one.
"""

# Shapes: S matrices of a stack (1 for others), R lines along the longer side (whole ones stay orthogonal), N their length.

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median, mode
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sampling import Waiting, plain
from .probes import is_linear
from .tracking import GroupState, Tracked, lr_of

EVERY, LOOKS = 5, 12  # updates between steps that are measured, steps of a tensor; then the kind is known
PER_GROUP = 4  # tensors of a group that are measured
STACK, LINES, LENGTH = 4, 64, 1024  # the most of S, of R, and of N where there is no spectrum
FEWEST, FLATTEST = 8, 4  # R, and N over R, up to which orthogonal lines can be told from random ones

# Muon's Newton–Schulz leaves a spread up to 0.4, independent elements have 1. Adam's RMS is 0.2 to 1 times its LR, a little
# more or less under Nesterov's rule.
ORTHOGONAL, SIGN, ADAM = 0.6, 1.002, (0.1, 2.0)


class Step(NamedTuple):
    rms: float  # root mean square of the elements that moved, over the LR, without the decay
    spread: float  # of the squared singular values; 0: all equal, 1: as of independent elements; NaN: no spectrum
    evenness: float  # mean fourth power over the squared mean square: 1 where all elements move as far


class Steps:
    """Measures steps as they are taken, and leaves them in `Tracked.steps`."""

    def __init__(self, waiting: Waiting) -> None:
        self.waiting = waiting
        self.chosen: list[Tracked] = []
        self.before: dict[int, tuple] = {}  # by the tensor's id: LR, weight, and the step where it was replayed

    def choose(self, tracked: Sequence[Tracked]) -> None:
        """Of each group the largest tensor of each kind, those with a spectrum first."""
        groups: dict[GroupState, dict[str, Tracked]] = {}
        for t in sorted(tracked, key=lambda t: (not has_spectrum(t.param), -t.param.numel())):
            if t.owner:
                groups.setdefault(t.owner, {}).setdefault(t.kind, t)
        self.chosen = [t for kinds in groups.values() for t in list(kinds.values())[:PER_GROUP]]

    def begin(self, optimizer: Optimizer, n: int, replayed: Mapping[int, Tensor]) -> None:
        """Before update n (from 1). `replayed`: by the tensor's id, the intended step of a 16-bit one: whole, or of its sample."""
        if n % EVERY != 2:  # the first of all may be another rule's: Adam's is a sign
            return
        for t in (t for t in self.chosen if t.optimizer is optimizer and len(t.steps) < LOOKS):
            lr, grad, moved = lr_of(t.group), t.param.grad, replayed.get(id(t))
            if grad is None or grad.is_sparse or (t.is_narrow and moved is None):
                continue
            is_whole = moved is None or moved.shape == t.param.shape
            weight = part(t.param) if is_whole else t.sample(t.param).float()
            lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
            self.before[id(t)] = lr, weight, part(moved) if is_whole and moved is not None else moved

    def end(self, optimizer: Optimizer) -> None:
        for t in (t for t in self.chosen if t.optimizer is optimizer and id(t) in self.before):
            lr, weight, moved = self.before.pop(id(t))
            moved = part(t.param) - weight if moved is None else moved
            step = (moved / lr + (t.group.get("weight_decay") or 0.0) * weight).float()
            self.waiting.add(numbers(step, has_spectrum(t.param)), partial(self.take, t))

    def take(self, t: Tracked, values: Sequence[float]) -> None:
        square, moved, fourth, spread = values
        if moved and math.isfinite(fourth) and square:
            t.steps.append(Step(math.sqrt(square / moved), spread, fourth * moved / square**2))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(A, B) of a matrix, of each one of a stack, or of a convolution's kernel as Muon takes it."""
    return tuple(shape[-2:]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


def has_spectrum(p: Tensor) -> bool:
    if p.ndim < 2:
        return False
    rows, columns = matrix_shape(plain(p).shape)
    return min(rows, columns) >= FEWEST and max(rows, columns) <= FLATTEST * min(rows, columns)


def part(tensor: Tensor) -> Tensor:
    """A copy of some lines (S, R, N): all along the longer side, of a few matrices of a stack. At least float32."""
    x = plain(tensor)
    x = x.reshape(1, 1, -1) if x.ndim < 2 else x if x.ndim == 3 else x.flatten(1).unsqueeze(0)
    x = x.mT if x.shape[1] > x.shape[2] else x
    step = [-(-n // most) for n, most in zip(x.shape, (STACK, LINES, LENGTH), strict=True)]
    x = x[:: step[0], :: step[1], :: 1 if has_spectrum(tensor) else step[2]]
    return x.float() if x.dtype.itemsize < 4 else x.clone()


def numbers(step: Tensor, spectral: bool) -> Tensor:
    """(4,) float32, on the device: Σ u², the elements that moved, Σ u⁴ and the spread."""
    spread = step.new_full((), math.nan)
    if spectral and step.ndim == 3:
        with torch.autocast(step.device.type, enabled=False):
            lines = step / step.norm()
            grams = lines @ lines.mT  # (S, R, R)
        n_lines, length = step.shape[1:]
        same = n_lines * grams.square().sum() / grams.diagonal(dim1=1, dim2=2).sum(1).square().sum()
        spread = (same - 1) * length / n_lines  # noise has 1 + R/N, orthogonal lines 1
    return torch.stack([step.square().sum(), (step != 0).sum(), step.pow(4).sum(), spread])


def kind(t: Tracked, step: Step) -> str:
    """`orthogonal` (Muon), `linear` (SGD), `sign` (Lion), `adam` (about one LR an element), or `other`."""
    if step.spread < ORTHOGONAL:
        return "orthogonal"
    if t.owner.is_linear == "untried":
        t.owner.is_linear = is_linear(t.optimizer, t.group)
    if t.owner.is_linear or step.evenness < SIGN:
        return "linear" if t.owner.is_linear else "sign"
    return "adam" if ADAM[0] <= step.rms <= ADAM[1] else "other"


def kind_of(members: Sequence[Tracked]) -> tuple[str, list[tuple[Tracked, Step]]]:
    """What kind of step a group takes, and the tensors that show it; `unknown` before any was measured.

    `orthogonal` if any is: beside Muon's matrices may be some that have no spectrum, or a head under Adam.
    """
    seen = [(t, Step(*map(median, zip(*t.steps, strict=True)))) for t in members if t.steps]
    kinds = [kind(t, step) for t, step in seen]
    most = "orthogonal" if "orthogonal" in kinds else mode(kinds) if kinds else "unknown"
    return most, [pair for pair, its in zip(seen, kinds, strict=True) if its == most]
