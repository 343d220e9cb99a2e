"""Rules about who is updated at all: optimizers, frozen parts, gradients that never come."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ..findings import several
from .bank import Tracked
from .rule import Rule, Told, by_kind, of_tensors
from .state import State, n_parameters

WAIT = 15  # updates before a missing gradient is judged: zero-initialised and adapter matrices start with exact zeros
WAIT_READINGS = 3  # readings of the gradients until then, 5 updates apart
ON_PURPOSE = 0.5  # share of the parameters from which on frozen ones look like an adapter's base


def outside(state: State) -> dict[str, list[Tracked]]:
    return by_kind([t for t in state.tracked if t.name in state.outside and t.name not in state.frozen_on_purpose])


def updated_twice(state: State) -> dict[str, str]:
    """Tensors that a second group holds, by name."""
    seen: dict[int, str] = {}
    twice = {}
    names = {id(t.param): t.name for t in state.tracked}
    for group in state.groups:
        for p in group.group["params"]:
            if id(p) in seen:
                name = names.get(id(p), f"a tensor of shape {tuple(p.shape)} in {group.name}")
                twice[name] = group.name
            seen[id(p)] = group.name
    return twice


def tell_twice(state: State, twice: Mapping[str, str]) -> Told:
    names = several(list(twice))
    message = f"{names} is in two optimizers and moves twice a step"
    return Told(names, message, "take it out of one of them", len(twice), 0)


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


def tell_frozen(state: State, frozen: Mapping[str, Tensor]) -> Told:
    names, share = several(list(frozen)), frozen_share(state)
    return Told(
        names,
        f"{len(frozen)} tensors have requires_grad=False ({share:.0%} of the parameters is frozen): {names}"
        + (", as under adapters" if share > ON_PURPOSE else ""),
        "name them in expect_frozen if that is meant; else set requires_grad=True before the optimizer is built",
        share,
        ON_PURPOSE,
    )


def not_frozen(state: State) -> dict[str, list[Tracked]]:
    declared = [t for t in state.tracked if t.name in state.frozen_on_purpose]
    return by_kind([t for t in declared if t.param.requires_grad and t.optimizer])


def nonfinite_gradient(state: State) -> dict[str, list[Tracked]]:
    return by_kind([t for t in state.tracked if not t.finite])


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


def idle(state: State) -> dict[str, list[Tracked]]:
    return {} if no_gradient(state, True) else no_gradient(state, False, None)


def tell_idle(state: State, ill: Mapping[str, list[Tracked]]) -> Told:
    known = all(state.forward.matters(ts[0].param) is False for ts in ill.values())
    what = "do not change the output" if known else "have no gradient"
    return of_tensors(
        f"{{n}} trainable tensors {what} and got no gradient in {{updates}} updates: {{names}}",
        "take them out of the model or the optimizer, or find out why nothing uses them",
    )(state, ill)


def sparse_gradient(state: State) -> dict[str, list[Tracked]]:
    return by_kind([t for t in state.tracked if t.sparse])


NOT_IN_OPTIMIZER = Rule(
    "not_in_optimizer",
    "error",
    outside,
    of_tensors(
        "{n} trainable tensors ({share:.0%} of the parameters) are in no optimizer: {names}",
        "add them to a parameter group, or set requires_grad=False and name them in expect_frozen",
    ),
    static=True,
)
UPDATED_TWICE = Rule("updated_twice", "error", updated_twice, tell_twice, static=True)
FROZEN_MODULE = Rule("frozen_module", "warning", partial(frozen_module, on_purpose=False), tell_frozen, static=True)
FROZEN_BASE = Rule("frozen_module", "info", partial(frozen_module, on_purpose=True), tell_frozen, static=True)
NOT_FROZEN = Rule(
    "not_frozen",
    "warning",
    not_frozen,
    of_tensors(
        "{n} tensors are in expect_frozen, and yet they require gradients and are in an optimizer: {names}",
        "set requires_grad=False, or take them out of expect_frozen",
    ),
    static=True,
)
NONFINITE_GRADIENT = Rule(
    "nonfinite_gradient",
    "error",
    nonfinite_gradient,
    of_tensors(
        "a gradient was NaN or infinite: {names}",
        "stop, go back to the last sound checkpoint, and lower the learning rate or look for a log or division of 0",
    ),
)
CUT_OFF = Rule(
    "no_gradient",
    "error",
    lambda state: no_gradient(state, True),
    of_tensors(
        "{n} tensors shape the output but got no gradient in {updates} updates: {names}",
        "learning is cut off there: look for detach(), no_grad, item() or an argmax between them and the loss",
    ),
)
IDLE = Rule("no_gradient", "warning", idle, tell_idle)
SPARSE_GRADIENT = Rule(
    "sparse_gradient",
    "info",
    sparse_gradient,
    of_tensors(
        "sparse gradients: {names}; its lost updates are not measured",
        "nothing to do; set sparse=False for a while to have it measured",
        value=None,
        limit=None,
    ),
)
