"""Findings from a checkpoint alone: what never moved, which learning rate is baked in. Nothing in the file is executed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..before.preflight import preflight
from ..during.state import several
from ..findings import Finding
from .checkpoint_file import (
    WEIGHTS,
    by_kind,
    is_readable,
    keeps_lost_bits,
    learning_rates,
    load,
    numbers,
    optimizer_steps,
    parts,
    updates_of,
    weights_of,
    wide,
)

MANY_UNCHANGED = 0.5  # share of a kind's sampled elements from which on it is worth a line
LR_RULES = ("lr_too_low", "lr_too_high", "muon_convention")


class Sampled(NamedTuple):
    """One tensor now and at its start, at the places that the checkpoint kept."""

    name: str
    n_elements: int
    n_unchanged: int  # bit-identical


def inspect_checkpoint(path: str | Path) -> list[Finding]:
    """Findings from a file of torch.save: one of this package, of another trainer, or a bare mapping of tensors.

    Files of this package hold a sample of start values, so that what never moved is known. In others only tensors that
    are one constant throughout can be told, and a finding says so. A file that is cut short, that needs code to be read, or
    that holds no tensors is the finding `unreadable`. Raises ValueError, in one line, if there is no file to read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give the path of a checkpoint")
    state, problem = load(path)
    weights = {} if problem else weights_of(state)
    if not weights:
        reason = problem or "it holds no tensors by name, neither itself nor under " + ", ".join(WEIGHTS)
        return [
            Finding(
                rule="unreadable",
                severity="error",
                where=str(path),
                message=f"not a checkpoint that can be inspected: {reason}",
                advice="use another checkpoint",
            )
        ]
    sample = state.get("initial_sample")
    readable = {name: t for name, t in weights.items() if is_readable(t)}
    findings = list(nonfinite(readable))
    if isinstance(sample, Mapping):
        rows, odd = compare(readable, sample)
        findings += odd
        findings += unread_tensors(weights.keys() - readable.keys())
        findings += never_moved(rows, updates_of(state), learning_rates(state))
    else:
        findings += unread_tensors(weights.keys() - readable.keys())
        findings += constants(readable, updates_of(state))
    return [*findings, *sixteen_bits(readable, state), *baked_in(state), *counters(state)]


def nonfinite(weights: Mapping[str, Tensor]) -> Iterator[Finding]:
    bad = [name for name, t in weights.items() if t.is_floating_point() and not wide(t).isfinite().all()]
    if bad:
        yield Finding(
            rule="nonfinite_values",
            severity="error",
            where=several(bad),
            value=len(bad),
            limit=0,
            message=f"{len(bad)} of {len(weights)} tensors hold NaN or infinite values",
            advice="resume from an earlier checkpoint, with a lower learning rate",
        )


def unread_tensors(names: Iterable[str]) -> Iterator[Finding]:
    names = sorted(names)
    if names:
        yield unexpected(names, "warning", "sparse, quantised or without values: not inspected")


def unexpected(names: list[str], severity: str, what: str) -> Finding:
    return Finding(
        rule="unexpected_tensors",
        severity=severity,
        where=several(names),
        value=len(names),
        message=f"{several(names)}: {what}",
        advice="see whether the file belongs to the run, and whether it was edited",
    )


def compare(weights: Mapping[str, Tensor], sample: Mapping) -> tuple[list[Sampled], list[Finding]]:
    """Every sampled tensor now against its start, and findings about names, shapes and samples that do not fit."""
    rows, misfits = [], []
    for name, kept in sample.items():
        index, value = (kept.get("index"), kept.get("value")) if isinstance(kept, Mapping) else (None, None)
        whole = isinstance(index, Tensor) and isinstance(value, Tensor) and index.dtype == torch.int64
        now = weights.get(name)
        if not whole or now is None or index.shape != value.shape or not is_readable(index) or not is_readable(value):
            misfits.append(str(name))
            continue
        if not index.numel():
            continue
        if index.min() < 0 or index.max() >= now.numel():
            misfits.append(str(name))
            continue
        # a run that was cast after its start counts from the cast values
        unchanged = wide(now.flatten()[index]) == wide(value.to(now.dtype))
        rows.append(Sampled(str(name), index.numel(), int(unchanged.sum())))
    findings = []
    if misfits:
        what = "the sample of start values names tensors that are not there, or of another size"
        findings.append(unexpected(misfits, "warning", what))
    extra = sorted(weights.keys() - sample.keys())
    if extra:
        findings.append(unexpected(extra, "info", "no start values are kept of it, so that it cannot be judged"))
    return rows, findings


