"""Does health name each sickness by step 100? `make detection`; runs that were finished before are read from .cache.

Every row of detection_rows.py is a training of 100 updates beside its healthy twin. Three seeds of both are watched at the defaults,
with examine before. Five seeds of both tell whether the fault does harm: on the same held-out
batches, by a one-sided permutation test (126 of 252 ways to label ten runs, and p ≤ 0.05). A row with harm is sick, one without is
latent and counts apart. The rows are in two halves: what the rules are fixed with (`--half calibration`), and what judges them.
A second and a third set judge too (`--half second`): their harm is measured first and with nobody watching (`--half second --harm`);
the runs that are watched later must come to the same numbers. Writes benchmarks/detection.json.
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

from benchmarks.detection_rows import APART, HALVES, ROWS, THIRD, halves
from benchmarks.programs import HEALTH, Job, alarms, kept, sources_of, trained, watched
from moe_lab.config import ROOT
from moe_lab.data.prepare import CACHE
from moe_lab.failures.results import provenance, write_json

STEPS, WATCHED, SEEDS = 100, (0, 1, 2), (0, 1, 2, 3, 4)
HARM = 0.05  # p of the permutation test
ON_PAPER = "schedules on paper"  # the class whose schedules nothing runs: the training is the twin's
OUT = ROOT / "benchmarks" / "detection.json"
BODIES = ("detection_bodies", "detection_kinds", "detection_twins")
BODIES += ("healthy_families", "healthy_language", "healthy_senses", "healthy_kinds")


def jobs(half: str | None, harm: bool = False) -> Iterable[Job]:
    """Three seeds of each row are watched, and two more only trained; with `harm` all five are only trained. Of the sets
    apart, whose harm is known, no more than three are run."""
    split, sources, seen = halves(), sources_of(*BODIES), set()
    rows = [row for row in ROWS if half in (None, split[row.name])]
    for seed, row, sick in product(SEEDS, rows, (True, False)):  # the first seed of all rows first
        name, is_watched = row.twins[not sick], seed in WATCHED and not harm
        is_idle = not is_watched and (row.sickness == ON_PAPER or (split[row.name] in APART and not harm))
        if (name, seed) in seen or is_idle:
            continue
        seen.add((name, seed))
        run, files = (watched, sources + HEALTH) if is_watched else (trained, sources)
        # a row's own function, and not its whole file: another row may change. The third set's files hold bodies, too
        source = inspect.getmodule(row.make) if split[row.name] == THIRD else row.make
        own = "" if row.plain and not sick else inspect.getsource(source)
        yield Job(name, seed, partial(run, partial(row.make, sick=sick), seed, STEPS), files, own)


def finished(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Rows of these jobs that were computed before from the same files."""
    paths = [CACHE / "evidence" / f"{job.key}.json" for job in jobs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def p_worse(sick: Sequence[float], healthy: Sequence[float]) -> float:
    """The share of all ways to label these runs in which the sick ones are at least as much worse as they are. A run that broke
    is worse than any."""
    worst = 1 + max((value for value in (*sick, *healthy) if value is not None), default=0.0)
    values = [worst if value is None else value for value in (*sick, *healthy)]
    n, told = len(sick), fmean(values[: len(sick)]) - fmean(values[len(sick) :])
    ways = list(combinations(range(len(values)), n))
    total = sum(values)
    as_much = sum(
        sum(values[i] for i in way) / n - (total - sum(values[i] for i in way)) / (len(values) - n) >= told - 1e-12
        for way in ways
    )
    return as_much / len(ways)


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


def judged(results: dict[str, list[dict[str, Any]]], before: dict[str, Any], harm: bool) -> list[dict[str, Any]]:
    """A line a row. `before`: the lines of earlier runs, from which the harm of the sets apart is taken."""
    lines, split = [], halves()
    for row in ROWS:
        if any(name not in results for name in row.twins):
            continue
        sick, healthy = (results[name] for name in row.twins)
        on_paper = row.sickness == ON_PAPER
        achieved = [[run.get("held_out") for run in runs] for runs in (sick, healthy)]
        lines.append(
            {
                "row": row.name,
                "half": split[row.name],
                "sickness": row.sickness,
                "kind": row.kind,
                "right": list(row.right),
                "trigger": row.trigger,
                "on_paper": on_paper,
                "commits": sorted({run["commit"] for run in (*sick, *healthy)}),
                "failed": sorted({run["failed"] for run in (*sick, *healthy) if "failed" in run}),
            }
        )
        if split[row.name] in APART and not harm and not on_paper:
            lines[-1] |= measured_harm(before.get(row.name), row.name, achieved)
        else:
            lines[-1] |= harm_of(achieved, on_paper)
        some = 0 if harm else len(WATCHED)
        lines[-1]["seeds"] = [told_of(run, row.right, row.trigger) for run in sick[:some]]
        lines[-1]["twin_alarms"] = [[f[:4] for f in alarms(run)] for run in healthy[:some]]
    return lines


def harm_of(achieved: list[list[float | None]], on_paper: bool) -> dict[str, Any]:
    """What the held-out losses of the sick and of the healthy runs say; three seeds tell, if all are worse than all."""
    n = min(map(len, achieved))
    p = p_worse(*(values[:n] for values in achieved)) if n >= 3 and not on_paper else None
    return {"is_sick": p is not None and p <= HARM, "p": p and round(p, 4), "n_seeds": n, "held_out": achieved}


def measured_harm(line: dict[str, Any] | None, name: str, achieved: list[list[float | None]]) -> dict[str, Any]:
    """The harm that was measured before any watch was run, and whether the watched runs come to the same numbers, as they must.
    Raises ValueError if it was not measured."""
    if line is None:
        raise ValueError(
            f"{OUT.name}: no harm of the row «{name}»: python -m benchmarks.detection --half {halves()[name]} --harm"
        )
    same = all(known[: len(now)] == now for known, now in zip(line["held_out"], achieved, strict=True))
    return {key: line[key] for key in ("is_sick", "p", "n_seeds", "held_out")} | {"same_numbers": same}


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
    parser.add_argument("--harm", action="store_true", help="only whether the faults do harm: no watch is run")
    half, only_finished, harm = (args := parser.parse_args()).half, args.finished, args.harm
    if harm and half not in APART:
        parser.error(f"--harm is for --half {' and '.join(APART)}: the other rows' harm comes with their watched runs")
    file = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    before = file.get("rows", [])
    results: dict[str, list[dict[str, Any]]] = {}
    for run in finished(jobs(half, harm)) if only_finished else kept(jobs(half, harm), "detection"):
        results.setdefault(run["name"], []).append(run)
    lines = judged(results, {line["row"]: line for line in before}, harm)
    show(lines)
    lines = sorted(
        lines + [line for line in before if half not in (None, line["half"])],
        key=lambda line: HALVES.index(line["half"]),
    )
    print(json.dumps(summary(lines), indent=2))
    made = file["provenance"] if harm and file else provenance() | {"updates": STEPS}  # lines have their own commits
    write_json(OUT, {"provenance": made, "summary": summary(lines), "rows": lines})


def show(lines: list[dict[str, Any]]) -> None:
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
        if not line.get("same_numbers", True):
            print("      the watched runs came to other numbers than those that nobody watched")
        if any(line["twin_alarms"]):
            print(f"      twin: {line['twin_alarms']}")


if __name__ == "__main__":
    main()
