"""Sampled elements of many tensors, kept flat on their device, so that a reading is a few operations and one transfer."""

# Shapes: S sampled elements of all tensors of one device, M tensors.

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .measures import Reading, ulp

SAMPLE = 256  # elements of a tensor; a tensor of up to WHOLE elements is taken whole
WHOLE = 512
GOLDEN = 0.6180339887498949


def sample_index(n: int, device: torch.device) -> Tensor:
    """Flat positions of the sample, int64: all of a small tensor, else spread by the golden ratio, which no row length
    can fall into step with (evenly spaced ones may all hit one column)."""
    if n <= WHOLE:
        return torch.arange(n, device=device)
    return ((torch.arange(SAMPLE, dtype=torch.float64) * GOLDEN % 1) * n).long().to(device)


def plain(tensor: Tensor) -> Tensor:
    """The numbers behind a tensor, as a view: a sharded one's own part, a complex one's real and imaginary parts."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # DTensor
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Tracked:
    """One watched tensor: who it is, who updates it, and what was counted without looking at its values."""

    def __init__(self, name: str, param: Tensor, optimizer: Optimizer | None, group_number: int, group_name: str):
        self.name, self.param, self.optimizer = name, param, optimizer
        self.group_number, self.group_name = group_number, group_name
        self.kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        values = plain(param)
        self.index = sample_index(values.numel(), values.device)
        self.is_narrow = param.dtype.itemsize < 4  # 16 bits or less
        self.grad_norm = 0.0
        self.with_gradient = self.zero_gradient = self.no_gradient = 0
        self.finite = True
        self.sparse = False
        self.intended_known = False
        self.is_outside_model = False  # a master copy: its gradient is made by whoever copies
        self.age = (
            0 if optimizer is None else int(optimizer.state.get(param, {}).get("step", 0))
        )  # updates with gradient

    @property
    def group(self) -> dict:
        """The optimizer's own group: looked up, since load_state_dict puts others in their place."""
        return {} if self.optimizer is None else self.optimizer.param_groups[self.group_number]

    @property
    def device(self) -> torch.device:
        return self.index.device

    def sample(self, tensor: Tensor) -> Tensor:
        """The sampled elements of the parameter, its gradient, or a state of its shape."""
        return plain(tensor).take(self.index)


class Bank:
    """The samples of all watched tensors of one device; float64 ones are in a bank of their own."""

    def __init__(self, tensors: Sequence[Tracked]):
        self.tensors = list(tensors)
        self.device = tensors[0].device
        self.dtype = torch.float64 if tensors[0].param.dtype in (torch.float64, torch.complex128) else torch.float32
        sizes = [len(t.index) for t in tensors]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.places = {id(t): slice(end - n, end) for t, n, end in zip(tensors, sizes, ends, strict=True)}
        self.firsts = torch.tensor([end - n for n, end in zip(sizes, ends, strict=True)], device=self.device)
        self.owner = torch.repeat_interleave(torch.tensor(sizes)).to(self.device, torch.int32)
        self.start = self.gather()  # (S,)
        self.last = self.start.clone()
        self.touched = torch.zeros_like(self.start, dtype=torch.bool)
        self.watches_intent = any(t.is_narrow for t in tensors)
        if self.watches_intent:
            self.origin = self.start.clone()
            self.intended = torch.zeros_like(self.start)
            self.ulp = torch.cat([ulp(self.start[self.places[id(t)]], t.param.dtype) for t in tensors])

    def gather(self) -> Tensor:
        return torch.cat([t.sample(t.param).to(self.dtype) for t in self.tensors])

    def touch(self, tensors: Sequence[Tracked]) -> None:
        """Mark the sampled elements of these tensors of the bank that have a gradient now."""
        has = torch.cat([t.sample(t.param.grad) != 0 for t in tensors])
        if len(tensors) == len(self.tensors):
            self.touched |= has
            return
        for t, part in zip(tensors, has.split([len(t.index) for t in tensors]), strict=True):
            self.touched[self.places[id(t)]] |= part

    def intend(self, t: Tracked, moved: Tensor) -> None:
        """Add an intended step to those of the window."""
        self.intended[self.places[id(t)]] += moved
        t.intended_known = True

    def n_bytes(self) -> int:
        kept = [self.start, self.last, self.touched, self.owner, self.firsts, *[t.index for t in self.tensors]]
        kept += [self.origin, self.intended, self.ulp] if self.watches_intent else []
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
        # fourth powers of small steps leave float32's range
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        start, moved = self.start.to(wide), now.to(wide) - self.start
        if self.watches_intent:
            r, u = (now.to(wide) - self.origin) * on, self.intended.to(wide) * on
            ulps = u / self.ulp
        else:
            r = u = ulps = torch.zeros_like(moved)
        columns = [on, on & (now == self.start), on & (now == self.last), on & (moved > 0), on & (moved < 0)]
        columns += [on * moved**2, start**2, r * u, u**2, r**2 * u**2, r * u**3, u**4, ulps**2]
        columns += [(u < 0) & on & (moved != 0), self.start != self.start[self.firsts][self.owner]]
        table = torch.stack([column.to(wide) for column in columns], 1)
        sums = table.new_zeros(len(self.tensors), table.shape[1]).index_add_(0, self.owner, table)
        self.last = now
        return sums

    def readings(self, sums: list[list[float]]) -> list[Reading]:
        return [reading(t, row) for t, row in zip(self.tensors, sums, strict=True)]


def banks_of(tensors: Sequence[Tracked]) -> list[Bank]:
    """A bank for each device and width."""
    kept: dict[tuple, list[Tracked]] = {}
    for t in tensors:
        kept.setdefault((t.device, t.param.dtype in (torch.float64, torch.complex128)), []).append(t)
    return [Bank(mine) for mine in kept.values()]


def state_dtypes(t: Tracked) -> tuple[torch.dtype, ...]:
    """Number formats of what the optimizer keeps for each element: moments, masters, compensation."""
    state = {} if t.optimizer is None else t.optimizer.state.get(t.param, {})
    found = {v.dtype: None for v in state.values() if isinstance(v, Tensor) and v.ndim and v.shape == t.param.shape}
    return tuple(found)


def reading(t: Tracked, row: list[float]) -> Reading:
    touched, unchanged, lately, up, down, moved, weight, ru, uu, rruu, ruuu, uuuu, ulps, meant_down, varied = row
    known = t.intended_known
    return Reading(
        name=t.name,
        kind=t.kind,
        group=t.group_name,
        dtype=t.param.dtype,
        state_dtypes=state_dtypes(t),
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
