"""record.jsonl: one JSON object a line, appended while a run goes on, readable at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

RECORD = "record.jsonl"
FINDINGS = "findings.jsonl"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file. A last line that a kill cut short is left out; a missing file has no rows."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what follows the last newline is unfinished


def read_record(run_dir: str | Path) -> list[dict]:
    """Rows of a run: steps (`step`, `tokens`, `loss`, …) and evaluations (`"event": "eval"`), in order of time."""
    return read_jsonl(Path(run_dir) / RECORD)


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_atomically(path: Path, text: str) -> None:
    """All of the text or, after a crash, what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def cut_jsonl(path: Path, last_step: int) -> None:
    """Drop every row beyond `last_step`, and a line that was cut short. A row whose step is None stays."""
    if path.exists():
        rows = [row for row in read_jsonl(path) if row["step"] is None or row["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
