"""Notebook 03's failure is an asserted artefact: with a no-op in the bug's place its first claim fails."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from moe_lab.failures import bugs

PATH = Path(__file__).parents[1] / "notebooks" / "03_bf16_underflow.ipynb"


def run_cells(last: str) -> dict:
    """The notebook's code cells up to the one of that id, executed here in profile smoke."""
    names: dict = {}
    for cell in nbformat.read(PATH, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"03, cell {cell.id}", "exec"), names)
        if cell.id == last:
            return names
    raise AssertionError(f"the notebook has no cell {last}")


@pytest.fixture(autouse=True)
def headless(monkeypatch) -> None:
    monkeypatch.setenv("MOE_LAB_PROFILE", "smoke")
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")


def test_the_bug_freezes_the_norms(capsys) -> None:
    run_cells("frozen")
    assert "03.1 holds" in capsys.readouterr().out


def test_a_bug_that_no_longer_fails_turns_the_notebook_red(monkeypatch) -> None:
    monkeypatch.setattr(bugs, "cast_parameters", bugs.no_op)
    with pytest.raises(
        AssertionError, match=r"03.1 does not hold: with bf16 parameters every norm weight is exactly 1"
    ):
        run_cells("frozen")
