"""Sampled elements of many tensors, kept flat on their device, so that a reading is a few operations and one transfer."""

# Shapes: S sampled elements of all tensors of one device, M tensors.

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_lab.health.measures import Reading, ulp

SAMPLE = 256  # elements of a tensor; a tensor of up to WHOLE elements is taken whole
WHOLE = 512
GOLDEN = 0.6180339887498949


def sample_index(n: int, device: torch.device) -> Tensor:
    """Flat positions of the sample, int64: all of a small tensor, else spread by the golden ratio, which no row length
    can fall into step with (evenly spaced ones may all hit one column)."""
    if n <= WHOLE:
        return torch.arange(n, device=device)
    return ((torch.arange(SAMPLE, dtype=torch.float64) * GOLDEN % 1) * n).long().to(device)


class Tracked:
    """One watched tensor: who it is, who updates it, and what was counted without looking at its values."""

    def __init__(self, name: str, param: Tensor, optimizer: Optimizer | None, group: dict, group_name: str):
        self.name, self.param, self.optimizer, self.group, self.group_name = name, param, optimizer, group, group_name
        self.kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        self.index = sample_index(param.numel(), param.device)
        self.grad_norm = 0.0
        self.with_gradient = self.zero_gradient = self.no_gradient = 0
        self.finite = True
        self.sparse = False
        self.intended_known = False
        self.is_outside_model = False  # a master copy: its gradient is made by whoever copies


class Bank:
    """The samples of all watched tensors of one device."""

    def __init__(self, tensors: Sequence[Tracked]):
        self.tensors = list(tensors)
        sizes = [len(t.index) for t in tensors]
        device = tensors[0].param.device
        self.places = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.owner = torch.repeat_interleave(
            torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device)
        )
        self.start = self.gather()  # (S,) float32
        self.last = self.start.clone()
        self.touched = torch.zeros_like(self.start, dtype=torch.bool)
        widths = [ulp(self.start[place], t.param.dtype) for t, place in zip(self.tensors, self.places, strict=True)]
        self.ulp = torch.cat(widths)
        self.watches_intent = any(t.param.dtype.itemsize < 4 for t in tensors)
        # where no format is narrow, nothing is accumulated and nothing kept
        self.origin = self.start.clone() if self.watches_intent else self.start
        self.intended = torch.zeros_like(self.start) if self.watches_intent else None

    def gather(self) -> Tensor:
        return torch.cat([t.param.detach().take(t.index).float() for t in self.tensors])

    def n_bytes(self) -> int:
        kept = [self.start, self.last, self.touched, self.ulp, self.owner, *[t.index for t in self.tensors]]
        kept += [self.origin, self.intended] if self.watches_intent else []
        return sum(t.numel() * t.element_size() for t in kept)

    def restart_window(self) -> None:
        """Begin a new window of intended against realised displacement."""
        if self.watches_intent:
            self.origin = self.gather()
            self.intended.zero_()

    def read(self) -> Tensor:
        """(M, 15) float64 on the device: for each tensor the sums that `readings` turns into Readings."""
        now = self.gather()
        on = self.touched
        intended = self.intended if self.watches_intent else torch.zeros_like(now)
        r, u = (now - self.origin) * on, intended * on
        moved = now - self.start
        first = self.start[[place.start for place in self.places]][self.owner]
        columns = [on, on & (now == self.start), on & (now == self.last), on & (moved > 0), on & (moved < 0)]
        columns += [on * moved**2, self.start**2, r * u, u**2, r**2 * u**2, r * u**3, u**4, (u / self.ulp) ** 2]
        columns += [(u < 0) & on & (moved != 0), self.start != first]
        table = torch.stack([column.double() if now.device.type != "mps" else column.float() for column in columns], 1)
        sums = table.new_zeros(len(self.tensors), table.shape[1]).index_add_(0, self.owner, table)
        self.last = now
        return sums

    def readings(self, sums: list[list[float]]) -> list[Reading]:
        return [reading(t, row) for t, row in zip(self.tensors, sums, strict=True)]


def reading(t: Tracked, row: list[float]) -> Reading:
    touched, unchanged, lately, up, down, moved, weight, ru, uu, rruu, ruuu, uuuu, ulps, meant_down, varied = row
    known = t.intended_known
    return Reading(
        name=t.name,
        kind=t.kind,
        group=t.group_name,
        dtype=t.param.dtype,
        shape=tuple(t.param.shape),
        n_elements=len(t.index),
        n_touched=int(touched),
        unchanged=int(unchanged),
        unchanged_lately=int(lately),
        up=int(up),
        down=int(down),
        meant_down=int(meant_down),
        moved_square=moved,
        weight_square=weight,
        realised_intended=ru if known else None,
        intended_square=uu if known else None,
        moments=(rruu, ruuu, uuuu),
        ulps_square=ulps,
        grad_norm=t.grad_norm,
        with_gradient=t.with_gradient,
        zero_gradient=t.zero_gradient,
        no_gradient=t.no_gradient,
        constant=varied == 0,
    )
