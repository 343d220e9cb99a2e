"""record.jsonl: one JSON object a line, appended while a run goes on, readable at any moment; and whose code wrote it."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

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
