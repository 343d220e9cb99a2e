"""Findings from a config and its comments, before a second of compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..conventions import ADAMW_RMS, judge, muon_element_step
from ..findings import Finding, found
from ..measures import adam_ratio_bound, predict_lost
from .comments import contradiction
from .plan import ALIASES, Comment, Entry, Plan, as_number, sum_of_shares

MOST_KEYS = 10_000  # a file with more is no config; aliases of aliases can make one line hold billions
SAMPLE = 100_000  # weights drawn to predict a share: good to a third of a percent
DEEPEST = 50  # levels of nested mappings
EARLY = 100  # updates by which a sick run should be told from a healthy one

# Who names the format of the weights. An error where nothing else can be meant; others' optimizers may keep float32 masters.
FORMAT_KEYS = {
    "precision.parameters": "error",
    **dict.fromkeys(("param_dtype", "params_dtype", "parameter_dtype", "model_dtype", "torch_dtype"), "warning"),
}
REMEDIES = ("kahan", "stochastic_round", "master_weight", "master_param", "fp32_master", "remedy")
SCHEMA_KEYS = ("aliases", "sections", "dead_keys")


def preflight(
    source: str | Path | Mapping, n_parameters: float | None = None, schema: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Findings from a YAML file, comments included, or from a mapping such as `dataclasses.asdict(config)`.

    Knows the keys of many projects (`plan.ALIASES`). `n_parameters`: of the model; without it, what a plain transformer of
    these sizes has. `schema`: what a project knows of its own configs, each if wanted: `aliases` {a key of ALIASES: the
    project's names for it}; `dead_keys` {section.key that nothing reads: what is read instead}, held against configs that
    have no other sections than `sections`. `where` is `file:line` for a file, the key for a mapping. What the keys do
    not tell is not judged. Raises ValueError, in one line, for a source that cannot be read as a mapping.
    """
    schema = schema or {}
    unknown = sorted(set(schema) - set(SCHEMA_KEYS))
    if unknown:
        raise ValueError(f"schema has {', '.join(unknown)}; it takes {', '.join(SCHEMA_KEYS)}")
    if isinstance(source, Mapping):
        origin, entries = None, limited(entries_of_mapping(source), "config")
    elif isinstance(source, (str, Path)):
        origin, entries = str(source), read_entries(Path(source))
    else:
        raise ValueError(f"preflight takes a YAML file or a mapping, got {type(source).__name__}; try a dict of it")
    own = schema.get("aliases", {})
    plan = Plan(entries, origin, {**ALIASES, **{key: (*names, *ALIASES.get(key, ())) for key, names in own.items()}})
    return [
        *parameter_formats(plan),
        *judged_rates(plan, n_parameters or plan.n_parameters()),
        *contradicted_comments(plan),
        *schedule(plan),
        *dead_keys(plan, schema),
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
    try:
        import yaml
    except ModuleNotFoundError:
        raise ValueError(f"{path}: to read it needs PyYAML: pip install pyyaml; or give a mapping") from None
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
            line = root.start_mark.line + 1
            raise ValueError(f"{path}, line {line}: no keys and values; write sections such as `model:`")
        return limited(walk(root, (), ()), path)
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(
            f"{path}{line}: not valid YAML: {' '.join(str(problem or error).split())}; correct it"
        ) from None


def limited(entries: Iterator[Entry], origin: str | Path) -> list[Entry]:
    taken = list(islice(entries, MOST_KEYS + 1))
    if len(taken) > MOST_KEYS:
        raise ValueError(f"{origin}: more than {MOST_KEYS} keys; is this a config?")
    return taken


def comments_of(lines: list[str], first: int, last: int, column: int) -> tuple[Comment, ...]:
    """The comment lines right above line `first` and the comment after `column` of line `last`; lines count from 0."""
    comments = []
    above = first - 1
    while above >= 0 and lines[above].lstrip().startswith("#"):
        comments.insert(0, Comment(above + 1, lines[above].strip().lstrip("# ")))
        above -= 1
    before, mark, beside = lines[last][column:].partition("#") if last < len(lines) else ("", "", "")
    if mark and (before == "" or before[-1].isspace() or before.strip() in ("}", "]", ",")):
        comments.append(Comment(last + 1, beside.strip()))
    return tuple(comments)


# ---- rules -----------------------------------------------------------------------------------------------------------


def parameter_formats(plan: Plan) -> Iterator[Finding]:
    """Parameters kept in bfloat16, unless a key names masters, Kahan summation or stochastic rounding."""
    named = ((key, e) for key in FORMAT_KEYS for e in plan.entries if f".{e.name}".endswith(f".{key}"))
    key, entry = next(named, (None, None))
    if entry is None or str(entry.value).lower().removeprefix("torch.") not in ("bfloat16", "bf16"):
        return
    if any(word in e.name.lower() and e.value not in (None, False, "") for word in REMEDIES for e in plan.entries):
        return
    message = f"{entry.name}: {entry.value} keeps the weights in 16 bits{predicted_losses(plan)}"
    advice = f"keep float32 parameters ({entry.name}: float32) and compute under autocast"
    advice += ", unless the optimizer has float32 masters" if FORMAT_KEYS[key] == "warning" else ""
    yield found("bf16_parameters", FORMAT_KEYS[key], plan.where(entry), message, advice, str(entry.value), "float32")


def predicted_losses(plan: Plan) -> str:
    """What bfloat16 would cost at the planned peak learning rates, as a clause; empty if no learning rate is known."""
    groups, parts = [group for group, _ in plan.groups()], []
    adam, muon = ([group for group in groups if group.kind == kind] for kind in ("adam", "muon"))
    most = adam_ratio_bound(math.inf, betas_of(plan)) * min((group.lr for group in adam), default=math.inf)
    if most <= 2.0**-9:
        parts.append(f"a norm weight at 1.0 loses every update (at most {most:.1e}; it takes more than 2^-9 = 2.0e-03)")
    elif most <= 2.0**-8:
        parts.append(f"a norm weight at 1.0 can only shrink (at most {most:.1e} a step; up takes more than 3.9e-03)")
    if muon and plan.number("d_model") or adam and not muon:
        std = plan.number("init_std") or 0.02
        step = muon_element_step(*muon[0][2:5]) if muon else ADAMW_RMS * adam[0].lr
        weights = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(1)) * std
        share = f"{predict_lost(weights, step).lost:.0%} of their updates at first (RMS {step:.1e} a step)"
        parts.append(f"matrices with deviation {std:g} lose {share}")
    return ": expect that " + ", and ".join(parts) if parts else ""


