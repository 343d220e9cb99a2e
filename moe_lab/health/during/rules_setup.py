"""Rules about who is updated at all: optimizers, frozen parts, and who is decayed. They are asked at the start, too."""

from __future__ import annotations

from collections import Counter
from functools import partial

from .rule import Rule, by_kind
from .state import State
from .tracking import Tracked

ON_PURPOSE = 0.5  # share of the parameters from which on frozen ones look like an adapter's base


def outside(state: State) -> dict[str, list[Tracked]]:
    trainable = [t for t in state.tracked if t.owner is None and t.param.requires_grad]
    return by_kind(t for t in trainable if t.name not in state.frozen_on_purpose)


def updated_twice(state: State) -> dict[str, list[Tracked]]:
    n_owners = Counter(id(p) for group in state.groups for p in group.group["params"])
    return {t.name: [t] for t in state.tracked if n_owners[id(t.param)] > 1}


def frozen_module(state: State, on_purpose: bool) -> dict[str, dict]:
    """Frozen tensors by name, none if their share of the parameters looks meant and `on_purpose` is not, or the reverse."""
    frozen = {name: p for name, p in state.model.named_parameters() if not p.requires_grad}
    share = sum(p.numel() for p in frozen.values()) / state.n_parameters
    if (share > ON_PURPOSE) != on_purpose:
        return {}
    known = state.frozen_on_purpose | {t.name for t in state.tracked}  # an optimizer may train copies
    return {name: {"value": share, "limit": ON_PURPOSE} for name in frozen if name not in known}


def not_frozen(state: State) -> dict[str, list[Tracked]]:
    trained = [t for t in state.tracked if t.owner and t.param.requires_grad]
    return by_kind(t for t in trained if t.name in state.frozen_on_purpose)


def decayed_vectors(state: State) -> dict[str, list[Tracked]]:
    return by_kind(t for t in state.tracked if t.group.get("weight_decay") and t.param.ndim <= 1)


FROZEN = "{n} tensors have requires_grad=False ({value:.0%} of the parameters is frozen): {names}"
UNFREEZE = "name them in expect_frozen if that is meant; else set requires_grad=True before the optimizer is built"

RULES = (
    Rule(
        "not_in_optimizer",
        "error",
        outside,
        "{n} trainable tensors ({share:.0%} of the parameters) are in no optimizer: {names}",
        "add them to a parameter group, or set requires_grad=False and name them in expect_frozen",
    ),
    Rule(
        "updated_twice",
        "error",
        updated_twice,
        "{names} is in two optimizers and moves twice a step",
        "take it out of one of them",
    ),
    Rule(
        "frozen_module",
        "warning",
        partial(frozen_module, on_purpose=False),
        FROZEN,
        UNFREEZE,
    ),
    Rule(
        "frozen_module",
        "info",
        partial(frozen_module, on_purpose=True),
        FROZEN + ", as under adapters",
        UNFREEZE,
    ),
    Rule(
        "not_frozen",
        "warning",
        not_frozen,
        "{n} tensors are in expect_frozen, and yet they require gradients and are in an optimizer: {names}",
        "set requires_grad=False, or take them out of expect_frozen",
    ),
    Rule(
        "weight_decay_on_norms",
        "info",
        decayed_vectors,
        "vectors (norm weights, biases) decay towards 0: {names}",
        "give them a group with weight_decay=0",
        limit=None,
    ),
)
