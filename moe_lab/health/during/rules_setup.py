"""Rules about who is updated at all: optimizers, frozen parts, and who is decayed. They are asked at the start, too."""

from collections import Counter
from functools import partial

from torch import Tensor, nn

from ..before import structure
from ..before.preflight import plan_of
from ..measures import is_decay_rates
from .forward import unwrapped
from .rule import Ill, Rule, by_kind, found_in, rule
from .state import State
from .tracking import storage

JUST_LOADED = 20  # updates after which, at the latest, a loaded state is looked at
THAWED = 2  # looks at gradients, five updates apart: a loop may add the group a little later
THAWED_BY = 50  # updates: a part that an optimizer holds, and that is to be thawed, usually is by then
ON_PURPOSE = 0.5  # share of the parameters from which on frozen ones look like an adapter's base


@rule(
    "{n} trainable tensors ({share:.2%} of the parameters) are in no optimizer: {names}",
    "add them to a parameter group, or set requires_grad=False and name them in expect_frozen",
)
def not_in_optimizer(state: State) -> Ill:
    """A copy that the model keeps of itself is meant, unless gradients reach it. Tensors that were replaced are another matter."""
    present = set(map(id, state.named.values()))
    trainable = [t for t in state.tracked if t.owner is None and t.param.requires_grad and id(t.param) in present]
    trainable += filter(state.is_passed_by, state.tracked)
    trainable = [t for t in trainable if t.name not in state.copied or t.with_gradient]
    thawed = [t for t in trainable if t.is_late and t.with_gradient >= THAWED]  # frozen on purpose no longer
    return by_kind(t for t in trainable if t in thawed or t.name not in state.frozen_on_purpose)


@rule(
    "{names} is in the optimizers twice and moves twice a step",
    "take it out of one of them; to tie weights, assign the parameter itself and not its .data",
)
def updated_twice(state: State) -> Ill:
    """By storage: two parameters may lie in the same memory, each with gradients and an optimizer's state of its own."""
    n_owners = Counter(storage(p) for group in state.groups for p in group.group["params"])
    return {t.name: [t] for t in state.tracked if n_owners[storage(t.param)] > 1}


@rule(
    "{n} tensors have requires_grad=False ({value:.0%} of the parameters is frozen{meant}): {names}",
    "name them in expect_frozen if that is meant; else set requires_grad=True before the optimizer is built",
)
def frozen_module(state: State) -> Ill:
    """Frozen tensors by name: an info where their share of the parameters, or what they are, looks meant; and while what an optimizer
    holds may yet be thawed. Gradients may be made by hand."""
    held = {t.name for t in state.tracked if t.owner and not t.param.requires_grad and not t.with_gradient}
    if not state.is_changed and not held:
        return {}
    found = {name: p for name, p in state.named.items() if not p.requires_grad and name not in state.copied}
    if not found:
        return {}
    share = sum(p.numel() for p in found.values()) / state.n_parameters
    is_meant = share > ON_PURPOSE or usually_frozen(state, found).issuperset(map(id, found.values()))
    # a vector by itself is what a module keeps for itself, as experts' biases; whoever freezes by accident freezes matrices, too
    is_module = any(p.numel() > max(p.shape, default=1) for name, p in found.items() if name in held)
    may_thaw = set() if is_module and state.n_seen >= THAWED_BY else held
    told = {
        "value": share,
        "limit": ON_PURPOSE,
        "meant": ", as under adapters, of fixed tables or a target network" if is_meant else "",
    }
    known = state.frozen_on_purpose | ({t.name for t in state.tracked} - held)  # an optimizer may train copies
    unknown = [name for name in found if name not in known]
    return {name: told | ({"severity": "info"} if is_meant or name in may_thaw else {}) for name in unknown}


def usually_frozen(state: State, found: dict[str, Tensor]) -> set[int]:
    """Of all, by id: tables, what is added to every row of a batch, the head, and a module that looks like the one that trains, as a
    target network does."""
    usual = [m.weight for m in state.modules.values() if isinstance(m, nn.Embedding)]
    usual += [p for p in found.values() if p.ndim > 2 and len(p) == 1]
    usual += (state.forward.heard.head or nn.Identity()).parameters()
    trained = {id(t.param) for t in state.tracked if t.owner and t.param.requires_grad}
    parts = structure.trained_parts(state.model, trained)
    usual += [p for m in structure.lookalikes(parts, state.modules.values(), trained) for p in m.parameters()]
    return set(map(id, usual))


@rule(
    "vectors (norm weights, biases) or a state space's decay rates decay towards 0: {names}",
    "give them a group with weight_decay=0",
)
def weight_decay_on_norms(state: State) -> Ill:
    decayed = [t for t in state.tracked if t.group.get("weight_decay")]
    rates = [t for t in decayed if t.param.ndim == 2 and not state.n_seen and is_decay_rates(t.param)]
    return by_kind([*(t for t in decayed if t.param.ndim <= 1), *rates])


def broken_tie(state: State) -> Ill:
    model = unwrapped(state.model)
    found = structure.broken_tie(model, plan_of(model)) if state.is_changed else None
    return {found.where: found.to_dict()} if found else {}


def named_in_vain(state: State) -> Ill:
    found = None if state.n_seen else structure.named_in_vain(unwrapped(state.model), plan_of(state.model))
    return {found.where: found.to_dict()} if found else {}


def unusable_state(state: State) -> Ill:
    """At the start, and right after a state was loaded: later on it would only say again what gradients and the loss say."""
    loaded_at = [g.loaded_at for g in state.groups if g.loaded_at >= 0]
    is_new = bool(loaded_at) and state.n_seen - max(loaded_at) <= JUST_LOADED
    is_due = not state.n_seen or (is_new and all(t.finite for t in state.tracked))
    finding = structure.unusable_state(state.optimizers, {id(p): n for n, p in state.named.items()}) if is_due else None
    return {finding.message: finding.to_dict()} if finding else {}


RULES = (
    not_in_optimizer,
    Rule("not_in_optimizer", "error", partial(found_in, name="not_in_optimizer")),
    updated_twice,
    Rule("frozen_module", "warning", named_in_vain),
    frozen_module,
    Rule("broken_tie", "warning", broken_tie),
    Rule("nonfinite_values", "error", unusable_state),
    weight_decay_on_norms,
)
