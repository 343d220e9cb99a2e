"""Working copies of the notebooks for a reader, so that the tracked files stay as they are: `make lab` opens them.

    python -m benchmarks.copies          # makes in work/ what is missing there
    python -m benchmarks.copies fresh    # moves work/ aside first

A copy has no outputs, folded answers, claims and code that tells an answer hidden, and its own order of each question's options.
work/solutions/ holds the same notebooks with the exercises solved, from the code in notebooks/solutions/NN.md.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import secrets
import shutil
import sys
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from nbformat import NotebookNode

from moe_lab.config import ROOT
from moe_lab.course.notebook import first_free
from moe_lab.course.runner import NOTEBOOKS, all_notebooks
from moe_lab.sections import ConfigError
from moe_lab.train.command import exit_code
from moe_lab.train.record import write_atomically

WORK = ROOT / "work"
ANSWERS = "answers.json"  # in WORK: the seed of the options' order, and what the reader answered
SUMMARY = "The answer: open it when you have one of your own"
RECAP = "The recap, five lines: open it when you have said yours"
# a notebook's own answers at its end: the recap's lines, and the sentence of its last cell
ENDS = re.compile(r"(?<=## Recap\n\n).+?(?=\n\n|\Z)|\*\*Answer:\*\*.*\Z", re.DOTALL)
TERM = re.compile(r"^- \*\*(.+?)\*\*", re.MULTILINE)  # of the glossary: a word, or several of one meaning
# what JupyterLab would write into a notebook at its first save: with it, a copy that was only opened is unchanged
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
QUIET = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}},  # pages are read
}


class Solution(NamedTuple):
    number: str  # of the exercise
    code: str
    prose: str


def make(fresh: bool = False, work: Path = WORK) -> list[str]:
    """Write what is missing in `work`; lines that say what was done. A copy that is there is left alone."""
    said, old = [], []
    if fresh and work.exists():
        aside = first_free(work.with_name(f"{work.name}-{datetime.now():%Y-%m-%d_%H%M}"))
        work.rename(aside)
        said.append(f"what was in {work.name}/ is now in {aside.name}/")
    # a reader writes none of these: they follow the package
    shutil.copytree(NOTEBOOKS / "checks", work / "checks", ignore=shutil.ignore_patterns("__*__"), dirs_exist_ok=True)
    shutil.copytree(work / "checks", work / "solutions" / "checks", dirs_exist_ok=True)
    for page in (*NOTEBOOKS.glob("*.md"), *NOTEBOOKS.glob("*.html")):
        write_atomically(work / page.name, TERM.sub(anchored, relinked(page.read_text(encoding="utf-8"))))
    settings = work / ".jupyter" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings, json.dumps(QUIET))
    if not (work / ANSWERS).exists():
        write_atomically(work / ANSWERS, json.dumps({"seed": secrets.randbelow(10**6), "guesses": {}, "answers": {}}))
    for path in all_notebooks():
        source = nbformat.read(path, as_version=4)
        for target, change in ((work / path.name, copied), (work / "solutions" / path.name, solved)):
            made = change(source, path)
            if not target.exists():
                nbformat.write(made, target)
            elif made.metadata.moe_lab != nbformat.read(target, as_version=4).metadata.get("moe_lab"):
                old.append(target.relative_to(work).as_posix())
    said.append(f"{work.name}/ holds your copies of the notebooks; they are never overwritten")
    if old:
        said.append(f"older than the notebooks of today: {', '.join(old)}; `make lab FRESH=1` moves yours aside")
    return said


def copied(source: NotebookNode, path: Path) -> NotebookNode:
    """The notebook as its reader gets it."""
    copy = prepared(source)
    for cell in copy.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and {"answer", "claims"} & {*tags}:
            cell.metadata["jupyter"] = {"source_hidden": True}
        elif cell.cell_type == "markdown" and "answer" in tags:
            cell.source = folded(cell.source)
        elif cell.cell_type == "markdown":
            cell.source = ENDS.sub(fold_end, cell.source)
    return copy


def prepared(source: NotebookNode) -> NotebookNode:
    """The notebook without outputs, with links that hold in WORK, and a mark of what it was made from."""
    copy = deepcopy(source)
    texts = json.dumps([cell.source for cell in source.cells])
    copy.metadata["moe_lab"] = {"made_from": hashlib.sha256(texts.encode()).hexdigest()[:16]}
    copy.metadata["kernelspec"] = KERNEL
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = relinked(cell.source)
    return copy


def fold_end(found: re.Match[str]) -> str:
    return folded(found[0], SUMMARY if found[0].startswith("**Answer") else RECAP)


def folded(text: str, summary: str = SUMMARY) -> str:
    """A heading in the first line stays in view; the rest opens by a click."""
    head, rest = re.fullmatch(r"((?:#+ [^\n]*\n+)?)(.*)", text, re.DOTALL).groups()
    return f"{head}<details><summary>{summary}</summary>\n\n{rest.strip()}\n\n</details>"


def relinked(text: str) -> str:
    """Links of a page in notebooks/ as they must be in WORK: results stay where they are, solutions are notebooks, and a word
    that is linked to the glossary leads to its own line there, and shows its meaning under the pointer."""

    def notebook(link: re.Match[str]) -> str:
        names = {path.name.split("_")[0]: path.name for path in all_notebooks()}
        return f"solutions/{names.get(link[1], link[0])}"

    def word(link: re.Match[str]) -> str:
        term = " ".join(link[1].lower().strip("`").split())
        forms = (term, term.removesuffix("s"), term.removesuffix("es"), re.sub(r"ies$", "y", term))
        form = next((form for form in forms if form in known), None)
        return f'[{link[1]}](GLOSSARY.md#{slug(form)} "{known[form]}")' if form else link[0]

    if "](GLOSSARY.md)" in text:
        known = meanings((NOTEBOOKS / "GLOSSARY.md").read_text(encoding="utf-8"))
        text = re.sub(r"\[([^\]]+)\]\(GLOSSARY\.md\)", word, text)
    text = text.replace("](results/", f"](../{NOTEBOOKS.name}/results/")
    return re.sub(r"\bsolutions/(\w+)\.md\b", notebook, text)


def anchored(entry: re.Match[str]) -> str:
    return f"- {''.join(f'<a id={slug(term)!r}></a>' for term in entry[1].split(', '))}{entry[0][2:]}"


def slug(term: str) -> str:
    return re.sub(r"\W+", "-", term.lower())


def meanings(glossary: str) -> dict[str, str]:
    """Each term of the glossary, in lower case, and what is said of it, as plain text that fits into a link's title."""
    found = {}
    for term, said in re.findall(rf"{TERM.pattern}[^:]*: (.+)$", glossary, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`$\\]", r"\1", said)
        found |= dict.fromkeys(term.lower().split(", "), plain.replace('"', "'").replace("|", "∣"))
    return found


# ---- solutions -------------------------------------------------------------------------------------------------------


def solved(source: NotebookNode, path: Path) -> NotebookNode:
    """The notebook with its exercises solved, for WORK/solutions. Raises ConfigError for a solution without its exercise."""
    copy = prepared(source)
    for cell in copy.cells:
        if cell.cell_type == "markdown":  # a folder down
            cell.source = re.sub(r"\]\((?!\w+:|[#/])", "](../", cell.source)
    for solution in solutions(path.name.split("_")[0]):
        names = defined(solution.code)
        for place, cell in enumerate(copy.cells):
            exercise = cell.cell_type == "code" and ".check_" in cell.source and defined(cell.source)
            if exercise and exercise.keys() & names.keys():
                cell.source = with_solution(cell.source, solution.code)
                text = f"**A solution of exercise {solution.number}.** {solution.prose}".strip()
                told = nbformat.v4.new_markdown_cell(text, id=f"solution-{solution.number}")
                copy.cells.insert(place + 1, told)
                break
        else:
            raise ConfigError(f"{path.name}: no exercise asks for {', '.join(names)}, which a solution defines")
    return copy


def solutions(number: str) -> list[Solution]:
    """What notebooks/solutions/NN.md says under each `## Exercise N`: its Python, and what is told about it. A block marked
    `python notebook` is for the notebook alone, where the names of the cells before are known."""
    page = NOTEBOOKS / "solutions" / f"{number}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = []
    for section in re.split(r"^## Exercise ", text, flags=re.MULTILINE)[1:]:
        exercise, _, body = section.partition("\n")
        blocks = re.compile(r"```python(?: notebook)?\n(.*?)```\n?", re.DOTALL)
        found.append(
            Solution(exercise.strip(), "\n\n".join(blocks.findall(body)).strip(), blocks.sub("", body).strip())
        )
    return found


def with_solution(exercise: str, code: str) -> str:
    """The exercise's cell with `code` in place of what the reader was to replace: the statements that define its names."""
    names, lines = defined(code).keys(), exercise.splitlines()
    places = [node for name, node in defined(exercise).items() if name in names]
    first = min(node.lineno for node in places) - 1
    gone = {n for node in places for n in range(node.lineno - 1, node.end_lineno)}
    before, after = (
        [lines[n] for n in numbers if n not in gone] for numbers in (range(first), range(first, len(lines)))
    )
    return "\n".join([*before, *code.splitlines(), *(["", ""] if "def " in code else []), *after])


def defined(code: str) -> dict[str, Any]:
    """The statement that defines each name at the top of a cell: functions, classes and assigned names."""
    names: dict[str, Any] = {}
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            inside = ast.walk(node)
            names |= {
                n.id: node for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id != "_"
            }
    return names


def main(argv: list[str]) -> None:
    print(*make(fresh="fresh" in argv), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
