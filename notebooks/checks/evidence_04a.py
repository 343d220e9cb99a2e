"""The numbers on which notebook 04a's verdicts rest, by claim, out of committed runs and the case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from checks.designs import CURE, POINTS
from checks.study_04 import blocks, corner, crossing, readings
from checks.surface import case_lrs
from moe_lab.course import case
from moe_lab.failures.results import Results, load_results, spread
from moe_lab.health.measures import adam_reach

WIDTHS = (96, 192)


def deviations(found: Results, arm: str) -> list[float]:
    """How far a norm weight is from 1 at most, by seed."""
    return [row["norm_deviation"] for row in found.rows if row["arm"] == arm]


def norms_by_muon(found: Results) -> dict[float, float]:
    """Muon's LR → how far the norms got, on average over seeds, with AdamW at 9e-5."""
    arms = {
        3e-4: "failure, float32",
        1e-3: corner("cure", {"Muon", "float32"}),
        4e-3: corner("centre", {"Muon", "float32"}),
    }
    return {lr: fmean(deviations(found, arm)) for lr, arm in arms.items()}


def of_norms(results: Mapping[str, Results]) -> dict[str, dict[str, Any]]:
    second, report = case.observed_run("second"), case.facts("report")
    both = [results[f"attribution_{w}"] for w in WIDTHS]
    lrs = case_lrs(second.updates, second.adamw_lr)
    got, seen = [norms_by_muon(found) for found in both], second.norm_deviation
    failing, cured = (spread(x for f in both for x in deviations(f, f"{arm}, float32")) for arm in ("failure", "cure"))
    fixed = case_lrs(report["fixed_within_steps"] // 4, CURE[1])
    by_c06 = report["norm_deviation_then"] / report["norm_move_per_step"]
    return {
        "C05": {
            "observed": seen,
            "ceiling": adam_reach(lrs),
            "travel": float(lrs.sum()),
            "norms_by_muon": max(max(by.values()) / min(by.values()) for by in got),
        },
        "C06": {
            "per_update": seen / second.updates,
            "per_micro_batch": seen / second.steps,
            "mean_lr": float(lrs.mean()),
        },
        "C07": {"claimed": report["norm_steps_to_deviate"], "by_c06": by_c06, "own_deviation_after_200": failing},
        "C13": {"ceiling_after_125_updates": adam_reach(fixed), "own_deviation_after_200": cured},
    }


def of_losses(results: Mapping[str, Results], floors: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    report, parts = case.facts("report"), {}
    for kind in ("cure", "failure"):
        runs = [run for w in WIDTHS for run in readings(results[f"attribution_{w}"], f"{kind}, float32")]
        parts[kind] = [blocks(run) for run in runs]
    falls = {kind: all(a > b for p in by for a, b in zip(p, p[1:], strict=False)) for kind, by in parts.items()}
    fallen = {kind: spread(p[0] - p[-1] for p in by) for kind, by in parts.items()}
    crossings = [
        crossing(run, floors["unigram"]) for w in WIDTHS for run in readings(results[f"starved_{w}"], "failure")
    ]
    start = math.log(case.facts("training_1.5b")["vocab_size"])
    ended = results["reproduction"]
    own = {arm: spread(floors["uniform"] - ended.loss(arm, seed) for seed in ended.seeds(arm)) for arm in POINTS}
    grads = gradient_norms(results)
    return {
        "C08": {
            "crossings": [n or -1 for n in crossings],
            "fall_by_125": fallen["failure"],
            "loss_at_125": spread(p[-1] for p in parts["failure"]),
            "unigram": floors["unigram"],
            "last": results["starved_96"].losses("failure"),
        },
        "C12": {"cure_falls": falls["cure"], "failure_falls": falls["failure"], "fallen": fallen},
        "C14": {"expected_start": start, "claimed_start": report["fixed_losses"][0], "own_fall": own},
        "C15": {
            "healthy": [min(grads["centre"]), max(grads["centre"])],
            "failing": [min(grads["failure"]), max(grads["failure"])],
            "claimed": list(report["healthy_grad_norms"]),
        },
    }


def gradient_norms(results: Mapping[str, Results]) -> dict[str, list[float]]:
    """Median gradient norms of every run at these two points."""
    rows = [row for name, found in results.items() if name.startswith(("attr", "repro")) for row in found.rows]
    kinds = ("centre", "failure")
    return {kind: [row["median_grad_norm"] for row in rows if row["arm"].split(",")[0] == kind] for kind in kinds}


def of_adamw() -> dict[str, dict[str, Any]]:
    norms = load_results("norms_96")
    best = min(norms.arms(), key=lambda arm: norms.losses(arm).mean)
    gaps = {arm.removeprefix("norms "): norms.paired(arm, best) for arm in norms.arms()}
    return {
        "C11": {
            "norms_above_best": {lr: gap.mean for lr, gap in gaps.items()},
            "norms_sd": {lr: gap.sd for lr, gap in gaps.items()},
        }
    }


def evidence(results: Mapping[str, Results], floors: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Claim id → what `case.judge` is given."""
    return of_norms(results) | of_losses(results, floors) | of_adamw()
