"""summary.json: what a run came to."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.train.record import FINDINGS, read_jsonl, read_record, write_atomically

if TYPE_CHECKING:
    from moe_lab.train.loop import Trainer


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
    commands = (
        ["ls-files", "--error-unmatch", Path(__file__).name],
        ["describe", "--always", "--dirty=+", "--exclude=*"],
    )
    try:
        for command in commands:
            git = ["git", "-C", str(Path(__file__).parent), *command]
            done = subprocess.run(git, capture_output=True, text=True, timeout=10)
            if done.returncode:
                return None
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
