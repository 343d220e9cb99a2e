"""A notebook that re-enacts a bug must turn red once the bug stops failing: here a no-op takes the bug's place.

That the same cells are green with the real bug is what `make test` shows by nbval, in the same profile.
"""

import ast
import inspect
import re
from pathlib import Path

import nbformat
import pytest
import torch
from helpers import MECHANISMS, random_ids, tiny

from moe_lab import build_model
from moe_lab.failures import bugs

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# (notebook, the function of moe_lab.failures.bugs that it calls, the first claim that must fail without it)
REENACTED = [
    ("03_bf16_underflow", "cast_parameters", "03.1 does not hold: with bf16 parameters every norm weight is exactly 1"),
    (
        "04_wrong_learning_rate",
        "lr_of_another_optimizer",
        "04.5 does not hold: the watch names the learning rate first",
    ),
]


def run_cells(name: str) -> dict:
    """Run the notebook's code cells here, one after another; returns what they define. Whatever a cell raises is raised."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    namespace: dict = {"__name__": "__main__"}
    for cell in cells:
        if cell.cell_type == "code":
            code = compile(cell.source, f"{name}:{cell.id}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            assert not code.co_flags & inspect.CO_COROUTINE, f"{cell.id}: awaits; this needs a kernel"
            exec(code, namespace)
    return namespace


@pytest.mark.parametrize(("name", "bug", "claim"), REENACTED)
def test_a_no_op_in_the_bugs_place_turns_a_claim_red(name: str, bug: str, claim: str, monkeypatch) -> None:
    monkeypatch.setenv("MOE_LAB_PROFILE", "smoke")
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    calls = []
    monkeypatch.setattr(bugs, bug, lambda given: calls.append(1) or given)
    with pytest.raises(AssertionError, match=f"^{re.escape(claim)}$"):
        run_cells(name)
    assert calls, f"{name} does not call bugs.{bug}"


@pytest.mark.parametrize("path", ["layers.0.seq_layer", "layers.0.ffn", "layers.1.seq_layer", "layers.1.ffn"])
def test_a_detached_branch_computes_and_learns_nothing(path: str) -> None:
    """Whatever the layer returns beside its output: a routing, or nothing."""
    model, ids = build_model(tiny(**MECHANISMS["all"])), random_ids(2, 9)
    before = model.losses(ids)
    bugs.detach_output(model.get_submodule(path))
    after = model.losses(ids)
    assert all(torch.equal(before[name], after[name]) for name in before)
    sum(after.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if name.startswith(path + ".")}
    assert grads and not [name for name, grad in grads.items() if grad is not None and grad.any()]
