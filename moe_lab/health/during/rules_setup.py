"""Rules about who is updated at all: optimizers, frozen parts, and who is decayed. They are asked at the start, too."""

from __future__ import annotations

from collections import Counter
from functools import partial

from .rule import Ill, Rule, by_kind, rule
from .state import State

ON_PURPOSE = 0.5  # share of the parameters from which on frozen ones look like an adapter's base


@rule(
    "error",
    "{n} trainable tensors ({share:.0%} of the parameters) are in no optimizer: {names}",
    "add them to a parameter group, or set requires_grad=False and name them in expect_frozen",
)
def not_in_optimizer(state: State) -> Ill:
    trainable = [t for t in state.tracked if t.owner is None and t.param.requires_grad]
    return by_kind(t for t in trainable if t.name not in state.frozen_on_purpose)


@rule("error", "{names} is in two optimizers and moves twice a step", "take it out of one of them")
def updated_twice(state: State) -> Ill:
    n_owners = Counter(id(p) for group in state.groups for p in group.group["params"])
    return {t.name: [t] for t in state.tracked if n_owners[id(t.param)] > 1}


def frozen(state: State, on_purpose: bool) -> Ill:
    """Frozen tensors by name, none if their share of the parameters looks meant and `on_purpose` is not, or the reverse."""
    found = {name: p for name, p in state.model.named_parameters() if not p.requires_grad}
    share = sum(p.numel() for p in found.values()) / state.n_parameters
    if (share > ON_PURPOSE) != on_purpose:
        return {}
    known = state.frozen_on_purpose | {t.name for t in state.tracked}  # an optimizer may train copies
    return {name: {"value": share, "limit": ON_PURPOSE} for name in found if name not in known}


@rule(
    "info",
    "vectors (norm weights, biases) decay towards 0: {names}",
    "give them a group with weight_decay=0",
)
def weight_decay_on_norms(state: State) -> Ill:
    return by_kind(t for t in state.tracked if t.group.get("weight_decay") and t.param.ndim <= 1)


FROZEN = "{n} tensors have requires_grad=False ({value:.0%} of the parameters is frozen): {names}"
UNFREEZE = "name them in expect_frozen if that is meant; else set requires_grad=True before the optimizer is built"

RULES = (
    not_in_optimizer,
    updated_twice,
    Rule("frozen_module", "warning", partial(frozen, on_purpose=False), FROZEN, UNFREEZE),
    Rule("frozen_module", "info", partial(frozen, on_purpose=True), FROZEN + ", as under adapters", UNFREEZE),
    weight_decay_on_norms,
)
