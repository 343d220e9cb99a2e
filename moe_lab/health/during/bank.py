"""Sampled elements of many tensors, kept flat on their device, so that a reading is a few operations and one transfer."""

# Shapes: S sampled elements of all tensors of one device, M tensors.

import math
import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..findings import grouped
from ..measures import ulp
from ..sampling import Waiting, plain
from ..torch_private import norms
from .tracking import Tracked

KEPT = 8  # norms of all gradients
ROWS, SAME_ROWS = 4, 1e-3  # of a matrix at least; of the largest number: rounding
MOST_BIASES = 64  # in which dead units are looked for
DARK_IN = 30  # updates without a gradient that make an element dark
SOME = 8  # weights of a unit that are looked at beside its bias
WIDE = (torch.float64, torch.complex128)


class Bank:
    """The samples of all watched tensors of one device; float64 ones are in a bank of their own."""

    def __init__(self, tensors: Sequence[Tracked]):
        self.tensors = list(tensors)
        for t in tensors:
            t.bank = weakref.ref(self)
        self.device = tensors[0].index.device
        self.dtype = torch.float64 if tensors[0].param.dtype in WIDE else torch.float32
        sizes = [t.n_elements for t in tensors]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.places = {id(t): slice(end - n, end) for t, n, end in zip(tensors, sizes, ends, strict=True)}
        self.firsts = torch.tensor([end - n for n, end in zip(sizes, ends, strict=True)], device=self.device)
        self.owner = torch.repeat_interleave(torch.tensor(sizes)).to(self.device, torch.int32)
        self.start = self.gather()  # (S,)
        self.last = self.start.clone()
        self.read_at: int | None = None
        self.touched = torch.zeros_like(self.start, dtype=torch.bool)
        # what had a gradient from that update on: of some biases alone
        self.lit, self.lit_from = self.touched.clone(), -1
        self.biases = set([id(t) for t in tensors if t.param.ndim == 1 and t.name.endswith("bias")][:MOST_BIASES])
        named = {t.name: t for t in tensors}
        # a bias's gradient may cancel where its unit's weights have one
        self.weights = {id(t): named.get(f"{t.name[:-4]}weight") for t in tensors if id(t) in self.biases}
        self.watches_intent = any(t.is_narrow for t in tensors)
        if self.watches_intent:
            self.origin = self.start.clone()
            self.intended = torch.zeros_like(self.start)
            self.ulp = torch.cat([ulp(self.start[self.places[id(t)]], t.param.dtype) for t in tensors])

    def gather(self) -> Tensor:
        return torch.cat([t.sample(t.param).to(self.dtype) for t in self.tensors])

    def touch(self, tensors: Sequence[Tracked]) -> None:
        """Mark the sampled elements of these tensors of the bank that have a gradient now."""
        for t in (t for t in tensors if t.n_touched < t.n_elements or id(t) in self.biases):  # as of the last reading
            has = t.sample(t.param.grad) != 0
            self.touched[self.places[id(t)]] |= has
            beside = self.weights.get(id(t))
            rows = None if beside is None or beside.param.grad is None else plain(beside.param.grad)
            if rows is not None and not rows.is_sparse and rows.ndim > 1 and len(rows) == t.param.numel():
                has = has | rows.flatten(1)[t.index, :SOME].any(1)
            self.lit[self.places[id(t)]] |= has

    def intend(self, t: Tracked, moved: Tensor) -> None:
        self.intended[self.places[id(t)]] += moved
        t.intended_known = True

    def restart_window(self) -> None:
        if self.watches_intent:
            self.origin = self.gather()
            self.intended.zero_()

    def sums(self) -> tuple[list[str], Tensor]:
        """Their names, and (M, a column for each). r: realised, u: intended displacement, of touched elements alone: those whose
        gradient has been non-zero at least once (an embedding's row counts from its first gradient on)."""
        now = self.gather()
        on = self.touched
        # fourth powers of small steps leave float32's range
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        start, moved = self.start.to(wide), now.to(wide) - self.start
        columns = {
            "n_touched": on,
            "unchanged": on & (now == self.start),  # since the watch began
            "unchanged_lately": on & (now == self.last),  # … the last reading
            "down": on & (moved < 0),
            "moved_square": on * moved**2,
            "weight_square": start**2,  # of all
            "touched_square": on * start**2,
            "along": on * start * moved,
            "n_lit": self.lit,
            "n_varied": self.start != self.start[self.firsts][self.owner],  # of all: that differ from the first
        }
        if self.watches_intent:
            r, u = (now.to(wide) - self.origin) * on, self.intended.to(wide) * on
            columns |= {
                "meant_down": (u < 0) & on & (moved != 0),
                "realised_intended": r * u,  # of the window; None where the intended update is not known, as the next
                "intended_square": u**2,
                "moments_rruu": r**2 * u**2,  # with the next two for the standard error of ρ
                "moments_ruuu": r * u**3,
                "moments_uuuu": u**4,
                "ulps_square": (u / self.ulp) ** 2,
            }
        self.last = now
        table = torch.stack([column.to(wide) for column in columns.values()], 1)
        return list(columns), table.new_zeros(len(self.tensors), table.shape[1]).index_add_(0, self.owner, table)

    def read(self, step: int) -> None:
        """Leave the sums in their tensors, once a step: nothing has moved since. The one transfer from the device."""
        if self.read_at == step:
            return
        self.read_at = step
        names, table = self.sums()
        for t, row in zip(self.tensors, table.tolist(), strict=True):
            vars(t).update(zip(names, row, strict=True))
            if not t.intended_known:
                t.realised_intended = t.intended_square = None
        self.lit_from = step if self.lit_from < 0 else self.lit_from
        if step - self.lit_from >= DARK_IN:
            for t in self.tensors:
                t.dark = 1 - t.n_lit / t.n_elements if t.n_lit and id(t) in self.biases else 0.0
            self.lit.zero_()
            self.lit_from = step


