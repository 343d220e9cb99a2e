"""The evidence's own arithmetic: the split, the permutation test, what counts as named."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from statistics import fmean

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import programs
from benchmarks.detection import SEEDS, WATCHED, jobs, measured_harm, p_worse, told_of
from benchmarks.detection_rows import APART, CLASSES, HALVES, ROWS, halves
from benchmarks.programs import HEALTH
from moe_lab.health import RULES


def test_each_class_has_rows_in_both_halves_and_each_row_one_name() -> None:
    split = halves()
    assert len(split) == len(ROWS) >= 40
    assert len({row.kind for row in ROWS}) >= 12
    for sickness in CLASSES:
        counts = [sum(split[row.name] == half for row in ROWS if row.sickness == sickness) for half in HALVES]
        assert abs(counts[0] - counts[1]) <= 1 and min(counts) >= 1


@pytest.mark.parametrize("half", APART)
def test_a_set_apart_has_two_rows_of_each_class_over_twelve_kinds_and_knows_its_rules(half: str) -> None:
    split = halves()
    rows = [row for row in ROWS if split[row.name] == half]
    assert 24 <= len(rows) <= 30 and len({row.kind for row in rows}) >= 12
    assert {row.sickness for row in rows} == set(CLASSES)
    assert min(Counter(row.sickness for row in rows).values()) >= 2
    assert {rule for row in ROWS for rule in row.right} <= set(RULES)


@pytest.mark.parametrize("half", APART)
def test_harm_is_measured_before_a_watch_and_its_numbers_are_held_against_it(half: str) -> None:
    runs = list(jobs(half, harm=True))
    assert not any(path in HEALTH for job in runs for path in job.sources) and {job.seed for job in runs} == set(SEEDS)
    assert {job.seed for job in jobs(half)} == set(WATCHED)
    line = {"is_sick": True, "p": 0.004, "n_seeds": 5, "held_out": [[2.0, 3.0], [1.0, None]]}
    assert measured_harm(line, "row", [[2.0], [1.0]])["same_numbers"]
    assert not measured_harm(line, "row", [[2.0], [1.5]])["same_numbers"]
    with pytest.raises(ValueError, match="no harm of the row"):
        measured_harm(None, next(row.name for row in ROWS if halves()[row.name] == half), [[], []])


def test_the_permutation_test_agrees_with_counting_all_orders() -> None:
    sick, healthy = [3.0, 2.0, 4.0], [1.0, 2.5, 2.0]
    told = fmean(sick) - fmean(healthy)
    orders = list(permutations(sick + healthy))
    share = sum(fmean(order[:3]) - fmean(order[3:]) >= told - 1e-12 for order in orders) / len(orders)
    assert p_worse(sick, healthy) == pytest.approx(share)
    assert p_worse([5.0, 6, 7, 8, 9], [0.0, 1, 2, 3, 4]) == pytest.approx(1 / 252)
    assert p_worse([None] * 5, [0.0, 1, 2, 3, 4]) == pytest.approx(1 / 252)  # a run that broke is worse than any
    assert p_worse([None] * 5, [2.8202, 2.80228, 2.7781, 2.76935, 2.78837]) == pytest.approx(1 / 252)
    assert p_worse([1.0] * 5, [1.0] * 5) == 1.0


def run_of(*findings: tuple) -> dict:
    return {"findings": [["watch", rule, severity, step, "where", 1.0, "message"] for rule, severity, step in findings]}


def test_the_first_finding_must_name_the_cause() -> None:
    right = told_of(run_of(("reach", "info", 10), ("stale_gradients", "error", 10)), ("stale_gradients",), 0)
    assert right["right"] and right["delay"] == 10
    second = told_of(run_of(("initial_loss", "warning", 10), ("stale_gradients", "error", 20)), ("stale_gradients",), 0)
    assert not second["right"] and second["named"] == ["watch", "stale_gradients", "error", 20]
    assert told_of(run_of(), ("stale_gradients",), 0) == {"first": None, "right": False, "named": None, "delay": None}


def test_a_fault_that_begins_mid_run_is_not_named_before_it() -> None:
    early = told_of(run_of(("lr_spent", "warning", 20)), ("lr_spent",), 40)
    assert not early["right"]
    late = told_of(run_of(("lr_spent", "warning", 60)), ("lr_spent",), 40)
    assert late["right"] and late["delay"] == 20


def test_twins_share_start_and_batches() -> None:
    row = next(row for row in ROWS if row.name.startswith("the framework steps"))
    losses = []
    for sick in (True, False):
        torch.manual_seed(0)
        losses.append(float(row.make(0, sick).step(0)))
    assert losses[0] == losses[1]


def test_a_row_is_computed_once_for_each_content_of_its_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(programs, "CACHE", tmp_path)
    monkeypatch.setenv("JOBS", "1")
    source = tmp_path / "source.py"
    source.write_text("1")
    ran = tmp_path / "ran"

    def work() -> dict:
        ran.write_text(ran.read_text() + "x" if ran.exists() else "x")
        return {"value": 1}

    for _ in range(2):
        assert programs.kept([programs.Job("name", 0, work, [source])], "test")[0]["value"] == 1
    assert ran.read_text() == "x"
    source.write_text("2")
    programs.kept([programs.Job("name", 0, work, [source])], "test")
    assert ran.read_text() == "xx"
