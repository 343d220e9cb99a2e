"""Rules about what flows through a model, and beside it: targets and data, looks into the future, modes; experts, faint signals,
terms without effect; copies, counts and tables of positions."""

import math
from functools import partial
from statistics import median

from torch import nn

from ..findings import RULES as SAID
from ..findings import grouped
from ..tokens import REPEATED
from .causal import future_leak
from .outside import FIRST
from .rule import Ill, Rule, by_kind, found_in, rule
from .state import MODES, State
from .tracking import Tracked

OFF, SETTLED, LATEST = 1.0, 50, 3  # deviations or doublings; updates before they are judged; looks, 5 updates apart
START_LEFT = 0.1  # share of the first statistics that the budget leaves
UNEVEN = 2.0  # a token's weight over that of another in the same update
SAME_MEANS = 1.05  # … while the micro-batches' own weights are this much the same
FAINT = 2.0**-23  # gradient over weight, beside the median kind's: float32 shows no more of it beside them
WAIT, WAIT_READINGS = 15, 3  # updates and readings before a gradient is called faint: adapters start with exact zeros
STARVED, STARVED_IN, STARVED_AT = 0.1, 50, 70  # of an even load, updates, and the first that it is judged at
COLLAPSED, COLLAPSED_IN = 0.9, 20  # share of the choices that fall on as many experts as a token chooses, and updates
# where it is told, and where it is an alarm: of healthy routers many choose alike from update 20 to 60, and come back by themselves
TOLD_AT, LAST_AT = 40, 80
LEAST = 100  # choices that an even load has in them, so that 10 % is no accident
CONSTANT, N_VALUES = 1e-5, 10  # spread over mean up to which float32's rounding explains it; values
SLOWED = 0.5  # as of lost updates
BALANCE = "is a balancing term in the loss with its gradient and weight, does the router learn, is a bias that balances updated?"
FOLLOWED = 2  # looks between which a norm's weights went after the trained ones'
FAR_AWAY = 0.5  # of the weights' size: an average that began as a copy of an older model is nearer
TWICE = 3  # updates in which a count was doubled


def leaks(state: State) -> Ill:
    """Whether the model sees what it is to foretell; tried once, at the first check that knows the targets."""
    heard = state.forward.heard
    if heard.is_next_token and not heard.was_tried:
        heard.was_tried = True
        heard.leak = state.forward.tried("whether the model sees the future", future_leak, state.forward)
    return {heard.leak.where: heard.leak.to_dict()} if heard.leak else {}


@rule(
    "tokens of one update weigh up to {value:.1f} times as much as others: each micro-batch's mean counts alike, whatever its targets",
    "divide the summed loss of all micro-batches by the number of all their targets",
)
def token_weights(state: State) -> Ill:
    """The largest over the smallest weight among the micro-batches of an update, the median over updates."""
    ratios = []
    for passes in grouped(state.forward.heard.likelihoods, lambda p: p.update).values():
        weights = [p.weight for p in passes]
        means = [p.weight * p.n_targets for p in passes]
        if len(passes) > 1 and max(means) < SAME_MEANS * min(means):
            ratios.append(max(weights) / min(weights))
    value = median(ratios) if ratios else 0.0
    return {"loss": {"value": value, "limit": UNEVEN}} if value > UNEVEN else {}


@rule(
    "{n} modules would compute otherwise in training, and updates are made in evaluation mode: {names}",
    "call model.train() after each evaluation, and before the first update",
)
def evaluation_mode(state: State) -> Ill:
    """Updates while no module at all is in training mode, and some compute otherwise there. A frozen backbone in evaluation mode
    has a head, or a root, in training mode; frozen batch norms are meant to keep their statistics."""
    if len(state.modes) < MODES or any(state.modes):
        return {}
    severity = "error" if state.has_trained else "warning"
    return {name: {"severity": severity} for name, module in state.modules.items() if differs_by_mode(module)}


