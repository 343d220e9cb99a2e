"""Rules about who is updated at all: optimizers, frozen parts, broken gradients, and who is decayed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ..findings import several
from .bank import Tracked
from .state import Rule, State, by_kind, n_parameters, of_tensors

ON_PURPOSE = 0.5  # share of the parameters from which on frozen ones look like an adapter's base


def outside(state: State) -> dict[str, list[Tracked]]:
    return by_kind([t for t in state.tracked if t.name in state.outside and t.name not in state.frozen_on_purpose])


tell_outside = partial(
    of_tensors,
    "{n} trainable tensors ({share:.0%} of the parameters) are in no optimizer: {names}",
    "add them to a parameter group, or set requires_grad=False and name them in expect_frozen",
)


def updated_twice(state: State) -> dict[str, str]:
    """Tensors that a second group holds, by name."""
    names = {id(t.param): t.name for t in state.tracked}
    seen, twice = set(), {}
    for group in state.groups:
        for p in group.group["params"]:
            if id(p) in seen:
                twice[names.get(id(p), f"a tensor of shape {tuple(p.shape)} in {group.name}")] = group.name
            seen.add(id(p))
    return twice


def tell_twice(state: State, twice: Mapping[str, str]) -> tuple:
    names = several(list(twice))
    message = f"{names} is in two optimizers and moves twice a step"
    return names, message, "take it out of one of them", len(twice), 0


def frozen_share(state: State) -> float:
    frozen = [p for p in state.model.parameters() if not p.requires_grad]
    return sum(p.numel() for p in frozen) / n_parameters(state)


def frozen_module(state: State, on_purpose: bool) -> dict[str, Tensor]:
    """Frozen tensors by name, none if their share of the parameters looks meant and `on_purpose` is not, or the reverse."""
    if (frozen_share(state) > ON_PURPOSE) != on_purpose:
        return {}
    masters = {t.name for t in state.tracked}  # a model whose optimizer trains copies
    known = state.frozen_on_purpose | masters
    return {name: p for name, p in state.model.named_parameters() if not p.requires_grad and name not in known}


def tell_frozen(state: State, frozen: Mapping[str, Tensor]) -> tuple:
    names, share = several(list(frozen)), frozen_share(state)
    message = f"{len(frozen)} tensors have requires_grad=False ({share:.0%} of the parameters is frozen): {names}"
    message += ", as under adapters" if share > ON_PURPOSE else ""
    advice = "name them in expect_frozen if that is meant; else set requires_grad=True before the optimizer is built"
    return names, message, advice, share, ON_PURPOSE


def not_frozen(state: State) -> dict[str, list[Tracked]]:
    declared = [t for t in state.tracked if t.name in state.frozen_on_purpose]
    return by_kind([t for t in declared if t.param.requires_grad and t.optimizer])


tell_not_frozen = partial(
    of_tensors,
    "{n} tensors are in expect_frozen, and yet they require gradients and are in an optimizer: {names}",
    "set requires_grad=False, or take them out of expect_frozen",
)


def decayed_vectors(state: State) -> dict[str, list[Tracked]]:
    return by_kind([t for t in state.tracked if t.group.get("weight_decay") and t.param.ndim <= 1])


tell_decayed = partial(
    of_tensors,
    "vectors (norm weights, biases) decay towards 0: {names}",
    "give them a group with weight_decay=0",
    limit=None,
)


def nonfinite_gradient(state: State) -> dict[str, list[Tracked]]:
    return by_kind([t for t in state.tracked if not t.finite])


tell_nonfinite = partial(
    of_tensors,
    "a gradient was NaN or infinite: {names}",
    "stop, go back to the last sound checkpoint, and lower the learning rate or look for a log or division of 0",
)

RULES = (
    Rule("not_in_optimizer", "error", outside, tell_outside, static=True),
    Rule("updated_twice", "error", updated_twice, tell_twice, static=True),
    Rule("frozen_module", "warning", partial(frozen_module, on_purpose=False), tell_frozen, static=True),
    Rule("frozen_module", "info", partial(frozen_module, on_purpose=True), tell_frozen, static=True),
    Rule("not_frozen", "warning", not_frozen, tell_not_frozen, static=True),
    Rule("weight_decay_on_norms", "info", decayed_vectors, tell_decayed, static=True),
    Rule("nonfinite_gradient", "error", nonfinite_gradient, tell_nonfinite),
)
