"""The one way to committed outputs and to the numbers in prose.

`make outputs` executes every notebook in profile lab, in place, from a clean tree; writes numbers of claims into the prose
that names them, `<!-- 03.2 cost:.3f -->0.057<!-- / -->`; and writes down minutes and claims. `make claims` executes them
as well, for their claims alone: in profile lab all are asserted, also those that a smaller run cannot meet.

    python -m benchmarks.outputs [--claims] [notebook …]
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import torch
from checks.machine_00 import MINUTES, read_minutes, tokens_per_second

from moe_lab.config import ROOT, ConfigError, load_config
from moe_lab.course import case
from moe_lab.course.runner import all_notebooks, execute, find_notebook
from moe_lab.failures.results import cpu_kind, provenance
from moe_lab.train.command import exit_code
from moe_lab.train.record import NO_CODE, write_atomically

MAX_BYTES = 500 * 1024  # of a committed notebook
CLAIMS = ROOT / "benchmarks" / "claims.json"
LAST = "07 00"  # which show what the others wrote down
MARK = re.compile(r"<!-- ([^/\s][^>]*?) -->(.*?)<!-- /\w* -->")
Claim = dict[str, Any]  # notebook, id, statement, numbers


def refresh(names: Sequence[str]) -> None:
    """Outputs of profile lab in place; minutes of both profiles and all claims beside them. The ledger comes after all whose
    verdicts it shows, and the first notebook last: it shows the minutes of the others. Raises ConfigError where one commit cannot stand for all of it."""
    refuse_dirt()
    commit, paths, measured = provenance()["commit"], chosen(names), read_minutes()
    machine = f"{torch.get_num_threads()} cores, {cpu_kind()}, no GPU"
    if names and machine != measured["reference"]["machine"]:
        raise ConfigError(f"minutes were measured on {measured['reference']['machine']}: here, refresh all notebooks")
    for profile in ("smoke", "lab"):
        config = load_config(ROOT / "configs" / f"{profile}.yaml")
        measured["reference"]["tokens_per_s"][profile] = round(tokens_per_second(config))
    measured["reference"]["machine"] = machine
    there = {path.stem for path in all_notebooks()}
    measured["notebooks"] = {name: both for name, both in measured["notebooks"].items() if name in there}
    found: dict[str, list[Claim]] = {}
    for path in sorted(paths, key=lambda path: LAST.find(path.stem[:2])):
        minutes = measured["notebooks"][path.stem] = {}
        for profile in ("smoke", "lab"):
            start, found[path.stem] = time.perf_counter(), []
            fresh = executed(path, profile, found[path.stem], MOE_LAB_KEEP_VERDICTS="1")
            minutes[profile] = round((time.perf_counter() - start) / 60, 1)
        write_outputs(fresh, path, found[path.stem])
        print(f"{path.stem}: smoke {minutes['smoke']} min, lab {minutes['lab']} min", flush=True)
        write_atomically(MINUTES, json.dumps(measured, indent=2) + "\n")
    if commit != provenance()["commit"]:
        raise ConfigError(f"{commit} was checked out at the start and {provenance()['commit']} is now: run this again")
    if not names:
        keep_verdicts_of(commit)  # what no notebook judges any longer must not stay
        write_claims(found, sum(minutes["lab"] for minutes in measured["notebooks"].values()))


def keep_verdicts_of(commit: str | None) -> None:
    """Leave out the entries that another commit made."""
    entries = case.read_verdicts().items()
    case.write_verdicts({id: entry for id, entry in entries if entry["provenance"]["commit"] == commit})


def assert_claims(names: Sequence[str]) -> None:
    """Execute in profile lab and look at claims alone; without names, write them down."""
    start, found = time.perf_counter(), {}
    for path in chosen(names):
        executed(path, "lab", found.setdefault(path.stem, []))
        print(f"{path.stem}: {len(found[path.stem])} claims hold", flush=True)
        if missing := [id for id in declared_claims(path) if id not in {claim["id"] for claim in found[path.stem]}]:
            raise ConfigError(f"{path.stem}: not asserted in profile lab: {', '.join(missing)}")
    if not names:
        write_claims(found, round((time.perf_counter() - start) / 60, 1))


def chosen(names: Sequence[str]) -> list[Path]:
    return [find_notebook(name) for name in names] or all_notebooks()


def refuse_dirt() -> None:
    """Raises ConfigError where committed files differ from the commit, those that are written here left out; what judges the
    exercises and claims is code as well."""
    elsewhere = [f":(top,exclude){path}" for path in NO_CODE]
    changes = []
    for paths in ([":/", *elsewhere], [":/notebooks/checks"]):
        command = ["git", "status", "--porcelain", "--untracked-files=no", "--", *paths]
        changes += subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    if changes:
        raise ConfigError(
            f"commit first: outputs name one commit, and {', '.join(line[3:] for line in changes)} differ"
        )


def executed(path: Path, profile: str, claims: list[Claim] | None = None, **environment: str) -> nbformat.NotebookNode:
    """The notebook as the profile makes it; `claims` gets what it claimed."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "claims.jsonl"
        environment |= {"MOE_LAB_PROFILE": profile, "MOE_LAB_CLAIMS": str(kept)}
        execute(path, Path(folder) / path.name, {}, **environment)
        if claims is not None and kept.exists():
            claims += map(json.loads, kept.read_text(encoding="utf-8").splitlines())
        return nbformat.read(Path(folder) / path.name, as_version=4)


