"""Verdicts: one stable line for the reader, one entry for the ledger, and no verdict that the numbers do not give."""

import json
import math
import platform
import re

import numpy as np
import pytest
import torch
from helpers import refused

from benchmarks.outputs import keep_verdicts_of
from moe_lab.config import ConfigError
from moe_lab.course import case, notebook
from moe_lab.failures.results import cpu_kind

NOTEBOOK = "01_data_and_loss_floors"
ONE = """
def C05(share, n, **others):
    if share < 0.5:
        return "holds only if", "most of it is what any run could show by then"
    return "holds", "as it says"
def C02(n): return ("holds" if n == 1 else "does not hold"), "a sentence"
def C03(outcome): return outcome, "a sentence"
def C04(): return "does not hold", "none of its numbers"
def C07(): return "open", "here"
"""
TWO = "def C07(): return 'open', 'and here'\n"


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The verdicts' file, beside two notebooks and what judges in them."""
    for number, name, source in (("01", NOTEBOOK, ONE), ("02", "02_build_the_model", TWO), ("99", None, "C09 = print")):
        (tmp_path / "checks").mkdir(exist_ok=True)
        (tmp_path / "checks" / f"verdicts_{number}.py").write_text(source)
        if name:
            (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setenv("MOE_LAB_KEEP_VERDICTS", "1")
    monkeypatch.setattr(case, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(case, "VERDICTS", tmp_path / "results" / "verdicts.json")
    return case.VERDICTS


@pytest.fixture(scope="module")
def lab():
    return notebook.resolve(profile="lab", seed=3)


def test_a_verdict_is_one_line_and_one_entry(path, lab, capsys) -> None:
    numbers = {"share": np.float32(1 / 3), "n": np.int64(102), "bracket": (0.1, 2), "by_seed": {1: torch.tensor(0.5)}}
    case.judge("C05", lab, corpus="abc", sure=True, **numbers)
    sentence = "most of it is what any run could show by then"
    assert capsys.readouterr().out == f"C05 holds only if: {sentence}\n"
    (id, entry), *others = case.read_verdicts().items()
    assert (id, others) == ("C05", [])
    assert entry["claim"] == case.claim("C05").sentence
    assert (entry["outcome"], entry["sentence"]) == ("holds only if", sentence)
    assert entry["numbers"] == {"sure": True, "share": 0.333333, "n": 102, "bracket": [0.1, 2], "by_seed": {"1": 0.5}}
    origin = entry["provenance"]
    commit = origin.pop("commit")
    assert commit is None or re.fullmatch(r"[0-9a-f]{7,}\+?", commit)
    assert origin == {
        "notebook": NOTEBOOK,
        "profile": "lab",
        "seed": 3,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": cpu_kind(),
        "corpus": "abc",
        "settings": ["training.seed: 0 → 3"],
    }


def test_a_long_verdict_breaks_between_words(path, lab, capsys) -> None:
    long = " ".join(["a", "sentence", "of", "many", "words"] * 12)
    with (path.parents[1] / "checks" / "verdicts_01.py").open("a") as file:
        file.write(f"def C06(n): return 'holds', {long!r}\n")
    case.judge("C06", lab, n=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 100 and all(line.startswith("  ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == f"C06 holds: {long}"


def test_a_second_verdict_replaces_the_first_and_ids_are_sorted(path, lab) -> None:
    case.judge("C03", lab, outcome="open")
    case.judge("C02", lab, n=1)
    case.judge("C03", lab, outcome="does not hold")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert list(stored) == ["C02", "C03"]
    assert (stored["C03"]["outcome"], stored["C02"]["numbers"]) == ("does not hold", {"n": 1})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "corpus" not in stored["C03"]["provenance"]


@pytest.mark.parametrize("profile", ["smoke", "gpu"])
def test_other_profiles_print_and_write_nothing(path, lab, profile, capsys) -> None:
    case.judge("C02", lab, n=1)
    before = path.read_bytes()
    case.judge("C02", notebook.resolve(profile=profile), n=2)
    assert capsys.readouterr().out.splitlines()[-1] == "C02 does not hold: a sentence"
    assert path.read_bytes() == before


def test_entries_of_another_commit_go_when_all_are_made_anew(path, lab) -> None:
    case.judge("C05", lab, share=0.1, n=1)
    entry = case.read_verdicts()["C05"]
    older = entry | {"provenance": entry["provenance"] | {"commit": "0ld"}}
    case.write_verdicts({"C05": entry, "C06": older})
    keep_verdicts_of(entry["provenance"]["commit"])
    assert case.read_verdicts() == {"C05": entry}


def test_a_readers_run_leaves_the_record_alone(path, lab, monkeypatch, capsys) -> None:
    monkeypatch.delenv("MOE_LAB_KEEP_VERDICTS")
    case.judge("C02", lab, n=1)
    assert capsys.readouterr().out == "C02 holds: a sentence\n"
    assert not path.exists()


@pytest.mark.parametrize(
    ("id", "changes", "message"),
    [
        ("C5", {}, "'C5' is no claim of the case; did you mean C05?"),
        ("B01", {}, "'B01' is no claim"),
        ("C03", {"outcome": "hold"}, "C03: 'hold' is no outcome: holds, holds only if, does not hold, open; did you"),
        ("C02", {"n": math.nan}, "C02: n=nan must be finite"),
        ("C05", {"share": torch.tensor([1.0, math.inf])}, "C05: share=tensor([1., inf]) must be finite"),
        ("C05", {"share": 1, "x": {"a": -math.inf}}, "C05: x=-inf must be finite"),
        ("C07", {}, "C07: judged by notebooks 01 and 02; it must be one"),
        ("C08", {}, "C08: judged by no notebook"),
        ("C09", {}, "C09: checks/verdicts_99.py belongs to no notebook"),
    ],
)
def test_a_wrong_verdict_is_refused_in_one_line_and_leaves_no_trace(path, lab, id, changes, message, capsys) -> None:
    with refused(ConfigError, match=re.escape(message)):
        case.judge(id, lab, **changes)
    assert capsys.readouterr().out == ""
    assert not path.exists()


def test_a_number_that_the_verdict_does_not_know_is_a_mistake(path, lab) -> None:
    with pytest.raises(TypeError, match="C04"):
        case.judge("C04", lab, n=1)
    assert not path.exists()


def test_every_claim_that_a_notebook_judges_is_of_the_case_and_judged_once() -> None:
    for file in (notebook.ROOT / "notebooks" / "checks").glob("verdicts_*.py"):
        for id in re.findall(r"^def (C\d\d)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            assert case.verdict_of(id)[0].startswith(file.stem.removeprefix("verdicts_") + "_")
            assert case.claim(id)


def test_a_damaged_file_is_refused_and_kept(path, lab) -> None:
    assert case.read_verdicts() == {}
    path.parent.mkdir()
    path.write_text('{"C01": {')
    with refused(ConfigError, match="cannot be read"):
        case.judge("C02", lab, n=1)
    assert path.read_text() == '{"C01": {'


def test_the_committed_verdicts_are_in_the_case() -> None:
    for id, entry in case.read_verdicts().items():
        assert entry["claim"] == case.claim(id).sentence
        assert entry["outcome"] in case.OUTCOMES
        assert entry["provenance"]["profile"] == "lab"
        assert entry["provenance"]["settings"] == []
