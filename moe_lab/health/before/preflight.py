"""Findings from a config and its comments, before a second of compute."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from ..conventions import ADAMW_RMS, judge
from ..findings import Finding, several
from ..measures import adam_ratio_bound, predict_lost
from .comments import contradictions, switches
from .plan import ALIASES, NOT_FROM_SCRATCH, Entry, Plan, as_number
from .schedule import schedule

MOST_KEYS = 10_000  # a file with more is no config; aliases of aliases can make one line hold billions
DEEPEST = 50  # levels of nested mappings
SAMPLE = 100_000  # weights drawn to predict a share: good to a third of a percent

# Who names the format of the weights. An error in the first; beside others an optimizer may keep float32 masters.
FORMAT_KEYS = ("precision.parameters", "param_dtype", "params_dtype", "parameter_dtype", "model_dtype", "torch_dtype")
REMEDIES = re.compile(r"kahan|stochastic_round|master_weight|master_param|fp32_master|remedy")
SCHEMA_KEYS = ("aliases", "sections", "dead_keys")


def preflight(
    source: str | Path | Mapping, n_parameters: float | None = None, schema: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Findings from a YAML file, comments included, or from a mapping such as `dataclasses.asdict(config)`.

    Knows the keys of many projects (`plan.ALIASES`). `n_parameters`: of the model; without it, what a plain transformer of
    these sizes has. `schema`: what a project knows of its own configs, each if wanted: `aliases` {a key of ALIASES: the
    project's names for it}; `dead_keys` {section.key that nothing reads: what is read instead}, held against configs that
    have half of the `sections` at least. `where` is `file:line` for a file, the key for a mapping. What the keys do
    not tell is not judged. Raises ValueError, in one line, for a source that cannot be read as a mapping.
    """
    schema = schema or {}
    unknown = sorted(set(schema) - set(SCHEMA_KEYS))
    if unknown:
        raise ValueError(f"schema has {', '.join(unknown)}; it takes {', '.join(SCHEMA_KEYS)}")
    entries = entries_of(source)
    own = schema.get("aliases", {})
    plan = Plan(entries, ALIASES | {key: (*names, *ALIASES.get(key, ())) for key, names in own.items()})
    return [
        *parameter_formats(plan),
        *judged_rates(plan, n_parameters or plan.n_parameters()),
        *schedule(plan),
        *contradictions(plan),
        *switches(plan),
        *dead_keys(plan, schema),
    ]


def entries_of(source: str | Path | Mapping) -> list[Entry]:
    """Of a file or a mapping. Raises ValueError, in one line, for what is neither, or cannot be read."""
    if isinstance(source, Mapping):
        return entries_of_mapping(source)
    if isinstance(source, (str, Path)):
        return read_entries(Path(source))
    raise ValueError(f"preflight takes a YAML file or a mapping, got {type(source).__name__}; try a dict of it")


def plan_of(model: Any, config: str | Path | Mapping[str, Any] | None = None) -> Plan:
    """What is planned: by the config that was given, else by the one that the model carries, if any."""
    own = getattr(model, "config", None)
    carried = own if isinstance(own, Mapping) else getattr(own, "__dict__", {})
    return Plan(entries_of({str(key): value for key, value in carried.items()} if config is None else config))


# ---- reading ---------------------------------------------------------------------------------------------------------


def leaves(origin: str | Path, tree: Any, inside: Callable[[Any], Iterable | None]) -> list[tuple]:
    """Path and value of each leaf of a tree, in order; `inside(value)` gives keys and values, or None for a leaf."""

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple]:
        if len(path) > DEEPEST:
            raise ValueError(f"{origin}: {path[0]} is nested more than {DEEPEST} deep, or holds itself")
        pairs = inside(value)
        if pairs is None:
            yield path, value
        for key, inner in pairs or ():
            yield from walk(inner, (*path, str(key)))

    found = list(islice(walk(tree, ()), MOST_KEYS + 1))
    if len(found) > MOST_KEYS:
        raise ValueError(f"{origin}: more than {MOST_KEYS} keys; is this a config?")
    return found


def entries_of_mapping(values: Mapping) -> list[Entry]:
    """The plain values of nested mappings and of lists of mappings, in order."""

    def inside(value: Any) -> Iterable | None:
        if isinstance(value, Mapping):
            return value.items()
        is_list = isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value)
        return enumerate(value) if is_list else None

    found = leaves("config", values, inside)
    return [Entry(path, list(v) if isinstance(v, tuple) else v, ".".join(path)) for path, v in found]


def read_entries(path: Path) -> list[Entry]:
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

    def inside(node: yaml.Node) -> Iterable | None:
        if node.id == "mapping":
            return [(key.value, value) for key, value in node.value]
        is_list = node.id == "sequence" and any(inner.id != "scalar" for inner in node.value)
        return enumerate(node.value) if is_list else None

    def entry(keys: tuple[str, ...], node: yaml.Node) -> Entry:
        value = node.value if node.id == "scalar" else [item.value for item in node.value]
        line, end = node.start_mark.line, node.end_mark
        comments = comments_of(lines[:line], lines[end.line][end.column :])
        return Entry(keys, value, f"{path}:{line + 1}", lines[line], comments)

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None or root.id != "mapping":
            raise ValueError(f"{path}: no keys and values; a config holds sections such as `model:`")
        return [entry(*leaf) for leaf in leaves(path, root, inside)]
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(problem or error).split())
        raise ValueError(f"{path}{line}: not valid YAML: {problem}; correct it") from None