def filled(text: str, value_of: Callable[[str], str | None]) -> str:
    """The text with `value_of(mark)` between `<!-- mark -->` and `<!-- / -->`; None leaves what is there."""

    def fill(found: re.Match[str]) -> str:
        value = value_of(found[1])
        return found[0] if value is None else f"<!-- {found[1]} -->{value}<!-- / -->"

    return MARK.sub(fill, text)


def number_of(mark: str, claims: Sequence[Claim]) -> str | None:
    """What `03.2 cost.96:.3f` stands for: a number of the claim, or a part of one, in that format; None: no such mark.
    Raises ConfigError where there is no such claim or number."""
    if not (parts := re.fullmatch(r"(\d\d[a-z]?\.\d+) ([\w.]+)(?::(\S+))?", mark)):
        return None
    id, name, form = parts[1], parts[2], parts[3] or ""
    value: Any = next((claim["numbers"] for claim in claims if claim["id"] == id), None)
    if value is None:
        raise ConfigError(f"<!-- {mark} -->: this notebook made no claim {id}")
    for key in name.split("."):
        if key not in (value if isinstance(value, dict) else {}):
            raise ConfigError(f"<!-- {mark} -->: claim {id} has no number {name}")
        value = value[key]
    return format(value, form)


def write_outputs(fresh: nbformat.NotebookNode, path: Path, claims: Sequence[Claim] | None = None) -> None:
    """Put an executed notebook in the committed one's place, without what papermill, widgets and stderr leave behind, with
    execution counts 1 to n, and with the numbers of `claims` in its prose. Raises ConfigError if it has become too large."""
    for name in ("papermill", "widgets"):
        fresh.metadata.pop(name, None)
    for cell in fresh.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if claims is not None and cell.cell_type == "markdown":
            cell.source = filled(cell.source, lambda mark: number_of(mark, claims))
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


def declared_claims(path: Path) -> list[str]:
    """Ids of all claims that the notebook's code can make."""
    ids = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            tree = compile(cell.source, path.name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
            calls = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "claim"]
            ids += [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]
    return [id for id in ids if re.match(r"\d\d[a-z]?\.", str(id))]


def write_claims(found: dict[str, list[Claim]], minutes: float) -> None:
    """Each claim of profile lab with its numbers; a line each, so that one that changes is a line that changes."""
    made = provenance() | {"cores": os.cpu_count(), "profile": "lab", "minutes": minutes}
    rows = [{"notebook": name, **claim} for name, claims in sorted(found.items()) for claim in claims]
    for row in rows:
        row.pop("profile")
    text = json.dumps({"provenance": made, "claims": rows}, ensure_ascii=False)
    write_atomically(CLAIMS, text.replace('{"notebook"', '\n{"notebook"') + "\n")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--claims"]
    sys.exit(exit_code(assert_claims if "--claims" in sys.argv else refresh, arguments))
