"""What a learning rate does, measured on steps that were taken: their size, their spectrum, what they depend on.

A class's name does not tell: one called Muon may scale by any of five rules, and one group may hold matrices under Muon and
a head under Adam. So of a few tensors of each group two steps in a row are looked at, every few updates at first. Of 16-bit
weights, whose own displacement is rounded, the replayed steps are taken instead, where there are any.
"""

# Shapes: S matrices of a stack (1 for others), R lines along the longer side (whole ones stay orthogonal), N their length.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median, mode
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sampling import Waiting, plain
from .tracking import GroupState, Tracked

EVERY, PAIRS = 5, 12  # updates between pairs of steps, pairs of a tensor; then the kind is known
PER_GROUP = 4  # tensors of a group that are measured
STACK, LINES, LENGTH = 4, 64, 1024  # the most of S, of R, and of N where there is no spectrum
FEWEST, FLATTEST = 8, 4  # R, and N over R, up to which orthogonal lines can be told from random ones

# Muon's Newton–Schulz leaves a spread up to 0.4, independent elements have 1. A rule that is linear in the gradients leaves
# rounding errors, Adafactor 1 % and Adam 20 %. Adam's RMS is 0.2 to 1 times its LR, a little more under Nesterov's rule.
ORTHOGONAL, LINEAR, SIGN, ADAM = 0.6, 5e-3, 1.002, (0.1, 2.0)
OLD_NEWS = 3e-4  # share of a squared step, not explained by the one before, below which float32 shows no more


class Step(NamedTuple):
    rms: float  # root mean square of the elements that moved, over the LR, without the decay
    spread: float  # of the squared singular values; 0: all equal, 1: as of independent elements; NaN: no spectrum
    rest: float  # of what the step before and the weight do not explain, the share that the gradients do not either
    evenness: float  # mean fourth power over the squared mean square: 1 where all elements move as far

    @property
    def kind(self) -> str:
        """`linear` (SGD), `orthogonal` (Muon), `sign` (Lion), `adam` (about one LR an element), or `other`."""
        if self.rest < LINEAR:
            return "linear"
        if self.spread < ORTHOGONAL:
            return "orthogonal"
        return "sign" if self.evenness < SIGN else "adam" if ADAM[0] <= self.rms <= ADAM[1] else "other"


class Steps:
    """Measures steps as they are taken, and leaves them in `Tracked.steps`."""

    def __init__(self, waiting: Waiting) -> None:
        self.waiting = waiting
        self.chosen: list[Tracked] = []
        # by the tensor's id: LR, weight, gradient, and the step where it was replayed
        self.before: dict[int, tuple] = {}
        self.first: dict[int, tuple[Tensor, Tensor]] = {}  # the first of two steps, and its gradient

    def choose(self, tracked: Sequence[Tracked]) -> None:
        """Of each group the largest tensor of each kind, those with a spectrum first."""
        groups: dict[GroupState, dict[str, Tracked]] = {}
        for t in sorted(tracked, key=lambda t: (not has_spectrum(t.param), -t.param.numel())):
            if t.owner:
                groups.setdefault(t.owner, {}).setdefault(t.kind, t)
        self.chosen = [t for kinds in groups.values() for t in list(kinds.values())[:PER_GROUP]]

    def begin(self, optimizer: Optimizer, n: int, replayed: Mapping[int, Tensor]) -> None:
        """Before update n (from 1). `replayed`: by the tensor's id, the intended step of a 16-bit one: whole, or of its sample."""
        if n % EVERY not in (1, 2):
            return
        for t in (t for t in self.chosen if t.optimizer is optimizer and len(t.steps) < PAIRS):
            lr, grad, moved = t.group.get("lr"), t.param.grad, replayed.get(id(t))
            if lr is None or grad is None or grad.is_sparse or (t.is_narrow and moved is None):
                continue
            lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
            if moved is None or moved.shape == t.param.shape:
                moved = moved if moved is None else part(moved)
                self.before[id(t)] = lr, part(t.param), part(grad), moved
            else:
                self.before[id(t)] = lr, t.sample(t.param).float(), t.sample(grad).float(), moved

    def end(self, optimizer: Optimizer, n: int) -> None:
        for t in (t for t in self.chosen if t.optimizer is optimizer and id(t) in self.before):
            lr, weight, grad, moved = self.before.pop(id(t))
            moved = part(t.param) - weight if moved is None else moved
            step = (moved / lr + (t.group.get("weight_decay") or 0.0) * weight).float()
            if n % EVERY == 1:
                self.first[id(t)] = step, grad
            elif id(t) in self.first:
                before, grad_before = self.first.pop(id(t))
                columns = [step, before, weight, grad, grad_before]
                if all(column.shape == step.shape for column in columns):
                    self.waiting.add(numbers(columns, has_spectrum(t.param)), partial(self.take, t))

    def take(self, t: Tracked, values: Sequence[float]) -> None:
        square, moved, fourth, spread, *gram = values
        if moved and all(map(math.isfinite, (fourth, *gram))):
            cosines = torch.tensor(gram, dtype=torch.float64).view(5, 5)
            new = left_over(cosines, [1, 2])
            if new > OLD_NEWS:
                rest = left_over(cosines, [1, 2, 3, 4]) / new
                t.steps.append(Step(math.sqrt(square / moved), spread, rest, fourth * moved / square**2))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(A, B) of a matrix, of each one of a stack, or of a convolution's kernel as Muon takes it."""
    return tuple(shape[-2:]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


def left_over(cosines: Tensor, columns: list[int]) -> float:
    """Share of the first column, squared, that a linear combination of these others does not explain."""
    mine = cosines[0, columns]
    return 1 - (mine @ torch.linalg.pinv(cosines[columns][:, columns], rtol=1e-5, hermitian=True) @ mine).item()


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


def numbers(columns: Sequence[Tensor], spectral: bool) -> Tensor:
    """(29,) float32, on the device: of the first column Σ u², the elements that moved, Σ u⁴ and the spread; and the cosines of all."""
    step = columns[0]
    flat = torch.stack([column.float().flatten() for column in columns])
    with torch.autocast(flat.device.type, enabled=False):
        flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
        cosines = flat @ flat.T
        spread = flat.new_full((), math.nan)
        if spectral and step.ndim == 3:
            lines = step / step.norm()
            grams = lines @ lines.mT  # (S, R, R)
            n_lines, length = step.shape[1:]
            same = n_lines * grams.square().sum() / grams.diagonal(dim1=1, dim2=2).sum(1).square().sum()
            spread = (same - 1) * length / n_lines  # noise has 1 + R/N, orthogonal lines 1
    sums = torch.stack([step.square().sum(), (step != 0).sum(), step.pow(4).sum(), spread])
    return torch.cat([sums, cosines.flatten()])


def kind_of(members: Sequence[Tracked]) -> tuple[str, list[tuple[Tracked, Step]]]:
    """What kind of step a group takes, and the tensors that show it; `unknown` before any was measured.

    `orthogonal` if any is: beside Muon's matrices may be some that have no spectrum, or a head under Adam.
    """
    seen = [(t, Step(*map(median, zip(*t.steps, strict=True)))) for t in members if t.steps]
    kinds = [step.kind for _, step in seen]
    kind = "orthogonal" if "orthogonal" in kinds else mode(kinds) if kinds else "unknown"
    return kind, [(t, step) for t, step in seen if step.kind == kind]
