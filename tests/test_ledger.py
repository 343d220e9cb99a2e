"""The ledger: a row for each claim, and no verdict without a fresh measurement."""

import nbformat
import pytest
from checks import ledger
from nbformat.v4 import new_code_cell, new_notebook, new_output

from moe_lab.course import case

COMMIT = "abcdef0"


@pytest.fixture
def folder(tmp_path):
    """A notebook that judges C01 in its third code cell."""
    said = new_output("stream", text=f"commit {COMMIT} · Python 3.11 · torch 2.13 · cpu\n")
    sources = ["x = 1", "lab.provenance()", 'case.judge("C01", lab, n=1)\ncase.judge(\n    "C02", lab)', "# judge: C03"]
    cells = [new_code_cell(source) for source in sources]
    cells[1].outputs = [said]
    nbformat.write(new_notebook(cells=cells), tmp_path / "03_bf16.ipynb")
    return tmp_path


def entry(**changes) -> dict:
    origin = {"profile": "lab", "seed": 0, "settings": [], "commit": COMMIT, "machine": "x86_64"} | changes
    numbers = {"cost": {"mean": 0.0574, "sd": 0.0041, "n": 3}}
    return {"outcome": "holds", "sentence": "at width 96", "numbers": numbers, "provenance": origin}


def test_a_fresh_measurement_is_a_row_with_its_place(folder) -> None:
    first, *others = ledger.rows({"C01": entry()}, folder)
    assert (first.id, first.outcome, first.sentence) == ("C01", "holds", "at width 96")
    assert (first.notebook, first.cell) == ("03_bf16", 3)
    assert first.run == f"profile lab, seed 0, commit {COMMIT}, x86_64"
    assert [row.id for row in others] == list(case.case()["claims"])[1:]
    assert {row.outcome for row in others} == {"open"}
    table = ledger.as_markdown([first, *others]).splitlines()
    assert {line.count(" | ") for line in table[2 : 2 + 21]} == {4}
    assert table[2 + 21 :] == ["", f"C01: {first.run}."]
    assert "cost 0.057 ± 0.004 (3 runs) | [03_bf16](03_bf16.ipynb), code cell 3 |" in table[2]


@pytest.mark.parametrize(
    ("id", "stored", "why"),
    [
        ("C01", None, "its notebook has not recorded a verdict yet"),
        ("C01", entry(settings=["training.seed: 0 → 3"]), "measured with other settings: training.seed: 0 → 3"),
        ("C01", entry(commit=f"{COMMIT}+"), "measured with code that no commit holds"),
        ("C01", entry(commit=None), "measured with code that no commit holds"),
        ("C01", entry(commit="1234567"), f"measured at 1234567, and its notebook's outputs are of {COMMIT}"),
        ("C03", entry(), "no notebook measures it any longer"),
        ("C03", None, "no notebook measures it yet"),
    ],
)
def test_a_claim_without_a_fresh_measurement_is_open(folder, id, stored, why) -> None:
    row = next(row for row in ledger.rows({id: stored} if stored else {}, folder) if row.id == id)
    assert (row.outcome, row.sentence, row.numbers, row.run) == ("open", why, {}, "")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.123456, "0.123"),
        (True, "yes"),
        (7, "7"),
        ([0.2, 0.16], "0.2, 0.16"),
        ({"96": 1.95959, "192": {"mean": 1.0, "sd": 0.01, "n": 3}}, "96: 1.96, 192: 1.000 ± 0.010 (3 runs)"),
    ],
)
def test_numbers_are_told_in_few_words(value, words) -> None:
    assert ledger.shown(value) == words


def test_many_numbers_are_told_by_their_ends(folder) -> None:
    row = ledger.rows({"C01": entry()}, folder)[0]._replace(
        numbers={"at_width": dict(zip("abcdef", [3, 1, 2, 5, 4, 9], strict=True))}
    )
    assert ledger.numbers_of(row) == "at width 1 to 9"


def test_every_claim_says_what_would_change_it() -> None:
    assert list(ledger.WOULD_CHANGE) == list(case.case()["claims"])


def test_committed_verdicts_follow_from_their_recorded_numbers() -> None:
    for row in ledger.rows(case.read_verdicts()):
        if row.run:
            assert ledger.judged_again(row.id, row.numbers) == (row.outcome, row.sentence), row.id
