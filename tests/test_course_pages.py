"""The case on one page and the checklist: they say what the case file says, and what they name is there."""

import re
from importlib import import_module

import pytest
from checks import checklist
from helpers import resolved

from benchmarks.course_pages import CASE_PAGE, CHECKLIST_PAGE, STAGES, checklist_lines, named_in, the_list
from moe_lab.config import ROOT
from moe_lab.course import case
from moe_lab.health import RULES

LINES = checklist_lines()


def is_there(check: str) -> bool:
    """Whether a check is a function of ours, a test, or a claim that a notebook makes."""
    if "::" in check:
        path, _, name = check.partition("::")
        return f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
    if re.fullmatch(r"\d\da?\.\d+", check):
        notebooks = (ROOT / "notebooks").glob(f"{check.split('.')[0]}_*.ipynb")
        return any(f'claim(\\"{check}\\"' in path.read_text(encoding="utf-8") for path in notebooks)
    return resolved(check) is not None


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["id"])
def test_what_a_line_names_is_there(line: dict) -> None:
    assert is_there(line["check"]), line["check"]
    assert all(case.bug(id) for id in line["bugs"])
    assert line["stage"] in STAGES and line["measurement"] in the_list()["measurements"]
    assert list((ROOT / "notebooks").glob(f"{line['notebook']}_*.ipynb"))
    for sign in line["see"]:
        if "finding" in sign:
            assert sign["finding"] in RULES and f"`{sign['finding']}`" in line["sign"]
            assert line["measurement"] in ("preflight", "examine", "watch", "inspection")
        else:
            (limit,) = [sign[key] for key in ("below", "above") if key in sign]
            assert the_list()["readings"][sign["reading"]]["of"] == line["measurement"] and limit >= 0


def test_a_line_that_names_nothing_is_noticed() -> None:
    """The test above can fail, for each kind of check."""
    assert not is_there("moe_lab.health.before.preflight.no_such_function")
    assert not is_there("tests/test_causality.py::test_nothing")
    assert not is_there("01.999")
    assert is_there("01.1")


def test_lines_stand_in_order_and_leave_no_bug_out() -> None:
    assert [line["id"] for line in LINES] == [f"K{n:02d}" for n in range(1, len(LINES) + 1)]
    stages = [list(STAGES).index(line["stage"]) for line in LINES]
    assert stages == sorted(stages)
    looked_for = {id for line in LINES for id in line["bugs"]}
    left_out = set(the_list()["without_a_line"])
    assert looked_for | left_out == set(case.case()["bugs"]) and not looked_for & left_out


def test_references_between_lines_are_to_lines() -> None:
    ids = {line["id"] for line in LINES}
    for line in LINES:
        assert set(re.findall(r"\bK\d\d\b", f"{line['cause']} {line['cure']}")) <= ids - {line["id"]}


def test_limits_are_those_of_the_tools() -> None:
    """Where a tool has a limit of its own, the page says the same."""
    by_reading = {sign["reading"]: sign for line in LINES for sign in line["see"] if "reading" in sign}
    branch, loss = (import_module(f"moe_lab.health.during.{name}") for name in ("branch", "rules_loss"))
    explore = import_module("checks.explore_01")
    assert by_reading["gain"]["above"] == branch.GAIN
    assert by_reading["start_off"]["above"] == loss.START_OFF == explore.START_OFF
    assert by_reading["from_uniform"]["below"] == explore.AT_LN_V


def test_a_notebooks_map_is_its_lines() -> None:
    text = checklist.map_of("01")
    assert [line["id"] for line in checklist.lines_of("01")] == re.findall(r"^\| (K\d\d) ", text, re.M)
    assert "random tokens" in text
    with pytest.raises(ValueError, match="no line of checklist.yaml is learned in notebook '99'"):
        checklist.map_of("99")


def test_the_pages_hold_every_claim_bug_and_line() -> None:
    """That they are the generated ones is tested with the other generated pages."""
    page, printed = (path.read_text(encoding="utf-8") for path in (CASE_PAGE, CHECKLIST_PAGE))
    for id, sentence in case.case()["claims"].items():
        assert f"| {id} | {sentence} |" in page
    for id in case.case()["bugs"]:
        assert f"| {id} | {case.bug(id).sentence} |" in page
    assert all(line["cause"] in printed and line["sign"] in printed for line in LINES)
    linked = re.findall(r"\]\(([^)#]+)\)", page + printed)
    assert len(linked) > 20 and all((ROOT / "notebooks" / link).exists() for link in linked)
    assert set(named_in()) <= {*case.case()["claims"], *case.case()["bugs"]}


def glossary_problems(text: str) -> list[str]:
    """Terms twice, out of the alphabet's order, without a sentence or a notebook."""
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    terms = [re.match(r"- \*\*(.+?)\*\*(?: \([^)]+\))? \(\d\da?\): .+\.$", line) for line in lines]
    found = [f"no entry: {line[:40]}" for line, term in zip(lines, terms, strict=True) if not term]
    names = [" ".join(re.findall(r"\w+", re.sub("[`*_]", " ", term[1]).casefold())) for term in terms if term]
    found += [f"twice: {name}" for name in sorted({name for name in names if names.count(name) > 1})]
    return found + [f"before {a}: {b}" for a, b in zip(names, names[1:], strict=False) if b < a]


def test_the_glossary_is_one_list_in_order() -> None:
    assert glossary_problems((ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8")) == []


def test_a_bad_glossary_is_noticed() -> None:
    text = "- **Nat** (01): a unit.\n- **Floor** (01): a loss.\n- **Nat** (02): again.\n- **Odd**: no notebook."
    assert glossary_problems(text) == ["no entry: - **Odd**: no notebook.", "twice: nat", "before nat: floor"]