def betas_of(plan: Plan) -> tuple[float, float]:
    entry = plan.find("betas")
    betas = [as_number(beta) for beta in entry.value] if entry and isinstance(entry.value, list) else []
    known = len(betas) == 2 and all(b is not None and 0 <= b < 1 for b in betas) and betas[1]
    return tuple(betas) if known else (0.9, 0.95)


def judged_rates(plan: Plan, n_parameters: float | None) -> Iterator[Finding]:
    """The learning rates against their conventions and the model's size; not for a run that starts from trained weights."""
    judged = [(group, entry) for group, entry in plan.groups() if group.kind != "other"]
    if not judged or not plan.from_scratch():
        return
    if not n_parameters:
        message = "learning rates were not judged: the width and depth of a transformer are not among the keys"
        advice = "give d_model and n_layers, or watch the first updates of the run"
        yield found("lr_too_low", "info", plan.where(judged[0][1]), message, advice)
        return
    for finding in judge([group for group, _ in judged], n_parameters):
        first = next((entry for group, entry in judged if group.name == finding.where.split(", ")[0]), judged[0][1])
        quoted = f"; line {first.line} reads `{' '.join(first.text.split())}`" if first.line else ""
        yield replace(finding, where=plan.where(first), message=finding.message + quoted)


def contradicted_comments(plan: Plan) -> Iterator[Finding]:
    judged = (contradiction(entry, lr, family, plan.where(entry)) for entry, lr, family in plan.peak_rates())
    yield from filter(None, judged)


def schedule(plan: Plan) -> Iterator[Finding]:
    """A warm-up that the run does not outlive, and how far a weight under AdamW can travel."""
    n_updates, warmup = plan.n_updates(), plan.number("warmup_steps")
    if not n_updates or warmup is None or warmup != int(warmup):
        return
    warmup = int(warmup)
    if warmup > n_updates:
        message = f"the warm-up takes {warmup} updates and the run has {n_updates}: "
        message += f"the learning rates end at {n_updates / warmup:.0%} of their peak"
        where, advice = plan.where(plan.find("warmup_steps")), "shorten the warm-up or lengthen the run"
        yield found("lr_too_low", "warning", where, message, advice, warmup, n_updates)
    adam = [(group, entry) for group, entry in plan.groups() if group.kind == "adam"]
    if not adam:
        return
    group, entry = min(adam, key=lambda pair: pair[0].lr)
    ratio = min(plan.number("min_lr_ratio", 1.0), 1.0)  # unknown: no decay, which is still an upper bound
    step = adam_ratio_bound(math.inf, betas_of(plan))
    ends = (min(EARLY, n_updates), n_updates)
    early, all_of_it = (step * group.lr * sum_of_shares(end, n_updates, min(warmup, n_updates), ratio) for end in ends)
    message = f"{group.name} {group.lr:.3g}: AdamW moves a weight by at most {step:.3g} × the learning rate, so a norm weight "
    message += f"can be at most {early:.2g} from 1 after {ends[0]} updates and {all_of_it:.2g} after all {n_updates}"
    advice = "hold what the run shows against this, not against a wish"
    yield found("reach", "info", plan.where(entry), message, advice, early)


def dead_keys(plan: Plan, schema: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that look like knobs, and nothing reads them. In another project's config they may well be read."""
    sections, instead = schema.get("sections"), schema.get("dead_keys", {})
    if sections and not all(len(entry.path) > 1 and entry.path[0] in sections for entry in plan.entries):
        return
    for entry in plan.entries:
        if entry.name in instead:
            message = f"nothing reads {entry.name}: changing it changes nothing"
            advice = f"set {instead[entry.name]} instead"
            yield found("unread_key", "warning", plan.where(entry), message, advice, str(entry.value))
