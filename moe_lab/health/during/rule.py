"""What a rule is: something to look for, and the words for it."""

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from ..findings import RULES, Finding, grouped, several
from .state import State
from .tracking import Tracked

# what is ill (kinds of tensors, groups, "loss") → its tensors, or facts by name
Ill = Mapping[str, list[Tracked] | Mapping[str, Any]]


class Rule(NamedTuple):
    """One thing that can be wrong with a training; a finding is made of what it did not name before at this severity or a
    higher one.

    `message` and `advice` may use {names} of the tensors, or else of what is ill, {n}, how many, their {share} of the
    parameters, {updates} seen, and the first one's facts; those may also set the finding's `where`, `value` and `limit`, and
    a lower severity.
    """

    id: str  # of findings.RULES
    severity: str
    when: Callable[[State], Ill]
    message: str = "{message}"  # of facts that are a finding's
    advice: str = "{advice}"

    def severity_of(self, facts: list[Tracked] | Mapping[str, Any]) -> str:
        return self.severity if isinstance(facts, list) else facts.get("severity", self.severity)

    def finding(self, state: State, ill: Ill) -> Finding:
        tensors = [t for facts in ill.values() if isinstance(facts, list) for t in facts]
        facts = {"value": len(tensors), "limit": 0} if tensors else next(iter(ill.values()))
        words = {
            "n": len(tensors or ill),
            "each": ", ".join(fact["told"] for fact in ill.values() if isinstance(fact, Mapping) and "told" in fact),
            "names": several([t.name for t in tensors] or list(ill)),
            "share": sum(t.param.numel() for t in tensors) / state.n_parameters,
            "updates": state.n_seen,
            **facts,
        }
        where = words.get("where", words["names"])
        told = self.message.format(**words), self.advice.format(**words), facts.get("value"), facts.get("limit")
        return Finding(self.id, self.severity_of(facts), where, *told, state.step)


def rule(message: str, advice: str, *, severity: str = "") -> Callable[[Callable[[State], Ill]], Rule]:
    """Makes the Rule that has the decorated function's name and asks it; of the table's severity, unless it says another."""
    return lambda when: Rule(when.__name__, severity or RULES[when.__name__][0], when, message, advice)


def found_in(state: State, name: str) -> Ill:
    """What was found under this rule in the batches and in the graphs that were heard."""
    found = [*state.forward.heard.found, *state.outside.reached.found]
    return {f.where: f.to_dict() for f in found if f.rule == name}


def by_kind(tensors: Iterable[Tracked]) -> dict[str, list[Tracked]]:
    return grouped(tensors, attrgetter("kind"))