def never_moved(rows: list[Sampled], updates: int | None, rates: Mapping[str, float]) -> Iterator[Finding]:
    """Per kind, the tensors of which no sampled element has moved; and the kinds of which most elements have not."""
    if updates == 0:
        yield nothing_yet()
        return
    by_name = {row.name: row for row in rows}
    stuck = {row.name for row in rows if row.n_unchanged == row.n_elements}
    should_move = bool(updates) and len(stuck) < len(rows) and max(rates.values(), default=0.0) > 0
    after = f"in {updates} updates" if updates else "since the start"
    slow: dict[str, float] = {}
    for kind, names in by_kind(by_name).items():
        frozen = [name for name in names if name in stuck]
        share = sum(by_name[n].n_unchanged for n in names) / sum(by_name[n].n_elements for n in names)
        if frozen:
            yield Finding(
                rule="never_moved",
                severity="error" if should_move else "warning",
                where=several(frozen),
                value=len(frozen) / len(names),
                limit=0,
                message=f"{len(frozen)} of {len(names)} {kind}: no sampled element has moved {after}",
                advice="see whether their updates are rounded away (16-bit parameters), get no gradient or no optimizer",
            )
        elif share >= MANY_UNCHANGED:
            slow[kind] = share
    if slow:
        worst = sorted(slow, key=slow.get, reverse=True)
        shown = ", ".join(f"{kind} {slow[kind]:.0%}" for kind in worst[:4]) + (", …" if len(worst) > 4 else "")
        yield Finding(
            rule="never_moved",
            severity="info",
            where=several(worst),
            value=slow[worst[0]],
            limit=MANY_UNCHANGED,
            message=f"{len(slow)} kinds of tensors have moved in part only {after}; unchanged sampled elements: {shown}",
            advice="expected of embedding rows whose tokens did not occur; else updates are small, or rounded away",
        )


def nothing_yet() -> Finding:
    return Finding(
        rule="never_moved",
        severity="info",
        where="every tensor",
        message="the checkpoint was written before the first update: it cannot show what moves",
        advice="inspect a later one",
    )


def constants(weights: Mapping[str, Tensor], updates: int | None) -> Iterator[Finding]:
    """Of a file without start values: tensors that are one number throughout, as norms and biases are at their start."""
    if updates == 0:
        yield nothing_yet()
        return
    floating = {name: t for name, t in weights.items() if t.is_floating_point() and t.numel() > 1}
    values = {}
    for name, t in floating.items():
        first = wide(t.flatten()[:1])
        if bool((wide(t) == first).all()):
            values[name] = first.item()
    for kind, names in by_kind(floating).items():
        constant = [name for name in names if name in values]
        if constant:
            levels = sorted({values[name] for name in constant})
            shown = ", ".join(f"{level:g}" for level in levels[:3]) + (", …" if len(levels) > 3 else "")
            yield Finding(
                rule="never_moved",
                severity="warning",
                where=several(constant),
                value=shown,
                message=f"{len(constant)} of {len(names)} {kind}: exactly {shown} in every element, as at a start",
                advice="if they were trained, see whether their updates are rounded away (16-bit parameters) or never made",
            )
    yield Finding(
        rule="never_moved",
        severity="info",
        where="every other tensor",
        message=f"no start values in the file: of its {len(weights)} tensors only constant ones can be told to have stood "
        "still. A comparison with a freshly drawn start proves nothing, since any two draws differ",
        advice="keep some start values in each checkpoint, or compare with the run's own first one",
    )


