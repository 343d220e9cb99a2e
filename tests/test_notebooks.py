"""What every committed notebook must be, and proof that the checks refuse notebooks that are not.

`make test` executes the notebooks by nbval. That alone would pass a cleared notebook, since there is nothing to compare,
so the outputs are looked at here. tests/fixtures/ holds one bad notebook or cell for each thing that must be refused.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import notebook_rules
import pytest
from checks import ledger
from nbformat.v4 import new_code_cell, new_notebook, new_output

from benchmarks.outputs import CLAIMS, declared_claims
from moe_lab.course import case

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 500 * 1024  # bytes


def problems(path: Path) -> list[str]:
    """What is wrong with a committed notebook's outputs and form; empty: nothing."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    found = []
    if not any(cell.outputs for cell in code):
        found.append("cleared: no cell has an output")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("execution counts are not 1 to n: run `make outputs`")
    outputs = [output for cell in code for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        found.append("an error is among the outputs")
    if any("widget" in kind for output in outputs for kind in output.get("data", {})) or "widgets" in notebook.metadata:
        found.append("widget state is among the outputs")
    if path.stat().st_size > LARGEST:
        found.append(f"{path.stat().st_size // 1024} KiB; the limit is {LARGEST // 1024}")
    if sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) != 1:
        found.append("there must be exactly one cell tagged parameters")
    if any(tag.endswith("raises-exception") for cell in code for tag in cell.metadata.get("tags", [])):
        found.append("raises-exception is read differently by each tool: assert the failure instead")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_keep_the_rules_of_form(path: Path) -> None:
    """tests/notebook_rules.py has them; `python tests/notebook_rules.py NOTEBOOK` prints what is broken."""
    assert notebook_rules.broken(path) == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_whole(path: Path) -> None:
    assert problems(path) == []


@pytest.mark.parametrize(
    ("name", "problem"), [("cleared", "cleared"), ("out_of_order", "execution counts"), ("refused", None)]
)
def test_the_form_of_bad_notebooks_is_refused(name: str, problem: str | None) -> None:
    found = problems(FIXTURES / f"{name}.ipynb")
    assert (found == []) if problem is None else any(text.startswith(problem) for text in found)


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(data: dict) -> Callable:
    return lambda notebook: code_of(notebook)[-1].outputs.append(new_output("display_data", data=data))


def tagged(*tags: str) -> Callable:
    return lambda notebook: code_of(notebook)[0].metadata.update(tags=[*tags])


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda notebook: [cell.update(outputs=[]) for cell in code_of(notebook)], "cleared"),
        (lambda notebook: code_of(notebook)[0].update(execution_count=2), "execution counts"),
        (lambda notebook: code_of(notebook)[0].outputs.append(new_output("error")), "an error"),
        (shown({"application/vnd.jupyter.widget-view+json": {}}), "widget state"),
        (lambda notebook: notebook.metadata.update(widgets={}), "widget state"),
        (shown({"image/png": "x" * LARGEST}), f"{LARGEST // 1024} KiB"),
        (tagged(), "there must be exactly one cell tagged parameters"),
        (tagged("parameters", "nbval-raises-exception"), "raises-exception"),
    ],
)
def test_each_problem_of_form_has_its_bad_notebook(spoil: Callable, problem: str, tmp_path: Path) -> None:
    cells = [new_code_cell("a = 1", metadata={"tags": ["parameters"]}, execution_count=1)]
    cells.append(new_code_cell("a", execution_count=2, outputs=[new_output("stream", text="1")]))
    notebook = new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "good.ipynb")
    assert problems(tmp_path / "good.ipynb") == []
    spoil(notebook)
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    (found,) = problems(tmp_path / "bad.ipynb")
    assert found.startswith(problem)


def test_nbval_refuses_bad_cells_and_no_others(tmp_path: Path) -> None:
    """Run as `make test` does: a claim that is false, a verdict that has changed, a misspelt parameter."""
    options = [
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-cell-timeout=120",
        "-p",
        "no:cacheprovider",
        "--noconftest",
    ]
    environment = os.environ | {"MOE_LAB_PROFILE": "smoke", "MOE_LAB_INTERACTIVE": "0"}
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={tmp_path / 'r.xml'}", FIXTURES / "refused.ipynb"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stdout
    cases = ElementTree.parse(tmp_path / "r.xml").iter("testcase")
    failures = [
        [bad.get("message") + bad.text for tag in ("failure", "error") for bad in case.iter(tag)] for case in cases
    ]
    expected = [None, None, None, "x.1 does not hold: one is less than two", "two is less than one"]
    expected += ["unknown parameter 'proflie'; did you mean profile?", None]
    for found, message in zip(failures, expected, strict=True):
        assert message in found[0] if message else found == []


def test_the_table_of_minutes_is_of_these_notebooks() -> None:
    measured = json.loads((ROOT / "notebooks" / "minutes.json").read_text(encoding="utf-8"))["notebooks"]
    assert sorted(measured) == [path.stem for path in NOTEBOOKS]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"| {measured[path.stem]['smoke']} | {measured[path.stem]['lab']} |" in readme


def test_all_committed_outputs_are_of_one_commit() -> None:
    """`make outputs` writes it into every notebook and verdict; the claims may be of a later `make claims`."""
    if not CLAIMS.exists():
        return  # before the first `make outputs` of this kind
    made = json.loads(CLAIMS.read_text(encoding="utf-8"))["provenance"]["commit"]
    found = ledger.commits(ROOT / "notebooks")
    found |= {id: entry["provenance"]["commit"] for id, entry in case.read_verdicts().items()}
    assert len(set(found.values())) == 1, found
    assert not any(str(commit).endswith("+") for commit in (made, *found.values()))


def test_every_committed_claim_was_asserted_in_profile_lab() -> None:
    if CLAIMS.exists():
        claims = json.loads(CLAIMS.read_text(encoding="utf-8"))["claims"]
        asserted = [(claim["notebook"], claim["id"]) for claim in claims]
        assert sorted(asserted) == sorted((path.stem, id) for path in NOTEBOOKS for id in declared_claims(path))
