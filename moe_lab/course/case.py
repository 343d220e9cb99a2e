"""The case: what the report claims, what it missed and what it observed, from case.yaml beside this file.

case.claim("C05").sentence, case.bug("B18").symptom, case.observed_run("second").adamw_lr
case.facts("training_1.5b")["d_model"]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_lab.config import ConfigError, read_yaml, suggestion

CASE = Path(__file__).with_name("case.yaml")


class Claim(NamedTuple):
    """A sentence of the report, in its own numbers."""

    id: str
    sentence: str


class Bug(NamedTuple):
    """A bug that the report missed (or, B01 and B02, found)."""

    id: str
    sentence: str
    symptom: str
    ran: bool  # seen by running the code of that day; else read there


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the two observed runs. `steps` are the report's micro-batches; `updates` are the optimizer's."""

    name: str
    parameters: str  # bfloat16 or float32
    muon_lr: float
    adamw_lr: float
    steps: int
    updates: int
    norm_deviation: float  # largest distance of a norm weight from 1
    tokens: int | None = None  # None: the report does not say
    checkpoint_of: str | None = None  # a group of `facts`; None: the report does not say


def claim(id: str) -> Claim:
    """Claim C01 … C21. Raises ConfigError for another id."""
    return Claim(id, entry("claims", id))


def bug(id: str) -> Bug:
    """Bug B01 … B22. Raises ConfigError for another id."""
    found = entry("bugs", id)
    return Bug(id, found["bug"], found["symptom"], found.get("ran", False))


def observed_run(name: str) -> Run:
    """Run `first` (bf16 parameters) or `second` (LR too low). Raises ConfigError for another name."""
    return Run(name=name, **entry("runs", name))


def facts(group: str) -> Mapping[str, Any]:
    """Figures by name, read-only: of the model `training_1.5b`, of its larger `sibling_3b`, of `training` and
    `optimizer`, and the numbers in the `report`'s claims. Raises ConfigError for another group."""
    return MappingProxyType(entry("facts", group))


@cache
def case() -> Mapping[str, Mapping[str, Any]]:
    return read_yaml(CASE)


def entry(section: str, id: str) -> Any:
    known = case()[section]
    if id in known:
        return known[id]
    what = {"claims": "claim", "bugs": "bug", "runs": "run", "facts": "group of facts"}[section]
    short = re.fullmatch(r"([a-z]?)(\d+)", str(id).strip().lower())  # c5 and 5 mean C05
    near = suggestion(f"{(short[1] or what[0]).upper()}{int(short[2]):02d}" if short else str(id), known)
    raise ConfigError(f"{id!r} is no {what} of the case{near or '; known are ' + ', '.join(known)}")
