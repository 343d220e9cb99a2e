"""record.jsonl: one JSON object a line, appended while a run goes on, readable at any moment; summary.json at its end."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lab.train.loop import Trainer

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


def write_summary(trainer: Trainer, status: str) -> dict[str, Any]:
    """Write summary.json from what the record holds; returns its content. `findings`: null if nothing watched."""
    rows = read_record(trainer.run_dir)
    losses = [row["loss"] for row in rows if "loss" in row][-trainer.config.training.log_interval :]
    validation = next((row["validation_loss"] for row in reversed(rows) if row.get("event") == "eval"), None)
    wall = trainer.seconds()
    n_targets = len(trainer.dataset.validation) - 1
    findings = trainer.run_dir / FINDINGS
    summary = {
        "status": status,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": validation,
        "trigram_loss": trainer.floors["trigram"],
        "bits_per_byte": validation and validation * n_targets / trainer.dataset.validation_bytes / math.log(2),
        "steps": trainer.step,
        "tokens": trainer.tokens(),
        "wall_s": round(wall, 1),
        "tokens_per_s": round(trainer.tokens() / wall, 1) if wall else 0.0,
        "seed": trainer.config.training.seed,
        "commit": commit(),
        "corpus": trainer.dataset.corpus_hash,
        "findings": read_jsonl(findings) if findings.exists() else None,
    }
    write_atomically(trainer.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def commit() -> str | None:
    """The repository's short commit hash, with a plus sign where files differ from it; None without git, and for an
    installed package, which may lie in somebody else's repository but is no part of it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    options: dict[str, Any] = {"stderr": subprocess.DEVNULL, "text": True, "timeout": 10}
    try:
        subprocess.check_output([*git, "ls-files", "--error-unmatch", Path(__file__).name], **options)
        return subprocess.check_output([*git, "describe", "--always", "--dirty=+", "--exclude=*"], **options).strip()
    except (OSError, subprocess.SubprocessError):
        return None
