"""Rules about learning rates over time: against what they were made with, from update to update, within the budget."""

import math
from functools import partial
from itertools import combinations, pairwise

from .rule import Ill, Rule, rule
from .state import State
from .tracking import LR_ACTED, LR_LATE, LR_STEADY, SAME_LR, SPENT, GroupState

UP, UP_LOADED = 20.0, 3.0  # over all there was, at once, and where a state was loaded (a first phase may have a tenth)
TEETH, REACHED = 3, 0.5  # restarts that make a habit; share of the LR asked for that no warm-up among them gets to
FAR_BELOW = 0.1  # of the LR asked for: a scheduler's own peak, and no factor that somebody meant
NOTHING = 2**-24  # of the peak: float32 does not see it beside 1
CLEAR, LONG = 50, 10_000  # updates after which, without a budget, a warm-up is called too long, and from where on


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
        in_stairs = (
            bool(state.budget) and not state.start_step and not g.loaded and g.n - g.risen_at <= 2 * longest_rest(g)
        )
        if g.last < g.peak or g.last > LR_LATE * planned or g.n < enough or not (is_straight or in_stairs):
            return {}
        pace = (g.last - g.lrs[0]) / max(1, g.risen_at - 1)
        after = (planned - g.last) / pace if pace else math.inf
        ends.append((g.risen_at + after + state.start_step, g.last, planned, g.n))
    if not ends or min(ends)[0] <= far:
        return {}
    end, now, planned, n = min(ends)
    facts = {"where": ", ".join(g.name for g in state.groups), "value": now, "limit": planned, "n": n}
    facts["when"] = "never" if end == math.inf else f"by update {end:.0f}"
    facts["far"] = f"{far} are planned" if state.budget else "no published warm-up is as long"
    facts["more"] = "" if state.budget else " A Watch that is told its budget knows more"
    return {"late": facts}


def longest_rest(group: GroupState) -> int:
    """Updates between two rises: those of an epoch, where a warm-up is stepped with each."""
    rises = [i for i, (a, b) in enumerate(pairwise(group.lrs), 1) if b > a]
    return max((b - a for a, b in pairwise([0, *rises])), default=group.n)


def never_reached(state: State) -> Ill:
    """Groups whose LR rose, and has come to rest far below the one that they were made with; a factor's base is 1."""
    found = {}
    for g in (g for g in state.groups if g.asked and g.asked != 1 and not g.loaded and len(g.recent) == LR_STEADY):
        rests = g.risen_at > 1 and g.n - g.risen_at > max(LR_STEADY, 2 * longest_rest(g))
        if rests and g.last == g.peak == min(g.recent) and g.last < FAR_BELOW * g.asked:
            found[g.name] = {"where": g.name, "value": g.last, "limit": g.asked, "at": g.risen_at + state.start_step}
    return found


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
SHORT = "{where} was made with a learning rate of {limit:.3g}; the warm-up ended at update {at}, and it steps at {value:.3g}"
ITS_OWN = "the scheduler has a peak of its own, perhaps a default: give it the optimizer's learning rate"
JUMPED = "the learning rate of {where} was {limit:.3g} and is {value:.3g} from update {at} on: no schedule goes there at once"
OTHER_RUN = "look for a state or a scheduler of another run, or of this one's start, that was loaded then, or a second scheduler"
LATE = "the learning rate of {where} is {value:.2g} at update {n}: at this pace it gets to {limit:.2g} {when}; {far}"
ANEW = "the warm-up of {where} began anew {n} times: its learning rate rises to {value:.2g} at most, and {limit:.2g} was asked for"
COUNTER = "let the schedule count the updates of the whole run: neither those of an epoch, nor of a scheduler made in the loop"
UNITS = (
    "is the scheduler stepped once an update, and not once an epoch? Is the warm-up's length given in updates, and not in "
    "samples or micro-batches?{more}"
)

RULES = (
    Rule("lr_overwritten", "warning", jumped, JUMPED, OTHER_RUN),
    Rule("lr_overwritten", "warning", merged, MERGED, SCALE),
    Rule("lr_overwritten", "warning", brought_back, BROUGHT, SET_AGAIN),
    Rule("lr_overwritten", "warning", never_reached, SHORT, ITS_OWN),
    lr_spent,
    Rule("lr_spent", "warning", rising_for_good, LATE, UNITS),
    Rule("lr_spent", "warning", begun_anew, ANEW, COUNTER),
)
