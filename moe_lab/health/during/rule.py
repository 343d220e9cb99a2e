"""What a rule is: when it speaks, of what, and what it says then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..findings import Finding, several
from .bank import Tracked
from .state import State, n_parameters


class Told(NamedTuple):
    """A finding without what the rule and the moment give."""

    where: str
    message: str
    advice: str
    value: float | str | None = None
    limit: float | str | None = None


class Rule(NamedTuple):
    """One thing that can be wrong with a training.

    `when(state)` maps what is ill (kinds of tensors, groups, "loss") to what is known of it; `tell(state, ill)` puts that into
    words. It is told only of what this rule did not name before at this severity or a higher one.
    """

    id: str  # of findings.RULES
    severity: str
    when: Callable[[State], Mapping[str, Any]]
    tell: Callable[[State, Mapping[str, Any]], Told]
    static: bool = False  # needs no update: asked when the watch begins, too
    once: bool = False  # has nothing to add once it has spoken

    def finding(self, state: State, ill: Mapping[str, Any]) -> Finding:
        return Finding(rule=self.id, severity=self.severity, step=state.step, **self.tell(state, ill)._asdict())


def by_kind(tensors: Sequence[Tracked]) -> dict[str, list[Tracked]]:
    kinds: dict[str, list[Tracked]] = {}
    for t in tensors:
        kinds.setdefault(t.kind, []).append(t)
    return kinds


def of_tensors(
    message: str, advice: str, value: str | None = "n", limit: float | None = 0
) -> Callable[[State, Mapping[str, Sequence[Tracked]]], Told]:
    """Words about tensors by kind; `message` may use {n}, {names}, {share} of the parameters and {updates} seen."""

    def tell(state: State, ill: Mapping[str, Sequence[Tracked]]) -> Told:
        tensors = [t for kind in ill.values() for t in kind]
        facts = {"n": len(tensors), "names": several([t.name for t in tensors]), "updates": state.n_seen}
        facts["share"] = sum(t.param.numel() for t in tensors) / n_parameters(state)
        return Told(facts["names"], message.format(**facts), advice, facts.get(value), limit)

    return tell


def already_told(judge: Callable[[State], Any], rule: str) -> tuple[Callable, Callable]:
    """`when` and `tell` of a rule that makes its findings elsewhere, by the groups that they are about."""

    def when(state: State) -> dict[str, Finding]:
        found = [finding for finding in judge(state) if finding.rule == rule]
        return {group: finding for finding in found for group in finding.where.split(", ")}

    def tell(state: State, ill: Mapping[str, Finding]) -> Told:
        finding = next(iter(ill.values()))
        return Told(finding.where, finding.message, finding.advice, finding.value, finding.limit)

    return when, tell
