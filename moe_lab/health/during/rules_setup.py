"""Rules about who is updated at all: optimizers, frozen parts, gradients that never come."""

from __future__ import annotations

from collections.abc import Iterator

from ..findings import Finding
from .bank import Tracked
from .state import State, n_parameters, several, static

WAIT = 15  # updates before a missing gradient is judged: zero-initialised and adapter matrices start with exact zeros
WAIT_READINGS = 3  # readings of the gradients until then, 5 updates apart
ON_PURPOSE = 0.5  # share of the parameters from which on frozen ones look like an adapter's base


@static
def not_in_optimizer(state: State) -> Iterator[Finding]:
    names = [name for name in state.outside if name not in state.frozen_on_purpose]
    if names:
        share = sum(t.param.numel() for t in state.tracked if t.name in names) / n_parameters(state)
        yield state.finding(
            "not_in_optimizer",
            "error",
            several(names),
            f"{len(names)} trainable tensors ({share:.0%} of the parameters) are in no optimizer: {several(names)}",
            "add them to a parameter group, or set requires_grad=False and name them in expect_frozen",
            value=len(names),
            limit=0,
        )


@static
def updated_twice(state: State) -> Iterator[Finding]:
    seen: dict[int, str] = {}
    twice = []
    names = {id(t.param): t.name for t in state.tracked}
    for group in state.groups:
        for p in group.group["params"]:
            if id(p) in seen:
                twice.append(names.get(id(p), f"a tensor of shape {tuple(p.shape)} in {group.name}"))
            seen[id(p)] = group.name
    if twice:
        yield state.finding(
            "updated_twice",
            "error",
            several(twice),
            f"{several(twice)} is in two optimizers and moves twice a step",
            "take it out of one of them",
            value=len(twice),
            limit=0,
        )


@static
def frozen_module(state: State) -> Iterator[Finding]:
    frozen = [(name, p) for name, p in state.model.named_parameters() if not p.requires_grad]
    names = [name for name, _ in frozen if name not in state.frozen_on_purpose]
    masters = {t.name for t in state.tracked}  # a model whose optimizer trains copies
    names = [name for name in names if name not in masters]
    if not names:
        return
    share = sum(p.numel() for _, p in frozen) / n_parameters(state)
    on_purpose = share > ON_PURPOSE
    yield state.finding(
        "frozen_module",
        "info" if on_purpose else "warning",
        several(names),
        f"{len(names)} tensors have requires_grad=False ({share:.0%} of the parameters is frozen): {several(names)}"
        + (", as under adapters" if on_purpose else ""),
        "name them in expect_frozen if that is meant; else set requires_grad=True before the optimizer is built",
        value=share,
        limit=ON_PURPOSE,
    )


@static
def not_frozen(state: State) -> Iterator[Finding]:
    trained = [
        t.name for t in state.tracked if t.name in state.frozen_on_purpose and t.param.requires_grad and t.optimizer
    ]
    if trained:
        yield state.finding(
            "not_frozen",
            "warning",
            several(trained),
            f"{len(trained)} tensors are in expect_frozen, and yet they require gradients and are in an optimizer: "
            f"{several(trained)}",
            "set requires_grad=False, or take them out of expect_frozen",
            value=len(trained),
            limit=0,
        )


def nonfinite_gradient(state: State) -> Iterator[Finding]:
    names = [t.name for t in state.tracked if not t.finite]
    if names:
        yield state.finding(
            "nonfinite_gradient",
            "error",
            several(names),
            f"a gradient was NaN or infinite: {several(names)}",
            "stop, go back to the last sound checkpoint, and lower the learning rate or look for a log or division of 0",
            value=len(names),
            limit=0,
        )


def no_gradient(state: State) -> Iterator[Finding]:
    """Trainable tensors without any gradient. An error where the model's output depends on them."""
    if state.step <= WAIT:
        return
    never = [t for t in state.tracked if t.optimizer is not None and t.param.requires_grad and not t.with_gradient]
    never = [t for t in never if t.no_gradient + t.zero_gradient >= WAIT_READINGS]
    never = [t for t in never if t.name not in state.frozen_on_purpose and not t.is_outside_model]
    if not never:
        return
    kinds: dict[str, Tracked] = {}
    for t in never:
        kinds.setdefault(t.kind, t)
    matters = {kind: state.forward.matters(t.param) for kind, t in kinds.items()}
    cut = [t.name for t in never if matters[t.kind]]
    idle = [t.name for t in never if not matters[t.kind]]
    if cut:
        yield state.finding(
            "no_gradient",
            "error",
            several(cut),
            f"{len(cut)} tensors shape the output but got no gradient in {state.step} updates: {several(cut)}",
            "learning is cut off there: look for detach(), no_grad, item() or an argmax between them and the loss",
            value=len(cut),
            limit=0,
        )
    elif idle:
        told = "do not change the output" if all(matters[t.kind] is False for t in never) else "have no gradient"
        yield state.finding(
            "no_gradient",
            "warning",
            several(idle),
            f"{len(idle)} trainable tensors {told} and got no gradient in {state.step} updates: {several(idle)}",
            "take them out of the model or the optimizer, or find out why nothing uses them",
            value=len(idle),
            limit=0,
        )


def sparse_gradient(state: State) -> Iterator[Finding]:
    names = [t.name for t in state.tracked if t.sparse]
    if names:
        yield state.finding(
            "sparse_gradient",
            "info",
            several(names),
            f"sparse gradients: {several(names)}; its lost updates are not measured",
            "nothing to do; set sparse=False for a while to have it measured",
        )
