"""What a person ordered and wrote down, kept between two kernels: an exam takes longer than one sitting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.config import ROOT
from moe_lab.train.record import write_atomically

if TYPE_CHECKING:
    from checks.ward import Ward

NOTES = ROOT / "runs" / "ward"


def go_on(ward: Ward, name: str) -> None:
    """Take up what was kept under this name, say so, and keep what follows."""
    from checks.ward import Note

    ward.kept = NOTES / f"notes_{name}.json"
    if ward.kept.exists():
        held = json.loads(ward.kept.read_text(encoding="utf-8"))
        ward.ordered = held["ordered"]
        for run, (causes, evidence, cures) in held["notes"].items():
            ward.notes[run] = Note(frozenset(causes), tuple(evidence), frozenset(cures))
        print(f"going on with {len(ward.notes)} diagnoses and {ward.minutes()} minutes; to begin anew, delete", end=" ")
        print(ward.kept.relative_to(ROOT) if ward.kept.is_relative_to(ROOT) else ward.kept)


def keep(ward: Ward) -> None:
    path: Path | None = ward.kept
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = {
            run: [sorted(part) if isinstance(part, frozenset) else list(part) for part in note]
            for run, note in ward.notes.items()
        }
        write_atomically(path, json.dumps({"ordered": ward.ordered, "notes": notes}, indent=1))
