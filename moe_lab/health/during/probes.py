"""What an optimizer does with made-up gradients: each answer needs its class and options alone, and no step of the training."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..measures import adam_ratio_bound, is_lost
from ..random_state import RandomState
from ..sampling import elements, plain, sample_positions
from .intended import DISAGREE, advance, keeps_lost_bits, shadow_of

FLAT = 0.5  # smallest over largest singular value of an orthogonal step: Newton–Schulz leaves 0.6


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
