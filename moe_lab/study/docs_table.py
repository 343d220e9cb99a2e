"""Write the README's table of notebooks and each notebook's card from the minutes that were measured: `make docs-table`."""

from __future__ import annotations

import json
import re

import nbformat

from moe_lab.study.machine import MINUTES
from moe_lab.study.runner import ROOT, all_notebooks
from moe_lab.train.record import write_atomically

TABLE = re.compile(r"(<!-- notebooks -->\n).*?(<!-- /notebooks -->)", re.DOTALL)
CARD = re.compile(r"(<!-- minutes -->).*?(<!-- /minutes -->)")


def main() -> None:
    measured = json.loads(MINUTES.read_text(encoding="utf-8"))
    rows = ["| notebook | question | minutes: smoke | lab |", "| --- | --- | --- | --- |"]
    for path in all_notebooks():
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0].source
        question = first.splitlines()[0].lstrip("# ").split("·", 1)[-1].strip()
        minutes = measured["notebooks"].get(path.stem, {})
        smoke, lab = (minutes.get(name, "?") for name in ("smoke", "lab"))
        rows.append(f"| [{path.stem}](notebooks/{path.name}) | {question} | {smoke} | {lab} |")
        text = f"smoke {smoke} · lab {lab} ({measured['reference']['machine']})"
        notebook.cells[0].source = CARD.sub(lambda m, text=text: m[1] + text + m[2], first)
        nbformat.write(notebook, path)
    readme = ROOT / "README.md"
    table = "\n".join(rows) + "\n"
    write_atomically(readme, TABLE.sub(lambda m: m[1] + table + m[2], readme.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
