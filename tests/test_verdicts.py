"""Verdicts: one stable line for the reader, one entry for the ledger, and no verdict that a cell did not derive."""

import json
import math
import multiprocessing
import platform
import re

import numpy as np
import pytest
import torch
from helpers import refused

from moe_lab.config import ConfigError
from moe_lab.course import case, notebook, verdicts

NOTEBOOK = "01_data_and_loss_floors"


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "VERDICTS", tmp_path / "results" / "verdicts.json")
    return verdicts.VERDICTS


@pytest.fixture(scope="module")
def lab():
    return notebook.resolve(profile="lab", seed=3)


def test_a_verdict_is_one_line_and_one_entry(path, lab, capsys) -> None:
    sentence = "most of it is what any run could show by then"
    numbers = {"share": np.float32(1 / 3), "n": np.int64(102), "bracket": (0.1, 2), "by_seed": {1: torch.tensor(0.5)}}
    verdicts.check(
        "C05", {"holds only if": True}, sentence, lab=lab, notebook=NOTEBOOK, corpus="abc", sure=True, **numbers
    )
    assert capsys.readouterr().out == f"C05 holds only if: {sentence}\n"
    (id, entry), *others = verdicts.read_verdicts().items()
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
        "machine": platform.machine(),
        "corpus": "abc",
        "settings": ["training.seed: 0 → 3"],
    }


def test_a_second_verdict_replaces_the_first_and_ids_are_sorted(path, lab) -> None:
    for id, outcome, n in (("C07", "open", 1), ("C02", "holds", 2), ("C07", "does not hold", 3)):
        verdicts.check(id, {outcome: True}, "a sentence", lab=lab, notebook=NOTEBOOK, n=n)
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert list(stored) == ["C02", "C07"]
    assert (stored["C07"]["outcome"], stored["C07"]["numbers"]) == ("does not hold", {"n": 3})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "corpus" not in stored["C07"]["provenance"]


@pytest.mark.parametrize("profile", ["smoke", "gpu"])
def test_other_profiles_print_and_write_nothing(path, lab, profile, capsys) -> None:
    verdicts.check("C02", {"holds": True}, "as measured", lab=lab, notebook=NOTEBOOK, n=1)
    before = path.read_bytes()
    other = notebook.resolve(profile=profile)
    verdicts.check("C02", {"does not hold": True}, "tiny numbers", lab=other, notebook=NOTEBOOK, n=2)
    assert capsys.readouterr().out.splitlines()[-1] == "C02 does not hold: tiny numbers"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "C5"}, "'C5' is no claim of the case; did you mean C05?"),
        ({"id": "B01"}, "'B01' is no claim"),
        (
            {"outcome": "hold"},
            "C05: 'hold' is no outcome: holds, holds only if, does not hold, open; did you mean holds?",
        ),
        ({"notebook": "01_data_and_loss_floor"}, "is no notebook; did you mean 01_data_and_loss_floors?"),
        ({"x": math.nan}, "C05: x=nan must be finite"),
        ({"x": torch.tensor([1.0, math.inf])}, "C05: x=tensor([1., inf]) must be finite"),
        ({"x": {"a": -math.inf}}, "C05: x={'a': -inf} must be finite"),
    ],
)
def test_a_wrong_verdict_is_refused_in_one_line_and_leaves_no_trace(path, lab, changes, message, capsys) -> None:
    given = {"id": "C05", "outcome": "holds", "sentence": "a sentence", "lab": lab, "notebook": NOTEBOOK} | changes
    id, outcome, sentence = (given.pop(name) for name in ("id", "outcome", "sentence"))
    with refused(ConfigError, match=re.escape(message)):
        verdicts.check(id, {outcome: True}, sentence, **given)
    assert capsys.readouterr().out == ""
    assert not path.exists()


def test_the_outcome_is_the_condition_that_is_true(path, lab, capsys) -> None:
    conditions = {"holds": np.bool_(False), "holds only if": torch.tensor(True), "does not hold": False}
    sentences = {"holds": "always", "holds only if": "std is fixed", "does not hold": "never"}
    assert verdicts.check("C03", conditions, sentences, lab=lab, notebook=NOTEBOOK, n=7) == "holds only if"
    assert capsys.readouterr().out == "C03 holds only if: std is fixed\n"
    assert verdicts.read_verdicts()["C03"]["numbers"] == {"n": 7}
    assert verdicts.check("C03", {"holds": 1 < 2, "open": False}, "one for all", lab=lab, notebook=NOTEBOOK) == "holds"
    assert verdicts.read_verdicts()["C03"]["sentence"] == "one for all"


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"holds": False, "does not hold": math.nan > 1}, "C03: none of holds, does not hold is what was measured"),
        ({"holds": True, "open": True, "does not hold": False}, "C03: all of holds, open are what was measured"),
        ({}, "C03: none of"),
    ],
)
def test_none_or_two_true_conditions_are_no_verdict(path, lab, conditions, message) -> None:
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}"):
        verdicts.check("C03", conditions, "a sentence", lab=lab, notebook=NOTEBOOK)
    assert not path.exists()


def test_each_outcome_has_its_sentence(path, lab) -> None:
    with refused(ConfigError, match="C03: no sentence for the outcome 'open'"):
        verdicts.check("C03", {"holds": True, "open": False}, {"holds": "yes"}, lab=lab, notebook=NOTEBOOK)


def test_a_damaged_file_is_refused_and_kept(path, lab) -> None:
    assert verdicts.read_verdicts() == {}
    path.parent.mkdir()
    path.write_text('{"C01": {')
    with refused(ConfigError, match="cannot be read"):
        verdicts.check("C02", {"holds": True}, "a sentence", lab=lab, notebook=NOTEBOOK)
    assert path.read_text() == '{"C01": {'


def write_ten(path, first: int) -> None:
    verdicts.VERDICTS = path
    for n in range(first, first + 10):
        verdicts.store(f"C{n:02d}", {"claim": ""})


def test_two_notebooks_at_once_lose_nothing(path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_ten, args=(path, first)) for first in (1, 11)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert list(verdicts.read_verdicts()) == [f"C{n:02d}" for n in range(1, 21)]


def test_the_committed_verdicts_are_in_the_case() -> None:
    for id, entry in verdicts.read_verdicts().items():
        assert entry["claim"] == case.claim(id).sentence
        assert entry["outcome"] in verdicts.OUTCOMES
        assert entry["provenance"]["profile"] == "lab"
        assert entry["provenance"]["settings"] == []
