"""Plant one-line faults, one at a time, and see that the test named beside each one fails: `make mutants`.

Works on copies of the repository. First every named test must pass there unharmed; then each fault must make its test
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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutants.toml"
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "*.egg-info")
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


def run_tests(folder: Path, tests: set[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *sorted(tests)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def survives(folder: Path, mutant: Mutant) -> str:
    """What its test did instead of failing; empty if it failed."""
    path = folder / mutant.file
    healthy = path.read_text(encoding="utf-8")
    if healthy.count(mutant.old) != 1:
        return f"the line to change stands {healthy.count(mutant.old)} times in {mutant.file}"
    path.write_text(healthy.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        done = run_tests(folder, {mutant.test})
    finally:
        path.write_text(healthy, encoding="utf-8")
    if done.returncode == 1 and " failed" in done.stdout:
        return ""
    return f"{mutant.test} ended with exit code {done.returncode}: {done.stdout.strip()[-300:]}"


def survivors(mutants: list[Mutant]) -> int:
    """How many of these live, tried one after another in a copy of their own; all, if a test fails without any."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(ROOT, Path(temporary) / "copy", ignore=LEFT_OUT)
        healthy = run_tests(folder, {mutant.test for mutant in mutants})
        if healthy.returncode:
            print(f"the named tests do not pass on healthy code:\n{healthy.stdout[-3000:]}", file=sys.stderr)
            return len(mutants)
        alive = 0
        for mutant in mutants:
            reason = survives(folder, mutant)
            alive += bool(reason)
            print(f"{'SURVIVED' if reason else 'died    '} {mutant.name:58} {reason or mutant.test}", flush=True)
        return alive


def main() -> int:
    mutants = read_table()
    with ThreadPoolExecutor(WORKERS) as pool:
        alive = sum(pool.map(survivors, (mutants[i::WORKERS] for i in range(WORKERS))))
    print(f"{len(mutants) - alive} of {len(mutants)} faults died")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
