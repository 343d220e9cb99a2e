"""Rules about what becomes of the updates: lost to rounding, without a gradient, or never seen to move anything."""

import math
from functools import partial

import torch

from ..findings import grouped
from ..measures import share_of
from . import intended
from .events import LOOKS
from .rule import Ill, Rule, by_kind, rule
from .state import State
from .steps import kind_of, unmovable
from .tracking import Tracked

LOST_ERROR, LOST_WARNING = 0.5, 0.95  # ρ, realised over intended displacement
LOST_UPDATES = 20  # updates before ρ is judged
LOST_ULPS = 1.0, 0.5  # intended displacement, in ULPs of the weight, from which on it is an error, a warning
LOST_READINGS = 2  # with a gradient, 5 updates apart, before a tensor that can never move is named
SIGMAS = 3.0  # standard errors that a reading must be past its limit
FROZEN_READINGS = 5  # readings with a gradient, 5 updates apart
FROZEN_ULPS = 4.0  # expected travel of a tensor that is called frozen
FROZEN_SHARE = 0.1  # of the sum of steps that a tensor is expected to travel: signs that alternate undo most of it
BIAS = 0.3  # share of moved elements that fell, above the share that was meant to
BIAS_ELEMENTS = 30  # moved elements before the bias is judged
N_LOSSES = 50  # without an update: more than micro-batches are accumulated, if each were observed
MOST, OFTEN = 0.8, 0.2  # share of the last updates from which on an order of events is a habit, or no accident
UNREPLAYED = 50  # updates before 16-bit weights under an unknown optimizer are judged


@rule(
    "a gradient was NaN or infinite: {names}",
    "stop, go back to the last sound checkpoint, and lower the learning rate or look for a log or division of 0",
)
def nonfinite_gradient(state: State) -> Ill:
    return by_kind(t for t in state.tracked if not t.finite)


def lost_updates(state: State, limit: float, ulps: float) -> Ill:
    """16-bit weights: realised against intended displacement, kind by kind, vectors (norms) and the worst first. Where one kind
    proves that an optimizer loses what it intends, whatever else of it falls short is named with it."""
    window = state.step - state.window_start
    if window < LOST_UPDATES:
        return {}
    kinds = by_kind(t for t in state.readings if t.intended_square and t.is_narrow and not explained(t))
    shares = {kind: share_of(mine) for kind, mine in kinds.items()}
    low = {kind: share for kind, share in shares.items() if share.rho + SIGMAS * share.error < limit}
    still = {k: sum(t.unchanged for t in kinds[k]) / max(1, sum(t.n_touched for t in kinds[k])) for k in low}
    # of a kind that intends half an ULP and more, some elements would move by chance
    proven = [k for k, share in low.items() if share.intended_ulps >= (LOST_ULPS[1] if still[k] == 1 else ulps)]
    losing = {kinds[kind][0].optimizer for kind in proven}
    sick = [kind for kind in low if kinds[kind][0].optimizer in losing]
    sick.sort(key=lambda kind: (kinds[kind][0].param.ndim > 1, shares[kind].rho))
    common = {"limit": limit, "window": window, "n_sick": len(sick), "n_kinds": len(kinds)}
    return {
        kind: {
            "value": shares[kind].rho,
            "told": f"{kind} {shares[kind].rho:.0%} (± {shares[kind].error:.0%}; {still[kind]:.0%} of its elements never moved)",
            "dtype": str(kinds[kind][0].param.dtype).removeprefix("torch."),
            **common,
        }
        for kind in sick
    }


def explained(t: Tracked) -> bool:
    """Whether what a tensor lacks is its decay, which `lost_decay` names."""
    return t.owner is not None and t.owner.decays is False and intended.keeps_lost_bits(t.optimizer)


def never_moves(state: State) -> Ill:
    """16-bit weights that stand still and, by the bound on Adam's steps at the peak LR, always will: no window is waited for. The
    peak is known where a scheduler has kept it, or once the LR no longer rises."""
    still = [t for t in state.readings if t.is_narrow and t.owner and t.is_still and t.with_gradient >= LOST_READINGS]
    known = {t.owner: None for t in still if t.group.get("initial_lr") or t.owner.is_steady}
    stuck = {id(p) for group in known for p, _ in unmovable(group.optimizer, group.group)}
    return by_kind(t for t in still if id(t.param) in stuck)


badly_lost = partial(lost_updates, limit=LOST_ERROR, ulps=LOST_ULPS[0])


def partly_lost(state: State) -> Ill:
    """None where an error says what the warning would, or what is missing may be carried on to later updates."""
    lost = {} if badly_lost(state) else lost_updates(state, LOST_WARNING, LOST_ULPS[1])
    carrying = [o for o in state.optimizers if intended.keeps_lost_bits(o)]
    carried = {t.kind for t in state.tracked if t.optimizer in carrying}
    return {kind: facts for kind, facts in lost.items() if kind not in carried}


