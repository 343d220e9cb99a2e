"""Rules about learning rates: what they are held against, and how far they can carry a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..conventions import Group, judge
from ..findings import Finding
from ..measures import adam_reach
from . import intended
from .bank import Tracked
from .state import LR_STEADY, State, n_parameters

UNBOUNDED = ("NAdam", "RAdam")  # their steps are not Adam's m̂/sqrt(v̂)


def learning_rates(state: State) -> Iterator[Finding]:
    """Peak LRs against what such models are trained with; low ones only once they stopped rising, and in a fresh model."""
    matrices: dict[int, list[Tracked]] = {}
    for t in state.tracked:
        matrices.setdefault(id(t.group), []).append(t)
    groups, steady = [], True
    for group in state.groups:
        kind = intended.kind_of(group.optimizer)
        members = matrices.get(id(group.group), [])
        if kind not in ("adam", "muon") or not members or not group.lrs:
            continue
        shape = max(members, key=lambda t: t.param.numel()).param.shape
        convention = group.group.get("adjust_lr") or group.group.get("adjust_lr_fn") or "original"
        steady &= group.is_steady
        planned = float(group.group.get("initial_lr") or 0.0)
        peak = max(group.peak, planned) if group.is_steady else group.peak
        shape = tuple(shape) if len(shape) > 1 else (1, 1)
        groups.append(Group(group.name, kind, peak, shape, convention))
    if state.forward.vocab_size is None or not groups:
        return  # the table is of language models
    for finding in judge(groups, n_parameters(state)):
        hot = finding.rule == "lr_too_high" or (finding.rule == "muon_convention" and finding.value > 1)
        if hot or (steady and state.is_fresh):
            yield replace(finding, step=state.step)


def reach(state: State) -> Iterator[Finding]:
    """How far a weight can get within the budget, at the LRs seen so far and the last one from there on."""
    if state.budget is None or state.step < LR_STEADY:
        return
    for group in state.groups:
        bounded = intended.kind_of(group.optimizer) == "adam" and type(group.optimizer).__name__ not in UNBOUNDED
        if not bounded or not group.lrs:
            continue
        lrs = [*group.lrs, *[group.peak] * max(0, state.budget - len(group.lrs))][: min(state.budget, 100_000)]
        most = adam_reach(lrs, group.group.get("betas", (0.9, 0.999)))
        yield state.finding(
            "reach",
            "info",
            group.name,
            f"within {state.budget} updates no weight of {group.name} can move by more than {most:.2g}, whatever its gradients",
            "compare it with the movement you expect before you call a weight frozen or slow",
            value=most,
        )
        return
