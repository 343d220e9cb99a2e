"""What the loop reads off each step, kept on the device until it is worth a transfer."""

import math
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


class Report(NamedTuple):
    """One update; the tensors are scalars on the run's device, and nothing was fetched for it."""

    step: int  # this update's number, from 1
    tokens: int  # trained on so far, with this update's
    lr: dict[str, float]  # of each group, in this update
    losses: dict[str, Tensor]  # the weighted terms, measured before the update; their sum is the loss
    grad_norm: Tensor  # before clipping


class Readings:
    """Rows of numbers that wait on the device; `fetch` brings all of them over in one transfer."""

    def __init__(self, model: nn.Module):
        self.norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
        self.waiting: list[dict] = []

    def norm_deviation(self) -> Tensor:
        """Largest |w - 1| over the RMSNorm weights, a scalar on the device."""
        apart = torch._foreach_sub([p.detach().float() for p in self.norms], 1.0)
        return torch.stack(torch._foreach_norm(apart, math.inf)).max()

    def add(self, report: Report, loads: list[list[Tensor]], deviation: Tensor, seconds: float) -> None:
        """Keep a step as a record row whose numbers are still tensors. `loads`: of each micro-batch, of each MoE layer the
        share of slots that each expert got, (E,)."""
        row = {"step": report.step, "tokens": report.tokens, "loss": None, "losses": report.losses, "lr": report.lr}
        row |= {"grad_norm": report.grad_norm, "norm_deviation": deviation}
        row["expert_load"] = [torch.stack(layer).mean(0) for layer in zip(*loads, strict=True)]
        self.waiting.append(row | {"seconds": seconds})

    def fetch(self) -> list[dict]:
        """The waiting steps as record rows."""
        waiting, self.waiting = self.waiting, []
        tensors = [leaf for leaf in tree_leaves(waiting) if isinstance(leaf, Tensor)]
        if not tensors:
            return []
        numbers = iter(self.gathered(torch.cat([t.float().flatten() for t in tensors])).tolist())  # the one transfer

        def fetched(t: Tensor) -> float | list[float]:
            return list(islice(numbers, len(t))) if t.ndim else next(numbers)

        rows = tree_map_only(Tensor, fetched, waiting)
        for row in rows:
            row["loss"] = sum(row["losses"].values())
        return rows

    def gathered(self, numbers: Tensor) -> Tensor:
        """Where ranks train together, what they say together of numbers that each one read."""
        return numbers
