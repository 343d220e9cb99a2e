"""What kind of step an optimizer takes: measured on steps that were taken, and told by what it does with made-up gradients.

A class's name does not tell: one called Muon may scale by any of five rules, and one group may hold matrices under Muon and
a head under Adam. So a step of a few tensors of each group is looked at, every few updates at first. Of 16-bit weights,
whose own displacement is rounded, the replayed step is taken instead, where there is one. What is asked of made-up gradients
needs the optimizer's class and options alone, and no step of the training.
"""

# Shapes: S matrices of a stack (1 for others), R lines along the longer side (whole ones stay orthogonal), N their length.

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from statistics import median, mode
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..measures import adam_ratio_bound, is_lost
from ..random_state import RandomState
from ..sampling import Waiting, elements, plain, sample_positions
from .intended import DISAGREE, advance, keeps_lost_bits, shadow_of
from .tracking import GroupState, Tracked, lr_of

EVERY, LOOKS = 5, 12  # updates between steps that are measured, steps of a tensor; then the kind is known
PER_GROUP = 4  # tensors of a group that are measured
STACK, LINES, LENGTH = 4, 64, 1024  # the most of S, of R, and of N where there is no spectrum
FEWEST, FLATTEST = 8, 4  # R, and N over R, up to which orthogonal lines can be told from random ones

# Muon's Newton–Schulz leaves a spread up to 0.4, independent elements have 1. Adam's RMS is 0.2 to 1 times its LR, a little
# more or less under Nesterov's rule.
ORTHOGONAL, SIGN, ADAM = 0.6, 1.002, (0.1, 2.0)
DIVIDED = 5  # times that a first step by decay alone is longer than it is asked to be
FLAT = 0.5  # smallest over largest singular value of an orthogonal step: Newton–Schulz leaves 0.6


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


# ---- made-up gradients ------------------------------------------------------------------------------------------------


def fresh_shadow(optimizer: Optimizer, group: dict, weight: Tensor, lr: float = 1.0, **options: Any) -> Optimizer:
    """An optimizer like it, of a made-up weight, that has not stepped yet. Raises whatever making one raises."""
    lr = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr
    first = optimizer.defaults  # whole numbers may be counts: of a group that has not stepped yet
    fresh = {k: first[k] if type(v) is int else v for k, v in group.items() if type(v) is not int or k in first}
    return shadow_of(optimizer, {**fresh, "lr": lr, **options}, weight, {})


@contextmanager
def tried(group: dict) -> Iterator[torch.device]:
    """Whatever a foreign step raises ends the attempt: then nothing is claimed of it. Random numbers are put back."""
    first = group["params"][0]
    with suppress(Exception), RandomState([first]):
        yield first.device


class Law(NamedTuple):
    """What a step that leaves all singular values alike does with shapes, found on made-up gradients."""

    # by dimensions, 2 or 3 for a stack: a tall matrix's singular values over a wide one's, 1 where alike
    tall: dict[int, float]
    mixes: bool  # whether the gradient of one matrix of a stack turns the steps of others


def law_of(optimizer: Optimizer, group: dict) -> Law | None:
    """None where steps are not orthogonal, or cannot be tried."""

    def step(grad: Tensor) -> Tensor:
        shadow = fresh_shadow(optimizer, group, torch.zeros(grad.shape, device=device))
        return advance(shadow, grad.to(device)).cpu()

    with tried(group) as device:
        generator = torch.Generator().manual_seed(0)
        wide = torch.randn(16, 64, generator=generator) * 10 ** torch.linspace(0, -1, 16)[:, None]
        values = [torch.linalg.svdvals(step(grad)) for grad in (wide, wide.mT.contiguous())]
        if any(s.min() <= FLAT * s.max() for s in values):  # or zero: some only set up their state in a first step
            return None
        tall = {2: (values[1].mean() / values[0].mean()).item()}
        # alike, as experts' gradients are: unlike ones are orthogonal to each other already
        stack = torch.randn(24, 32, generator=generator) + torch.randn(8, 24, 32, generator=generator) / 2
        changed = torch.cat([stack[:1].roll(1, 1), stack[1:]])
        if all(p.ndim < 3 for p in group["params"]):
            return Law(tall, False)  # stacks may be refused
        tall[3] = (step(wide.mT.repeat(8, 1, 1)).norm() / step(wide.repeat(8, 1, 1)).norm()).item()
        a, b = (step(grad)[1:].flatten() for grad in (stack, changed))
        return Law(tall, bool(torch.cosine_similarity(a, b, dim=0) < 1 - DISAGREE))
    return None


