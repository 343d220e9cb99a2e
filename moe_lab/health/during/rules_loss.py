"""Rules about learning rates and the loss: what steps of their size usually are, how far they can get, what they achieve."""

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from ..conventions import Group, convention_of, judge
from ..measures import adam_reach, trend
from .rule import Ill, Rule, rule
from .state import PRETRAINED, State
from .steps import is_adam, kind_of, matrix_shape
from .tracking import HISTORY, LR_ACTED, LR_LATE, LR_STEADY, GroupState

SIGMAS = 3.0  # standard errors of a difference of losses
START_OFF = 0.2  # nats between the first loss and ln V + var/2; nats by which a loss rose
PLATEAU = 60  # updates for which a loss may rest at its start: vision transformers and factors do for 40
SEEN_FALL = 0.1  # of the first loss: had it fallen by that, two standard errors would show it
AT_LN_V = 0.05  # nats from ln V, where each token is as likely as any other
LEARNED = 1 / 3  # share of an untrained model's loss that is gone when an LR is first judged: no low one
MOST_ACCUMULATED = 64  # the largest factor that a first loss is tried with

# findings that ask how far weights move: without one of them, how far they can is noise
ABOUT_MOVEMENT = {"lost_updates", "bf16_parameters", "frozen_tensor"}
NEW = "if weights were to be loaded, none arrived: these look as new ones do"
ABOUT_MOVEMENT |= {"lr_too_low", "muon_convention", "loss_not_falling"}


def measured_group(state: State, group: GroupState) -> Group | None:
    """A group as it is judged: by the kind of its steps, and not by its optimizer's name. None where no table is for it."""
    kind, seen = kind_of([t for t in state.tracked if t.owner is group])
    if kind not in ("adam", "sign", "orthogonal") or not group.lrs:
        return None
    lr = group.planned if group.is_steady else group.peak
    if kind == "adam":  # its number is what the table is about, whatever the RMS is by now
        return Group(group.name, "adam", lr)
    largest, step = max(seen, key=lambda pair: pair[0].param.numel())
    if kind == "sign":
        return Group(group.name, "adam", lr, rms=step.rms)
    declared = group.group.get("adjust_lr") or group.group.get("adjust_lr_fn")
    convention = convention_of([(matrix_shape(t.param.shape), step.rms) for t, step in seen], declared)
    rms = None if convention else step.rms
    return Group(group.name, "muon", lr, matrix_shape(largest.param.shape), convention or "its own", rms)


def learning_rates(state: State, name: str) -> Ill:
    """Peak LRs against what such models are trained with; low ones only once they stopped rising, and in a fresh model.
    What is found under the rule of this name, by the groups that it is about."""
    if not state.forward.is_language_model or "lr_overwritten" in {f.rule for f in state.findings}:
        return {}  # the table is of language models; and a number that nobody asked for needs no table
    judged = {group: known for group in state.groups if (known := measured_group(state, group))}
    if not judged:
        return {}
    # the table is of models that train as a whole: a new head on a frozen base takes less
    low_too = state.is_whole and state.is_fresh and all(group.is_steady for group in judged)
    if name == "lr_too_low" and state.expected_start and state.losses:  # what has learned so much is not slow
        low_too &= state.losses[0] - fmean(state.losses[-LR_STEADY:]) < LEARNED * state.expected_start
    ill = {}
    for finding in judge(judged.values(), state.n_parameters):
        hot = finding.rule == "lr_too_high" or (finding.rule == "muon_convention" and finding.value > 1)
        if finding.rule == name and (hot or low_too):
            facts = finding.to_dict() | ({} if hot else {"advice": f"{finding.advice}; {NEW}"})
            ill |= dict.fromkeys(finding.where.split(", "), facts)
    return ill


@rule(
    "within {budget} updates no weight of {where} can move by more than {value:.2g}, if it goes on by Adam's rule",
    "compare it with the movement you expect before you call a weight frozen or slow",
)
def reach(state: State) -> Ill:
    """How far a weight can get within the budget, at the LRs seen so far and the last one from there on: the smallest reach
    of the groups. Only beside a finding about movement."""
    if state.budget is None or state.n_seen < LR_STEADY or not ABOUT_MOVEMENT & {f.rule for f in state.findings}:
        return {}
    found = []
    for group in state.groups:
        if group.lrs and is_adam(group.optimizer, group.group):
            lrs = [*group.lrs, *[group.peak] * max(0, state.budget - len(group.lrs))][: min(state.budget, 100_000)]
            found.append((adam_reach(lrs, group.group["betas"]), group.name))
    if not found:
        return {}
    most, name = min(found)
    return {"the smallest": {"value": most, "where": name, "budget": state.budget}}


@rule("the loss is not finite", "go back to a sound checkpoint with a lower LR")
def nonfinite_loss(state: State) -> Ill:
    return {} if all(map(math.isfinite, state.losses)) else {"loss": {}}


def change(state: State) -> tuple[float, float, float]:
    """Mean of the first and the last LR_STEADY losses of a fresh model, all finite, and the standard error of their
    difference: infinite where there are too few."""
    losses = state.losses
    if len(losses) < 2 * LR_STEADY or not state.is_fresh or nonfinite_loss.when(state):
        return 0.0, 0.0, math.inf
    first, last = losses[:LR_STEADY], losses[-LR_STEADY:]
    # around their own line: a steep start is no noise
    return fmean(first), fmean(last), math.sqrt(sum(spread(window) / len(window) for window in (first, last)))


