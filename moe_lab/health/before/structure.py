"""How model, optimizer and batch fit together: ties, copies, what nobody holds, stale tensors, 16-bit weights that cannot move,
arguments without effect."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..during.reached import leaves, n_averaged, untaught
from ..during.steps import law_of, unmovable
from ..during.tracking import held_by, is_master, storage
from ..findings import Finding, several
from ..sampling import elements, fetched, plain, sample_positions
from ..tokens import raw, within
from ..torch_private import takers
from .plan import OFF, Plan, family

# who takes no matrix
ALONE = {"grouped", *(f"{name}Backward0" for name in ("Exp", "Softplus", "Sigmoid", "Embedding"))}
MANY_CLASSES = 8  # a smaller factor is one that rates are tuned over anyway
LEFT_OUT = 0.05  # share of the targets, which a class of its own may have
OWN_NUMBER = "leave ignore_index at -100, and give padding that label, or a class of its own"
TO_SAVE = "not tried, to save forward passes"
COPIED = 0.8  # share of what trains that a copy of the model must hold; the rest may be a head
TO_TRAIN = "modules_to_save"  # as peft calls what is trained whole
TIE = re.compile(r"(?:^|_)(?:tie|tied|tying)(?:_|$)")


def broken_tie(model: nn.Module, plan: Plan | None) -> Finding | None:
    """A token table and a head of its shape that are two tensors: although the config ties them, or with the same numbers."""
    named = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.Linear))}
    tables = {name: m.weight for name, m in named.items() if isinstance(m, nn.Embedding)}
    heads = {name: m.weight for name, m in named.items() if isinstance(m, nn.Linear)}
    largest = max((len(table) for table in tables.values()), default=0)  # smaller ones are of kinds, of positions
    tables = {name: table for name, table in tables.items() if len(table) == largest}
    pairs = [(t, h) for t in tables for h in heads if tables[t].shape == heads[h].shape]
    if not pairs or any(storage(tables[t]) == storage(heads[h]) for t, h in pairs):
        return None
    asked = next((e for e in plan.entries if TIE.search(e.path[-1].lower())), None) if plan else None
    equal = [(t, h) for t, h in pairs if torch.equal(tables[t], heads[h]) and float(tables[t].detach().std()) > 0]
    if not equal and (asked is None or str(asked.value).lower() in OFF):
        return None
    table, head = (equal or pairs)[0]
    why = "hold the same numbers" if equal else f"should be one tensor by {asked.name}"
    message = f"{table} and {head} {why} and are two tensors: each learns for itself"
    advice = "tie them after the last to(), copy, wrapping or loading, before the optimizer is made"
    return Finding("broken_tie", "warning", head, message, advice)


def named_in_vain(model: nn.Module, plan: Plan) -> Finding | None:
    """Lists of modules to train beside an adapter, of a config or of the adapter's own, of which no module bears any name: one of a library's
    defaults is enough."""
    adapters = getattr(model, "peft_config", None)
    adapters = list(adapters.values()) if isinstance(adapters, Mapping) else []
    lists = [getattr(adapter, TO_TRAIN, None) for adapter in adapters]
    lists += [entry.value for entry in [plan.find(TO_TRAIN)] if entry]
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    for names in lists:
        wanted = [str(name) for name in names] if isinstance(names, (list, tuple, set)) else []
        if wanted and not any(name.rpartition(".")[2] in parts for name in wanted):
            message = f"{TO_TRAIN} names {several(sorted(wanted))}, and no module of the model is called so: nothing is trained for it"
            advice = "take the name from model.named_modules(): a head is called score, classifier or lm_head, by the model's class"
            return Finding("frozen_module", "warning", TO_TRAIN, message, advice, 0, len(wanted))
    return None


def stale(model: nn.Module, optimizers: Sequence[Optimizer]) -> Finding | None:
    """Tensors of the optimizer that are not the model's, where the model has others of their shapes that no optimizer has."""
    mine = {storage(p): (name, p) for name, p in model.named_parameters() if p.requires_grad}
    held = held_by(optimizers)
    missing = [pair for key, pair in mine.items() if key not in set(map(storage, held))]
    foreign = [p for p in held if storage(p) not in mine and p.numel()]
    foreign = [p for p in foreign if not any(is_master(p, of=q) for _, q in missing)]
    lost = [name for name, q in missing if any(p.shape == q.shape for p in foreign)]
    if not lost:
        return None
    message = f"{len(foreign)} tensors of the optimizer are not the model's, and {len(lost)} of the model's, of their shapes, are in none"
    advice = "make the optimizer after the model is moved, wrapped, converted, resized or given adapters, from its own parameters"
    return Finding("not_in_optimizer", "error", several(lost), message, advice, len(foreign), 0)


