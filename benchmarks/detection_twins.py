"""The training loop that detection_rows.py makes sick, a part at a time, and what a row is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.detection_bodies import Batch, Body
from benchmarks.healthy_families import WARMUP
from benchmarks.programs import Program


def adamw(model: nn.Module, lr: float, **options: Any) -> AdamW:
    """Decoupled decay of matrices alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), **options)


class Loop:
    """An update as it should be; a sick row replaces one of the parts by another, from an update on if it is told so."""

    def __init__(
        self, body: Body, optimizers: list[Optimizer] | None = None, n_accum: int = 1, clip: float | None = 1.0
    ):
        self.body, self.n_accum, self.max_norm = body, n_accum, clip
        self.optimizers = optimizers or [adamw(body.model, body.lr)]
        self.lrs = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.warmup = WARMUP
        self.forward = body.loss

    def batch(self) -> Batch:
        return self.body.batches()

    def schedule(self, i: int) -> None:
        for o, lrs in zip(self.optimizers, self.lrs, strict=True):
            for group, lr in zip(o.param_groups, lrs, strict=True):
                group["lr"] = lr * min(1.0, (i + 1) / self.warmup)

    def clear(self, i: int) -> None:
        for o in self.optimizers:
            o.zero_grad()

    def backward(self, i: int) -> Tensor:
        total = 0.0
        for _ in range(self.n_accum):
            loss = self.forward(self.body.model, self.batch()) / self.n_accum
            loss.backward()
            total = total + loss
        return total

    def clip(self, i: int) -> None:
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.body.model.parameters(), self.max_norm)

    def step(self, i: int) -> None:
        for o in self.optimizers:
            o.step()

    def update(self, i: int) -> Tensor:
        self.schedule(i)
        self.clear(i)
        loss = self.backward(i)
        self.clip(i)
        self.step(i)
        return loss

    def program(self, held_out: Callable[[], float] | None = None, examined: Any = None, **options: Any) -> Program:
        examined = examined or (self.batch(), self.forward)
        return Program(self.body.model, self.optimizers, self.update, examined, options, held_out or self.body.held_out)


# ---- rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    sickness: str  # the class
    kind: str  # of model
    right: tuple[str, ...]  # ids of the rules that name its cause
    make: Callable[[int, bool], Program]  # of a seed, and whether it is sick
    trigger: int  # the update at which the fault begins
    plain: bool  # whether the healthy twin is the kind's plain training, which other rows share

    @property
    def twins(self) -> tuple[str, str]:
        """Names of the sick runs, and of the healthy ones."""
        return f"{self.name}: sick", f"{f'plain {self.kind}' if self.plain else self.name}: healthy"


def row(table: list[Row], sickness: str, kind: str, *right: str, trigger: int = 0, plain: bool = False) -> Callable:
    """Enter a function `(seed, sick) -> Program` into a table; its docstring names it."""

    def enter(make: Callable[[int, bool], Program]) -> Callable:
        name = " ".join(make.__doc__.split()).removesuffix(".")
        table.append(Row(name, sickness, kind, right, make, trigger, plain))
        return make

    return enter
