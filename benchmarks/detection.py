"""Does the watch name each sickness by step 100, and keep quiet about healthy runs? `make detection`.

Every row of detection_rows.py is a training of 100 updates, three seeds each, watched at the defaults. The rows are in two
halves: the thresholds in moe_lab/health were chosen while only the first half was run (`--half calibration`); the second
half judges them. Prints a table and writes benchmarks/detection.json. On two cores it takes about a quarter
of an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.detection_rows import ROWS
from moe_lab.config import ROOT
from moe_lab.failures.results import provenance, write_json
from moe_lab.health import SICKNESSES, Watch

STEPS, SEEDS = 100, (0, 1, 2)
HALVES = ("calibration", "judged")


def watched(index: int, seed: int) -> dict[str, Any]:
    """One row with one seed: every finding that the watch made in 100 updates."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    row = ROWS[index]
    with tempfile.TemporaryDirectory() as folder:
        run = row.make(seed, Path(folder) / "run")
        with Watch(run.model, run.optimizers, budget=run.budget, expect_frozen=run.expect_frozen, quiet=True) as watch:
            for loss in islice(run.losses, STEPS):
                watch.observe(loss=loss)
            watch.check()
    findings = [[f.rule, f.severity, f.step, f.where, number(f.value)] for f in watch.findings]
    return {
        "row": row.name,
        "half": row.half,
        "sickness": row.sickness,
        "seed": seed,
        "first": next((f[:3] for f in findings if f[1] != "info"), None),
        "findings": findings,
        "commit": provenance()["commit"],
    }


def number(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def is_right(result: dict[str, Any]) -> bool:
    """Sick: the first finding of at least warning names the cause. Healthy: no error."""
    if result["sickness"]:
        return bool(result["first"]) and result["first"][0] == SICKNESSES[result["sickness"]]
    return all(severity != "error" for _, severity, *_ in result["findings"])


def summary(results: list[dict[str, Any]], half: str) -> dict[str, Any]:
    mine = [r for r in results if r["half"] == half]
    sick, healthy = [r for r in mine if r["sickness"]], [r for r in mine if not r["sickness"]]
    return {
        "sick_runs": len(sick),
        "right_cause": sum(map(is_right, sick)),
        "healthy_runs": len(healthy),
        "with_error": sum(not is_right(r) for r in healthy),
        "with_warning": sum(any(f[1] == "warning" for f in r["findings"]) for r in healthy),
    }


def print_row(results: Sequence[dict[str, Any]]) -> None:
    """A line: half, sickness, row, right (.) or wrong (X) by seed, and the first finding of each seed."""
    firsts = ("{} ({}, step {})".format(*r["first"]) if r["first"] else "-" for r in results)
    marks, row = "".join(".X"[not is_right(r)] for r in results), results[0]
    print(f"{row['half'][:5]} {row['sickness'] or 'healthy':22} {row['row']:52} {marks}  {', '.join(firsts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=HALVES, help="only one half of the rows; prints, and writes nothing")
    half = parser.parse_args().half
    jobs = [(i, seed) for i, row in enumerate(ROWS) if half in (None, row.half) for seed in SEEDS]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(watched, *job) for job in jobs]
        results = [future.result() for future in tqdm(futures, unit="run", desc="detection")]
    for first in range(0, len(results), len(SEEDS)):
        print_row(results[first : first + len(SEEDS)])
    halves = {half: summary(results, half) for half in HALVES}
    print(json.dumps(halves, indent=2))
    if half is None:
        made = provenance()
        origin = {"torch": made["torch"], "python": made["python"], "steps": STEPS}
        result = {"provenance": origin, "summary": halves, "runs": results}
        write_json(ROOT / "benchmarks" / "detection.json", result)


if __name__ == "__main__":
    main()