def is_numbers(t: Tensor) -> bool:
    """Floats that lie there as they are, on one device or several: not those that a class of its own packs."""
    return t.is_floating_point() and t.layout is torch.strided and (type(t) is Tensor or hasattr(t, "to_local"))


def unusable_state(optimizers: Sequence[Optimizer], names: Mapping[int, str]) -> Finding | None:
    """What an optimizer keeps of a tensor and is NaN or infinite: an infinite second moment makes each of its steps 0, for good."""
    kept = [
        (p, *item)
        for o in optimizers
        for p, mine in o.state.items()
        if isinstance(mine, Mapping)
        for item in mine.items()
    ]
    held = [(p, key, v) for p, key, v in kept if isinstance(v, Tensor) and is_numbers(v)]
    ill = fetched([(~plain(v).isfinite()).sum() for _, _, v in held])
    if not any(ill):
        return None
    where = several([f"{key} of {names.get(id(p), 'a tensor')}" for (p, key, _), n in zip(held, ill, strict=True) if n])
    message = f"{sum(ill)} numbers that the optimizers keep are NaN or infinite: {where}"
    advice = "begin with a fresh optimizer, or an older checkpoint: such elements never move again, or become NaN"
    return Finding("nonfinite_values", "error", "optimizers", message, advice, sum(ill), 0)


def averaged(graph: Sequence[Any]) -> Iterator[Finding]:
    """What an optimizer that knows no scale of its own takes for a smaller gradient."""
    if (n := next(filter(None, map(n_averaged, graph)), 0)) >= MANY_CLASSES:
        message = f"the loss is a mean over its {n} classes, too: each gradient, and each step of SGD, is {n} times as small as that of the sum"
        advice = (
            "sum over the classes first, as reduction='batchmean' of KLDivLoss does, or tune the learning rate for it"
        )
        yield Finding("starved_steps", "warning", "loss", message, advice, n, MANY_CLASSES)


def asked_by_loss(trial: Any) -> list[Finding]:
    """By its graph; what lies outside of the model's parameters, where an optimizer is given."""
    has_scale = any(family(type(o).__name__) == "sgd" for o in trial.optimizers)
    graph, known = trial.graph, {id(p) for model in (trial.given, trial.model) for p in model.parameters()}
    outside = [leaf for leaf in leaves(graph) if id(leaf) not in known] if trial.optimizers else []
    return [*untaught(outside, trial.copies), *trial.asked, *(averaged(graph) if has_scale else ())]


def ignored(trial: Any) -> Iterator[Finding]:
    """A class that the loss leaves out by its `ignore_index`, in the midst of rows, where no padding stands."""
    batch = trial.batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    shapes = {t.numel(): t.shape for t in parts if isinstance(t, Tensor) and t.ndim == 2}
    for target, left_out in trial.left_out:
        if (shape := shapes.get(target.numel())) is not None:
            share = float(within(target.view(shape) == left_out).float().mean())
            if share > LEFT_OUT:
                message = f"the loss leaves class {left_out} out (ignore_index), which is {share:.0%} of the targets within rows: it is never learned"
                yield Finding("never_a_target", "warning", "loss", message, OWN_NUMBER, round(share, 3), LEFT_OUT)


def copied(model: nn.Module, optimizers: Sequence[Optimizer]) -> set[str]:
    """Names of the tensors of a copy that the model keeps of itself, such as an average: of a module about as large as what trains,
    of which nothing trains, and whose matrices all hold the values of trained ones."""
    trained, named = set(map(id, held_by(optimizers))), dict(model.named_parameters())
    mine = [p for p in named.values() if id(p) in trained]
    formats = {p.dtype for p in named.values() if id(p) not in trained}
    known = {values(p, dtype) for p in mine if p.ndim > 1 for dtype in formats}
    found: set[str] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix))
        if len(own) >= COPIED * len(mine) and trained.isdisjoint(map(id, own.values())):
            matrices = [p for p in own.values() if p.ndim > 1]  # fresh norms are all alike
            found |= own.keys() if matrices and all(values(p, p.dtype) in known for p in matrices) else set()
    return found


def kind_of(module: nn.Module) -> tuple:
    return type(module), *(tuple(p.shape) for p in module.parameters())


