"""What a rule is: when it speaks, of what, and what it says then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..findings import Finding, found, several
from .bank import Tracked
from .state import State, n_parameters


class Rule(NamedTuple):
    """One thing that can be wrong with a training.

    `when(state)` maps what is ill (kinds of tensors, groups, "loss") to what is known of it; `tell(state, ill)` puts that into
    words: where, message, advice, and the value and the limit, if there are. It is told only of what this rule did not name
    before at this severity or a higher one.
    """

    id: str  # of findings.RULES
    severity: str
    when: Callable[[State], Mapping[str, Any]]
    tell: Callable[[State, Mapping[str, Any]], tuple]
    static: bool = False  # needs no update: asked when the watch begins, too

    def finding(self, state: State, ill: Mapping[str, Any]) -> Finding:
        return found(self.id, self.severity, *self.tell(state, ill), step=state.step)


def of_tensors(
    message: str, advice: str, state: State, ill: Mapping[str, Sequence[Tracked]], limit: float | None = 0
) -> tuple:
    """Words about tensors by kind; `message` may use {n}, {names}, {share} of the parameters and {updates} seen."""
    tensors = [t for kind in ill.values() for t in kind]
    n, names = len(tensors), several([t.name for t in tensors])
    share = sum(t.param.numel() for t in tensors) / n_parameters(state)
    return names, message.format(n=n, names=names, share=share, updates=state.n_seen), advice, n, limit
