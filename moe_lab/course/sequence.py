"""The whole sequence of notebooks: run it, or make its committed outputs anew.

python -m moe_lab.course.sequence run [name=value …]     # each notebook into one new directory under runs/
python -m moe_lab.course.sequence refresh [notebook …]   # outputs in place, and notebooks/minutes.json
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from papermill.exceptions import PapermillExecutionError

from moe_lab.config import ConfigError, load_config
from moe_lab.course import runner
from moe_lab.course.machine import MINUTES, tokens_per_second
from moe_lab.train.record import write_atomically


def minutes_of(call) -> float:
    start = time.perf_counter()
    call()
    return round((time.perf_counter() - start) / 60, 1)


def smoke(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runner.execute(path, Path(folder) / path.name, {}, MOE_LAB_PROFILE="smoke")


def refresh(paths: list[Path]) -> None:
    """Outputs of profile lab in place; minutes of both profiles beside them. The first notebook comes last: it shows
    the minutes of the others."""
    measured = json.loads(MINUTES.read_text(encoding="utf-8"))
    for profile in ("smoke", "lab"):
        config = load_config(runner.ROOT / "configs" / f"{profile}.yaml")
        measured["reference"]["tokens_per_s"][profile] = round(tokens_per_second(config))
    measured["reference"]["machine"] = f"{torch.get_num_threads()} cores, {platform.machine()}, no GPU"
    for path in sorted(paths, key=lambda path: path.stem.startswith("00")):
        minutes = {"smoke": minutes_of(lambda path=path: smoke(path))}
        minutes["lab"] = minutes_of(lambda path=path: runner.refresh([path]))
        measured["notebooks"][path.stem] = minutes
        print(f"{path.stem}: smoke {minutes['smoke']} min, lab {minutes['lab']} min")
        write_atomically(MINUTES, json.dumps(measured, indent=2) + "\n")


def main(arguments: list[str]) -> int:
    try:
        command, *rest = arguments or [""]
        if command == "run":
            print(runner.run_all(parameters=runner.parse(["all", *rest])[1]))
        elif command == "refresh":
            refresh([runner.find_notebook(name) for name in rest] or runner.all_notebooks())
        else:
            raise ConfigError(f"{command!r} is not a command; write run or refresh")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        print(f"error: cell [{error.exec_count}]: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
