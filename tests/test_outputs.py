"""Committed outputs: where their numbers and their commit come from."""

import json
import re
import subprocess

import nbformat
import pytest
from checks import ledger
from helpers import refused, write_notebook
from nbformat.v4 import new_markdown_cell

from benchmarks import outputs
from moe_lab.config import ROOT, ConfigError
from moe_lab.train import record

CLAIMS = [{"id": "03.2", "statement": "it costs", "numbers": {"cost": 0.0574, "by_width": {"96": 12, "seeds": [1, 2]}}}]


@pytest.mark.parametrize(
    ("mark", "shown"),
    [
        ("03.2 cost:.3f", "0.057"),
        ("03.2 cost:+.1%", "+5.7%"),
        ("03.2 cost", "0.0574"),
        ("03.2 by_width.96:.1f", "12.0"),
        ("minutes", None),
        ("notebooks", None),
    ],
)
def test_a_mark_stands_for_a_number_of_its_claim(mark, shown) -> None:
    assert outputs.number_of(mark, CLAIMS) == shown


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("03.7 cost", "<!-- 03.7 cost -->: this notebook made no claim 03.7"),
        ("03.2 costs", "<!-- 03.2 costs -->: claim 03.2 has no number costs"),
        ("03.2 by_width.192", "claim 03.2 has no number by_width.192"),
        ("03.2 cost.96", "claim 03.2 has no number cost.96"),
    ],
)
def test_a_mark_without_its_number_is_refused(mark, message) -> None:
    with refused(ConfigError, match=re.escape(message)):
        outputs.number_of(mark, CLAIMS)


def test_marks_are_filled_and_the_rest_of_a_text_stays() -> None:
    text = "a <!-- 03.2 cost:.3f -->9<!-- / --> b <!-- minutes -->old<!-- /minutes --> <!-- a comment --> c\n<!-- 03.2 cost -->\n<!-- / -->"
    known = {"03.2 cost:.3f": "0.057", "minutes": "new"}
    expected = "a <!-- 03.2 cost:.3f -->0.057<!-- / --> b <!-- minutes -->new<!-- / --> <!-- a comment --> c\n<!-- 03.2 cost -->\n<!-- / -->"
    assert outputs.filled(text, known.get) == expected


def test_an_executed_notebook_gets_its_own_numbers(tmp_path) -> None:
    code = """from moe_lab.course.notebook import claim
import os
claim("03.1", True, "always", profile_letters=len(os.environ["MOE_LAB_PROFILE"]))
if os.environ["MOE_LAB_PROFILE"] == "lab":
    claim("03.2", True, "in lab", third=1 / 3)"""
    path, prose = (
        tmp_path / "03_n.ipynb",
        "<!-- 03.2 third:.2f -->9<!-- / --> and <!-- 03.1 profile_letters -->9<!-- / -->",
    )
    page = write_notebook(path, code)
    page.cells.append(new_markdown_cell(prose))
    nbformat.write(page, path)
    assert outputs.declared_claims(path) == ["03.1", "03.2"]
    claims: list = []
    outputs.write_outputs(outputs.executed(path, "lab", claims), path, claims)
    assert nbformat.read(path, as_version=4).cells[1].source == (
        "<!-- 03.2 third:.2f -->0.33<!-- / --> and <!-- 03.1 profile_letters -->3<!-- / -->"
    )
    assert [(claim["id"], claim["profile"]) for claim in claims] == [("03.1", "lab"), ("03.2", "lab")]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A committed repository of six files, in this one's place."""
    for name in ("moe_lab/train/record.py", "notebooks/a.ipynb", "notebooks/checks/a.py", "README.md", "docs/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(outputs, "ROOT", tmp_path)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "moe_lab" / "train" / "record.py"))
    return tmp_path


def test_a_dirty_tree_is_refused_and_a_plus_marks_it(repository) -> None:
    outputs.refuse_dirt()
    clean = record.commit()
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    for written in ("notebooks/a.ipynb", "README.md", "docs/a.md"):
        (repository / written).write_text("2")
    (repository / "untracked").touch()
    outputs.refuse_dirt()
    (repository / "notebooks" / "checks" / "a.py").write_text("2")
    with refused(ConfigError, match="outputs name one commit, and notebooks/checks/a.py differ"):
        outputs.refuse_dirt()
    subprocess.run(["git", "checkout", "-q", "."], cwd=repository, check=True)
    (repository / "notebooks" / "a.ipynb").write_text("2")
    assert record.commit() == clean
    (repository / "moe_lab" / "train" / "record.py").write_text("2")
    assert record.commit() == clean + "+"
    with refused(ConfigError, match="record.py differ"):
        outputs.refuse_dirt()


def test_a_claim_that_profile_lab_does_not_reach_is_named(tmp_path, monkeypatch) -> None:
    code = "from moe_lab.course.notebook import claim\nclaim('03.1', True, 'a', n=1)\nif False:\n    claim('03.2', True, 'b')"
    path = tmp_path / "03_n.ipynb"
    write_notebook(path, code)
    monkeypatch.setattr(outputs, "chosen", lambda names: [path])
    monkeypatch.setattr(outputs, "CLAIMS", tmp_path / "claims.json")
    with refused(ConfigError, match="03_n: not asserted in profile lab: 03.2"):
        outputs.assert_claims([])
    assert not outputs.CLAIMS.exists()
    write_notebook(path, code.replace("False", "True"))
    outputs.assert_claims([])
    stored = json.loads(outputs.CLAIMS.read_text(encoding="utf-8"))
    assert stored["claims"] == [
        {"notebook": "03_n", "id": "03.1", "statement": "a", "numbers": {"n": 1}},
        {"notebook": "03_n", "id": "03.2", "statement": "b", "numbers": {}},
    ]
    assert {"commit", "machine", "cores", "minutes"} <= set(stored["provenance"])


def test_the_numbers_in_committed_prose_are_those_of_the_committed_claims() -> None:
    """Of the same run: a later `make claims` measures anew."""
    if not outputs.CLAIMS.exists():
        return  # before the first `make outputs` of this kind
    stored = json.loads(outputs.CLAIMS.read_text(encoding="utf-8"))
    made = ledger.commits(ROOT / "notebooks")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        own = [claim for claim in stored["claims"] if claim["notebook"] == path.stem]
        for cell in (
            nbformat.read(path, as_version=4).cells if made[path.stem] == stored["provenance"]["commit"] else ()
        ):
            for mark, shown in outputs.MARK.findall(cell.source) if cell.cell_type == "markdown" else ():
                assert outputs.number_of(mark, own) in (shown, None), f"{path.stem}: <!-- {mark} -->"