def differs_by_mode(module: nn.Module) -> bool:
    """A dropout that drops, by class or by an attribute of that name, or a batch norm that is trained."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.track_running_stats and all(p.requires_grad for p in module.parameters())
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(isinstance(v, float) and 0 < v < 1 and "drop" in name for name, v in vars(module).items())


@rule(
    "{value:.0%} of the last batches had come a short while before, though none did at first",
    "look for a worker or shard that has come to its end and starts over, a buffer that is not filled again, or a sampler made anew",
)
def repeated_data(state: State) -> Ill:
    share = state.outside.repeats.share
    return {"batches": {"value": share, "limit": REPEATED, "where": "data"}} if share > REPEATED else {}


def one_batch(state: State) -> Ill:
    """An info: a full batch is meant so, and a model that overfits one on trial."""
    repeats = state.outside.repeats
    return (
        {"batch": {"value": repeats.n, "limit": 1, "where": "data"}}
        if len(repeats.last) == 1 and repeats.n > FIRST
        else {}
    )


@rule(
    "{names}: after {updates} updates the statistics that evaluation uses are {value:.2g} deviations, or doublings of the variance, "
    "off the batches': a momentum of {momentum:g} keeps those of a fresh model",
    "torch's momentum is the share of the new batch: 0.1 where others say 0.9; or evaluate after many more updates",
)
def mode_mismatch(state: State) -> Ill:
    """Batch norms, where the budget does not do away with what they began with."""
    averages, found = state.outside.averages, {}
    for name, looks in averages.off.items() if state.n_seen >= SETTLED else ():
        momentum, off = averages.slow[name].momentum, median(looks[-LATEST:])
        if off > OFF and (state.budget is None or (1 - momentum) ** state.budget > START_LEFT):
            found[name] = {"value": off, "limit": OFF, "momentum": momentum}
    return found


def hasty(state: State) -> Ill:
    norms = {name: state.modules[name].momentum for name in state.outside.averages.hasty}
    return {name: {"value": m, "limit": 0.5, "kept": 1 - m} for name, m in norms.items()}


@rule(
    "matrices ({n}) with gradients of {size:.0e} of the others', relative to their weights: {names}",
    "look for a score, a branch or a loss term that is multiplied by next to nothing, or a softmax or sigmoid that is saturated",
)
def faint_gradient(state: State) -> Ill:
    """Matrices alone: a bias before a softmax or a norm has no gradient but rounding, and is well."""
    if state.n_seen <= WAIT:
        return {}
    seen = [t for t in state.readings if t.owner and t.param.ndim > 1 and t.with_gradient >= WAIT_READINGS]
    seen = [t for t in seen if t.weight_square]  # one that starts at zero has no size to hold it against
    size = {k: max(map(relative_gradient, mine)) for k, mine in by_kind(seen).items()}
    usual = median(size.values()) if len(size) > 2 else 0.0
    faint = {kind: value / usual for kind, value in size.items() if 0 < value < FAINT * usual}
    return {k: {"size": v, "value": v, "limit": FAINT} for k, v in sorted(faint.items(), key=lambda pair: pair[1])}


def relative_gradient(t: Tracked) -> float:
    return t.grad_norm / math.sqrt(t.weight_square / t.n_elements * t.param.numel())


def loads(state: State, updates: int, earliest: int) -> dict[str, tuple[list[int], int]]:
    """Of the last `updates`: how many choices fell on each expert of a module, and how many a token makes."""
    found = {}
    for experts in state.outside.routing.experts:
        last = experts.loads[-1].step
        looks = [look for look in experts.loads if look.step > last - updates]
        if last >= earliest and len({len(look.counts) for look in looks}) == 1:
            total = [sum(of) for of in zip(*(look.counts for look in looks), strict=True)]
            if sum(total) >= LEAST * len(total):
                found[experts.name] = total, looks[-1].n_choices
    return found


@rule(
    "{names}: the {k} busiest of its {of} experts take {value:.0%} of the tokens' choices after {updates} updates",
    BALANCE,
)
def collapsed_experts(state: State) -> Ill:
    """An alarm where it lasts, in most of the modules, as where a term, a sign or a bias that balances them all is at fault."""
    found, known = {}, loads(state, COLLAPSED_IN, TOLD_AT)
    for name, (total, k) in known.items():
        share = sum(sorted(total)[-k:]) / sum(total)
        if share > COLLAPSED and 2 * k <= len(total):
            found[name] = {"value": share, "limit": COLLAPSED, "k": k, "of": len(total)}
    lasts = bool(loads(state, COLLAPSED_IN, LAST_AT)) and 2 * len(found) > len(known)
    return {name: facts | {"severity": "warning" if lasts else "info"} for name, facts in found.items()}


@rule(
    "{value} of {of} experts of {names} get less than a tenth of an even load: {which}; they may come back, or never learn",
    BALANCE,
)
def starved_experts(state: State) -> Ill:
    found = {}
    for name, (total, _) in loads(state, STARVED_IN, STARVED_AT).items():
        if ill := [n for n, load in enumerate(total) if load * len(total) < STARVED * sum(total)]:
            found[name] = {"value": len(ill), "limit": 0, "of": len(total), "which": ill[:8]}
    return found


@rule(
    "{names} has a gradient behind it and is {value:.6g} in each of {looks} readings: as a term of the loss it teaches nothing",
    "an auxiliary loss may be summed over the wrong axis, normalised to a constant, or made of detached numbers",
)
def constant_term(state: State) -> Ill:
    found = {}
    for name, values in state.outside.terms.values.items():
        mean, spread = sum(values) / len(values), max(values) - min(values)
        if len(values) >= N_VALUES and spread <= CONSTANT * abs(mean) > 0:
            found[name] = {"value": mean, "limit": CONSTANT, "looks": len(values)}
    return found


@rule(
    "{names}: what the forward pass adds is added again when it is recomputed for the backward pass",
    "count under torch.is_grad_enabled() of the first pass alone, or outside of the checkpointed function; halve what reads it",
)
def counted_twice(state: State) -> Ill:
    twice = {name: sum(looks) for name, looks in state.outside.counts.doubled.items()}
    return {name: {"value": n, "limit": TWICE} for name, n in twice.items() if n >= TWICE}


@rule(
    "{where}: what lies near its weight comes nearer at {value:.0%} of the pace of what lies far: the format rounds it off",
    "keep an average of the weights, or a target network, in float32: 16 bits hold no decay beyond 0.99",
)
def stuck_copy(state: State) -> Ill:
    slowed = state.outside.copies.slowed()
    if slowed is None or slowed >= SLOWED:
        return {}
    names = [t.name for _, t in state.outside.copies.followed]
    return {"copies": {"value": slowed, "limit": SLOWED, "where": f"{len(names)} 16-bit copies that follow {names[0]}"}}


def left_behind(state: State) -> Ill:
    left = sum(n >= FOLLOWED for n in state.outside.statistics.left.values())
    return {"statistics": {"value": left, "limit": 0}} if left else {}


def began_elsewhere(state: State) -> Ill:
    far = [looks[-1] for looks in state.outside.followers.far.values() if len(looks) >= FOLLOWED]
    away, pace = max(far, default=(0.0, 0.0))
    return {"models": {"value": away, "limit": FAR_AWAY, "pace": pace}} if away > FAR_AWAY else {}


def kept_casts(state: State) -> Ill:
    stale = sum(state.outside.casts.stale)
    return {"casts": {"value": stale, "limit": 0}} if stale > 1 else {}


@rule(
    "{names}: positions in 16 bits run together (late ones are {value:.2g} rad off, or as many are the same as the one before)",
    "keep such buffers in float32 when the model is cast, and compute angles there; cast the cosines and sines",
)
def rough_positions(state: State) -> Ill:
    return {name: {"value": size, "limit": 0} for name, size in (state.outside.positions or {}).items()}


def rounded(state: State) -> Ill:
    return {name: {"value": 16, "limit": 32} for name in state.outside.rounded if name not in state.outside.positions}


HASTY = (
    "{names}: a momentum of {value:g} keeps {kept:.0%} of what was known: evaluation uses the last batch's statistics"
)
OTHER_WAY = "torch's momentum is the share of the new batch: 0.01 where TensorFlow says 0.99"
LEFT = "{value} batch norms beside the model follow its weights, and their running statistics stay what they were"
ELSEWHERE = (
    "a model beside this one follows its weights from {value:.0%} of their size away, and makes {pace:.1%} of the way between two checks: it did "
    "not begin as their copy"
)
KEPT = "{value} passes computed with 16-bit casts of weights as they were before the last update"
WRAP = "autocast keeps its casts until its outermost context ends: let it wrap each forward pass and its loss, and not the loop"
MADE_BEFORE = "make the average after a checkpoint is loaded into the model, or load the average's own"
BUFFERS = (
    "copy the buffers along with the weights, as torch's AveragedModel does, or run update_bn() before the copy is used"
)
SAME_BATCH = "each of {value} updates had the same batch"
ANEW = "no fault where it is all that there is, or a trial; else look for a loader made anew, or a buffer that gives its first rows"
GRAPHS = "shared_target", "squashed_twice", "out_of_range", "no_effect"
TEXTS = "constant_tokens", "random_tokens", "repeated_data", "one_text"
LABELS = "label_shift", "never_a_target", "padding_in_loss", "prompt_in_loss"
SIGNALS = faint_gradient, collapsed_experts, starved_experts, constant_term
BESIDE = (
    counted_twice,
    stuck_copy,
    Rule("stuck_copy", "warning", left_behind, LEFT, BUFFERS),
    Rule("stuck_copy", "warning", began_elsewhere, ELSEWHERE, MADE_BEFORE),
    Rule("stuck_copy", "warning", kept_casts, KEPT, WRAP),
    rough_positions,
    Rule(
        "rough_positions",
        "info",
        rounded,
        "{names}: kept in 16 bits beside weights in 32: off by up to 0.4 % (cosines of positions by 0.002, late ones by no more)",
        "no loss where products are in 16 bits, too; else keep such buffers in float32 when the model is cast",
    ),
)

RULES = (
    Rule("future_leak", "error", leaks),
    evaluation_mode,
    repeated_data,
    Rule("repeated_data", "info", one_batch, SAME_BATCH, ANEW),
    mode_mismatch,
    Rule("mode_mismatch", "warning", hasty, HASTY, OTHER_WAY),
    *(Rule(name, SAID[name][0], partial(found_in, name=name)) for name in GRAPHS + TEXTS + LABELS),
    *SIGNALS,
    *BESIDE,
)