def spread(losses: Sequence[float]) -> float:
    """Variance around the least-squares line."""
    n = len(losses)
    return trend(losses)[1] ** 2 * (n**3 - n) / 12


def loss_rose(state: State) -> Ill:
    """Where nothing is trained against it: a generator's loss rises as its judge learns. Of a loss that may have any unit, by a
    tenth of it at least, and an error from twice of it on."""
    first, last, noise = change(state)
    is_nats = state.forward.is_language_model
    limit = START_OFF if is_nats else max(START_OFF, SEEN_FALL * first)
    if last - first <= SIGMAS * noise + limit or state.losses[0] <= 0 or state.events.targets_move:
        return {}
    severity = "error" if is_nats or last > 2 * first else "warning"
    return {"loss": {"value": last - first, "limit": limit, "first": first, "last": last, "severity": severity}}


@rule(
    "after {acted:.0f} updates' worth of the peak LR the loss {what}: {value:.1e} ± {error:.0e} an update",
    "check the data first (random tokens? shuffled labels?), then the learning rate by a branch probe",
)
def loss_not_falling(state: State) -> Ill:
    """A loss that falls to ln V and stays there has learned to say nothing: wide logits start above it, whatever the data. Nobody
    needs to wait where a language model says nothing; else a plateau at the start is left time. Losses need not fall where targets move."""
    first, last, noise = change(state)
    groups = [group for group in state.groups if group.peak]
    acted = max((group.total / group.peak for group in groups), default=0.0)
    late = all(group.last < LR_LATE * group.peak for group in groups)
    know_nothing = math.log(state.forward.vocab_size) if state.forward.is_language_model else math.inf
    too_early = acted < LR_ACTED or (state.n_seen < PLATEAU and last < know_nothing - AT_LN_V)
    too_noisy = 2 * noise > SEEN_FALL * abs(first)  # rewards, or squares with heavy tails
    if too_early or too_noisy or late or loss_rose(state) or state.events.targets_move:
        return {}
    slope, error = trend(state.losses[-HISTORY:])
    facts = {"value": slope, "limit": 0.0, "error": error, "acted": acted, "what": "has not fallen"}
    if last - first <= -noise:  # it fell, or that may yet show
        slope, error = trend(state.losses[-2 * LR_STEADY :])
        rests = abs(last - know_nothing) < AT_LN_V and slope > -SIGMAS * error
        if not rests or first - last < AT_LN_V + SIGMAS * noise:
            return {}
        facts |= {"value": slope, "error": error, "what": f"fell to ln V = {know_nothing:.2f} and rests there"}
    return {"loss": facts}


@rule(
    "the first loss is {value:.3f}; {shown} {limit:.3f}{factor}",
    "look for a division by the accumulation done twice or not at all, padding in the loss, or a wrong init",
)
def initial_loss(state: State) -> Ill:
    """Where the targets are known, against the cross-entropy of the model's own logits: other terms may be in the loss, and only
    a whole factor is told. Else against what an untrained model shows, and only one that is a number of times that is surely
    ill: tied embeddings, auxiliary terms and a frozen base move it by a quarter of a nat, too."""
    own = state.forward.heard.first_loss
    # one that was divided is as low as a trained one's
    is_new = state.is_fresh or (own is None and state.has_new_norms and not state.start_step)
    expected = state.expected_start if own is None else own
    if expected is None or not state.losses or not math.isfinite(state.losses[0]) or not (is_new or own):
        return {}
    first = state.losses[0]
    if abs(first - expected) <= START_OFF:
        return {}
    # of a trained model's small loss, other terms may be twice or three times
    factors = range(2, MOST_ACCUMULATED + 1) if is_new else [state.forward.heard.n_first]
    if own is None and not state.is_whole:  # beside a frozen teacher it is a divergence from what that one says
        factors = []
    small = next((a for a in factors if a > 1 and abs(first * a - expected) < START_OFF * a**0.5), None)
    large = next((a for a in factors if a > 1 and abs(first / a - expected) < START_OFF), None)
    is_told = bool(small or large)
    if not is_told and (own is not None or first < expected - PRETRAINED):
        return {}  # other terms; trained before, or another loss altogether
    factor = f": it is {small or large} times too {'small' if small else 'large'}" if is_told else ""
    shown = "an untrained model of this vocabulary shows" if own is None else "the cross-entropy of its own logits is"
    severity = "warning" if is_told else "info"
    return {"loss": {"value": first, "limit": expected, "factor": factor, "shown": shown, "severity": severity}}


BY_TABLE = "muon_convention", "lr_too_low", "lr_too_high"
ROSE = "the loss rose from {first:.2f} to {last:.2f}"
LOWER = "lower the learning rate, or lengthen the warm-up; targets that grow by design, as a curriculum's, look alike"

RULES = (
    *(Rule(name, "warning", partial(learning_rates, name=name)) for name in BY_TABLE),
    nonfinite_loss,
    Rule("lr_too_high", "error", loss_rose, ROSE, LOWER),
    loss_not_falling,
    initial_loss,
)
