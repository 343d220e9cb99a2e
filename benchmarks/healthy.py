"""Does health keep quiet about trainings that are well? `make healthy`, a quarter of an hour of one core.

Programs that were not written for it, each trained for 60 updates under examine and a Watch at its
defaults. An alarm is a finding of at least `warning`. Writes benchmarks/healthy.json; with a part of some names, as in
`python -m benchmarks.healthy "causal llama"`, it runs those alone, prints all that was said, and writes nothing; `--finished` computes nothing and tells of runs that are finished.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable
from functools import partial
from typing import Any

from benchmarks import healthy_families, healthy_kinds, healthy_language, healthy_loops, healthy_senses
from benchmarks.detection import finished
from benchmarks.healthy_rates import BEST, STEPS, at_rate
from benchmarks.programs import HEALTH, Job, Make, alarms, kept, sources_of, watched
from moe_lab.config import ROOT
from moe_lab.failures.results import provenance, write_json

TABLES = (healthy_families, healthy_language, healthy_loops, healthy_senses, healthy_kinds)


def seed_of(name: str) -> int:
    """A program's own, so that not all see the same batches."""
    return zlib.crc32(name.encode()) % 1000


def jobs(part: str) -> Iterable[Job]:
    for table in TABLES:
        sources = sources_of(table.__name__.rsplit(".", 1)[-1], "healthy_rates") + HEALTH
        make: Make
        for name, make in table.programs():
            make = partial(at_rate, make, BEST[name]) if name in BEST else make
            if part in name:
                yield Job(name, seed_of(name), partial(watched, make, seed_of(name), STEPS), sources)


def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    ran = [row for row in rows if "failed" not in row]
    severities = [{finding[2] for finding in alarms(row)} for row in ran]
    return {
        "programs": len(ran),
        "left_out": len(rows) - len(ran),
        "silent": sum(not s for s in severities),
        "with_warning": sum("warning" in s and "error" not in s for s in severities),
        "with_error": sum("error" in s for s in severities),
    }


def main() -> None:
    words = sys.argv[1:]
    only_finished = words[:1] == ["--finished"]
    part = " ".join(words[only_finished:])
    rows = finished(jobs(part)) if only_finished else kept(jobs(part), "healthy")
    for row in rows:
        if "failed" in row:
            print(f"left out: {row['name']}: {row['failed']}")
        elif part or alarms(row):
            print(f"{row['name']}: loss {row['losses'][0]} → {row['losses'][1]}, {row['updates']} updates")
        for who, rule, severity, step, _, _, message in row.get("findings", ()) if part else alarms(row):
            print(f"    {who}: {severity}: {rule} (step {step}): {message}")
    print(summary(rows))
    if not part:
        made = provenance() | {"updates": STEPS}
        write_json(
            ROOT / "benchmarks" / "healthy.json", {"provenance": made, "summary": summary(rows), "programs": rows}
        )


if __name__ == "__main__":
    main()