def sixteen_bits(weights: Mapping[str, Tensor], state: Mapping) -> Iterator[Finding]:
    """16-bit weights without anything in the optimizer's state that keeps what rounding loses."""
    narrow = [name for name, t in weights.items() if t.dtype in (torch.bfloat16, torch.float16)]
    optimizers = list(parts(state, "optim"))
    if not narrow or keeps_lost_bits(optimizers):
        return
    formats = " and ".join(sorted({str(weights[name].dtype).removeprefix("torch.") for name in narrow}))
    trained = any(part.get("state") for part in optimizers)
    yield Finding(
        rule="bf16_parameters",
        severity="error" if trained else "info",
        where=several(narrow),
        value=len(narrow) / len(weights),
        limit=0,
        message=f"{len(narrow)} of {len(weights)} tensors are {formats}, and "
        + (
            "the optimizer's state keeps nothing of what rounding loses"
            if trained
            else "no optimizer state says how they got so"
        ),
        advice="train float32 parameters and compute under autocast"
        if trained
        else "fine for a copy to run; not one to train further as it is",
    )


def baked_in(state: Mapping) -> Iterator[Finding]:
    """The learning rates that a plain load_state_dict would bring back; a warning if they are out of the usual range."""
    rates = learning_rates(state)
    for part in parts(state, "sched"):
        for key in ("max_lr", "max_lrs", "base_lrs"):
            for lr in numbers([part.get(key)])[:1]:
                rates[f"scheduler {key}"] = lr
    if not rates:
        return
    config = state.get("config")
    wrong = (
        [f for f in preflight(config) if f.rule in LR_RULES and f.severity != "info"]
        if isinstance(config, Mapping)
        else []
    )
    shown = ", ".join(f"{name} {lr:.3g}" for name, lr in rates.items())
    yield Finding(
        rule="lr_baked_in",
        severity="warning" if wrong else "info",
        where=wrong[0].where if wrong else "optimizer and scheduler state",
        value=shown,
        message=f"the checkpoint stores learning rates: {shown}. A plain load_state_dict brings them back over a corrected "
        "config" + (f", and they look wrong: {wrong[0].rule}: {wrong[0].message}" if wrong else ""),
        advice="after load_state_dict, set each group's lr and initial_lr and the scheduler's maximum from the config",
    )


def counters(state: Mapping) -> Iterator[Finding]:
    """The checkpoint's step and tokens against the updates that its optimizer counted."""
    step, counted = numbers([state.get("step")]), optimizer_steps(state)
    if step and counted is not None and int(step[0]) != counted:
        yield Finding(
            rule="step_counters",
            severity="warning",
            where="step",
            value=step[0],
            limit=counted,
            message=f"the checkpoint says step {step[0]:g} and its optimizer has made {counted} updates",
            advice="see whether steps count micro-batches: then schedules and intervals end too early or never come",
        )
    config, tokens = state.get("config"), numbers([state.get("tokens_seen")])
    training, model = ((config.get(k) if isinstance(config, Mapping) else None) for k in ("training", "model"))
    if not (step and tokens and isinstance(training, Mapping) and isinstance(model, Mapping)):
        return
    sizes = numbers([training.get("batch_size"), training.get("gradient_accumulation_steps"), model.get("max_seq_len")])
    if len(sizes) == 3 and tokens[0] != step[0] * math.prod(sizes):
        yield Finding(
            rule="step_counters",
            severity="warning",
            where="tokens_seen",
            value=tokens[0],
            limit=step[0] * math.prod(sizes),
            message=f"tokens_seen is {tokens[0]:g} and {step[0]:g} updates of the stored config are "
            f"{step[0] * math.prod(sizes):g} tokens",
            advice="see whether steps count micro-batches, or whether the batch was changed on the way",
        )
