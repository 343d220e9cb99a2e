"""What one's own code does when it is run: which keys of a config matter, and what a loop counts."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..findings import Finding
from ..torch_private import backward_heard
from .plan import Plan, as_number
from .preflight import entries_of_mapping
from .schedule import INTERVALS

FACTORS = 1.5, 0.01, 100.0  # a clip binds at a hundredth, if it is read at all
JUMP = 1.5  # LR of the first update over the second's, while the third's rises


def unread_keys(config: Mapping[str, Any], run: Callable[[dict[str, Any]], Any]) -> list[Finding]:
    """Change one number or switch of a config at a time: does anything that `run(config)` returns change?

    `run` builds, makes two updates with all seeds fixed, and returns what came of it: say (model.state_dict(), the planned LRs),
    tensors and numbers in any nesting. Each key takes up to three runs. A value that `run` refuses is left aside, as it was read;
    so are intervals of logs, evaluations and checkpoints, which two updates do not show. Raises what `run(config)` itself raises.
    """
    given = copy.deepcopy(dict(config))
    plan, told = Plan(entries_of_mapping(given)), run(copy.deepcopy(given))
    apart = {plan.find(key).path for key in INTERVALS if plan.find(key)}
    found = []
    for entry in plan.entries:
        number = as_number(entry.value)
        others = changed(entry.value) if isinstance(entry.value, bool) or number == number else []
        if others and entry.path not in apart and not any(matters(given, entry.path, v, run, told) for v in others):
            message = f"nothing changes with {entry.name}: {', '.join(f'{v:g}' for v in others)} in place of {entry.value:g} were tried"
            advice = "nothing may read it, or something overrides it: look where the code takes this value from"
            found.append(Finding("unread_key", "warning", entry.where, message, advice, str(entry.value)))
    return found


def changed(value: float) -> list[float]:
    if isinstance(value, bool):
        return [not value]
    return [value + 1, value * 2 or 2] if isinstance(value, int) else [float(value) * f or f for f in FACTORS]


def matters(config: dict, path: Sequence[str], value: Any, run: Callable, told: Any) -> bool:
    other = copy.deepcopy(config)
    inside: Any = other
    for key in path[:-1]:
        inside = inside[int(key)] if isinstance(inside, list) else inside[key]
    inside[path[-1]] = value
    try:
        return not same(run(other), told)
    except Exception:  # it was read, and refused
        return True


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def dry_run(
    loop: Callable[[Callable[[str], object]], object],
    steps: int | None = None,
    expected: Sequence[str] = ("log", "evaluation", "save"),
) -> list[Finding]:
    """Run one's own loop with a stub that costs nothing, say nn.Linear(1, 1), and count what it does.

    Backward passes, optimizers' updates and their LRs, `torch.save` (which writes nothing here) and `Module.eval` are heard; what
    torch does not know of, such as a log, `loop(on)` tells by `on("log")`. Findings: what is `expected` and never comes, another
    number of updates than the `steps` that are planned, and a first update at an LR above the second's that then rises.
    """
    counts: Counter[str] = Counter()
    rates: dict[Optimizer, list[float]] = {}

    def on(what: str) -> None:
        counts[what] += 1

    def stepped(optimizer: Optimizer, *_: object) -> None:
        rates.setdefault(optimizer, []).append(max(float(group["lr"]) for group in optimizer.param_groups))

    def evaluated(module: nn.Module) -> nn.Module:
        on("evaluation")
        return module.train(False)

    handle, save, evaluate = register_optimizer_step_pre_hook(stepped), torch.save, nn.Module.eval
    torch.save, nn.Module.eval = (lambda *_, **__: on("save")), evaluated
    try:
        with backward_heard(lambda root: on("backward")):
            loop(on)
    finally:
        handle.remove()
        torch.save, nn.Module.eval = save, evaluate
    # an update may be that of several optimizers
    counts["update"] = max(counts["update"], *map(len, rates.values()), 0)
    heard = f"{counts['backward']} backward passes, {counts['update']} updates"
    told = []  # message, advice, value, limit
    if never := [what for what in expected if not counts[what]]:
        message = f"of {heard}: no {' and no '.join(never)} ever comes"
        advice = "count updates alone, and ask for the interval where an update was made: (step + 1) % a and step % b may never meet"
        told.append((message, advice, 0, 1))
    if steps is not None and counts["update"] != steps:
        message, advice = f"{steps} steps are planned and the loop makes {heard}", "count updates, not micro-batches"
        told.append((message, advice, counts["update"], steps))
    begins = [made[:3] for made in rates.values() if len(made) > 2]
    for first, second, _ in [three for three in begins if three[0] > JUMP * three[1] and three[2] > three[1]][:1]:
        message = f"the first update runs at {first:.3g}, the second at {second:.3g}, and then the LR rises"
        advice = "a warm-up is off by one: set the LR of an update before it, (step + 1) / warmup"
        told.append((message, advice, first, second))
    return [Finding("schedule", "warning", "loop", *facts) for facts in told]
