"""What notebook 06 reads out of the matrix of bugs and checks (benchmarks/bug_matrix.py), and how far rounded positions are off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
AT_ONCE = ("all of that day", "all of that day, but B08 and B09")
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
# two bugs of one run may be told by one rule: what its message must hold
WORDS = {
    ("B06", "mode_mismatch"): "in training only",
    ("B22", "mode_mismatch"): "in evaluation only",
    ("B07", "schedule"): "ever comes",
    ("B18", "schedule"): "first update",
}


def load() -> dict[str, Any]:
    return json.loads((RESULTS / "bugs_matrix.json").read_text(encoding="utf-8"))


def column(call: str) -> str:
    """`check_train_eval, the shown loss` is a call of `check_train_eval`."""
    return call.split(", ")[0]


def names(id: str, finding: Mapping[str, Any]) -> bool:
    """Whether a finding names a bug."""
    return finding["rule"] in NAMES[id] and WORDS.get((id, finding["rule"]), "") in finding["message"]


def named(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By bug: the calls that name it in every seed that was run, each with its highest severity. Bugs that were not run are left out."""
    told: dict[str, dict[str, str]] = {}
    for id in NAMES:
        rows = [row for row in found["rows"] if row["row"] == id]
        for call in CALLS if rows else ():
            by_seed: dict[int, list[str]] = {row["seed"]: [] for row in rows}
            for row in rows:
                if column(row["call"]) == call:
                    by_seed[row["seed"]] += [f["severity"] for f in row["findings"] if names(id, f)]
            told.setdefault(id, {})
            if all(by_seed.values()):
                every = [severity for severities in by_seed.values() for severity in severities]
                told[id][call] = min(every, key=SEVERITIES.index)
    return told


def facts(found: Mapping[str, Any]) -> dict[str, int]:
    """In figures: bugs planted and named, runs, and of the two rows with many bugs how many are named."""
    by_call = named(found)
    day, bare = (together(found, row) for row in AT_ONCE)
    counts = {"caught": sum(map(bool, by_call.values())), "planted": len(by_call), "runs": n_runs(found)}
    counts |= {"day": sum(day.values()), "of_day": len(day), "bare": sum(bare.values()), "of_bare": len(bare)}
    return counts | {"healthy": n_healthy(found), "alarms": len(alarms(found))}


def hidden(found: Mapping[str, Any]) -> list[str]:
    """Named by nothing among all the bugs of that day, and named where two of them are mended."""
    day, bare = (together(found, row) for row in AT_ONCE)
    return [id for id, told in bare.items() if told and not day[id]]


def together(found: Mapping[str, Any], row: str) -> dict[str, bool]:
    """Of the bugs that were planted at once in a row: whether a call names it in every seed."""
    mine = [one for one in found["rows"] if one["row"] == row]
    seeds = {one["seed"] for one in mine}
    told = {id: {one["seed"] for one in mine for f in one["findings"] if names(id, f)} for id in found["planted"][row]}
    return {id: by_seed == seeds for id, by_seed in told.items()}


PLACES = [64, 256, 1024, 4096, 16384, 65536]


def rounded(places: Sequence[int] = PLACES) -> dict[str, list[float]]:
    """How far the last position's angle, in radians, is off where a rotary table keeps its frequencies in bfloat16, and how far any
    cosine or sine up to it is off where it keeps those: by position, frequencies of heads of 16 to the base 10,000."""
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.outer(torch.arange(max(places) + 1, dtype=torch.float64), frequencies)
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    off = {"rounded cosines": waves.bfloat16() - waves}
    off["rounded frequencies"] = torch.outer(angles[:, 0], frequencies.bfloat16() - frequencies)
    return {what: [float(error[: n + 1].abs().max()) for n in places] for what, error in off.items()}


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
    steps = ([f["step"] for f in row["findings"] if names(id, f)] for row in rows)
    return [min(found) for found in steps if found]
