"""Findings from a config and its comments, before a second of compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from ..conventions import ADAMW_RMS, adam_largest_step, judge, muon_element_step
from ..findings import Finding
from ..measures import predict_lost
from .comments import contradiction
from .plan import Comment, Entry, Plan, as_number, sum_of_shares

MOST_KEYS = 10_000  # a file with more is no config; aliases of aliases can make one line hold billions
SAMPLE = 100_000  # weights drawn to predict a share: good to a third of a percent
DEEPEST = 50  # levels of nested mappings
EARLY = 100  # updates by which a sick run should be told from a healthy one

# Keys of the case and of its relatives that look like knobs and that nothing reads (B20), and what is read instead.
DEAD_KEYS = {
    "training.weight_decay": "optimizer.weight_decay",
    "training.lr": "training.max_lr",
    "training.learning_rate": "training.max_lr",
    "model.capacity_factor": "model.moe_capacity_factor",
    "model.expert_capacity_factor": "model.moe_capacity_factor",
    "model.moe.capacity_factor": "model.moe_capacity_factor",
    "model.mod.capacity_factor": "model.mod_capacity_factor",
    "optimizer.newton_iters": "optimizer.ns_steps",
    "optimizer.muon.newton_iters": "optimizer.ns_steps",
    "optimizer.muon.nesterov": "optimizer.nesterov",
    "training.nesterov": "optimizer.nesterov",
    "training.dtype": "precision.parameters and precision.compute",
    "training.mixed_precision": "precision.compute",
}
OTHERS_DTYPES = ("param_dtype", "params_dtype", "parameter_dtype", "model_dtype", "torch_dtype")
REMEDIES = ("kahan", "stochastic_round", "master_weight", "master_param", "fp32_master", "remedy")


def preflight(source: str | Path | Mapping) -> list[Finding]:
    """Findings from a YAML file, comments included, or from a mapping such as `to_dict(config)`.

    Knows the sections of this package, and of other projects the keys that it recognises. `where` is `file:line` for a
    file, the key for a mapping. What the keys do not tell is not judged. Raises ValueError, in one line, for a source that
    cannot be read as a mapping.
    """
    if isinstance(source, Mapping):
        origin, entries = None, limited(entries_of_mapping(source), "config")
    elif isinstance(source, (str, Path)):
        origin, entries = str(source), read_entries(Path(source))
    else:
        raise ValueError(f"preflight takes a YAML file or a mapping, got {type(source).__name__}; try to_dict(config)")
    plan = Plan(entries)

    def where(entry: Entry) -> str:
        return f"{origin}:{entry.line}" if entry.line else entry.name

    return [
        *parameter_formats(plan, where),
        *learning_rates(plan, where),
        *contradicted_comments(plan, where),
        *schedule(plan, where),
        *dead_keys(plan, where),
    ]


# ---- reading ---------------------------------------------------------------------------------------------------------


def entries_of_mapping(values: Mapping, path: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The plain values of nested mappings and of lists of mappings, in order."""
    if len(path) > DEEPEST:
        raise ValueError(f"{path[0]} is nested more than {DEEPEST} deep, or holds itself; give plain nested values")
    for key, value in values.items():
        inner = (*path, str(key))
        if isinstance(value, Mapping):
            yield from entries_of_mapping(value, inner)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            yield from entries_of_mapping({index: item for index, item in enumerate(value)}, inner)
        else:
            yield Entry(inner, list(value) if isinstance(value, tuple) else value)


