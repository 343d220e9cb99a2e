"""What bf16 weights would keep of each update of a float32 run, on sampled elements and at several learning rates.

Nothing is carried over to the next update: the shares say what one update keeps, at every point of a healthy trajectory.
"""

# Shapes: L learning rates, S sampled elements of a tensor.

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.optim.groups import group_of

SAMPLE = 4096  # elements of a tensor; a smaller one is taken whole


class Sample:
    """Elements of one tensor, and what they have added up to. An element counts from its first gradient on, as an
    embedding's rows do."""

    def __init__(self, p: Tensor, n_lrs: int):
        n = p.numel()
        drawn = torch.randint(n, (SAMPLE,), generator=torch.Generator().manual_seed(0))
        self.index = drawn if n > SAMPLE else torch.arange(n)  # flat positions
        self.touched = torch.zeros(len(self.index), dtype=torch.bool)
        self.before = torch.empty(0)
        self.sums = torch.zeros(n_lrs, 2, dtype=torch.float64)  # Σ r·u, Σ u·u


class Shadow:
    """Attached to the optimizers of a float32 model: sums, per tensor and LR, of what bf16 would have realised (r) of each
    update at that LR (u), on sampled elements.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], lrs: Sequence[float]):
        self.lrs = torch.tensor(lrs, dtype=torch.float32)
        self.parameters = dict(model.named_parameters())
        self.samples = {p: Sample(p, len(lrs)) for p in self.parameters.values()}
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self.before_step)
            optimizer.register_step_post_hook(self.after_step)

    def moving(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Sample, float]]:
        """Each tensor with a gradient, its sample and its LR."""
        pairs = ((p, group["lr"]) for group in optimizer.param_groups for p in group["params"])
        return ((p, self.samples[p], lr) for p, lr in pairs if p.grad is not None)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for p, sample, _ in self.moving(optimizer):
            sample.before = p.take(sample.index)
            sample.touched |= p.grad.take(sample.index) != 0

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for p, sample, lr in self.moving(optimizer):
            direction = (p.take(sample.index) - sample.before) / lr * sample.touched
            start, u = sample.before.bfloat16().float(), self.lrs[:, None] * direction  # (S,), (L, S)
            r, u = ((start + u).bfloat16().float() - start).double(), u.double()
            sample.sums += torch.stack([r * u, u * u], dim=1).sum(2)

    def read(self) -> dict[str, dict[str, list[float]]]:
        """name → LR → Σ ru, Σ u², each estimated for the whole tensor from its sample."""
        table = {}
        for name, p in self.parameters.items():
            sample = self.samples[p]
            rows = (p.numel() / len(sample.index) * sample.sums).tolist()
            table[name] = {f"{lr:.6g}": row for lr, row in zip(self.lrs.tolist(), rows, strict=True)}
        return table


def share(rows: Iterable[Sequence[float]]) -> float:
    """From rows of `Shadow.read`: realised share ρ = Σ ru / Σ u²; it may exceed 1 where rounding up prevails."""
    ru, uu = (sum(column) for column in zip(*rows, strict=True))
    return ru / uu if uu else math.nan


def at_lr(table: dict[str, dict[str, list[float]]], lr: float, factors: dict[str, float] | None = None) -> dict:
    """From `Shadow.read`, each tensor's sums at `lr`, times its own factor if `factors` are given."""
    return {name: rows[f"{lr * (factors[name] if factors else 1):.6g}"] for name, rows in table.items()}


def by_part(sums: dict[str, list[float]]) -> dict[str, float]:
    """Part of a block → `share`. `Muon` is all of Muon's matrices together."""
    parts: dict[str, list] = {}
    for name, row in sums.items():
        parts.setdefault(part_of(name), []).append(row)
        if group_of(name) == "muon":
            parts.setdefault("Muon", []).append(row)
    return {part: share(rows) for part, rows in parts.items()}


def part_of(name: str) -> str:
    """`layers.0.seq_layer.q_proj.weight` → q_proj; all norms are one part."""
    last = name.removesuffix(".weight").split(".")[-1]
    return "norms" if last.endswith("norm") else "head" if name.startswith("lm_heads") else last
