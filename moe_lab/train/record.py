"""record.jsonl: one JSON object a line, appended while a run goes on, readable at any moment; summary.json at its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from moe_lab.train.loop import Trainer

RECORD = "record.jsonl"
FINDINGS = "findings.jsonl"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file. A last line that a kill cut short is left out; a missing file has no rows."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def read_record(run_dir: str | Path) -> list[dict]:
    """Rows of a run: steps (`step`, `tokens`, `loss`, …) and evaluations (`"event": "eval"`), in order of time."""
    return read_jsonl(Path(run_dir) / RECORD)


def lines_of(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(lines_of(rows))


def cut_jsonl(path: Path, last_step: int) -> list[dict]:
    """Drop every row beyond `last_step`, and a line that was cut short. Returns what stays; a row without a step does."""
    rows = [row for row in read_jsonl(path) if (row["step"] or 0) <= last_step]
    if path.exists():
        write_atomically(path, lines_of(rows))
    return rows


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place once it is whole: a crash at any moment leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        yield file
    os.replace(temporary, path)


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def write_summary(trainer: Trainer, status: str) -> dict[str, Any]:
    """Write summary.json from what the record holds; returns its content. `findings`: null if nothing watched."""
    rows = read_record(trainer.run_dir)
    losses = [row["loss"] for row in rows if "loss" in row][-trainer.config.training.log_interval :]
    validation = next((row["validation_loss"] for row in reversed(rows) if "validation_loss" in row), None)
    dataset = trainer.dataset
    wall = trainer.seconds()
    findings = trainer.run_dir / FINDINGS
    n_targets = len(dataset.validation) - 1
    summary = {
        "status": status,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": validation,
        "trigram_loss": trainer.floors["trigram"],
        "bits_per_byte": validation and validation * n_targets / dataset.validation_bytes / math.log(2),
        "steps": trainer.step,
        "tokens": trainer.tokens(),
        "wall_s": round(wall, 1),
        "tokens_per_s": round(trainer.tokens() / wall, 1) if wall else 0.0,
        "seed": trainer.config.training.seed,
        "commit": commit(),
        "corpus": dataset.corpus_hash,
        "findings": read_jsonl(findings) if findings.exists() else None,
    }
    write_atomically(trainer.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


NO_CODE = ("notebooks", "*.md", "benchmarks/*.json")  # what `make outputs` and measurements rewrite


def commit() -> str | None:
    """The repository's short commit hash, with a plus sign where code or settings differ from it; None without git, and for
    an installed package, which may lie in somebody else's repository."""
    options = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL, "text": True, "timeout": 10}
    try:
        subprocess.check_output(["git", "ls-files", "--error-unmatch", __file__], **options)
        made = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], **options).strip()
        changes = ["git", "diff", "--quiet", "HEAD", "--", ":/", *(f":(top,exclude){path}" for path in NO_CODE)]
        return made + "+" * subprocess.run(changes, **options).returncode
    except (OSError, subprocess.SubprocessError):
        return None
