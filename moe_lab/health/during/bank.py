"""Sampled elements of many tensors, kept flat on their device, so that a reading is a few operations and one transfer."""

# Shapes: S sampled elements of all tensors of one device, M tensors.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..findings import grouped
from ..measures import Reading, Sums, ulp
from ..sampling import elements, plain, sample_positions, tensor_kind

WIDE = (torch.float64, torch.complex128)
SUMS = [field.name for field in fields(Sums)]


class Tracked:
    """One watched tensor: who it is, who updates it, and what was counted without looking at its values."""

    def __init__(self, name: str, param: Tensor, optimizer: Optimizer | None, group_number: int, group_name: str):
        self.name, self.param, self.optimizer = name, param, optimizer
        self.group_number, self.group_name = group_number, group_name
        self.kind = tensor_kind(name)
        values = plain(param)
        self.index = sample_positions(values.shape).to(values.device)
        self.is_narrow = param.dtype.itemsize < 4  # 16 bits or less
        self.grad_norm = 0.0
        self.with_gradient = self.zero_gradient = self.no_gradient = 0
        self.finite = True
        self.sparse = False
        self.intended_known = False
        self.steps: list = []  # what its measured steps were like: `Step`s
        self.bank: Bank | None = None  # where its sample is
        self.is_outside_model = False  # a master copy: its gradient is made by whoever copies
        self.age = int(self.state.get("step", 0))  # updates with gradient

    @property
    def group(self) -> dict:
        """The optimizer's own group: looked up, since load_state_dict puts others in their place."""
        return {} if self.optimizer is None else self.optimizer.param_groups[self.group_number]

    @property
    def state(self) -> dict:
        return {} if self.optimizer is None else self.optimizer.state.get(self.param, {})

    @property
    def device(self) -> torch.device:
        return self.index.device

    def sample(self, tensor: Tensor) -> Tensor:
        """The sampled elements of the parameter, its gradient, or a state of its shape."""
        return elements(plain(tensor), self.index)

    def state_dtypes(self) -> tuple[torch.dtype, ...]:
        """Number formats of what the optimizer keeps for each element: moments, masters, compensation."""
        kept = [v for v in self.state.values() if isinstance(v, Tensor) and v.ndim and v.shape == self.param.shape]
        return tuple(dict.fromkeys(v.dtype for v in kept))


class Bank:
    """The samples of all watched tensors of one device; float64 ones are in a bank of their own."""

    def __init__(self, tensors: Sequence[Tracked]):
        self.tensors = list(tensors)
        for t in tensors:
            t.bank = self
        self.device = tensors[0].device
        self.dtype = torch.float64 if tensors[0].param.dtype in WIDE else torch.float32
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
        kept = [*vars(self).values(), *(t.index for t in self.tensors)]
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))

    def restart_window(self) -> None:
        """Begin a new window of intended against realised displacement."""
        if self.watches_intent:
            self.origin = self.gather()
            self.intended.zero_()

    def sums(self) -> Tensor:
        """(M, one column per field of Sums) on the device."""
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
        columns = Sums(
            n_touched=on,
            unchanged=on & (now == self.start),
            unchanged_lately=on & (now == self.last),
            up=on & (moved > 0),
            down=on & (moved < 0),
            meant_down=(u < 0) & on & (moved != 0),
            moved_square=on * moved**2,
            weight_square=start**2,
            realised_intended=r * u,
            intended_square=u**2,
            moments_rruu=r**2 * u**2,
            moments_ruuu=r * u**3,
            moments_uuuu=u**4,
            ulps_square=ulps**2,
            n_varied=self.start != self.start[self.firsts][self.owner],
        )
        self.last = now
        table = torch.stack([getattr(columns, name).to(wide) for name in SUMS], 1)
        return table.new_zeros(len(self.tensors), table.shape[1]).index_add_(0, self.owner, table)

    def read(self) -> list[Reading]:
        """What is known of each tensor now; the one transfer from the device."""
        return [reading(t, row) for t, row in zip(self.tensors, self.sums().tolist(), strict=True)]


def banks_of(tensors: Sequence[Tracked]) -> list[Bank]:
    """A bank for each device and width."""
    return [Bank(mine) for mine in grouped(tensors, lambda t: (t.device, t.param.dtype in WIDE)).values()]


def reading(t: Tracked, row: Sequence[float]) -> Reading:
    """The sums of a tensor with what is known of it otherwise."""
    sums = dict(zip(SUMS, row, strict=True))
    if not t.intended_known:
        sums |= {"realised_intended": None, "intended_square": None}
    counted = ("name", "kind", "grad_norm", "with_gradient", "zero_gradient", "no_gradient")
    return Reading(
        group=t.group_name,
        dtype=t.param.dtype,
        state_dtypes=t.state_dtypes(),
        shape=tuple(t.param.shape),
        n_elements=len(t.index),
        **{key: getattr(t, key) for key in counted},
        **sums,
    )