def read_entries(path: Path) -> list[Entry]:
    """The entries of a YAML file with their lines and comments. Nothing but plain YAML values is ever constructed."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    lines = text.splitlines() + [""]  # an empty value at the end of a file stands in the line after it

    def walk(node: yaml.Node, path_to: tuple[str, ...], ancestors: tuple[int, ...]) -> Iterator[Entry]:
        if id(node) in ancestors:
            raise yaml.MarkedYAMLError(problem="an alias refers to itself", problem_mark=node.start_mark)
        inner = (*ancestors, id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from walk(value, (*path_to, str(key.value)), inner)
        elif isinstance(node, yaml.SequenceNode) and not all(isinstance(v, yaml.ScalarNode) for v in node.value):
            for index, value in enumerate(node.value):
                yield from walk(value, (*path_to, str(index)), inner)
        else:
            try:
                value = loader.construct_object(node, deep=True)
            except (ValueError, KeyError, AttributeError, OverflowError) as error:  # a 13th month, `!!bool maybe`
                problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error
            line, end = node.start_mark.line, node.end_mark
            yield Entry(path_to, value, line + 1, lines[line], comments_of(lines, line, end.line, end.column))

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ValueError(f"{path}: the file is empty; a config holds sections such as `model:`")
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(
                f"{path}, line {root.start_mark.line + 1}: no keys and values; write sections such as `model:`"
            )
        return limited(walk(root, (), ()), path)
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{at}: not valid YAML: {' '.join(str(error.problem).split())}; correct it") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}; correct it") from None


def limited(entries: Iterator[Entry], origin: str | Path) -> list[Entry]:
    found = list(islice(entries, MOST_KEYS + 1))
    if len(found) > MOST_KEYS:
        raise ValueError(f"{origin}: more than {MOST_KEYS} keys; is this a config?")
    return found


def comments_of(lines: list[str], first: int, last: int, column: int) -> tuple[Comment, ...]:
    """The comment lines right above line `first` and the comment after `column` of line `last`; lines count from 0."""
    found = []
    above = first - 1
    while above >= 0 and lines[above].lstrip().startswith("#"):
        found.insert(0, Comment(above + 1, lines[above].strip().lstrip("# ")))
        above -= 1
    before, mark, beside = lines[last][column:].partition("#") if last < len(lines) else ("", "", "")
    if mark and (before == "" or before[-1].isspace() or before.strip() in ("}", "]", ",")):
        found.append(Comment(last + 1, beside.strip()))
    return tuple(found)


# ---- rules -----------------------------------------------------------------------------------------------------------


def parameter_formats(plan: Plan, where) -> Iterator[Finding]:
    """Parameters kept in bfloat16, unless a key names masters, Kahan summation or stochastic rounding."""
    ours = next((e for e in plan.entries if e.path[-2:] == ("precision", "parameters")), None)
    entry = ours or next((plan.by_key[key] for key in OTHERS_DTYPES if key in plan.by_key), None)
    if entry is None or str(entry.value).lower().removeprefix("torch.") not in ("bfloat16", "bf16"):
        return
    if any(word in e.name.lower() and e.value not in (None, False, "") for word in REMEDIES for e in plan.entries):
        return
    yield Finding(
        rule="bf16_parameters",
        severity="error" if ours else "warning",  # another project's optimizer may keep float32 masters
        where=where(entry),
        value=str(entry.value),
        limit="float32",
        message=f"{entry.name}: {entry.value} keeps the weights in 16 bits{predicted_losses(plan)}",
        advice="keep float32 parameters and compute under autocast (precision.parameters: float32)"
        if ours
        else "keep float32 parameters and compute under autocast, unless the optimizer has float32 masters",
    )


def predicted_losses(plan: Plan) -> str:
    """What bfloat16 would cost at the planned peak learning rates, as a clause; empty if no learning rate is known."""
    groups, parts = [group for group, _ in plan.groups()], []
    adam = min((group.lr for group in groups if group.kind == "adam"), default=None)
    if adam is not None:
        most = adam_largest_step(betas_of(plan)) * adam
        if most <= 2.0**-9:
            parts.append(
                f"a norm weight at 1.0 loses every update (at most {most:.1e}; it takes more than 2^-9 = 2.0e-03)"
            )
        elif most <= 2.0**-8:
            parts.append(
                f"a norm weight at 1.0 can only shrink (at most {most:.1e} a step; up takes more than 3.9e-03)"
            )
    matrices = next((g for g in groups if g.kind == "muon"), None) or next(
        (g for g in groups if g.kind == "adam"), None
    )
    if matrices is not None and (matrices.kind == "adam" or plan.number("d_model")):
        std = plan.number("init_std") or 0.02
        muon = matrices.kind == "muon"
        step = muon_element_step(*matrices[2:]) if muon else ADAMW_RMS * matrices.lr
        weights = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(1)) * std
        lost = predict_lost(weights, step).lost
        parts.append(
            f"matrices with deviation {std:g} lose {lost:.0%} of their updates at first (RMS {step:.1e} a step)"
        )
    return ": expect that " + ", and ".join(parts) if parts else ""


def betas_of(plan: Plan) -> tuple[float, float]:
    entry = plan.find("betas")
    betas = [as_number(beta) for beta in entry.value] if entry and isinstance(entry.value, list) else []
    return tuple(betas) if len(betas) == 2 and all(b is not None and 0 <= b < 1 for b in betas) else (0.9, 0.95)


def learning_rates(plan: Plan, where) -> Iterator[Finding]:
    """The learning rates against their conventions and the model's size; not for a run that starts from trained weights."""
    groups = plan.groups()
    judged = [(group, entry) for group, entry in groups if group.kind != "other"]
    if not judged or not plan.from_scratch():
        return
    n_parameters = plan.n_parameters()
    if not n_parameters:
        yield Finding(
            rule="lr_too_low",
            severity="info",
            where=where(judged[0][1]),
            message="learning rates were not judged: the width and depth of a transformer are not among the keys",
            advice="give d_model and n_layers, or watch the first updates of the run",
        )
        return
    for finding in judge([group for group, _ in judged], n_parameters):
        first = next((entry for group, entry in judged if group.name == finding.where.split(", ")[0]), judged[0][1])
        quoted = f"; line {first.line} reads `{' '.join(first.text.split())}`" if first.line else ""
        yield replace(finding, where=where(first), message=finding.message + quoted)


