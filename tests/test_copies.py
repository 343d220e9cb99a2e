"""Working copies: made once, complete, and with nothing in view that answers what is asked; their solutions solve."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from helpers import refused

from benchmarks import copies
from moe_lab.config import ROOT, ConfigError
from moe_lab.course import runner

NAMES = [path.stem for path in runner.all_notebooks()]
SEARCHABLE = 12  # an option of fewer characters ("slower", "1 to 5") occurs in prose by chance


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Copies of the whole course."""
    folder = tmp_path_factory.mktemp("lab") / "work"
    copies.make(work=folder)
    return folder


# ---- a reader's work is left alone -----------------------------------------------------------------------------------


def markdown(text: str, *tags: str):
    return nbformat.v4.new_markdown_cell(text, metadata={"tags": [*tags]})


def code(text: str, *tags: str, output: str = ""):
    outputs = [nbformat.v4.new_output("stream", text=output)] if output else []
    return nbformat.v4.new_code_cell(text, metadata={"tags": [*tags]}, outputs=outputs, execution_count=1)


def write(path: Path, *cells) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=[*cells]), path)


@pytest.fixture
def course(tmp_path: Path, monkeypatch) -> Path:
    """A course of one notebook with one exercise; its copies go to work/ beside it."""
    folder = tmp_path / "notebooks"
    (folder / "checks").mkdir(parents=True)
    (folder / "solutions").mkdir()
    (folder / "checks" / "exercises_00.py").write_text("def check_half(half): print(half(4))\n")
    (folder / "GLOSSARY.md").write_text("[results](results/a.json)")
    text = "## Exercise 1\n```python\nimport math\n\n\ndef half(n):\n    return n / 2\n```\nTold in words.\n"
    (folder / "solutions" / "00.md").write_text(text)
    for module in (copies, runner):
        monkeypatch.setattr(module, "NOTEBOOKS", folder)
    exercise = "start = 4\nhalf = None  # your function\n_ = exercises_00.check_half(half)"
    answer = markdown("## What it was\n\nIt fell.\nAnd rose.\n\nIt stopped.", "answer")
    cells = [code("print(1)", output="1"), answer, code("claim(1)", "claims"), code(exercise)]
    recap = "Solutions: none.\n\n## Recap\n\n1. It fell.\n\n### Would you know?\n\nYes.\n\n**Answer:** it fell."
    cells.append(markdown(recap))
    write(folder / "00_one.ipynb", *cells, markdown("[done](solutions/00.md), [runs](results/a.json)"))
    return folder


def test_a_copy_is_cleared_folded_and_linked(course: Path) -> None:
    copies.make(work=course.parent / "work")
    copy = nbformat.read(course.parent / "work" / "00_one.ipynb", as_version=4)
    first, answer, claim, exercise, recap, links = copy.cells
    assert all((cell.outputs, cell.execution_count) == ([], None) for cell in (first, claim, exercise))
    assert answer.source.startswith(
        f"## What it was\n\n<details><summary>{copies.SUMMARY}</summary>\n\nIt fell.\nAnd rose.\n\nIt stopped.\n\n</det"
    )
    assert recap.source.splitlines()[:4] == ["Solutions: none.", "", "## Recap", ""]
    assert f"{copies.RECAP}</summary>\n\n1. It fell.\n\n</details>\n\n### Would you know?" in recap.source
    assert recap.source.endswith("</summary>\n\n**Answer:** it fell.\n\n</details>")
    assert claim.metadata.jupyter.source_hidden and "jupyter" not in first.metadata
    assert links.source == "[done](solutions/00_one.ipynb), [runs](../notebooks/results/a.json)"
    assert (course.parent / "work" / "GLOSSARY.md").read_text() == "[results](../notebooks/results/a.json)"
    assert nbformat.read(course / "00_one.ipynb", as_version=4).cells[0].outputs, "the notebook itself has changed"


