"""The one way to committed outputs: `make outputs` executes every notebook in profile lab, in place, and writes down the minutes.

python -m benchmarks.outputs [notebook …]
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
import torch

from moe_lab.config import ROOT, ConfigError, load_config
from moe_lab.course.machine import MINUTES, read_minutes, tokens_per_second
from moe_lab.course.runner import all_notebooks, execute, find_notebook
from moe_lab.train.command import exit_code
from moe_lab.train.record import write_atomically

MAX_BYTES = 500 * 1024  # of a committed notebook


def refresh(names: Sequence[str]) -> None:
    """Outputs of profile lab in place; minutes of both profiles beside them. The first notebook comes last: it shows the
    minutes of the others."""
    paths, measured = [find_notebook(name) for name in names] or all_notebooks(), read_minutes()
    for profile in ("smoke", "lab"):
        config = load_config(ROOT / "configs" / f"{profile}.yaml")
        measured["reference"]["tokens_per_s"][profile] = round(tokens_per_second(config))
    measured["reference"]["machine"] = f"{torch.get_num_threads()} cores, {platform.machine()}, no GPU"
    for path in sorted(paths, key=lambda path: path.stem.startswith("00")):
        minutes = measured["notebooks"][path.stem] = {}
        for profile in ("smoke", "lab"):
            start = time.perf_counter()
            fresh = executed(path, profile)
            minutes[profile] = round((time.perf_counter() - start) / 60, 1)
        write_outputs(fresh, path)
        print(f"{path.stem}: smoke {minutes['smoke']} min, lab {minutes['lab']} min")
        write_atomically(MINUTES, json.dumps(measured, indent=2) + "\n")


def executed(path: Path, profile: str) -> nbformat.NotebookNode:
    with tempfile.TemporaryDirectory() as folder:
        execute(path, Path(folder) / path.name, {}, MOE_LAB_PROFILE=profile)
        return nbformat.read(Path(folder) / path.name, as_version=4)


def write_outputs(fresh: nbformat.NotebookNode, path: Path) -> None:
    """Put an executed notebook in the committed one's place, without what papermill, widgets and stderr leave behind, and
    with execution counts 1 to n. Raises ConfigError if it has become too large."""
    for name in ("papermill", "widgets"):
        fresh.metadata.pop(name, None)
    for cell in fresh.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    code = [cell for cell in fresh.cells if cell.cell_type == "code" and cell.source.strip()]
    for count, cell in enumerate(code, 1):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    size, limit = len(nbformat.writes(fresh).encode()) // 1024, MAX_BYTES // 1024
    if size > limit:
        raise ConfigError(f"{path.name}: {size} KiB of outputs; {limit} is the limit: thin its figures")
    nbformat.write(fresh, path)


if __name__ == "__main__":
    sys.exit(exit_code(refresh, sys.argv[1:]))
