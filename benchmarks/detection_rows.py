"""All rows of the detection table, and in which part each stands: calibration, judged, or a judged set of its own."""

from __future__ import annotations

import hashlib

from benchmarks import (
    detection_data,
    detection_loops,
    detection_models,
    detection_reports,
    detection_reports_models,
    detection_schedules,
    detection_structure,
    detection_threads,
    detection_threads_models,
)
from benchmarks.detection_twins import Row

# sets that judge too, each with rows that were written after the one before had been looked at
SECOND, THIRD = APART = ("second", "third")
HALVES = ("calibration", "judged", *APART)
TABLES = (detection_loops, detection_schedules, detection_models, detection_structure, detection_data)
FIRST: list[Row] = [row for table in TABLES for row in table.ROWS]
LATER: dict[str, list[Row]] = {
    SECOND: [*detection_threads.ROWS, *detection_threads_models.ROWS],
    THIRD: [*detection_reports.ROWS, *detection_reports_models.ROWS],
}
ROWS: list[Row] = [*FIRST, *LATER[SECOND], *LATER[THIRD]]
CLASSES = tuple(dict.fromkeys(row.sickness for row in FIRST))


def halves() -> dict[str, str]:
    """Row → half. Within a class the first rows take turns, in the order of a hash of their names: nobody chose."""
    split = {row.name: name for name, rows in LATER.items() for row in rows}
    for sickness in CLASSES:
        names = [row.name for row in FIRST if row.sickness == sickness]
        for i, name in enumerate(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())):
            split[name] = HALVES[i % 2]
    return split
