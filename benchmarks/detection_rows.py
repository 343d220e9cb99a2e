"""All rows of the detection table, and in which half each stands: calibration, or judged."""

from __future__ import annotations

import hashlib

from benchmarks import detection_data, detection_loops, detection_models
from benchmarks.detection_bodies import Row

HALVES = ("calibration", "judged")
TABLES = (detection_loops, detection_models, detection_data)
ROWS: list[Row] = [row for table in TABLES for row in table.ROWS]
CLASSES = tuple(dict.fromkeys(row.sickness for row in ROWS))


def halves() -> dict[str, str]:
    """Row → half. Within a class the rows take turns, in the order of a hash of their names: nobody chose."""
    split = {}
    for sickness in CLASSES:
        names = [row.name for row in ROWS if row.sickness == sickness]
        for i, name in enumerate(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())):
            split[name] = HALVES[i % 2]
    return split
