"""Rules about gradients that do not arrive: cut off, gone silent, of no effect."""

from functools import partial

from .rule import Ill, Rule, by_kind
from .rules_updates import cleared_gradients
from .state import State
from .tracking import Tracked

WAIT = 15  # updates before a missing gradient is judged: zero-initialised and adapter matrices start with exact zeros
SILENT = 50  # updates without a gradient, after some with one
WAIT_READINGS = 3  # readings of the gradients until then, 5 updates apart


def no_gradient(state: State, matters: bool) -> Ill:
    """Trainable tensors without any gradient, of which a change is seen in the output (`forward.matters`), or is not.

    That repeats a forward pass, once a kind for the whole training: no other rule computes anything.
    """
    if state.n_seen <= WAIT or cleared_gradients.when(state):
        return {}
    never = [t for t in state.tracked if t.owner and t.param.requires_grad and not t.with_gradient]
    never = [t for t in never if t.no_gradient + t.zero_gradient >= WAIT_READINGS]
    never = [t for t in never if t.name not in state.frozen_on_purpose and not t.is_master and not cancels(state, t)]
    never = [t for t in never if not state.is_passed_by(t)]
    return {kind: ts for kind, ts in by_kind(never).items() if bool(state.forward.matters(ts[0].param)) == matters}


def went_silent(state: State, frozen: bool) -> Ill:
    """Kinds of tensor that were trained and no longer are, while others go on: an expert or a layer that is left out is no kind, and
    experts that no token chooses are another rule's."""
    mine = [t for t in state.tracked if t.owner and t.name not in state.frozen_on_purpose and not t.is_master]
    routed = tuple(f"{experts.name}." for experts in state.outside.routing.experts)
    mine = [t for t in mine if not t.name.startswith(routed) and t.param.numel() > 1]  # a temperature may be clamped
    since = {t: state.counts[id(t.optimizer)] - t.last_gradient for t in mine if t.last_gradient}
    kinds = by_kind(mine)
    gone = {kind: ts for kind, ts in kinds.items() if all(since.get(t, 0) >= SILENT for t in ts)}
    gone = {kind: ts for kind, ts in gone.items() if any(t.param.requires_grad for t in ts) != frozen}
    found = {kind: {"value": max(t.last_gradient for t in ts), "limit": SILENT} for kind, ts in gone.items()}
    return found if len(found) < len(kinds) else {}


def nothing_learns(state: State) -> Ill:
    """All trainable tensors, where none of them has a say in the output either, as behind a clamp."""
    silent, trained = no_gradient(state, matters=False), [t for t in state.tracked if t.owner and t.param.requires_grad]
    return silent if sum(map(len, silent.values())) == len(trained) else {}


def cancels(state: State, t: Tracked) -> bool:
    """Whether a bias has a gradient of exactly 0 where its module's other tensors get another: nothing is cut off there, and what
    it adds cancels in the loss, as in a difference of two scores."""
    beside = [o for o in state.tracked if o.name.rpartition(".")[0] == t.name.rpartition(".")[0]]
    return t.name.endswith("bias") and t.zero_gradient > 0 and any(o.with_gradient for o in beside)


def idle(state: State, used: bool) -> Ill:
    """Without a gradient where nothing is cut off: what is behind a cut has none either. What no pass takes, or takes in vain, is a
    part of the class that this use of it has no need of; two factors that are both zero have a say together."""
    is_told = no_gradient(state, matters=True) or nothing_learns(state)
    idle = {} if is_told else no_gradient(state, matters=False)
    together, forward = [t.param for ts in idle.values() for t in ts], state.forward
    if together and forward.matters(*together) is False:
        forward.unused |= forward.told & set(together)
    return {kind: ts for kind, ts in idle.items() if (ts[0].param not in forward.unused) == used}


def deaf(state: State) -> Ill:
    """Where all that takes a part of the batch as it came has no effect, and no table stands for tokens beside it: whatever the
    model is given, it says the same."""
    takers = {p for module in state.forward.raw for p in module.parameters(recurse=False)}
    if not takers or state.forward.table is not None:
        return {}
    found = idle(state, used=False)
    return found if takers <= state.forward.unused else {}


CUT_OFF = "{n} tensors shape the output but got no gradient in {updates} updates: {names}"
FIND_CUT = (
    "learning is cut off there: an autograd.Function whose backward returns None for them, reentrant checkpointing under frozen "
    "inputs (use_reentrant=False, or enable_input_require_grads), a choice (argmax, top-k) whose score never multiplies the "
    "output, detach(), no_grad or item() between them and the loss"
)
STOPPED = "{n} kinds of tensor were trained, and got no gradient after update {value}: {names}"
FIND_STOPPED = (
    "something cuts them off mid-run: units that died (a rate too high), a branch or a phase that no longer takes them, a graph that a "
    "change of the model left behind"
)
FROZEN_SINCE = "{n} kinds of tensor were trained, and have requires_grad=False after update {value}: {names}"
THAW = "set it back after the step of the other network, or after loading; name in expect_frozen what is frozen mid-run on purpose"
NOTHING = "none of the {n} trainable tensors got a gradient other than 0 in {updates} updates: {names}"
FIND_STOP = (
    "nothing learns: between all of them and the loss stands a clamp, a saturated or rounding function, a mask over everything, "
    "or factors that are both zero; or all targets, rewards or weights of the loss are the same"
)
IDLE = "{n} trainable tensors got no gradient in {updates} updates, and no effect of theirs on the output was seen: {names}"
UNUSED = "{n} trainable tensors got no gradient in {updates} updates, and whatever they hold, the output is the same: {names}"
USE = "find out whether the loss should use them (a head, a term, a branch that is never taken), else leave them out"
DEAF = "no layer that takes the batch has an effect on the output, {n} tensors without a gradient among them: {names}"
HEAR = "what the model says does not depend on what it is given: look at which axis is the batch, which place is read out, and at masks"

RULES = (
    Rule("no_gradient", "error", partial(no_gradient, matters=True), CUT_OFF, FIND_CUT),
    Rule("no_gradient", "error", nothing_learns, NOTHING, FIND_STOP),
    Rule("no_gradient", "warning", partial(went_silent, frozen=False), STOPPED, FIND_STOPPED),
    Rule("frozen_module", "warning", partial(went_silent, frozen=True), FROZEN_SINCE, THAW),
    Rule("no_gradient", "warning", partial(idle, used=True), IDLE, USE),
    Rule("no_gradient", "warning", deaf, DEAF, HEAR),
    Rule("no_gradient", "info", partial(idle, used=False), UNUSED, USE),
)
