"""Plant one-line faults, one at a time, and see that the test named beside each one fails: `make mutants`.

Works on a copy of the repository. First every named test must pass there unharmed; then each fault must make its test
fail (exit code 1 of pytest: a test ran and did not hold; a test that cannot even be collected does not count).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutants.toml"
COPIED = (
    "moe_lab",
    "benchmarks",
    "tests",
    "configs",
    "notebooks",
    "pyproject.toml",
    "README.md",
    "environment.yml",
    "constraints.txt",
    "Makefile",
)
WORKERS = 2


class Mutant(NamedTuple):
    """One entry of the table."""

    file: str
    name: str
    old: str
    new: str
    test: str


def read_table() -> list[Mutant]:
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [Mutant(file, **entry) for file, entries in table.items() for entry in entries]


class Verdict(NamedTuple):
    died: bool
    text: str


def copy_repository(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def try_mutant(folder: Path, mutant: Mutant) -> Verdict:
    path = folder / mutant.file
    healthy = path.read_text(encoding="utf-8")
    if healthy.count(mutant.old) != 1:
        return Verdict(False, f"the line to change stands {healthy.count(mutant.old)} times in {mutant.file}")
    path.write_text(healthy.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        done = run_tests(folder, [mutant.test])
    finally:
        path.write_text(healthy, encoding="utf-8")
    if done.returncode == 1 and " failed" in done.stdout:
        return Verdict(True, mutant.test)
    return Verdict(False, f"{mutant.test} ended with exit code {done.returncode}: {done.stdout.strip()[-300:]}")


def main() -> int:
    mutants = read_table()
    with tempfile.TemporaryDirectory() as temporary:
        folders: Queue[Path] = Queue()
        for worker in range(WORKERS):
            folder = Path(temporary) / str(worker)
            folder.mkdir()
            folders.put(copy_repository(folder))
        healthy = run_tests(folders.queue[0], sorted({mutant.test for mutant in mutants}))
        if healthy.returncode:
            print(f"the named tests do not pass on healthy code:\n{healthy.stdout[-3000:]}", file=sys.stderr)
            return 1

        def in_a_folder(mutant: Mutant) -> Verdict:
            folder = folders.get()
            try:
                return try_mutant(folder, mutant)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(WORKERS) as pool:
            verdicts = list(zip(mutants, pool.map(in_a_folder, mutants), strict=True))
    for mutant, verdict in verdicts:
        print(f"{'died    ' if verdict.died else 'SURVIVED'} {mutant.name:58} {verdict.text}")
    survivors = sum(not verdict.died for _, verdict in verdicts)
    print(f"{len(verdicts) - survivors} of {len(verdicts)} faults died")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
