"""The schedule on paper: do warm-up, decay and intervals fit the budget, and do all count the same steps?"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from torch.optim import Optimizer

from ..findings import Finding
from .plan import Plan, as_number

# decay over budget, or the reverse, up to which a rounded number or a tail at the least LR explains it
OFF_BUDGET = 1.5
OF_RATES = re.compile(r"lr|sched|decay|optim|train|^milestones$")  # whose milestones these are
MANY = 3  # times the epochs, from where on a milestone may count something else
# what begins within a run, such as averaging or a decay; a run itself may begin where another one ended
BEGINS = re.compile(
    r"(?:\w*[a-z]_)?(?:starts?|begins?|unfreeze)(?:_at|_after|_from)?(?:_(?P<unit>epoch|step|iter|update)s?)?"
)
OF_THE_RUN = re.compile(r"(?:init_|initial_)?(?:start|begin)s?(?:_\w+)?|\w*(?:warm|window|date|time|index|idx)\w*")
INTERVALS = ("log_interval", "eval_interval", "save_interval")
NEVER = "it never comes, but at an end if the loop sees to it"
ONE_UNIT = "count all of it in updates: one is accumulation × micro-batches"


def told(plan: Plan, severity: str, key: str, words: str, advice: str, value: float, limit: float) -> Finding:
    entry = plan.find(key)
    return Finding("schedule", severity, entry.where, f"{entry.name}: {words}", advice, value, limit)


def schedule(plan: Plan) -> Iterator[Finding]:
    """Warnings where the number of steps is given, or of what counts epochs that of epochs: an LR that never reaches its peak or its
    end, rises again, or ends above its peak; steps that are micro-batches by the tokens planned, and a log that is never written. Other
    intervals beyond the budget are infos: many a loop evaluates and saves at its end."""
    yield from rate_over_time(plan)
    if plan.number("steps"):
        yield from counted_steps(plan)


def rate_over_time(plan: Plan) -> Iterator[Finding]:
    finding, steps = partial(told, plan), plan.number("steps")
    # of a share of the run, one run is planned
    for unit, planned in {"steps": steps, "epochs": plan.number("epochs"), "ratio": 1}.items():
        warmup, units = plan.number(f"warmup_{unit}") or 0, "runs" if unit == "ratio" else unit
        if planned and warmup >= planned:
            words = f"the warm-up of {warmup:g} {units} is not over within the {planned:g} planned: the peak LR is never reached"
            yield finding("warning", f"warmup_{unit}", words, f"shorten it, or {ONE_UNIT}", warmup, planned)
    # whether it counts epochs or updates, which are more
    cosine, epochs = plan.number("T_max") or math.inf, plan.number("epochs") or 0
    if cosine * OFF_BUDGET < epochs:
        words = f"the cosine is at its end by epoch {cosine:g} of {epochs:g} at the latest, and rises again"
        yield finding("warning", "T_max", words, "give it the whole run's length", cosine, epochs)
    entry = plan.find("milestones")
    falls = min(plan.numbers("milestones"), default=0) if entry and OF_RATES.search(entry.name.lower()) else 0
    planned, units = (epochs, "epochs") if epochs else (steps or 0, "steps")
    if 0 < planned <= falls < (MANY * epochs or math.inf):
        words = f"the LR falls at {falls:g} at the earliest, and {planned:g} {units} are planned: it never does"
        yield finding("warning", "milestones", words, "scale them with the length of the run", falls, planned)
    yield from never_begins(plan, {"epochs": epochs, "steps": steps or 0})
    peak = max((lr for _, lr, _ in plan.peak_rates()), default=math.inf)
    for key, most in {"min_lr": peak, "min_lr_ratio": 1}.items():
        if (least := plan.number(key) or 0) > most:
            words = f"the LR ends at {least:g}, above the {most:g} that it comes from: the decay is a rise"
            yield finding("warning", key, words, "give the end, or its share of the peak, below it", least, most)


def never_begins(plan: Plan, planned: Mapping[str, float]) -> Iterator[Finding]:
    """Of a number that is many times the run's length it is meant, and one without a unit may count what is more."""
    for entry in plan.entries:
        key, value = entry.path[-1].lower(), as_number(entry.value)
        named = None if OF_THE_RUN.fullmatch(key) else BEGINS.fullmatch(key)
        unit = named and named["unit"]
        of = {"epochs"} if unit == "epoch" else {"steps"} if unit else {"epochs", "steps"}
        length, units = max((n, units) for units, n in planned.items() if units in of)
        if named and 0 < length < value < MANY * length:
            words = f"{value:g} is beyond the {length:g} {units} planned: what begins there never does"
            advice = "scale it with the length of the run"
            yield Finding("schedule", "warning", entry.where, f"{entry.name}: {words}", advice, value, length)


def counted_steps(plan: Plan) -> Iterator[Finding]:
    finding, steps = partial(told, plan), plan.number("steps")
    n_accum, decay = plan.number("gradient_accumulation_steps") or 1, plan.number("decay_steps")
    if decay and not 1 / OFF_BUDGET <= decay / steps <= OFF_BUDGET:
        share = min(decay / steps, steps / decay)
        part = f"{share:.2g} of the way down" if decay > steps else f"at its end after {share:.2g} of the run"
        unit = "; they are apart by the accumulation" if max(decay / steps, steps / decay) == n_accum else ""
        message = f"the LR decays over {decay:g} steps and {steps:g} are planned: it is {part}{unit}"
        yield finding("warning", "decay_steps", message, f"let it end with the budget; {ONE_UNIT}", decay, steps)
    tokens, at_once = plan.number("total_tokens"), plan.tokens_per_update()
    if tokens and at_once and n_accum > 1 and math.isclose(steps, n_accum * tokens / at_once, rel_tol=0.02):
        never = [key for key in INTERVALS if math.gcd(int(n_accum), int(plan.number(key) or 1)) > 1]
        gated = f"; inside `(step + 1) % {n_accum:g} == 0`, {' and '.join(never)} never come" if never else ""
        message = f"{steps:g} steps are micro-batches by total_tokens: {steps / n_accum:g} updates{gated}"
        yield finding("warning", "steps", message, ONE_UNIT, steps, steps / n_accum)
    for key in INTERVALS:
        if (every := plan.number(key) or 0) > steps:
            severity = "warning" if key == INTERVALS[0] else "info"
            words = f"{every:g} is beyond the {steps:g} steps planned: {NEVER}"
            yield finding(severity, key, words, "lower it", every, steps)


def first_update(plan: Plan, optimizers: Iterable[Optimizer]) -> Iterator[Finding]:
    """Of optimizers that a scheduler has set up: whether the first update runs at the full LR although a warm-up is planned. An LR
    that a loop sets, of its own `initial_lr`, is not known yet."""
    warmup = plan.number("warmup_steps") or 0
    wrapped = [o for o in optimizers if "step" in vars(o)]  # as torch's schedulers do, to count the steps
    scheduled = [group for o in wrapped for group in o.param_groups if "initial_lr" in group]
    full = [g for g in scheduled if 0 < max(g["initial_lr"], g.get("max_lr", 0)) <= float(g["lr"]) * (1 + 1e-6)]
    if warmup > 1 and full:
        message = f"a warm-up of {warmup:g} steps is planned, and the first update runs at the full LR {float(full[0]['lr']):.3g}"
        advice = "begin at the first step's share of the LR, (step + 1) / warmup: the scheduler may be off by one, or not step"
        yield Finding("schedule", "warning", "optimizers", message, advice, float(full[0]["lr"]), 1 / warmup)
