"""What the loop reads off each step, kept on the device until it is worth a transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_lab.model.moe import Routing

if TYPE_CHECKING:
    from moe_lab.train.loop import Report


class ExpertLoads:
    """Forward hooks on the modules that route: the mean load of each, over the micro-batches of a step."""

    def __init__(self, model: nn.Module):
        self.seen: dict[int, list[Tensor]] = {}
        self.handles = [module.register_forward_hook(self.hook) for module in model.modules()]

    def hook(self, module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Routing) and module.training:
            routing = output[1]
            reading = torch.cat([routing.load(), routing.drop_rate.reshape(1).float()])
            self.seen.setdefault(id(module), []).append(reading.detach())

    def take(self) -> list[Tensor]:
        """(E + 1,) for each routing layer, in order of depth: loads, then the drop rate. Forgets them."""
        means = [torch.stack(readings).mean(0) for readings in self.seen.values()]
        self.seen.clear()
        return means

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class Readings:
    """Rows of numbers that wait on the device; `fetch` brings all of them over in one transfer."""

    def __init__(self, model: nn.Module):
        self.norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
        self.loads = ExpertLoads(model)
        self.waiting: list[tuple[dict, list[str], list[int], Tensor]] = []

    def norm_deviation(self) -> Tensor:
        """Largest |w - 1| over the RMSNorm weights, a scalar on the device."""
        return torch.stack([(p.detach().float() - 1).abs().max() for p in self.norms]).max()

    def add(self, report: Report, deviation: Tensor, seconds: float) -> None:
        """Keep a step's plain values and, on the device: loss terms, gradient norm, deviation, loads."""
        loads = self.loads.take()
        terms, grad_norm = report.losses, report.grad_norm
        scalars = torch.stack([*(term.float() for term in terms.values()), grad_norm.float(), deviation])
        row = {"step": report.step, "tokens": report.tokens, "lr": report.lr, "seconds": seconds}
        self.waiting.append((row, list(terms), [len(load) for load in loads], torch.cat([scalars, *loads])))

    def fetch(self) -> list[dict]:
        """The waiting steps as record rows."""
        if not self.waiting:
            return []
        sizes = [len(values) for *_, values in self.waiting]
        numbers = torch.cat([values for *_, values in self.waiting]).tolist()  # the one transfer
        rows, start = [], 0
        for (row, names, load_sizes, _), size in zip(self.waiting, sizes, strict=True):
            values = iter(numbers[start : start + size])
            losses = {name: next(values) for name in names}
            grad_norm, deviation = next(values), next(values)
            loads = [[next(values) for _ in range(n)] for n in load_sizes]
            reading = {"loss": sum(losses.values()), "losses": losses, "lr": row["lr"], "grad_norm": grad_norm}
            reading |= {"norm_deviation": deviation, "expert_load": [load[:-1] for load in loads]}
            if any(load[-1] for load in loads):
                reading["drop_rate"] = [load[-1] for load in loads]
            rows.append({"step": row["step"], "tokens": row["tokens"]} | reading | {"seconds": row["seconds"]})
            start += size
        self.waiting.clear()
        return rows