def banks_of(tensors: Sequence[Tracked]) -> list[Bank]:
    return [Bank(mine) for mine in grouped(tensors, lambda t: (t.index.device, t.param.dtype in WIDE)).values()]


def alike_rows(p: Tensor, grad: Tensor) -> Tensor:
    """() bool, on their device: whether all rows of a matrix, its units, hold the same numbers and get the same gradients."""
    rows, steps = (plain(x).flatten(1) for x in (p, grad))
    near = (rows - rows[:1]).abs().amax() <= SAME_ROWS * rows.abs().amax()
    apart = (steps - steps[:1]).abs().amax() > SAME_ROWS * steps.abs().amax()
    return near & ~apart & steps.any() if len(rows) >= ROWS else rows.new_zeros((), dtype=torch.bool)


class Gradients:
    """Who has a gradient, how large, and which sampled elements."""

    def __init__(self, waiting: Waiting) -> None:
        self.waiting = waiting
        self.squares: dict[int, float] = {}  # by update, the squared norm of all of them

    def read(self, tensors: Sequence[Tracked], optimizer: Optimizer, n: int) -> None:
        dense = []
        for t in tensors:
            if t.param.grad is None:
                t.no_gradient += t.param.requires_grad
            elif t.param.grad.is_sparse:
                t.with_gradient, t.last_gradient = t.with_gradient + 1, n
            else:
                dense.append(t)
                if t.alike is None and t.bank().read_at is not None:  # they had some updates to differ in
                    t.alike = False
                    if t.constant and t.param.ndim > 1:
                        self.waiting.add(alike_rows(t.param, t.param.grad), partial(setattr, t, "alike"))
        # a fused optimizer under a loss scaler is handed scaled gradients, and skips its step if one is infinite
        scale, skipped = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        alike = grouped(dense, lambda t: (t.bank, t.param.grad.dtype.itemsize < 4))
        for (bank, narrow), here in alike.items():
            bank().touch(here)
            # the norm of a float16 gradient may be beyond float16
            sizes = norms([plain(t.param.grad) for t in here], torch.float32 if narrow else None)
            sizes = sizes if scale is None else sizes / scale.to(sizes.device)
            if skipped is not None:
                sizes = torch.cat([sizes, skipped.to(sizes).view(1)])
            self.waiting.add(sizes, partial(self.take, n, here))

    def take(self, n: int, tensors: Sequence[Tracked], sizes: Sequence[float]) -> None:
        """Norms at update n; after them, from a loss scaler, whether the step was skipped."""
        if len(sizes) > len(tensors) and sizes[-1]:
            return
        for t, norm in zip(tensors, sizes, strict=False):
            self.squares[n] = self.squares.get(n, 0.0) + norm**2
            t.finite &= math.isfinite(norm)
            t.grad_norm = max(t.grad_norm, norm if math.isfinite(norm) else 0.0)
            t.with_gradient += norm != 0
            t.zero_gradient += norm == 0
            t.last_gradient = n if norm else t.last_gradient
        self.squares = dict(list(self.squares.items())[-KEPT:])
