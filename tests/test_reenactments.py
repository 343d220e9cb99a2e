"""A notebook that re-enacts a bug must turn red once the bug stops failing: here a no-op takes the bug's place.

That the same cells are green with the real bug is what `make test` shows by nbval, in the same profile.
"""

import ast
import asyncio
import inspect
import re
from pathlib import Path

import nbformat
import pytest
import torch
from helpers import MECHANISMS, random_ids, tiny

from moe_lab import build_model, load_config
from moe_lab.course import notebook
from moe_lab.failures import bugs

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SLOW = "04a.5 does not hold: the sick run's loss has fallen less than half as far"
# (notebook, the function of moe_lab.failures.bugs that it calls, the first claim that must fail without it)
REENACTED = [
    ("03_bf16_underflow", "cast_parameters", "03.1 does not hold: with bf16 parameters every norm weight is exactly 1"),
    ("04a_which_cause_was_it", "lr_of_another_optimizer", SLOW),
]


@pytest.mark.parametrize(("name", "bug", "claim"), REENACTED)
def test_a_no_op_in_the_bugs_place_turns_a_claim_red(name: str, bug: str, claim: str, monkeypatch) -> None:
    """On batches of one window, with which the claims hold too."""
    monkeypatch.setenv("MOE_LAB_PROFILE", "smoke")
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    small = {"model": {"max_seq_len": 32}, "training": {"batch_size": 1, "gradient_accumulation_steps": 1}}
    monkeypatch.setattr(notebook, "load_config", lambda *given: load_config(*given).with_(**small))
    calls = []
    monkeypatch.setattr(bugs, bug, lambda given: calls.append(1) or given)
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = [compile(cell.source, cell.id, "exec", flags) for cell in cells if cell.cell_type == "code"]
    namespace: dict = {"__name__": "__main__"}
    with pytest.raises(AssertionError, match=f"^{re.escape(claim)}$"):
        for cell in code:
            if inspect.iscoroutine(waiting := eval(cell, namespace)):
                asyncio.run(waiting)
    assert calls, f"{name} does not call bugs.{bug}"


@pytest.mark.parametrize("path", ["layers.0.seq_layer", "layers.0.ffn", "layers.1.seq_layer", "layers.1.ffn"])
def test_a_detached_branch_computes_and_learns_nothing(path: str) -> None:
    """Whatever the layer returns beside its output: a routing, or nothing."""
    model, ids = build_model(tiny(**MECHANISMS["all"])), random_ids(2, 9)
    before = model.losses(ids)
    bugs.detach_output(model, path)
    after = model.losses(ids)
    assert all(torch.equal(before[name], after[name]) for name in before)
    sum(after.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if name.startswith(path + ".")}
    assert grads and not [name for name, grad in grads.items() if grad is not None and grad.any()]
