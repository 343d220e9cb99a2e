"""What notebook 06 reads out of the matrix of bugs and checks (benchmarks/bug_matrix.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_lab.failures.results import RESULTS
from moe_lab.health.findings import SEVERITIES

CALLS = (
    "preflight",
    "dry_run",
    "check_data",
    "examine",
    "check_causality",
    "check_train_eval",
    "Watch",
    "inspect_checkpoint",
)
# the rules that name a bug; a finding of another rule is a symptom at best
NAMES: dict[str, set[str]] = {
    "B01": {"bf16_parameters", "lost_updates"},
    "B02": {"lr_too_low", "muon_convention"},
    "B03": {"scaled_copies"},
    "B04": {"future_leak"},
    "B05": {"no_gradient"},
    "B06": {"mode_mismatch"},
    "B07": {"step_counters", "schedule"},
    "B08": {"random_tokens"},
    "B09": {"short_memory"},
    "B10": {"weight_decay_on_norms"},
    "B11": {"padding_in_loss"},
    "B12": {"initial_loss"},
    "B13": {"lr_baked_in", "lr_overwritten"},
    "B15": {"collapsed_experts"},
    "B16": {"never_moved"},
    "B17": {"rank_positions"},
    "B18": {"schedule"},
    "B19": {"delta_start"},
    "B20": {"unread_key"},
    "B21": {"repeated_data", "one_text"},
    "B22": {"mode_mismatch"},
    "B23": {"comment_contradicts"},
    "B24": {"rough_positions"},
    "B25": {"repeated_data"},
    "B26": {"split_overlap"},
}


def load() -> dict[str, Any]:
    return json.loads((RESULTS / "bugs_matrix.json").read_text(encoding="utf-8"))


def column(call: str) -> str:
    """`check_train_eval, the shown loss` is a call of `check_train_eval`."""
    return call.split(", ")[0]


def named(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By bug: the calls that name it in every seed that was run, each with its highest severity. Bugs that were not run are left out."""
    told: dict[str, dict[str, str]] = {}
    for id, rules in NAMES.items():
        rows = [row for row in found["rows"] if row["row"] == id]
        for call in CALLS if rows else ():
            by_seed: dict[int, list[str]] = {row["seed"]: [] for row in rows}
            for row in rows:
                if column(row["call"]) == call:
                    by_seed[row["seed"]] += [f["severity"] for f in row["findings"] if f["rule"] in rules]
            told.setdefault(id, {})
            if all(by_seed.values()):
                every = [severity for severities in by_seed.values() for severity in severities]
                told[id][call] = min(every, key=SEVERITIES.index)
    return told


def n_runs(found: Mapping[str, Any]) -> int:
    return len({(row["row"], row["seed"]) for row in found["rows"]})


def healthy(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in found["rows"] if row["row"].startswith("healthy")]


def n_healthy(found: Mapping[str, Any]) -> int:
    return len({(row["row"], row["seed"]) for row in healthy(found)})


def alarms(found: Mapping[str, Any]) -> list[str]:
    """Warnings and errors about healthy runs."""
    return [
        f"{row['row']}, seed {row['seed']}, {row['call']}: {finding['rule']}"
        for row in healthy(found)
        for finding in row["findings"]
        if finding["severity"] in ("error", "warning")
    ]


def by_step(found: Mapping[str, Any], id: str) -> list[int]:
    """After how many updates the watch named a bug, in each seed."""
    rows = [row for row in found["rows"] if row["row"] == id and row["call"] == "Watch"]
    steps = ([f["step"] for f in row["findings"] if f["rule"] in NAMES[id]] for row in rows)
    return [min(found) for found in steps if found]