def trained_parts(model: nn.Module, trained: set[int]) -> dict[tuple, nn.Module]:
    """By class and shapes, the modules that hold nearly all of what trains (ids), such as the model itself."""
    least = max(1, COPIED * len(trained))
    return {kind_of(m): m for m in model.modules() if sum(id(p) in trained for p in m.parameters()) >= least}


def lookalikes(parts: Mapping[tuple, nn.Module], things: Iterable[Any], trained: set[int]) -> list[nn.Module]:
    """Modules that look like one of these parts, and of which nothing trains: an average, or a target network."""
    classes = {kind for kind, *_ in parts}
    mine = (m for m in things if type(m) in classes and kind_of(m) in parts)
    return [m for m in mine if trained.isdisjoint(map(id, m.parameters()))]


def values(p: Tensor, dtype: torch.dtype) -> tuple:
    """Of its sample, in this format."""
    sample = elements(plain(p), sample_positions(plain(p).shape).to(p.device))
    return tuple(p.shape), raw(sample.to(dtype).cpu())


def cannot_move(model: nn.Module, optimizers: Sequence[Optimizer]) -> Finding | None:
    """16-bit tensors that no gradient can move at the peak LR (`unmovable`)."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [pair for o in optimizers for group in o.param_groups for pair in unmovable(o, group)]
    steps = {names[id(p)]: step for p, step in found if id(p) in names}
    if not (stuck := list(steps)):
        return None
    most = f"a step of at most {max(steps.values()):.1e} is rounded away"
    message = f"{len(stuck)} tensors of 16 bits can never move: {most}: {several(stuck)}"
    advice = "keep the parameters in float32 and compute under autocast"
    return Finding("bf16_parameters", "error", several(stuck), message, advice, len(stuck), 0)


def not_linear(trial: Any) -> Iterator[Finding]:
    """Tensors whose steps are orthogonal, and that no product of the loss's graph takes: each of their elements, or rows, stands for
    itself."""
    used, mine = takers(trial.loss), dict(trial.model.named_parameters())
    by_law = {id(p) for o in trial.optimizers for g in o.param_groups if law_of(o, g) for p in g["params"]}
    names = [name for name, p in trial.given.named_parameters() if id(p) in by_law and p.ndim > 1]
    if wrong := [name for name in names if used.get(id(mine[name])) and used[id(mine[name])] <= ALONE]:
        message = f"{len(wrong)} tensors get orthogonal steps and are no matrix of any product: {several(wrong)}"
        advice = "choose Muon's tensors by their module, not by their number of dimensions; give these to AdamW"
        yield Finding("not_linear", "warning", wrong[0], message, advice, len(wrong), 0)


def called(part: Any) -> str:
    """A part of a batch, by its key or its place."""
    return f"the batch's part {part}" if isinstance(part, int) else repr(part)


def without_effect(trial: Any) -> Iterator[Finding]:
    """Change a third of each tensor of the batch: a loss that stays the same to the bit does not know of it. A warning for what looks
    like a mask. Raises ValueError after the findings where there are more tensors than spare forward passes: masks come first."""
    batch = trial.batch
    parts = dict(batch if isinstance(batch, Mapping) else enumerate(batch if isinstance(batch, (tuple, list)) else ()))
    tensors = {n: v for n, v in parts.items() if isinstance(v, Tensor) and v.ndim and v.numel() > 2}
    masks = {name for name, value in tensors.items() if ((value == 0) | (value == 1)).all()}
    ordered = sorted(tensors, key=lambda name: name not in masks)
    tried = ordered[: trial.spare]
    for name in tried:
        value, is_mask = tensors[name], name in masks
        other = 1 - value.int() if is_mask else value.flip(0).roll(1, -1) if value.ndim > 1 else value.roll(1)
        third = (torch.arange(value.numel(), device=value.device) % 3 == 1).view(value.shape)
        changed = torch.where(third, other.to(value.dtype), value)
        whole = parts | {name: changed}
        given = whole if isinstance(batch, Mapping) else type(batch)(whole.values())
        if not torch.equal(changed, value) and torch.equal(trial.loss_of(given), trial.loss):
            message = f"a third of {called(name)} was changed and the loss is the same to the bit: nothing uses it, or a factor of 0"
            advice = "follow it from the batch to the loss: it may be dropped on the way, or overwritten"
            yield Finding("no_effect", "warning" if is_mask else "info", str(name), message, advice, 0, 0)
    if rest := ordered[len(tried) :]:
        raise ValueError(f"{TO_SAVE}: {', '.join(map(called, rest))}")