@rule(
    "{n} tensors have gradients and a learning rate, and no sampled element has moved: {names}",
    "the optimizer may hold another object than the model uses, something writes the old values back, or its step is a share of a"
    " weight that is 0 (LAMB, LARS)",
)
def frozen_tensor(state: State) -> Ill:
    stuck = [t for t in state.readings if t.owner and t.is_still and t.with_gradient >= FROZEN_READINGS]
    stuck = [t for t in stuck if not (t.intended_square and t.is_narrow)]  # lost_updates measures those
    stuck = [t for t in stuck if not intended.keeps_lost_bits(t.optimizer)]
    return by_kind(t for t in stuck if expected_ulps(state, t) >= FROZEN_ULPS)


def expected_ulps(state: State, t: Tracked) -> float:
    """How far an element should have travelled, in ULPs of a typical weight, by the sum of learning rates; 0: not known. From 0
    any step is far, whatever the optimizer: one that is relative to the weights never begins."""
    if not t.weight_square:
        return FROZEN_ULPS * bool(t.owner.total)
    kind, _ = kind_of([other for other in state.tracked if other.owner is t.owner])
    orthogonal, linear = 1 / math.sqrt(max(t.param.shape[-2:], default=1)), t.grad_norm / math.sqrt(t.param.numel())
    step = {"adam": 1.0, "sign": 1.0, "orthogonal": orthogonal, "linear": linear}
    numbers = torch.finfo(t.param.dtype)
    spacing = max(math.sqrt(t.weight_square / t.n_elements), numbers.tiny) * numbers.eps
    return FROZEN_SHARE * t.owner.total * step.get(kind, 0.0) / spacing


@rule(
    "16-bit parameters whose intended steps are not known: no sampled element of {names} moved in {updates} updates",
    "keep the parameters in float32, or make sure that this optimizer keeps what rounding loses",
    severity="warning",
)
def bf16_parameters(state: State) -> Ill:
    """16-bit weights under an optimizer whose step was not replayed: judged by what moved at all, and only a warning."""
    if state.n_seen < UNREPLAYED:
        return {}
    replayed = {t.optimizer for t in state.tracked if t.intended_known}
    unknown = [t for t in state.readings if t.is_narrow and t.owner and t.optimizer not in replayed]
    return by_kind(t for t in unknown if t.is_still and not intended.keeps_lost_bits(t.optimizer))


@rule(
    "{worst}: {size:.0%} more of the moved elements went {way} than were meant to: the other way is rounded off",
    "keep these weights in float32",
)
def direction_bias(state: State) -> Ill:
    """16-bit weights next to a power of two, the worst first: the spacing differs on both sides, and one direction survives
    rounding."""
    narrow = [t for t in state.readings if t.is_narrow and t.intended_square and t.constant]
    found = {}
    for kind, mine in by_kind(narrow).items():
        moved = sum(t.n_touched - t.unchanged for t in mine)
        if moved < BIAS_ELEMENTS:
            continue
        bias = sum(t.down - t.meant_down for t in mine) / moved
        if abs(bias) - SIGMAS * 0.5 / math.sqrt(moved) > BIAS:
            way = "down" if bias > 0 else "up"
            found[kind] = {"value": bias, "limit": BIAS, "worst": kind, "size": abs(bias), "way": way}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]["size"]))


@rule(
    "{value} {what} and not one update since",
    "a GradScaler that meets an infinite gradient skips every step; else the optimizer that steps is another one",
)
def no_updates(state: State) -> Ill:
    """Losses without an update; or an optimizer that backward passes reach and that does not step, while another does."""
    n = min(state.events.n_losses, state.events.n_observed - state.n_seen)
    if n >= N_LOSSES:
        return {"updates": {"value": n, "limit": N_LOSSES, "what": "losses"}}
    found = {}
    for optimizer, ears in grouped(state.events.ears, lambda ear: ear.t.optimizer).items():
        n = min(ear.n for ear in ears)
        if n >= N_LOSSES and ears[0].n_others >= N_LOSSES:
            name = type(optimizer).__name__
            found[name] = {"value": n, "limit": N_LOSSES, "what": f"backward passes reached the tensors of {name}"}
    return found


@rule("in {value:.0%} of the updates {told}", "{cure}")
def stale_gradients(state: State) -> Ill:
    """Left over from earlier updates, in all or in every other one, or from other weights within one, or used for one and then
    for another. Where no pass is heard any more, as under a captured graph, nothing is known of the last."""
    often = {kind: max(state.events.share(kind, LOOKS), default=0.0) for kind in STALE}
    often["twice"] = max((share for share in state.events.share("twice") if share <= MOST), default=0.0)
    for kind, (told, cure, severity) in STALE.items():
        if often[kind] > OFTEN:
            return {kind: {"value": often[kind], "limit": OFTEN, "told": told, "cure": cure, "severity": severity}}
    return {}


