"""What bf16 weights keep of their updates, on sampled elements: foretold from a float32 run, or found in a bf16 run.

`Shadow` computes, beside a float32 run and at several learning rates, what rounding would have kept of each update. It
carries nothing over to the next one, so it says what one update keeps, at every point of one healthy trajectory.
`displacement` compares, in a bf16 run, the way that weights have gone with the sum of the steps they were meant to take.
"""

# Shapes: L learning rates, S sampled elements of a tensor.

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.health import Watch
from moe_lab.health.measures import is_lost, ratio_of_sums
from moe_lab.optim.groups import group_of

SAMPLE = 4096  # elements of a tensor; a smaller one is taken whole


def kept(weight: Tensor, direction: Tensor, lrs: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """What a weight of `dtype` would realise of `lr · direction`: weight and direction (S,) float32, lrs (L,) → realised,
    intended (L, S) float32 and lost (L, S) bool."""
    start = weight.to(dtype).float()
    intended = lrs[:, None] * direction
    return (start + intended).to(dtype).float() - start, intended, is_lost(start, intended, dtype)


class Sample:
    """Elements of one tensor, and what they have added up to. An element counts from its first gradient on, as an
    embedding's rows do."""

    def __init__(self, p: Tensor, n_lrs: int):
        n = p.numel()
        drawn = torch.randint(n, (SAMPLE,), generator=torch.Generator().manual_seed(0))
        self.index = drawn if n > SAMPLE else torch.arange(n)  # flat positions
        self.touched = torch.zeros(len(self.index), dtype=torch.bool)
        self.before = torch.empty(0)
        self.sums = torch.zeros(4, n_lrs, len(self.index), dtype=torch.float64)  # Σ r·u, Σ u·u, lost, all


class Shadow:
    """Attached to the optimizers of a float32 model: sums, per tensor and LR, of what bf16 would have realised (r) of each
    update at that LR (u), on sampled elements.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], lrs: Sequence[float], dtype=torch.bfloat16):
        self.lrs, self.dtype = torch.tensor(lrs, dtype=torch.float32), dtype
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
            r, u, lost = kept(sample.before, direction, self.lrs, self.dtype)
            r, u = r.double(), u.double()
            sample.sums += torch.stack([r * u, u * u, lost, u != 0])

    def read(self) -> dict[str, dict[str, list[float]]]:
        """name → LR → Σ ru, Σ u², then over elements Σ (Σ ru)², Σ (Σ ru)(Σ u²), Σ (Σ u²)², lost, all; each estimated for
        the whole tensor from its sample."""
        table = {}
        for name, p in self.parameters.items():
            ru, uu, lost, n = self.samples[p].sums  # (L, S) each
            scale = p.numel() / ru.shape[1]
            squares = [scale * x for x in (ru * ru, ru * uu, uu * uu)]
            rows = scale * torch.stack([ru, uu, *squares, lost, n], dim=1).sum(2)  # (L, 7)
            table[name] = {f"{lr:.6g}": row for lr, row in zip(self.lrs.tolist(), rows.tolist(), strict=True)}
        return table


def displacement(watch: Watch) -> dict[str, list[float]]:
    """name → the seven sums of `Shadow.read` in a bf16 run: of whole displacements since the watch began, against the sum of
    the steps that were meant, each replayed in float32. `lost` are elements that are where they began."""
    watch.check()
    known = [r for r in watch.readings if r.intended_square is not None]
    columns = ("realised_intended", "intended_square", "moments_rruu", "moments_ruuu", "moments_uuuu")
    return {r.name: [*(getattr(r, c) for c in columns), r.unchanged, r.n_touched] for r in known}


def share(rows: Iterable[Sequence[float]]) -> dict[str, float]:
    """From rows of `Shadow.read` or `displacement`: realised share ρ = Σ ru / Σ u², its standard error over elements, lost
    share of the updates (each 0 to 1; ρ may exceed 1 where rounding up prevails)."""
    *sums, lost, n = (sum(column) for column in zip(*rows, strict=True))
    rho, error = ratio_of_sums(*sums) if sums[1] else (math.nan, math.nan)
    return {"rho": rho, "error": error, "lost": lost / n if sums[1] else math.nan}


def at_lr(table: dict[str, dict[str, list[float]]], lr: float, factors: dict[str, float] | None = None) -> dict:
    """From `Shadow.read`, each tensor's sums at `lr`, times its own factor if `factors` are given."""
    return {name: rows[f"{lr * (factors[name] if factors else 1):.6g}"] for name, rows in table.items()}


def by_part(sums: dict[str, list[float]]) -> dict[str, dict[str, float]]:
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
