"""Rules about learning rates: what steps of their size usually are, and how far they can get."""

from __future__ import annotations

from functools import partial

from ..conventions import Group, convention_of, judge
from ..measures import adam_reach
from . import intended
from .rule import Rule
from .state import State
from .steps import kind_of, matrix_shape
from .tracking import LR_STEADY, GroupState

# findings that ask how far weights move: without one of them, how far they can is noise
ABOUT_MOVEMENT = {
    "lost_updates",
    "bf16_parameters",
    "frozen_tensor",
    "lr_too_low",
    "muon_convention",
    "loss_not_falling",
}


def measured_group(state: State, group: GroupState) -> Group | None:
    """A group as it is judged: by the kind of its steps, and not by its optimizer's name. None where no table is for it."""
    kind, seen = kind_of([t for t in state.tracked if t.owner is group])
    if kind not in ("adam", "sign", "orthogonal") or not group.lrs:
        return None
    planned = float(group.group.get("initial_lr") or 0.0)
    lr = max(group.peak, planned) if group.is_steady else group.peak
    if kind == "adam":  # its number is what the table is about, whatever the RMS is by now
        return Group(group.name, "adam", lr)
    largest, step = max(seen, key=lambda pair: pair[0].param.numel())
    if kind == "sign":
        return Group(group.name, "adam", lr, rms=step.rms)
    declared = group.group.get("adjust_lr") or group.group.get("adjust_lr_fn")
    convention = convention_of([(matrix_shape(t.param.shape), step.rms) for t, step in seen], declared)
    rms = None if convention else step.rms
    return Group(group.name, "muon", lr, matrix_shape(largest.param.shape), convention or "its own", rms)


def learning_rates(state: State, rule: str) -> dict[str, dict]:
    """Peak LRs against what such models are trained with; low ones only once they stopped rising, and in a fresh model.
    What is found under this rule, by the groups that it is about."""
    if not state.forward.is_language_model:
        return {}  # the table is of language models
    judged = {group: known for group in state.groups if (known := measured_group(state, group))}
    if not judged:
        return {}
    low_too = state.is_fresh and all(group.is_steady for group in judged)
    ill = {}
    for finding in judge(judged.values(), state.n_parameters):
        hot = finding.rule == "lr_too_high" or (finding.rule == "muon_convention" and finding.value > 1)
        if finding.rule == rule and (hot or low_too):
            ill |= dict.fromkeys(finding.where.split(", "), finding.to_dict())
    return ill


def reach(state: State) -> dict[str, dict]:
    """How far a weight can get within the budget, at the LRs seen so far and the last one from there on: the smallest reach
    of the groups. Only beside a finding about movement."""
    if state.budget is None or state.n_seen < LR_STEADY or not ABOUT_MOVEMENT & {f.rule for f in state.findings}:
        return {}
    found = []
    for group in state.groups:
        if group.lrs and intended.is_adam(group.optimizer, group.group):
            lrs = [*group.lrs, *[group.peak] * max(0, state.budget - len(group.lrs))][: min(state.budget, 100_000)]
            found.append((adam_reach(lrs, group.group["betas"]), group.name))
    if not found:
        return {}
    most, name = min(found)
    return {"the smallest": {"value": most, "where": name, "budget": state.budget}}


RULES = [
    Rule(rule, "warning", partial(learning_rates, rule=rule), "{message}", "{advice}")
    for rule in ("muon_convention", "lr_too_low", "lr_too_high")
]
REACH = Rule(
    "reach",
    "info",
    reach,
    "within {budget} updates no weight of {where} can move by more than {value:.2g}, whatever its gradients",
    "compare it with the movement you expect before you call a weight frozen or slow",
)
