"""Rules about learning rates and the loss: what rates were asked for, had at first and have now; what steps of their size usually
are, how far they can get, what they achieve."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from statistics import fmean

from ..conventions import Group, convention_of, judge
from ..measures import adam_reach, trend
from .rule import Ill, Rule, rule
from .state import PRETRAINED, State
from .steps import is_adam, kind_of, matrix_shape
from .tracking import HISTORY, LR_STEADY, SAME_LR, SPENT, GroupState

LR_LATE = 0.2  # share of the peak LR below which it is late in a decay, or early in a warm-up
UP, UP_LOADED = 20.0, 3.0  # over all there was, at once, and where a state was loaded (a first phase may have a tenth)
TEETH, REACHED = 3, 0.5  # restarts that make a habit; share of the LR asked for that no warm-up among them gets to
NOTHING = 2**-24  # of the peak: float32 does not see it beside 1
CLEAR, LONG = 50, 10_000  # updates after which, without a budget, a warm-up is called too long, and from where on
SIGMAS = 3.0  # standard errors of a difference of losses
START_OFF = 0.2  # nats between the first loss and ln V + var/2; nats by which a loss rose
LR_ACTED = 30.0  # updates' worth of peak LR before the loss must have fallen
PLATEAU = 60  # updates for which a loss may rest at its start: vision transformers and factors do for 40
SEEN_FALL = 0.1  # of the first loss: had it fallen by that, two standard errors would show it
AT_LN_V = 0.05  # nats from ln V, where each token is as likely as any other
LEARNED = 1 / 3  # share of an untrained model's loss that is gone when an LR is first judged: no low one
MOST_ACCUMULATED = 64  # the largest factor that a first loss is tried with

# findings that ask how far weights move: without one of them, how far they can is noise
ABOUT_MOVEMENT = {"lost_updates", "bf16_parameters", "frozen_tensor"}
ABOUT_MOVEMENT |= {"lr_too_low", "muon_convention", "loss_not_falling"}


def merged(state: State) -> Ill:
    """Groups that were made with different LRs and have one and the same, before any decay ends; or it was a jump, and no decay,
    that brought one down to the other."""
    found = {}
    known = [g for g in state.groups if g.asked and len(g.recent) == LR_STEADY and g.last]
    for a, b in combinations(known, 2):
        at_work = [g.last >= LR_LATE * g.peak for g in (a, b)]
        if not all(at_work) and not (any(at_work) and (a.jump or b.jump)):
            continue
        apart = max(a.asked, b.asked) / min(a.asked, b.asked)
        if apart > 1 + SAME_LR and all(map(partial(math.isclose, rel_tol=SAME_LR), a.recent, b.recent)):
            facts = {"a": a.asked, "b": b.asked, "where": f"{a.name}, {b.name}", "value": a.last, "limit": apart}
            found[facts["where"]] = facts
    return found


def brought_back(state: State) -> Ill:
    """Groups whose state was loaded, and which have stepped at one LR ever since: not the one that they were made with."""
    found = {}
    for g in (g for g in state.groups if g.loaded and g.asked and g.n >= LR_STEADY):
        planned = float(g.group.get("initial_lr", g.last))
        constant = math.isclose(min(g.lrs[:LR_STEADY]), max(g.lrs[:LR_STEADY]), rel_tol=SAME_LR)
        if constant and not any(math.isclose(lr, g.asked, rel_tol=SAME_LR) for lr in (planned, g.last)):
            found[g.name] = {"where": g.name, "value": g.last, "limit": g.asked}
    return found


@rule(
    "the learning rate of {where} {what}",
    "is the scheduler stepped once an update, and not once a micro-batch, process or epoch? Was its length given in updates?",
)
def lr_spent(state: State) -> Ill:
    """All LRs near zero before half of the budget, or for LR_STEADY updates at zero, beside the peak. Where the budget is not known: at
    rest there, for twice as many updates as it took to get there."""
    groups = [g for g in state.groups if len(g.recent) == LR_STEADY]
    if not groups or len(groups) < len(state.groups):
        return {}
    where = ", ".join(g.name for g in groups)
    if all(lr <= NOTHING * g.peak for g in groups for lr in g.recent):
        what = f"was {max(g.last for g in groups):.0g} in the last {LR_STEADY} updates"
        return {"zero": {"where": where, "what": what, "value": 0.0, "limit": max(g.peak for g in groups)}}
    first, now = max(g.spent_at for g in groups) + state.start_step, max(g.n for g in groups) + state.start_step
    is_at_rest = [len({*g.recent}) == 1 and g.last < SPENT * g.peak for g in groups]
    for_long = [g.n > max(LR_ACTED, 3 * g.spent_at) for g in groups]
    total = state.budget or (now if all(is_at_rest) and all(for_long) else 0)
    if not all(g.spent_at for g in groups) or first >= total / 2:
        return {}
    what = f"was below {SPENT:.0%} of its peak by update {first} of {total}"
    return {"early": {"where": where, "what": what, "value": first, "limit": total / 2}}


def rising_for_good(state: State) -> Ill:
    """A warm-up that ends beyond the budget: a straight one, or one in stairs, as by epochs, of which a quarter of the budget has
    shown no more. Without a budget, a straight one that is longer than any published one."""
    ends, far = [], state.budget or LONG
    for g in state.groups:
        planned = max(g.asked or 0.0, *(float(g.group.get(key) or 0.0) for key in ("initial_lr", "max_lr")))
        slope = (g.last - g.recent[0]) / (LR_STEADY - 1) if len(g.recent) == LR_STEADY else 0.0
        is_straight = slope > 0 and math.isclose(g.last - g.lrs[0], slope * (len(g.lrs) - 1), rel_tol=0.1)
        enough = (20 if state.budget else CLEAR) if is_straight and g.risen_at == g.n else far / 4
        in_stairs = bool(state.budget) and not state.start_step and not g.loaded
        if g.last < g.peak or g.last > LR_LATE * planned or g.n < enough or not (is_straight or in_stairs):
            return {}
        pace = (g.last - g.lrs[0]) / max(1, g.risen_at - 1)
        ends.append(g.risen_at + (planned - g.last) / pace + state.start_step if pace else math.inf)
    if not ends or min(ends) <= far:
        return {}
    first = state.groups[0]
    facts = {"where": ", ".join(g.name for g in state.groups), "value": first.last, "limit": planned, "n": first.n}
    facts["when"] = "never" if min(ends) == math.inf else f"by update {min(ends):.0f}"
    facts["far"] = f"{far} are planned" if state.budget else "no published warm-up is as long"
    facts["more"] = "" if state.budget else " A Watch that is told its budget knows more"
    return {"late": facts}


def begun_anew(state: State) -> Ill:
    """A warm-up that is back at its first LR again and again, from the middle of its rise. Cycles arrive, and restarts begin high."""
    found = {}
    for g in (g for g in state.groups if g.asked and g.peak < REACHED * g.asked):
        rises = zip(g.lrs, g.lrs[1:], g.lrs[2:], strict=False)
        n = sum(a < b > c and math.isclose(c, g.lrs[0], rel_tol=SAME_LR) for a, b, c in rises)
        if n >= TEETH:
            found[g.name] = {"where": g.name, "n": n, "value": g.peak, "limit": g.asked}
    return found


def jumped(state: State) -> Ill:
    """A group whose LR is at once far above all that it had and was made with, or back at the first one of its warm-up for good.
    A restart goes back to where it was, and rises or falls from there."""
    found = {}
    for g in (g for g in state.groups if g.jump):
        n, before, after, peak = g.jump
        factor = after / max(peak, g.asked or 0.0)
        back = len(g.lrs) > LR_STEADY and g.lrs[0] < before and math.isclose(after, g.lrs[0], rel_tol=SAME_LR)
        stays = g.n - n >= LR_STEADY - 1 and all(math.isclose(lr, after, rel_tol=SAME_LR) for lr in g.recent)
        if factor > (UP_LOADED if g.loaded_at == n - 1 else UP) or (back and stays):
            found[g.name] = {"where": g.name, "value": after, "limit": before, "at": n + state.start_step}
    return found


MERGED = "{where} were made with learning rates of {a:.3g} and {b:.3g}, and both step at {value:.3g}"
SCALE = "a scheduler writes one number over all groups: let it scale each group's own, or give it a list"
BROUGHT = "{where} was made with a learning rate of {limit:.3g}; since its state was loaded it steps at {value:.3g}"
SET_AGAIN = "load_state_dict brings the checkpoint's LR back: set lr, initial_lr and the scheduler's base after it"
JUMPED = "the learning rate of {where} was {limit:.3g} and is {value:.3g} from update {at} on: no schedule goes there at once"
OTHER_RUN = "look for a state or a scheduler of another run, or of this one's start, that was loaded then, or a second scheduler"
LATE = "the learning rate of {where} is {value:.2g} at update {n}: at this pace it gets to {limit:.2g} {when}; {far}"
ANEW = "the warm-up of {where} began anew {n} times: its learning rate rises to {value:.2g} at most, and {limit:.2g} was asked for"
COUNTER = "let the schedule count the updates of the whole run: neither those of an epoch, nor of a scheduler made in the loop"
UNITS = (
    "is the scheduler stepped once an update, and not once an epoch? Is the warm-up's length given in updates, and not in "
    "samples or micro-batches?{more}"
)

OVER_TIME = (
    Rule("lr_overwritten", "warning", jumped, JUMPED, OTHER_RUN),
    Rule("lr_overwritten", "warning", merged, MERGED, SCALE),
    Rule("lr_overwritten", "warning", brought_back, BROUGHT, SET_AGAIN),
    lr_spent,
    Rule("lr_spent", "warning", rising_for_good, LATE, UNITS),
    Rule("lr_spent", "warning", begun_anew, ANEW, COUNTER),
)


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
            ill |= dict.fromkeys(finding.where.split(", "), finding.to_dict())
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
