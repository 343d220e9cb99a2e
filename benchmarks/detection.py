"""Does health name each sickness by step 100? `make detection`; runs that were finished before are read from .cache.

Every row of detection_rows.py is a training of 100 updates beside its healthy twin. Three seeds of both are watched at the defaults,
with examine before where it knows the kind of model. Five seeds of both tell whether the fault does harm: on the same held-out
batches, by a one-sided permutation test (126 of 252 ways to label ten runs, and p ≤ 0.05). A row with harm is sick, one without is
latent and counts apart. The rows are in two halves: what the rules are fixed with (`--half calibration`), and what judges them.
Writes benchmarks/detection.json.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations, product
from statistics import fmean
from typing import Any

from benchmarks.detection_rows import HALVES, ROWS, halves
from benchmarks.programs import HEALTH, Job, kept, sources_of, trained, watched
from moe_lab.config import ROOT
from moe_lab.data.prepare import CACHE
from moe_lab.failures.results import provenance, write_json

STEPS, WATCHED, SEEDS = 100, (0, 1, 2), (0, 1, 2, 3, 4)
HARM = 0.05  # p of the permutation test
ON_PAPER = "schedules on paper"  # the class whose schedules nothing runs: the training is the twin's
BODIES = ("detection_bodies", "healthy_families", "healthy_language", "healthy_senses", "healthy_kinds")


def jobs(half: str | None) -> Iterable[Job]:
    split, sources, seen = halves(), sources_of(*BODIES), set()
    rows = [row for row in ROWS if half in (None, split[row.name])]
    for seed, row, sick in product(SEEDS, rows, (True, False)):  # the first seed of all rows first
        name = row.twins[not sick]
        if (name, seed) in seen or (row.sickness == ON_PAPER and seed not in WATCHED):
            continue
        seen.add((name, seed))
        run, files = (watched, sources + HEALTH) if seed in WATCHED else (trained, sources)
        # a row's own function, and not its whole file: another row may change
        own = "" if row.plain and not sick else inspect.getsource(row.make)
        yield Job(name, seed, partial(run, partial(row.make, sick=sick), seed, STEPS), files, own)


def finished(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Rows of these jobs that were computed before from the same files."""
    paths = [CACHE / "evidence" / f"{job.key}.json" for job in jobs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def p_worse(sick: Sequence[float], healthy: Sequence[float]) -> float:
    """The share of all ways to label these runs in which the sick ones are at least as much worse as they are. A run that broke
    is worse than any."""
    values = [1e9 if value is None else value for value in (*sick, *healthy)]
    n, told = len(sick), fmean(values[: len(sick)]) - fmean(values[len(sick) :])
    ways = list(combinations(range(len(values)), n))
    total = sum(values)
    as_much = sum(
        sum(values[i] for i in way) / n - (total - sum(values[i] for i in way)) / (len(values) - n) >= told - 1e-12
        for way in ways
    )
    return as_much / len(ways)


def alarms(run: dict[str, Any]) -> list[list]:
    """Findings of at least `warning`: examine's first, then the watch's by update."""
    return [finding for finding in run.get("findings", ()) if finding[2] != "info"]


def told_of(run: dict[str, Any], right: Sequence[str], trigger: int) -> dict[str, Any]:
    """Whether the first finding names the cause; a fault that begins mid-run cannot be named before."""
    found = alarms(run)
    first = found[0] if found else None
    named = next((f for f in found if f[1] in right), None)
    early = first is not None and (first[3] or 0) < trigger
    return {
        "first": first and [first[0], first[1], first[2], first[3]],
        "right": bool(first) and first[1] in right and not early,
        "named": named and [named[0], named[1], named[2], named[3]],
        "delay": None if named is None else max(0, (named[3] or 0) - trigger),
    }


def judged(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line a row."""
    lines, split = [], halves()
    for row in ROWS:
        if any(name not in results for name in row.twins):
            continue
        sick, healthy = (results[name] for name in row.twins)
        achieved = [[run.get("held_out") for run in runs] for runs in (sick, healthy)]
        n = min(map(len, achieved))  # seeds that are finished: three tell, if all are worse than all
        p = p_worse(*(values[:n] for values in achieved)) if n >= 3 and row.sickness != ON_PAPER else None
        on_paper = row.sickness == ON_PAPER
        lines.append(
            {
                "row": row.name,
                "half": split[row.name],
                "sickness": row.sickness,
                "kind": row.kind,
                "right": list(row.right),
                "trigger": row.trigger,
                "is_sick": p is not None and p <= HARM,
                "on_paper": on_paper,
                "p": p and round(p, 4),
                "n_seeds": n,
                "commits": sorted({run["commit"] for run in (*sick, *healthy)}),
                "held_out": achieved,
                "failed": sorted({run["failed"] for run in (*sick, *healthy) if "failed" in run}),
                "seeds": [told_of(run, row.right, row.trigger) for run in sick[: len(WATCHED)]],
                "twin_alarms": [[f[:4] for f in alarms(run)] for run in healthy[: len(WATCHED)]],
            }
        )
    return lines


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for half in HALVES:
        mine = [line for line in lines if line["half"] == half]
        found[half] = {}
        for kind in ("sick", "latent", "untried", "on paper"):
            some = [line for line in mine if kind == kind_of(line)]
            seeds = [seed for line in some for seed in line["seeds"]]
            found[half][kind] = {
                "rows": len(some),
                "runs": len(seeds),
                "right_first": sum(seed["right"] for seed in seeds),
                "named": sum(seed["named"] is not None for seed in seeds),
            }
        twins = [alarms for line in mine for alarms in line["twin_alarms"]]
        found[half]["twins"] = {"runs": len(twins), "with_alarm": sum(map(bool, twins))}
    return found


def kind_of(line: dict[str, Any]) -> str:
    """Harm is asked of five seeds, or of the three that are finished; of less it is not known."""
    if line["on_paper"]:
        return "on paper"
    return "untried" if line["p"] is None else "sick" if line["is_sick"] else "latent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=HALVES, help="only one half of the rows; the other's lines stay as they are")
    parser.add_argument("--finished", action="store_true", help="only of runs that are finished; computes nothing")
    half, only_finished = (args := parser.parse_args()).half, args.finished
    results: dict[str, list[dict[str, Any]]] = {}
    for run in finished(jobs(half)) if only_finished else kept(jobs(half), "detection"):
        results.setdefault(run["name"], []).append(run)
    lines = judged(results)
    for line in lines:
        marks = "".join(".X"[not seed["right"]] for seed in line["seeds"])
        firsts = ", ".join(
            "{} @{}".format(*(seed["first"][i] for i in (1, 3))) if seed["first"] else "-" for seed in line["seeds"]
        )
        print(
            f"{line['half'][:5]} {kind_of(line):8} p={line['p']} {marks} {line['kind']:13} {line['row'][:60]:60} {firsts}"
        )
        for message in line["failed"]:
            print(f"      failed: {message}")
        if any(line["twin_alarms"]):
            print(f"      twin: {line['twin_alarms']}")
    print(json.dumps(summary(lines), indent=2))
    path = ROOT / "benchmarks" / "detection.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    others = [line for line in before.get("rows", ()) if half not in (None, line["half"])]
    lines = sorted(lines + others, key=lambda line: HALVES.index(line["half"]))
    made = provenance() | {"updates": STEPS}
    write_json(path, {"provenance": made, "summary": summary(lines), "rows": lines})


if __name__ == "__main__":
    main()