def test_a_word_of_the_glossary_shows_its_meaning_in_a_copy_and_leads_to_its_line(work: Path) -> None:
    said = copies.relinked("two [learning rates](GLOSSARY.md), the [ULP](GLOSSARY.md), the [glossary](GLOSSARY.md)")
    rate, ulp, rest = re.fullmatch(r"two (.+), the (.+), the (.+)", said).groups()
    text = (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8")
    assert re.fullmatch(r'\[learning rates\]\(GLOSSARY\.md#learning-rate "[^"\n|]{20,}"\)', rate)
    assert ulp.removeprefix('[ULP](GLOSSARY.md#ulp "')[:20] in text and rest == "[glossary](GLOSSARY.md)"
    told = " ".join(cell.source for name in NAMES for cell in read(work, name).cells if cell.cell_type == "markdown")
    linked = {*re.findall(r"\]\(GLOSSARY\.md#(\S+)", told)}
    assert len(linked) > 40 and linked <= {*re.findall(r"<a id='([^']+)'></a>", (work / "GLOSSARY.md").read_text())}


def test_a_copy_is_made_once(course: Path) -> None:
    work = course.parent / "work"
    assert copies.make(work=work) == ["work/ holds your copies of the notebooks; they are never overwritten"]
    answers, copy = (work / copies.ANSWERS).read_text(), work / "00_one.ipynb"
    edited = nbformat.read(copy, as_version=4)
    edited.cells[0].source = "mine"
    nbformat.write(edited, copy)
    mine = copy.read_text()
    shutil.copy(course / "00_one.ipynb", course / "01_two.ipynb")  # a notebook that came later
    said = copies.make(work=work)
    assert copy.read_text() == mine and (work / copies.ANSWERS).read_text() == answers
    assert (work / "01_two.ipynb").exists() and not any("older" in line for line in said)
    write(course / "00_one.ipynb", code("print(2)"), *nbformat.read(course / "00_one.ipynb", as_version=4).cells[1:])
    told = (
        "older than the notebooks of today: 00_one.ipynb, solutions/00_one.ipynb; `make lab FRESH=1` moves yours aside"
    )
    assert told in copies.make(work=work) and copy.read_text() == mine


def test_fresh_copies_move_the_old_ones_aside(course: Path) -> None:
    work = course.parent / "work"
    copies.make(work=work)
    (work / "mine.txt").write_text("mine")
    for n in (1, 2):  # twice in a minute
        first, *_ = copies.make(fresh=True, work=work)
        aside = re.fullmatch(r"what was in work/ is now in (work-\S+)/", first)[1]
        assert (work.parent / aside / "mine.txt").read_text() == "mine" and not (work / "mine.txt").exists(), n
        (work / "mine.txt").write_text("mine")


def test_git_and_ruff_do_not_see_the_copies() -> None:
    for name in ("work/00_start_here.ipynb", "work/answers.json", "work-2026-11-28_1405/00_start_here.ipynb"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0, name
    tracked = subprocess.check_output(["git", "ls-files", "-ci", "--exclude-standard"], cwd=ROOT, text=True)
    assert tracked == "", "a file that git is to ignore is in a commit"
    assert '"work*"' in next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "extend-exclude" in line
    )


# ---- the copies of this course ---------------------------------------------------------------------------------------


def read(work: Path, name: str, folder: str = "."):
    return nbformat.read(work / folder / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("folder", [".", "solutions"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_what_it_needs_beside_it(name: str, folder: str, work: Path) -> None:
    """The modules of checks/ that it imports, and the files that its links name."""
    copy, here = read(work, name, folder), work / folder
    nbformat.validate(copy)
    for cell in copy.cells:
        modules = re.findall(r"^(?:from checks import (.+)|import checks\.(\w+))$", cell.source, re.MULTILINE)
        for module in {word for line in modules for word in re.findall(r"\w+", line[0] or line[1])}:
            assert (here / "checks" / f"{module}.py").exists(), module
        links = re.findall(r"\]\(([^)#\s]+)", cell.source) if cell.cell_type == "markdown" else []
        for link in (link for link in links if not re.match(r"\w+:", link)):
            in_the_checkout = Path(os.path.normpath(ROOT / "work" / folder / link))  # whether or not there is a work/
            assert (here / link).exists() or in_the_checkout.exists(), link


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_has_its_solution(name: str, work: Path) -> None:
    asked = [cell for cell in read(work, name).cells if cell.cell_type == "code" and ".check_" in cell.source]
    answered = {cell.id: cell for cell in read(work, name, "solutions").cells}
    told = copies.solutions(name.split("_")[0])
    assert len(asked) == len(told) == sum(id.startswith("solution-") for id in answered)
    for cell in asked:
        assert answered[cell.id].source != cell.source
        compile(answered[cell.id].source, name, "exec")


def test_a_solution_stands_in_its_exercise(course: Path) -> None:
    copies.make(work=course.parent / "work")
    *_, exercise, told, _, links = read(course.parent / "work", "00_one", "solutions").cells
    lines = ["start = 4", "import math", "", "", "def half(n):", "    return n / 2", "", ""]
    assert exercise.source.splitlines() == [*lines, "_ = exercises_00.check_half(half)"]
    assert told.source == "**A solution of exercise 1.** Told in words."
    assert links.source == "[done](../solutions/00_one.ipynb), [runs](../../notebooks/results/a.json)"


def test_a_solution_without_its_exercise_is_refused(course: Path) -> None:
    page = course / "solutions" / "00.md"
    page.write_text(page.read_text().replace("half", "hafl"))
    with refused(ConfigError, match="00_one.ipynb: no exercise asks for hafl, which a solution defines"):
        copies.make(work=course.parent / "work")


def test_a_solved_notebook_runs_and_is_right(work: Path, tmp_path: Path) -> None:
    """The first one, whole, as a reader runs it: from its own folder."""
    output = tmp_path / "out.ipynb"
    runner.execute(
        work / "solutions" / "00_start_here.ipynb", output, {}, MOE_LAB_PROFILE="smoke", PYTHONPATH=str(ROOT)
    )
    exercises = [cell for cell in nbformat.read(output, as_version=4).cells if ".check_" in cell.source]
    # on a busy machine a kernel hands over a line in two parts
    said = ["".join(output.text for output in cell.outputs if output.get("name") == "stdout") for cell in exercises]
    assert exercises and all(text.endswith("right\n") for text in said)


# ---- nothing is spoiled ----------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return " ".join(re.sub(r"[*_`$\\]", "", text).lower().split())


def visible(copy) -> list[str]:
    """What a copy shows before anything is clicked or run."""
    shown = []
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            text, n = cell.source, 1
            while n:  # from the innermost outwards
                text, n = re.subn(r"<details>(?:(?!<details>).)*?</details>", "", text, flags=re.DOTALL)
            shown.append(text)
        else:
            hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
            shown += [] if hidden else [cell.source]
            shown += [str(output) for output in cell.outputs]
    return shown


def lists(text: str, options: list[str]) -> bool:
    """Whether a text in view names three options of a question: suspects in a row convict nobody."""
    return sum(plain(option) in text for option in options) >= 3


def leaks(copy, measured: dict[str, list[str]], solved: list[str]) -> list[str]:
    """Options that were measured and stand in view; lines of solutions that stand anywhere, folded or not.

    `measured`: of each question, the option that was measured → all of them.
    """
    shown = [plain(text) for text in visible(copy)]
    found = []
    for option in (option for option in measured if len(option) >= SEARCHABLE):
        named = [text for text in shown if re.search(rf"\b{re.escape(plain(option))}\b", text)]
        found += [option] * any(not lists(text, measured[option]) for text in named)
    everywhere = [plain(cell.source) for cell in copy.cells]
    for text in solved:  # some lines may be the lesson's own, or given; more than two thirds are the solution
        lines = {line.split("  #")[0].strip() for line in text.splitlines()}
        telling = [line for line in lines if len(line) > 30 and not line.startswith(("import ", "from ", "def "))]
        seen = [line for line in telling if any(plain(line) in place for place in everywhere)]
        found += seen if 3 * len(seen) > 2 * len(telling) else []
    return found


def measured_options(name: str) -> dict[str, str]:
    """Question → option that the committed output measured."""
    found = {}
    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        asked = re.findall(r"reveal\(\s*(questions_\w+)\.(\w+)", cell.source) if cell.cell_type == "code" else []
        if not cell.get("outputs"):  # not executed yet; another test refuses that
            continue
        lines = "".join(output.get("text", "") for output in cell.get("outputs", ())).splitlines()
        answers = [line.removeprefix("measured: ") for line in lines if line.startswith("measured: ")]
        found |= dict(zip([".".join(pair) for pair in asked], answers, strict=True)) if asked else {}
    return found


# words that give an answer away and are no option's: a look that is the answer, a bug by its name, a caption, what is compared
TELLING = {
    "00_start_here": ["best_upper="],
    "03a_what_bf16_costs": ["frozen_from = max", "freezing"],
    "04a_which_cause_was_it": ["neither settles", "lr_of_another_optimizer", "Bug B02 puts"],
    "06_what_the_report_missed": ["check_data(batches"],
    "08_hugging_face": ["norms do not train"],
    "10_the_ward": ['"the example", "inspection"'],
}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_spoiled(name: str, work: Path) -> None:
    measured = measured_options(name)
    options = {}
    for question, option in measured.items():  # the outputs are of these questions
        module, _, attribute = question.partition(".")
        options[option] = list(getattr(importlib.import_module(f"checks.{module}"), attribute).options)
        assert option in options[option]
    copy = read(work, name)
    solved = [solution.code for solution in copies.solutions(name.split("_")[0])]
    assert leaks(copy, options, solved) == []
    assert not any(cell.get("outputs") for cell in copy.cells)
    texts = visible(copy)
    assert not [text for text in texts for telling in TELLING.get(name, ()) if telling in text]
    keys = [text for text in texts if re.search(r"lambda m\b|options\[\d if|checks/questions_", text)]
    assert keys == [], "an answer key is in view"


OPTION, SOLUTION = "updates are rounded away", "return 2.0 ** (math.floor(math.log2(weight)) - 7)"

OPTIONS = {OPTION: [OPTION, "no gradient", "the tokens are random", "healthy"]}


@pytest.mark.parametrize(
    ("cell", "leak"),
    [
        (markdown("So the *updates* are\nrounded away (03.5)."), OPTION),
        (markdown("## Updates are rounded away\n\nAs measured.", "answer"), OPTION),
        (code("# the updates are rounded away\nx = 1"), OPTION),
        (markdown(f"<details><summary>Hint</summary>\n\n`{SOLUTION}`\n\n</details>"), SOLUTION),
        (code(f"def gap(weight):\n    {SOLUTION}"), SOLUTION),
        (markdown("As measured, updates are rounded away.", "answer"), None),
        (code("claim('03.5', x, 'updates are rounded away')", "claims"), None),
        (code("# the updates are rounded away\nx = 1", "answer"), None),
        (code("x = 1", output="measured: updates are rounded away"), None),
        (markdown("Updates are lost."), None),
        (markdown("It is no gradient, or the tokens are random, or updates are rounded away."), None),
        (markdown("There is no gradient, or updates are rounded away."), OPTION),
    ],
)
def test_a_leak_is_seen(cell, leak: str | None, tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[cell])
    copy = copies.copied(notebook, tmp_path / "03_x.ipynb")
    assert leaks(copy, OPTIONS, [f"import math\n\n\ndef gap(weight):\n    {SOLUTION}"]) == ([leak] if leak else [])


def test_an_output_that_stays_is_a_leak() -> None:
    notebook = nbformat.v4.new_notebook(cells=[code("x = 1", output="measured: updates are rounded away")])
    assert leaks(notebook, OPTIONS, []) == [OPTION]