@rule("in {value:.0%} of the updates {told}", "{cure}")
def cleared_gradients(state: State) -> Ill:
    """Before the step, or between micro-batches: there the pass was for nothing, unless another optimizer uses it."""
    gone = max((*state.events.share("gone"), *state.events.share("some gone")), default=0.0)
    if gone > OFTEN:
        return {"order": {"value": gone, "limit": OFTEN, "told": GONE, "cure": MOVE_IT}}
    if state.events.had_use:
        return {}
    for kind, told, cure in (("thrown", THROWN, CLEAR_AFTER), ("shrunk", SHRUNK, CLIP_ONCE)):
        if (often := min(state.events.share(kind), default=0.0)) > OFTEN:
            return {"between": {"value": often, "limit": OFTEN, "told": told, "cure": cure}}
    return {}


@rule(
    "clipping was called {value} times, and found no gradient each time: nothing is clipped",
    "call it after backward() and unscale_(), before step(), and hand it a list or parameters(): a generator can be gone through once",
)
def empty_clip(state: State) -> Ill:
    """Where there are gradients at the step: that there never are any is another rule's."""
    clips, has_gradients = state.outside.clips, any(state.gradients.squares.values())
    return (
        {"clipping": {"value": clips.n, "limit": LOOKS}} if has_gradients and clips.n == clips.n_empty >= LOOKS else {}
    )


LEFT = "the gradients of earlier ones were still there when the backward pass began"
LEFT_OUTSIDE = "those of what the optimizer holds and the model does not were still there when the backward pass began"
CLEAR_ALL = (
    "call zero_grad() on the optimizer: the model's own leaves out what is not the model's, such as a loss's weights"
)
MIXED = "a backward pass added to the gradients of one at other weights"
FOREIGN = "a backward pass added to gradients that another optimizer's had left there"
CLEAR_BEFORE = "clear the gradients of each optimizer right before its own backward pass: the generator's also reaches the discriminator"
CLEAR_WITHIN = (
    "clear them in the closure, which is called again after each move (LBFGS), or before the second pass (SAM)"
)
CLEAR_ONCE = "call zero_grad() once an update, before its first backward pass, on the optimizer that steps"
TWICE = "the optimizer steps on gradients that it has used already, with no backward pass in between"
STEP_ONCE = "something else calls step(), too: a trainer, a wrapper or a callback; let one of them do it"
STALE = {  # the worst first
    "stale": (LEFT, CLEAR_ONCE, "error"),
    "stale outside": (LEFT_OUTSIDE, CLEAR_ALL, "error"),
    "mixed": (MIXED, CLEAR_WITHIN, "error"),
    "foreign": (FOREIGN, CLEAR_BEFORE, "warning"),
    "twice": (TWICE, STEP_ONCE, "error"),
}
GONE = "a gradient arrives and is gone when the optimizer steps"
MOVE_IT = "zero_grad() stands between backward pass and step(), or a validation there calls it: move it before both"
THROWN = "several backward passes come, and each finds the one before cleared: the step has the last one alone"
CLEAR_AFTER = "zero_grad() stands in the loop over micro-batches: call it once, before the first or after the step"
SHRUNK = "several backward passes come, and each finds the gradients of those before made smaller: the last ones outweigh them"
CLIP_ONCE = "clip, unscale or divide once an update, after its last backward pass: scale each loss by its share instead"
LOST = (
    "{dtype} rounds updates away. Of the displacement that the optimizer intended over {window} updates less than {limit:.0%} "
    "arrived in {n_sick} of {n_kinds} kinds of tensor: {each}"
)
KEEP_BITS = (
    "keep the parameters in float32 and compute under autocast; or use an optimizer with fp32 masters, Kahan "
    "summation or stochastic rounding"
)
NEVER = "{n} tensors of 16 bits stand still, and no step that Adam can make at its peak learning rate moves them: all is rounded away: {names}"
ASK_FOR_FLOAT32 = f"a checkpoint is loaded in its own format unless one asks for float32; {KEEP_BITS}"
RULES = (
    no_updates,
    stale_gradients,
    cleared_gradients,
    empty_clip,
    nonfinite_gradient,
    Rule("lost_updates", "error", never_moves, NEVER, ASK_FOR_FLOAT32),
    Rule("lost_updates", "error", badly_lost, LOST, KEEP_BITS),
    Rule("lost_updates", "warning", partly_lost, LOST, KEEP_BITS),
)
STILL = (frozen_tensor, bf16_parameters)
