"""Rules about signals that are dead or faint, experts, and what lies outside of the optimizer."""

import math
from statistics import median

from .rule import Ill, by_kind, rule
from .state import State
from .tracking import Tracked

FAINT = 2.0**-23  # gradient over weight, beside the median kind's: float32 shows no more of it beside them
WAIT, WAIT_READINGS = 15, 3  # updates and readings before a gradient is called faint: adapters start with exact zeros
STARVED, STARVED_IN, STARVED_AT = 0.1, 50, 70  # of an even load, updates, and the first that it is judged at
COLLAPSED, COLLAPSED_IN = 0.9, 20  # share of the choices that fall on as many experts as a token chooses, and updates
# where it is told, and where it is an alarm: of healthy routers many choose alike from update 20 to 60, and come back by themselves
TOLD_AT, LAST_AT = 40, 80
LEAST = 100  # choices that an even load has in them, so that 10 % is no accident
CONSTANT, N_VALUES = 1e-5, 10  # spread over mean up to which float32's rounding explains it; values
SLOWED = 0.5  # as of lost updates
BALANCE = "is a balancing term in the loss with its gradient and weight, does the router learn, is a bias that balances updated?"
TWICE = 3  # updates in which a count was doubled


@rule(
    "matrices ({n}) with gradients of {size:.0e} of the others', relative to their weights: {names}",
    "look for a score, a branch or a loss term that is multiplied by next to nothing, or a softmax or sigmoid that is saturated",
)
def faint_gradient(state: State) -> Ill:
    """Matrices alone: a bias before a softmax or a norm has no gradient but rounding, and is well."""
    if state.n_seen <= WAIT:
        return {}
    seen = [t for t in state.readings if t.owner and t.param.ndim > 1 and t.with_gradient >= WAIT_READINGS]
    seen = [t for t in seen if t.weight_square]  # one that starts at zero has no size to hold it against
    size = {k: max(map(relative_gradient, mine)) for k, mine in by_kind(seen).items()}
    usual = median(size.values()) if len(size) > 2 else 0.0
    faint = {kind: value / usual for kind, value in size.items() if 0 < value < FAINT * usual}
    return {k: {"size": v, "value": v, "limit": FAINT} for k, v in sorted(faint.items(), key=lambda pair: pair[1])}


def relative_gradient(t: Tracked) -> float:
    return t.grad_norm / math.sqrt(t.weight_square / t.n_elements * t.param.numel())


def loads(state: State, updates: int, earliest: int) -> dict[str, tuple[list[int], int]]:
    """Of the last `updates`: how many choices fell on each expert of a module, and how many a token makes."""
    found = {}
    for experts in state.outside.routing.experts:
        last = experts.loads[-1].step
        looks = [look for look in experts.loads if look.step > last - updates]
        if last >= earliest and len({len(look.counts) for look in looks}) == 1:
            total = [sum(of) for of in zip(*(look.counts for look in looks), strict=True)]
            if sum(total) >= LEAST * len(total):
                found[experts.name] = total, looks[-1].n_choices
    return found


@rule(
    "{names}: the {k} busiest of its {of} experts take {value:.0%} of the tokens' choices after {updates} updates",
    BALANCE,
)
def collapsed_experts(state: State) -> Ill:
    """An alarm where it lasts, in most of the modules, as where a term, a sign or a bias that balances them all is at fault."""
    found, known = {}, loads(state, COLLAPSED_IN, TOLD_AT)
    for name, (total, k) in known.items():
        share = sum(sorted(total)[-k:]) / sum(total)
        if share > COLLAPSED and 2 * k <= len(total):
            found[name] = {"value": share, "limit": COLLAPSED, "k": k, "of": len(total)}
    lasts = bool(loads(state, COLLAPSED_IN, LAST_AT)) and 2 * len(found) > len(known)
    return {name: facts | {"severity": "warning" if lasts else "info"} for name, facts in found.items()}


@rule(
    "{value} of {of} experts of {names} get less than a tenth of an even load: {which}; they may come back, or never learn",
    BALANCE,
)
def starved_experts(state: State) -> Ill:
    found = {}
    for name, (total, _) in loads(state, STARVED_IN, STARVED_AT).items():
        if ill := [n for n, load in enumerate(total) if load * len(total) < STARVED * sum(total)]:
            found[name] = {"value": len(ill), "limit": 0, "of": len(total), "which": ill[:8]}
    return found


@rule(
    "{names} has a gradient behind it and is {value:.6g} in each of {looks} readings: as a term of the loss it teaches nothing",
    "an auxiliary loss may be summed over the wrong axis, normalised to a constant, or made of detached numbers",
)
def constant_term(state: State) -> Ill:
    found = {}
    for name, values in state.outside.terms.values.items():
        mean, spread = sum(values) / len(values), max(values) - min(values)
        if len(values) >= N_VALUES and spread <= CONSTANT * abs(mean) > 0:
            found[name] = {"value": mean, "limit": CONSTANT, "looks": len(values)}
    return found


@rule(
    "{names}: what the forward pass adds is added again when it is recomputed for the backward pass",
    "count under torch.is_grad_enabled() of the first pass alone, or outside of the checkpointed function; halve what reads it",
)
def counted_twice(state: State) -> Ill:
    twice = {name: sum(looks) for name, looks in state.outside.counts.doubled.items()}
    return {name: {"value": n, "limit": TWICE} for name, n in twice.items() if n >= TWICE}


@rule(
    "{where}: what lies near its weight comes nearer at {value:.0%} of the pace of what lies far: the format rounds it off",
    "keep an average of the weights, or a target network, in float32: 16 bits hold no decay beyond 0.99",
)
def stuck_copy(state: State) -> Ill:
    slowed = state.outside.copies.slowed()
    if slowed is None or slowed >= SLOWED:
        return {}
    names = [t.name for _, t in state.outside.copies.followed]
    return {"copies": {"value": slowed, "limit": SLOWED, "where": f"{len(names)} 16-bit copies that follow {names[0]}"}}


@rule(
    "{names}: positions in 16 bits run together (late ones are {value:.2g} rad off, or as many are the same as the one before)",
    "keep such buffers in float32 when the model is cast, and compute angles there; cast the cosines and sines",
)
def rough_positions(state: State) -> Ill:
    return {name: {"value": size, "limit": 0} for name, size in (state.outside.positions or {}).items()}


RULES = (faint_gradient, collapsed_experts, starved_experts, constant_term, counted_twice, stuck_copy, rough_positions)
