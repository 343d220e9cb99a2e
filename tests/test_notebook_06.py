"""The committed study and matrix that notebook 06 reads are held against the code that makes them."""

from pathlib import Path

import pytest
from checks import matrix_06, study_06

from benchmarks import bug_matrix, bug_study
from moe_lab.failures.results import RESULTS, load_results


def test_the_study_is_of_the_arms_that_stand_there() -> None:
    found, cells = load_results(bug_study.NAME), bug_study.experiment().cells()
    assert {(row["arm"], row["seed"]): row["key"] for row in found.rows} == {at: cell.key for at, cell in cells.items()}
    assert all(row["updates"] == bug_study.UPDATES and row["diverged_at"] is None for row in found.rows)


def test_shares_add_up_and_a_cost_is_a_paired_difference() -> None:
    found = load_results(bug_study.NAME)
    whole = study_06.cost(found, "B01 + B02 + MoD + B21")
    assert sum(share.mean for share in study_06.shares(found).values()) == pytest.approx(whole.mean)
    by_hand = [found.loss("B21", seed) - found.loss("healthy", seed) for seed in (1, 2, 3)]
    assert study_06.alone(found)["B21"].mean == pytest.approx(sum(by_hand) / 3)


def test_the_matrix_has_every_bug_that_a_run_can_have() -> None:
    rows = {row["row"] for row in matrix_06.load()["rows"]}
    assert rows <= set(bug_matrix.ROWS) and {"healthy", *matrix_06.NAMES} >= rows & set(matrix_06.NAMES)
    assert set(matrix_06.NAMES) <= set(bug_matrix.ROWS)
    assert {*matrix_06.NAMES, "B14"} == {f"B{n:02d}" for n in range(1, 27)}


def test_a_call_names_a_bug_only_in_all_seeds_and_a_healthy_warning_is_an_alarm() -> None:
    def row(name: str, seed: int, rule: str, severity: str = "error", message: str = "") -> dict:
        return {
            "row": name,
            "seed": seed,
            "call": "Watch",
            "findings": [{"rule": rule, "severity": severity, "step": 20, "message": message}],
        }

    found = {
        "rows": [
            row("B05", 0, "no_gradient"),
            row("B05", 1, "reach", "info"),
            row("healthy", 0, "initial_loss", "warning"),
        ]
    }
    assert matrix_06.named(found)["B05"] == {} and len(matrix_06.alarms(found)) == 1
    found["rows"][1] = row("B05", 1, "no_gradient", "warning")
    assert matrix_06.named(found)["B05"] == {"Watch": "error"} and matrix_06.by_step(found, "B05") == [20, 20]
    # of two bugs that one rule names, its words tell which
    lone = "3 modules with parameters compute in evaluation only: Linear(16, 1)"
    found = {"rows": [row("day", 0, "mode_mismatch", message=lone)], "planted": {"day": ["B05", "B06", "B22"]}}
    assert matrix_06.together(found, "day") == {"B05": False, "B06": False, "B22": True}


def test_a_rounded_cosine_is_off_by_as_much_at_any_position_and_a_rounded_frequency_by_more() -> None:
    cosines, frequencies = matrix_06.rounded([64, 65536]).values()
    assert cosines == pytest.approx([2**-9, 2**-9], rel=2e-3)  # half a step of bfloat16 below 1
    assert frequencies[1] / frequencies[0] == pytest.approx(1024)


def test_results_lie_where_notebooks_look() -> None:
    assert {path.stem for path in Path(RESULTS).glob("bugs_*.json")} == {bug_study.NAME, bug_matrix.NAME}
