"""Rules about what becomes of the updates: lost to rounding, without a gradient, or never seen to move anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..findings import several
from ..measures import Reading, Share, share_of
from . import intended
from .bank import Tracked
from .state import GroupState, Rule, State, by_kind, of_tensors
from .steps import kind_of

LOST_ERROR, LOST_WARNING = 0.5, 0.95  # ρ, realised over intended displacement
LOST_UPDATES = 20  # updates before ρ is judged
LOST_ULPS = 1.0, 0.5  # intended displacement, in ULPs of the weight, from which on it is an error, a warning
SIGMAS = 3.0  # standard errors that a reading must be past its limit
FROZEN_READINGS = 5  # readings with a gradient, 5 updates apart
FROZEN_ULPS = 4.0  # expected travel of a tensor that is called frozen
FROZEN_SHARE = 0.1  # of the sum of steps that a tensor is expected to travel: signs that alternate undo most of it
BIAS = 0.3  # share of moved elements that fell, above the share that was meant to
BIAS_ELEMENTS = 30  # moved elements before the bias is judged
WAIT = 15  # updates before a missing gradient is judged: zero-initialised and adapter matrices start with exact zeros
WAIT_READINGS = 3  # readings of the gradients until then, 5 updates apart
UNREPLAYED = 50  # updates before 16-bit weights under an unknown optimizer are judged


class Lost(NamedTuple):
    share: Share
    readings: list[Reading]
    n_sick: int  # kinds of tensor, also those that were told before
    n_kinds: int


def lost_updates(state: State, limit: float, ulps: float) -> dict[str, Lost]:
    """16-bit weights: realised against intended displacement, kind by kind, the worst first."""
    if state.window < LOST_UPDATES:
        return {}
    kinds = by_kind([r for r in state.readings if r.intended_square and r.dtype.itemsize < 4])
    shares = {kind: share_of(mine) for kind, mine in kinds.items()}
    sick = {k: s for k, s in shares.items() if s.rho + SIGMAS * s.error < limit and s.intended_ulps >= ulps}
    worst_first = sorted(sick, key=lambda kind: sick[kind].rho)
    return {kind: Lost(sick[kind], kinds[kind], len(sick), len(kinds)) for kind in worst_first}


def partly_lost(state: State) -> dict[str, Lost]:
    """None where an error says what the warning would, or what is missing may be carried on to later updates."""
    carrying = {id(g.optimizer) for g in state.groups if intended.keeps_lost_bits(g.optimizer)}
    carried = {t.kind for t in state.tracked if id(t.optimizer) in carrying}
    lost = {} if badly_lost(state) else lost_updates(state, LOST_WARNING, LOST_ULPS[1])
    return {kind: what for kind, what in lost.items() if kind not in carried}


def badly_lost(state: State) -> dict[str, Lost]:
    return lost_updates(state, LOST_ERROR, LOST_ULPS[0])


def tell_lost(limit: float, state: State, ill: Mapping[str, Lost]) -> tuple:
    worst, (share, readings, n_sick, n_kinds) = next(iter(ill.items()))
    still = sum(r.unchanged for r in readings) / max(1, sum(r.n_touched for r in readings))
    dtype = str(readings[0].dtype).removeprefix("torch.")
    message = (
        f"{dtype} rounds updates away: {worst} realised {share.rho:.0%} (± {share.error:.0%}) of the displacement "
    )
    message += f"its optimizer intended over {state.window} updates, {still:.0%} of its elements never moved; "
    message += f"{n_sick} of {n_kinds} kinds of tensor are below {limit:g}"
    advice = "keep the parameters in float32 and compute under autocast; or use an optimizer with fp32 masters, Kahan "
    return several(list(ill)), message, advice + "summation or stochastic rounding", share.rho, limit


def no_gradient(state: State, *answers: bool | None) -> dict[str, list[Tracked]]:
    """Trainable tensors without any gradient of which `forward.matters` gives one of these answers.

    That repeats a forward pass, once a kind for the whole training: no other rule computes anything.
    """
    if state.n_seen <= WAIT:
        return {}
    never = [t for t in state.tracked if t.optimizer is not None and t.param.requires_grad and not t.with_gradient]
    never = [t for t in never if t.no_gradient + t.zero_gradient >= WAIT_READINGS]
    never = [t for t in never if t.name not in state.frozen_on_purpose and not t.is_outside_model]
    return {kind: ts for kind, ts in by_kind(never).items() if state.forward.matters(ts[0].param) in answers}


def cut_off(state: State) -> dict[str, list[Tracked]]:
    return no_gradient(state, True)


tell_cut_off = partial(
    of_tensors,
    "{n} tensors shape the output but got no gradient in {updates} updates: {names}",
    "learning is cut off there: look for detach(), no_grad, item() or an argmax between them and the loss",
)


def idle(state: State) -> dict[str, list[Tracked]]:
    return {} if cut_off(state) else no_gradient(state, False, None)


def tell_idle(state: State, ill: Mapping[str, list[Tracked]]) -> tuple:
    known = all(state.forward.matters(ts[0].param) is False for ts in ill.values())
    what = "do not change the output" if known else "have no gradient"
    message = f"{{n}} trainable tensors {what} and got no gradient in {{updates}} updates: {{names}}"
    return of_tensors(
        message, "take them out of the model or the optimizer, or find out why nothing uses them", state, ill
    )


def sparse_gradient(state: State) -> dict[str, list[Tracked]]:
    return by_kind([t for t in state.tracked if t.sparse])


tell_sparse = partial(
    of_tensors,
    "sparse gradients: {names}; its lost updates are not measured",
    "nothing to do; set sparse=False for a while to have it measured",
    limit=None,
)


def bf16_parameters(state: State) -> dict[str, list[Tracked]]:
    """16-bit weights under an optimizer whose step was not replayed: judged by what moved at all, and only a warning."""
    if state.n_seen < UNREPLAYED:
        return {}
    replayed = {id(t.optimizer) for t in state.tracked if t.intended_known}
    unknown = [(t, r) for t, r in state.read if t.is_narrow and t.optimizer and id(t.optimizer) not in replayed]
    stuck = [t for t, r in unknown if r.n_touched and r.unchanged == r.n_touched]
    return by_kind([t for t in stuck if not intended.keeps_lost_bits(t.optimizer)])


def tell_bf16_parameters(state: State, ill: Mapping[str, list[Tracked]]) -> tuple:
    stuck, names = [t for mine in ill.values() for t in mine], several(sorted(ill))
    classes = " and ".join(dict.fromkeys(type(t.optimizer).__name__ for t in stuck))
    message = f"16-bit parameters under {classes}, whose intended steps are not known: no sampled "
    message += f"element of {names} has moved in {state.n_seen} updates"
    advice = "keep the parameters in float32, or make sure that this optimizer keeps what rounding loses"
    return names, message, advice, len(stuck), 0


def frozen_tensor(state: State) -> dict[str, list[Tracked]]:
    """Tensors with gradients and a learning rate of which nothing has moved although their travel would show."""
    groups = {id(group.group): group for group in state.groups}
    stuck = [(t, r) for t, r in state.read if t.with_gradient >= FROZEN_READINGS and r.unchanged == r.n_touched > 0]
    stuck = [(t, r) for t, r in stuck if not (r.intended_square and t.is_narrow)]  # lost_updates measures those
    stuck = [(t, r) for t, r in stuck if id(t.group) in groups and not intended.keeps_lost_bits(t.optimizer)]
    members = {id(t.group): [other for other in state.tracked if other.group is t.group] for t, _ in stuck}
    ulps = [(t, expected_ulps(t, r, groups[id(t.group)], members[id(t.group)])) for t, r in stuck]
    return by_kind([t for t, expected in ulps if expected >= FROZEN_ULPS])


tell_frozen = partial(
    of_tensors,
    "{n} tensors have gradients and a learning rate, and no sampled element has moved: {names}",
    "the optimizer may hold another object than the model uses, or something writes the old values back",
)


def expected_ulps(t: Tracked, r: Reading, group: GroupState, members: Sequence[Tracked]) -> float:
    """How far an element should have travelled, in ULPs of a typical weight, by the sum of learning rates; 0: not known."""
    kind, _ = kind_of(members)
    weight = math.sqrt(r.weight_square / r.n_elements)
    spacing = max(weight, torch.finfo(r.dtype).tiny) * torch.finfo(r.dtype).eps
    if kind in ("adam", "sign"):
        step = 1.0
    elif kind == "orthogonal":
        step = 1 / math.sqrt(max(r.shape[-2:]))
    elif kind == "linear":
        step = r.grad_norm / math.sqrt(t.param.numel())
    else:
        return 0.0
    return FROZEN_SHARE * group.total * step / spacing


def direction_bias(state: State) -> dict[str, float]:
    """16-bit weights next to a power of two: the spacing differs on both sides, and one direction survives rounding."""
    narrow = [r for r in state.readings if r.dtype.itemsize < 4 and r.intended_square and r.constant]
    found = {}
    for kind, mine in by_kind(narrow).items():
        moved = sum(r.up + r.down for r in mine)
        if moved < BIAS_ELEMENTS:
            continue
        bias = (sum(r.down for r in mine) - sum(r.meant_down for r in mine)) / moved
        if abs(bias) - SIGMAS * 0.5 / math.sqrt(moved) > BIAS:
            found[kind] = bias
    return found


def tell_direction_bias(state: State, ill: Mapping[str, float]) -> tuple:
    kind = max(ill, key=lambda kind: abs(ill[kind]))
    way = "down" if ill[kind] > 0 else "up"
    message = f"{kind}: {abs(ill[kind]):.0%} more of the moved elements went {way} than were meant to: "
    where = several([kind, *(ill.keys() - {kind})])
    return where, message + "the other way is rounded off", "keep these weights in float32", ill[kind], BIAS


RULES = (
    Rule("lost_updates", "error", badly_lost, partial(tell_lost, LOST_ERROR)),
    Rule("lost_updates", "warning", partly_lost, partial(tell_lost, LOST_WARNING)),
    Rule("no_gradient", "error", cut_off, tell_cut_off),
    Rule("no_gradient", "warning", idle, tell_idle),
    Rule("frozen_tensor", "error", frozen_tensor, tell_frozen),
    Rule("bf16_parameters", "warning", bf16_parameters, tell_bf16_parameters),
)
DIRECTION_BIAS = Rule("direction_bias", "warning", direction_bias, tell_direction_bias)
SPARSE_GRADIENT = Rule("sparse_gradient", "info", sparse_gradient, tell_sparse)
