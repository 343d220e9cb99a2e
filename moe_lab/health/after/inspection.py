"""Findings from a checkpoint alone: what never moved, which learning rate is baked in. Nothing in the file is executed."""

import errno
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..before.plan import Plan
from ..before.preflight import entries_of_mapping, judged_rates
from ..during.intended import keeps_bits
from ..findings import Finding, grouped, several
from ..sampling import tensor_kind

WEIGHTS = ("model_state_dict", "state_dict", "model")  # where trainers keep the tensors; or the file is the mapping
NO_MEMORY = re.compile(r"can(?:'t|not) allocate|not enough memory", re.IGNORECASE)
STEPS = ("step", "global_step", "global_steps")  # what a checkpoint itself calls its step
DEEPEST = 6  # levels of mappings and lists in which an optimizer's state is looked for
TOKENS = ("tokens_seen", "n_tokens", "consumed_tokens")
STUCK = "see whether their updates are rounded away (16-bit parameters) or never made"
MICRO_BATCHES = "see whether steps count micro-batches, or whether the batch was changed on the way"

Start = tuple[Tensor, Tensor]  # of a tensor: flat positions, int64, and the values there when the run began


def inspect_checkpoint(path: str | Path) -> list[Finding]:
    """Findings from a file of torch.save: of any trainer's, or a bare mapping of tensors.

    Where the file holds `health.start_sample(model)` of step 0 under `initial_sample`, what never moved is known. In others
    only tensors that are one constant throughout can be told, and a finding says so. A file that is cut short, that needs
    code to be read, or that holds no tensors is the finding `unreadable`. Raises ValueError, in one line, if there is no
    file, or the machine cannot read it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give the path of a checkpoint")
    state, problem = load(path)
    weights = weights_of(state)
    if not weights:
        reason = problem or "it holds no tensors by name, neither itself nor under " + ", ".join(WEIGHTS)
        message = f"not a checkpoint that can be inspected: {reason}"
        return [Finding("unreadable", "error", str(path), message, "use another checkpoint")]
    readable = {name: t for name, t in weights.items() if is_readable(t)}
    config, plan = state.get("config"), Plan([])  # that of none, or of one of a size that is no config's
    with suppress(ValueError):
        plan = Plan(entries_of_mapping(config if isinstance(config, Mapping) else {}))
    return [
        *nonfinite(readable),
        *held_against_start(readable, state),
        *unexpected(weights.keys() - readable.keys(), "warning", "sparse, quantised or without values: not inspected"),
        *sixteen_bits(readable, state),
        *baked_in(state, plan, sum(t.numel() for t in weights.values())),
        *counters(state, plan),
    ]


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[Any, str]:
    """What the file holds and an empty text, or None and why it cannot be read. Only tensors and plain values are built.

    Raises ValueError, in one line, where not the file is at fault: no permission, a disk's error, too little memory.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), ""
    except Exception as error:
        no_memory = isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
        # torch looks for the end of a file that is cut short before its beginning: EINVAL
        if no_memory or isinstance(error, OSError) and error.errno != errno.EINVAL:
            reason = "not enough memory" if no_memory else error.strerror or str(error)
            raise ValueError(f"{path}: cannot be read: {reason}") from error
        if asked := re.search(r"GLOBAL (\S+)", str(error)):  # how torch names what it refused to look up
            return None, f"it asks for {asked[1]}, no plain value: reading it could run code, so it was not read"
        return None, f"it is cut short, damaged, or no file of torch.save ({type(error).__name__})"


def weights_of(state: Any) -> dict[str, Tensor]:
    """The named tensors of a checkpoint; empty if there are none."""
    places = [*map(state.get, WEIGHTS), state] if isinstance(state, Mapping) else []
    found = ({str(k): t for k, t in place.items() if isinstance(t, Tensor)} for place in contents(places, Mapping))
    return next(filter(None, found), {})