def contradicted_comments(plan: Plan, where) -> Iterator[Finding]:
    for entry, value, optimizer in plan.learning_rates():
        finding = contradiction(entry, value, optimizer, where(entry))
        if finding:
            yield finding


def schedule(plan: Plan, where) -> Iterator[Finding]:
    """A warm-up that the run does not outlive, and how far a weight under AdamW can travel."""
    n_updates, warmup = plan.n_updates(), plan.number("warmup_steps")
    if not n_updates or warmup is None or warmup != int(warmup):
        return
    warmup, at = int(warmup), where(plan.find("warmup_steps"))
    if warmup > n_updates:
        yield Finding(
            rule="lr_too_low",
            severity="warning",
            where=at,
            value=warmup,
            limit=n_updates,
            message=f"the warm-up takes {warmup} updates and the run has {n_updates}: "
            f"the learning rates end at {n_updates / warmup:.0%} of their peak",
            advice="shorten the warm-up or lengthen the run",
        )
    adam = sorted((g.lr, g.name, where(entry)) for g, entry in plan.groups() if g.kind == "adam")
    if not adam:
        return
    lr, name, at = adam[0]
    ratio = min(plan.number("min_lr_ratio", 1.0), 1.0)  # unknown: no decay, which is still an upper bound
    step = adam_largest_step(betas_of(plan))
    early = min(EARLY, n_updates)
    reach = [lr * sum_of_shares(until, n_updates, min(warmup, n_updates), ratio) for until in (early, n_updates)]
    yield Finding(
        rule="reach",
        severity="info",
        where=at,
        value=step * reach[0],
        message=f"{name} {lr:.3g}: AdamW moves a weight by at most {step:.3g} × the learning rate, so a norm weight can be at "
        f"most {step * reach[0]:.2g} from 1 after {early} updates and {step * reach[1]:.2g} after all {n_updates}",
        advice="hold what the run shows against this, not against a wish",
    )


def dead_keys(plan: Plan, where) -> Iterator[Finding]:
    for entry in plan.entries if plan.is_ours() else ():
        if entry.name in DEAD_KEYS:
            yield Finding(
                rule="unread_key",
                severity="warning",
                where=where(entry),
                value=str(entry.value),
                message=f"nothing reads {entry.name}: changing it changes nothing",
                advice=f"set {DEAD_KEYS[entry.name]} instead",
            )