def comments_of(above: list[str], rest: str) -> tuple[str, ...]:
    """The comment lines right above a value, and the comment in the rest of its own line."""
    lines = takewhile(lambda line: line.lstrip().startswith("#"), reversed(above))
    beside = re.match(r"(?:.*?\s|[}\],]*)#(.*)", rest)
    comments = [*list(lines)[::-1], *([beside[1]] if beside else [])]
    return tuple(comment.strip().lstrip("# ") for comment in comments)


# ---- rules -----------------------------------------------------------------------------------------------------------


def parameter_formats(plan: Plan) -> Iterator[Finding]:
    """Parameters kept in bfloat16, unless a key names masters, Kahan summation or stochastic rounding."""
    named = ((key, e) for key in FORMAT_KEYS for e in plan.entries if f".{e.name}".endswith(f".{key}"))
    key, entry = next(named, ("", None))
    bf16 = entry and str(entry.value).lower().removeprefix("torch.") in ("bfloat16", "bf16")
    if bf16 and not plan.says(REMEDIES):
        severity, unless = "warning", ", unless the optimizer has float32 masters"
        if key == FORMAT_KEYS[0]:
            severity, unless = "error", ""
        message = f"{entry.name}: {entry.value} keeps the weights in 16 bits{predicted_losses(plan)}"
        advice = f"keep float32 parameters ({entry.name}: float32) and compute under autocast{unless}"
        yield Finding("bf16_parameters", severity, entry.where, message, advice, str(entry.value), "float32")


def predicted_losses(plan: Plan) -> str:
    """What bfloat16 would cost at the planned peak learning rates, as a clause; empty if no learning rate is known."""
    groups, parts = [group for group, _ in plan.groups()], []
    adam, muon = ([group for group in groups if group.kind == kind] for kind in ("adam", "muon"))
    betas = plan.find("betas")
    betas = [as_number(beta) for beta in betas.value] if betas and isinstance(betas.value, list) else []
    known = len(betas) == 2 and 0 <= betas[0] < 1 and 0 < betas[1] < 1
    most = adam_ratio_bound(math.inf, betas if known else (0.9, 0.95)) * min((g.lr for g in adam), default=math.inf)
    if most <= 2.0**-9:
        parts.append(f"a norm weight at 1.0 loses every update (at most {most:.1e}; it takes more than 2^-9 = 2.0e-03)")
    elif most <= 2.0**-8:
        parts.append(f"a norm weight at 1.0 can only shrink (at most {most:.1e} a step; up takes more than 3.9e-03)")
    if muon and plan.number("d_model") or adam and not muon:
        std, step = plan.number("init_std") or 0.02, ADAMW_RMS * (muon or adam)[0].adamw_lr
        weights = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(1)) * std
        share = f"{predict_lost(weights, step):.0%} of their updates at first (RMS {step:.1e} a step)"
        parts.append(f"matrices with deviation {std:g} lose {share}")
    return ": expect that " + ", and ".join(parts) if parts else ""


def judged_rates(plan: Plan, n_parameters: float | None) -> Iterator[Finding]:
    """The learning rates against their conventions and the model's size; not for a run that starts from trained weights."""
    judged = list(plan.groups())
    if not judged or plan.says(NOT_FROM_SCRATCH):
        return
    if not n_parameters:
        message = "learning rates were not judged: a transformer's width and depth are not among the keys"
        advice = "give d_model and n_layers, or watch the first updates of the run"
        yield Finding("lr_too_low", "info", judged[0][1].where, message, advice)
        return
    for finding in judge([group for group, _ in judged], n_parameters):
        first = next(entry for group, entry in judged if group.name == finding.where.split(", ")[0])
        number, line = first.where.rpartition(":")[2], " ".join(first.line.split())
        quoted = f"; line {number} reads `{line}`" if line else ""
        yield replace(finding, where=first.where, message=finding.message + quoted)


def dead_keys(plan: Plan, schema: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that look like knobs, and nothing reads them: in configs with most of the project's sections. Beside sections of
    another's the code may be another, too, and what it reads in their place is not known."""
    sections, instead = set(schema.get("sections", ())), schema.get("dead_keys", {})
    present = {entry.path[0] for entry in plan.entries}
    if 2 * len(sections & present) < len(sections):
        return
    foreign = sorted(present - sections) if sections else []
    for entry in plan.entries:
        if entry.name in instead:
            message = f"nothing reads {entry.name}: changing it changes nothing"
            advice = f"set {instead[entry.name]} instead"
            if foreign:
                message += f", unless the code is another's, as {several(foreign)} may say"
                advice = f"see in that code what is read in its place; {instead[entry.name]} may not be"
            yield Finding("unread_key", "warning", entry.where, message, advice, str(entry.value))