def is_readable(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu" and not t.is_quantized


def wide(t: Tensor) -> Tensor:
    """8-bit floats, which have few operations, as float32; every other tensor as it is."""
    return t.float() if t.is_floating_point() and t.itemsize == 1 else t


def numbers(*values: Any) -> list[float]:
    """The finite numbers among values, single ones in tensors and in lists included."""
    finite = []
    for value in values:
        if is_readable(value) and value.numel() == 1:
            value = value.item()
        if isinstance(value, (list, tuple)):
            finite += numbers(*value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            finite.append(float(value))
    return finite


def contents(tree: Any, kind: type = object) -> list:
    """A mapping's values of this kind, or a list's; none of anything else."""
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [value for value in values if isinstance(value, kind)]


def parts(state: Mapping, word: str) -> list[Mapping]:
    """The mappings that a checkpoint keeps under keys with `word`, singly or in lists."""
    named = [value for key, value in state.items() if word in str(key).lower()]
    listed = [value if isinstance(value, (list, tuple)) else [value] for value in named]
    return [part for values in listed for part in contents(values, Mapping)]


def optimizers(tree: Any, depth: int = DEEPEST) -> list[Mapping]:
    """Every optimizer's state dict in a checkpoint, whatever holds it."""
    if isinstance(tree, Mapping) and {"state", "param_groups"} <= tree.keys():
        return [tree]
    return [found for part in contents(tree) for found in optimizers(part, depth - 1)] if depth else []


def in_optimizers(state: Mapping, key: str) -> list[Mapping]:
    """The `param_groups` of all stored optimizers, or the `state` of each of their tensors."""
    return [inner for part in optimizers(state) for inner in contents(part[key], Mapping)]


def stored_rates(state: Mapping) -> dict[str, float]:
    """Peak LR of each optimizer group: `initial_lr` where there is one, else `lr`."""
    groups = enumerate(in_optimizers(state, "param_groups"))
    rates = {g.get("name", f"group_{i}"): numbers(g.get("initial_lr"), g.get("lr")) for i, g in groups}
    return {str(name): lr[0] for name, lr in rates.items() if lr}


def optimizer_steps(state: Mapping) -> int | None:
    """The most updates that an optimizer counted for one tensor; None if none counts."""
    counted = numbers(*(entry.get("step") for entry in in_optimizers(state, "state")))
    return int(max(counted)) if counted else None


# ---- findings --------------------------------------------------------------------------------------------------------


def nonfinite(weights: Mapping[str, Tensor]) -> Iterator[Finding]:
    bad = [name for name, t in weights.items() if t.is_floating_point() and not wide(t).isfinite().all()]
    if bad:
        message = f"{len(bad)} of {len(weights)} tensors hold NaN or infinite values"
        advice = "resume from an earlier checkpoint, with a lower learning rate"
        yield Finding("nonfinite_values", "error", several(bad), message, advice, len(bad), 0)


def unexpected(names: Iterable[str], severity: str, what: str) -> Iterator[Finding]:
    if names := sorted(names):
        where, advice = several(names), "see whether the file is of this run, and was not edited"
        yield Finding("unexpected_tensors", severity, where, f"{where}: {what}", advice, len(names))


def held_against_start(weights: Mapping[str, Tensor], state: Mapping) -> Iterator[Finding]:
    """What has moved, by the start values in the file, or by the constants that a start leaves."""
    sample = state.get("initial_sample")
    updates = next(iter(numbers(optimizer_steps(state), *map(state.get, STEPS))), None)
    if isinstance(sample, Mapping):
        starts = {str(name): start_of(kept, weights.get(name)) for name, kept in sample.items()}
        misfits = [name for name, start in starts.items() if start is None]
        yield from unexpected(misfits, "warning", "start values of another size, or it is missing")
        extra = weights.keys() - starts.keys()
        yield from unexpected(extra, "info", "no start values, so that it cannot be judged")
    if updates == 0:
        message = "the checkpoint was written before the first update: it cannot show what moves"
        yield Finding("never_moved", "info", "every tensor", message, "inspect a later one")
    elif isinstance(sample, Mapping):
        starts = {name: start for name, start in starts.items() if start and len(start[0])}
        yield from never_moved(weights, starts, updates, any(stored_rates(state).values()))
    else:
        yield from constants(weights)


def start_of(kept: Any, now: Tensor | None) -> Start | None:
    """What is kept of a tensor's start, if it can be held against the tensor now."""
    index, value = (kept.get(key) if isinstance(kept, Mapping) else None for key in ("index", "value"))
    fits = now is not None and is_readable(index) and is_readable(value)
    fits = fits and index.dtype == torch.int64 and index.shape == value.shape
    return (index, value) if fits and ((index >= 0) & (index < now.numel())).all() else None


def kind_of(name: str) -> str:
    """What a tensor is: all norms' weights together, else the name with its numbers left out."""
    *module, last = name.split(".")
    if module and re.search(r"norm|(?:^|_)ln", module[-1].lower()):
        return f"norm {'biases' if last == 'bias' else 'weights'}"
    return tensor_kind(name)


def never_moved(
    weights: Mapping[str, Tensor], starts: Mapping[str, Start], updates: float | None, has_rates: bool
) -> Iterator[Finding]:
    same = {}  # elements that are bit-identical now; of a run that was cast after its start, to the cast values
    for name, (index, value) in starts.items():
        same[name] = wide(weights[name].flatten()[index]) == wide(value.to(weights[name].dtype))
    stuck = {name for name, elements in same.items() if elements.all()}
    severity = "error" if updates and has_rates and len(stuck) < len(starts) else "warning"
    after = f"in {updates:.0f} updates" if updates else "since the start"
    for kind, names in grouped(starts, kind_of).items():
        frozen = [name for name in names if name in stuck]
        if frozen:
            message = f"{len(frozen)} of {len(names)} {kind}: no sampled element has moved {after}"
            yield Finding("never_moved", severity, several(frozen), message, STUCK, len(frozen) / len(names), 0)


def constants(weights: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Of a file without start values: tensors that are one number throughout, as norms and biases are at their start."""
    floating = {name: t for name, t in weights.items() if t.is_floating_point() and t.numel() > 1}
    firsts = {name: wide(t.flatten()[0]) for name, t in floating.items()}
    values = {name: firsts[name].item() for name, t in floating.items() if (wide(t) == firsts[name]).all()}
    for kind, names in grouped(floating, kind_of).items():
        constant = [name for name in names if name in values]
        if constant:
            listed = " or ".join(f"{level:g}" for level in sorted({values[name] for name in constant})[:3])
            message = f"{len(constant)} of {len(names)} {kind}: exactly {listed} in every element, as at a start"
            yield Finding("never_moved", "warning", several(constant), message, STUCK, listed)
    message = "no start values in the file, and any two draws differ: only constants are seen to stand still"
    advice = "keep health.start_sample(model) of step 0 in each, as `initial_sample`"
    yield Finding("never_moved", "info", "every other tensor", message, advice)


def sixteen_bits(weights: Mapping[str, Tensor], state: Mapping) -> Iterator[Finding]:
    """16-bit weights without anything in the optimizer's state that keeps what rounding loses."""
    narrow = [name for name, t in weights.items() if t.dtype in (torch.bfloat16, torch.float16)]
    kept = [*parts(state, "optim"), *optimizers(state), *in_optimizers(state, "state")]
    if not narrow or keeps_bits(kept, in_optimizers(state, "param_groups")):
        return
    formats = " and ".join(sorted({str(weights[name].dtype).removeprefix("torch.") for name in narrow}))
    if in_optimizers(state, "state"):
        severity, why = "error", "the optimizer's state keeps nothing of what rounding loses"
        advice = "train float32 parameters and compute under autocast"
    else:
        severity, why = "info", "no optimizer state says how they got so"
        advice = "fine for a copy to run; not one to train further as it is"
    message = f"{len(narrow)} of {len(weights)} tensors are {formats}, and {why}"
    yield Finding("bf16_parameters", severity, several(narrow), message, advice, len(narrow) / len(weights), 0)


def baked_in(state: Mapping, plan: Plan, n_parameters: int) -> Iterator[Finding]:
    """The learning rates that a plain load_state_dict would bring back; a warning if they are out of the usual range."""
    rates = stored_rates(state)
    for part in parts(state, "sched"):
        for key in ("max_lr", "max_lrs", "base_lrs"):
            rates |= {f"scheduler {key}": lr for lr in numbers(part.get(key))[:1]}
    if not rates:
        return
    severity, where = "info", "optimizer and scheduler state"
    listed = ", ".join(f"{name} {lr:.3g}" for name, lr in rates.items())
    message = f"the checkpoint stores learning rates: {listed}. A plain load_state_dict brings them back over a corrected config"
    size = plan.n_parameters() and n_parameters  # a transformer's, or not to be judged
    for wrong in [f for f in judged_rates(plan, size) if f.severity != "info"][:1]:
        severity, where = "warning", wrong.where
        message += f", and they look wrong: {wrong.rule}: {wrong.message}"
    advice = "after load_state_dict, set lr, initial_lr and the scheduler's maximum from the config"
    yield Finding("lr_baked_in", severity, where, message, advice, listed)


def counters(state: Mapping, plan: Plan) -> Iterator[Finding]:
    counted, at_once = optimizer_steps(state), plan.tokens_per_update()
    together = max(1, len(optimizers(state)))  # some trainers count each optimizer's steps
    for step in numbers(*map(state.get, STEPS))[:1]:
        if counted is not None and int(step) not in (counted, counted - 1, counted * together):  # or began at 0
            message = f"the checkpoint says step {step:g} and its optimizer has made {counted} updates"
            yield Finding("step_counters", "warning", "step", message, MICRO_BATCHES, step, counted)
        told = [(name, tokens) for name in TOKENS for tokens in numbers(state.get(name))]
        for name, tokens in told[:1]:
            if at_once is not None and tokens != step * at_once:
                planned = step * at_once
                message = f"{name} is {tokens:g} and {step:g} updates of the stored config are {planned:g} tokens"
                yield Finding("step_counters", "warning", name, message, MICRO_BATCHES, tokens, planned)
