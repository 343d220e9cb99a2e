"""The case: what the report claims, what it missed and what it observed, from case.yaml beside this file.

case.claim("C05").sentence, case.bug("B18").symptom, case.observed_run("second").adamw_lr
case.facts("training_1.5b")["d_model"]

An id or a name that the case does not have raises ConfigError, with the nearest one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from moe_lab.sections import ConfigError, read_yaml, suggestion

CASE = Path(__file__).with_name("case.yaml")


def claim(id: str) -> SimpleNamespace:
    """Claim C01 … C21: its `sentence`, in the report's own numbers."""
    return SimpleNamespace(sentence=entry("claims", id))


def bug(id: str) -> SimpleNamespace:
    """Bug B01 … B22, which the report missed (or, B01 and B02, found): `sentence`, `symptom`, and whether it was seen
    by running the code of that day (`ran`), or read there."""
    return SimpleNamespace(**{"ran": False} | entry("bugs", id))


def observed_run(name: str) -> SimpleNamespace:
    """Run `first` (bf16 parameters) or `second` (LR too low): the fields of case.yaml's `runs`; None: the report does
    not say."""
    return SimpleNamespace(**entry("runs", name))


def facts(group: str) -> Mapping[str, Any]:
    """Figures by name, read-only: of the model `training_1.5b`, of its larger `sibling_3b`, of `training` and
    `optimizer`, and the numbers in the `report`'s claims."""
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