def decay_arrives(optimizer: Optimizer, group: dict, dtype: torch.dtype, lr: float) -> bool | None:
    """Whether a step without gradient moves any of many weights of this format, or keeps what it loses; None where it moves none
    of float32 either, or cannot be tried."""
    with tried(group) as device:
        start, arrived = torch.linspace(1, 2, 2**16, device=device).view(256, 256), []
        for kind in (dtype, torch.float32):
            weight = start.to(kind, copy=True)
            shadow = fresh_shadow(optimizer, group, weight, lr)
            moved = advance(shadow, torch.zeros_like(weight)).any()
            kept = [v for v in shadow.state[weight].values() if isinstance(v, Tensor) and v.shape == weight.shape]
            arrived.append(bool(moved) or any(bool(v.any()) for v in kept))
        return arrived[0] if arrived[1] else None
    return None


def divides_decay(optimizer: Optimizer, group: dict) -> bool:
    """Whether a step without a gradient is far longer than LR × decay × weight, as where the decay is added to a gradient that is then
    divided by its own size."""
    with tried(group) as device:
        start = torch.linspace(1e-3, 2e-3, 16, device=device)
        moved = advance(fresh_shadow(optimizer, group, start.clone(), 1e-3), torch.zeros_like(start))
        return bool((moved.abs() > DIVIDED * 1e-3 * group["weight_decay"] * start).all())
    return False


def is_linear(optimizer: Optimizer, group: dict) -> bool:
    """Whether twice the gradients make twice the steps, as under SGD, with momentum or without; RAdam's first ones are such, too."""
    with tried(group) as device:
        once, twice = (fresh_shadow(optimizer, group, torch.zeros(16, device=device)) for _ in range(2))
        for g in waves(device):
            steps = advance(once, g.clone()), advance(twice, 2 * g)
        return bool(steps[0].any() and torch.allclose(2 * steps[0], steps[1], rtol=DISAGREE))
    return False


def waves(device: torch.device) -> list[Tensor]:
    """Gradients (16,) of a few updates."""
    return [torch.sin(t * torch.arange(1.0, 17.0)).to(device) for t in range(1, 9)]


def is_adam(optimizer: Optimizer, group: dict) -> bool:
    """Whether a group's steps are Adam's (Kingma & Ba 2015, alg. 1), found by trying both on made-up gradients: with its own eps,
    since a large one is a size of steps and no other law."""
    with tried(group) as device:
        start = torch.zeros(16, device=device)
        shadow = fresh_shadow(optimizer, group, start.clone(), weight_decay=0.0)
        adam = torch.optim.Adam([start], lr=1.0, betas=group["betas"], eps=group.get("eps", 1e-8))
        for g in waves(device):
            if (advance(shadow, g.clone()).abs() - advance(adam, g).abs()).abs().max() > DISAGREE:
                return False
        return True
    return False


def unmovable(optimizer: Optimizer, group: Mapping[str, Any]) -> list[tuple[Tensor, float]]:
    """16-bit tensors of a group under torch's own Adam, which keeps nothing of what rounding loses, in which the largest step
    that any gradients can give at the peak LR (`adam_ratio_bound`), decay included, is rounded away in every sampled element;
    each with that step."""
    narrow = [p for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
    peak = max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))
    torchs = type(optimizer).__module__.startswith("torch.optim") and not keeps_lost_bits(optimizer)
    if not (narrow and peak and torchs and "betas" in group and is_adam(optimizer, group)):
        return []
    bound, found = peak * adam_ratio_bound(math.inf, group["betas"]), []
    for p in narrow:
        w = elements(plain(p), sample_positions(p.shape).to(p.device)).float()
        step = bound + peak * group.get("weight_decay", 0.0) * w.abs()
        if (is_lost(w, step, p.dtype) & is_lost(w, -step, p.dtype)).all():
            found.append((p, bound))
    return found
