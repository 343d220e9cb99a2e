"""Rules about what becomes of the updates: lost to rounding, or never seen to move anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from ..findings import Finding
from ..measures import Reading, share_of
from . import intended
from .bank import Tracked
from .state import GroupState, State, kinds_of, several

LOST_ERROR, LOST_WARNING = 0.5, 0.95  # ρ, realised over intended displacement
LOST_UPDATES = 20  # updates before ρ is judged
LOST_ULPS = 1.0, 0.5  # intended displacement, in ULPs of the weight, from which on it is an error, a warning
SIGMAS = 3.0  # standard errors that a reading must be past its limit
FROZEN_READINGS = 5  # readings with a gradient, 5 updates apart
FROZEN_ULPS = 4.0  # expected travel of a tensor that is called frozen
BIAS = 0.3  # share of moved elements that fell, above the share that was meant to
UNREPLAYED = 50  # updates before 16-bit weights under an unknown optimizer are judged


def lost_updates(state: State) -> Iterator[Finding]:
    """16-bit weights: realised against intended displacement, kind by kind."""
    if state.window < LOST_UPDATES:
        return
    kinds: dict[str, list[Reading]] = {}
    for r in state.readings:
        if r.intended_square and r.dtype.itemsize < 4:
            kinds.setdefault(r.kind, []).append(r)
    shares = {kind: share_of(readings) for kind, readings in kinds.items()}
    errors, warnings = [], []
    for kind, share in shares.items():
        if share.rho + SIGMAS * share.error < LOST_ERROR and share.intended_ulps >= LOST_ULPS[0]:
            errors.append(kind)
        elif share.rho + SIGMAS * share.error < LOST_WARNING and share.intended_ulps >= LOST_ULPS[1]:
            warnings.append(kind)
    for severity, sick, limit in (("error", errors, LOST_ERROR), ("warning", warnings, LOST_WARNING)):
        if not sick:
            continue
        sick.sort(key=lambda kind: shares[kind].rho)
        worst, share = sick[0], shares[sick[0]]
        still = sum(r.unchanged for r in kinds[worst]) / max(1, sum(r.n_touched for r in kinds[worst]))
        dtype = str(kinds[worst][0].dtype).removeprefix("torch.")
        yield state.finding(
            "lost_updates",
            severity,
            several(sick),
            f"{dtype} rounds updates away: {worst} realised {share.rho:.0%} (± {share.error:.0%}) of the displacement "
            f"its optimizer intended over {state.window} updates, {still:.0%} of its elements never moved; "
            f"{len(sick)} of {len(shares)} kinds of tensor are below {limit:g}",
            "keep the parameters in float32 and compute under autocast; or use an optimizer with fp32 masters, Kahan "
            "summation or stochastic rounding",
            value=share.rho,
            limit=limit,
        )
        return  # the error says what the warning would


def bf16_parameters(state: State) -> Iterator[Finding]:
    """16-bit weights under an optimizer whose step was not replayed: judged by what moved at all, and only a warning."""
    if state.step < UNREPLAYED:
        return
    by_optimizer: dict[int, list[Reading]] = {}
    replayed = {id(t.optimizer) for t in state.tracked if t.intended_known}
    for t, r in zip(state.tracked, sorted_like(state.readings, state.tracked), strict=True):
        if t.optimizer is not None and t.is_narrow and id(t.optimizer) not in replayed:
            by_optimizer.setdefault(id(t.optimizer), []).append(r)
    for group in state.groups:
        mine = by_optimizer.pop(id(group.optimizer), [])
        stuck = [r.kind for r in mine if r.n_touched and r.unchanged == r.n_touched]
        if stuck and not intended.keeps_lost_bits(group.optimizer):
            yield state.finding(
                "bf16_parameters",
                "warning",
                several(sorted(set(stuck))),
                f"16-bit parameters under {type(group.optimizer).__name__}, whose intended steps are not known: no sampled "
                f"element of {several(sorted(set(stuck)))} has moved in {state.step} updates",
                "keep the parameters in float32, or make sure that this optimizer keeps what rounding loses",
                value=len(stuck),
                limit=0,
            )


def frozen_tensor(state: State) -> Iterator[Finding]:
    """A tensor with gradients and a learning rate of which nothing has moved although its travel would show."""
    steps = {id(group.group): group for group in state.groups}
    names = []
    for t, r in zip(state.tracked, sorted_like(state.readings, state.tracked), strict=True):
        group = steps.get(id(t.group))
        if group is None or r.n_touched == 0 or r.unchanged < r.n_touched or t.with_gradient < FROZEN_READINGS:
            continue
        if r.intended_square and r.dtype.itemsize < 4:
            continue  # lost_updates measures it
        if expected_ulps(t, r, group) >= FROZEN_ULPS and not intended.keeps_lost_bits(group.optimizer):
            names.append(t.name)
    if names:
        yield state.finding(
            "frozen_tensor",
            "error",
            several(names),
            f"{len(names)} tensors have gradients and a learning rate, and no sampled element has moved: {several(names)}",
            "the optimizer may hold another object than the model uses, or something writes the old values back",
            value=len(names),
            limit=0,
        )


def expected_ulps(t: Tracked, r: Reading, group: GroupState) -> float:
    """How far an element should have travelled, in ULPs of a typical weight, by the sum of learning rates; 0: not known."""
    kind = intended.kind_of(group.optimizer)
    total = group.total
    weight = math.sqrt(r.weight_square / r.n_elements)
    spacing = max(weight, torch.finfo(r.dtype).tiny) * torch.finfo(r.dtype).eps
    if kind == "adam":
        step = 0.1 * total  # signs that alternate undo most of it
    elif kind == "muon":
        step = 0.1 * total / math.sqrt(max(r.shape[-2:]))
    elif type(group.optimizer).__name__ == "SGD":
        step = 0.1 * total * r.grad_norm / math.sqrt(t.param.numel())
    else:
        return 0.0
    return step / spacing


def direction_bias(state: State) -> Iterator[Finding]:
    """16-bit weights next to a power of two: the spacing differs on both sides, and one direction survives rounding."""
    for kind, readings in kinds_of(state.readings).items():
        mine = [r for r in readings if r.dtype.itemsize < 4 and r.intended_square and r.constant]
        moved = sum(r.up + r.down for r in mine)
        if moved < 30:
            continue
        bias = (sum(r.down for r in mine) - sum(r.meant_down for r in mine)) / moved
        if abs(bias) - SIGMAS * 0.5 / math.sqrt(moved) > BIAS:
            way = "down" if bias > 0 else "up"
            yield state.finding(
                "direction_bias",
                "warning",
                kind,
                f"{kind}: {abs(bias):.0%} more of the moved elements went {way} than were meant to: the other way is rounded off",
                "keep these weights in float32",
                value=bias,
                limit=BIAS,
            )
            return


def sorted_like(readings: Sequence[Reading], tracked: Sequence[Tracked]) -> list[Reading]:
    by_name = {r.name: r for r in readings}
    return [by_name[t.name] for t in tracked]
