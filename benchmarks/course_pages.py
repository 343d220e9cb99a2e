"""The generated parts of the course's pages: notebooks/THE_CASE.md from the case file and from where notebooks name its
ids, notebooks/CHECKLIST.md from notebooks/checklist.yaml; and that list as one sheet of paper, notebooks/checklist.html.
"""

from __future__ import annotations

import html
import re
from functools import cache
from pathlib import Path
from typing import Any

import nbformat

from moe_lab.config import ROOT
from moe_lab.course import case
from moe_lab.course.runner import all_notebooks
from moe_lab.sections import read_yaml

CASE_PAGE, CHECKLIST_PAGE, SHEET = (
    ROOT / "notebooks" / name for name in ("THE_CASE.md", "CHECKLIST.md", "checklist.html")
)
STAGES = {
    "before": "Before the first update",
    "twenty": "In the first twenty updates",
    "curve": "When there is a curve",
    "checkpoint": "When there is only a checkpoint",
    "repair": "Before you believe a repair",
}


@cache
def the_list() -> dict[str, Any]:
    return read_yaml(ROOT / "notebooks" / "checklist.yaml")


def checklist_lines() -> list[dict[str, Any]]:
    """In the order in which they are looked at."""
    return the_list()["lines"]


@cache
def named_in() -> dict[str, list[Path]]:
    """Notebooks by the claims and bugs that their text or code names."""
    found: dict[str, list[Path]] = {}
    for path in all_notebooks():
        source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        for id in sorted(set(re.findall(r"\b[BC]\d\d\b", source))):
            found.setdefault(id, []).append(path)
    return found


def links(id: str) -> str:
    return " ".join(f"[{path.stem.split('_')[0]}]({path.name})" for path in named_in().get(id, ())) or "–"


def table(head: str, rows: list[list[str]]) -> list[str]:
    return [head, "| --- " * (head.count("|") - 1) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def runs() -> list[str]:
    """The two runs that the report observed."""
    rows = []
    for name in ("first", "second"):
        run = case.observed_run(name)
        norms = "exactly 1.0, all of them" if run.norm_deviation == 0 else f"at most {run.norm_deviation:g} from 1.0"
        lrs = [f"{run.muon_lr:g}", f"{run.adamw_lr:g}"]
        rows.append([name, run.parameters, *lrs, f"{run.steps} ({run.updates} updates)", norms])
    return table("| run | parameters | Muon's LR | AdamW's LR | stopped at step | norm weights |", rows)


def claims() -> list[str]:
    rows = [[id, sentence, links(id)] for id, sentence in case.case()["claims"].items()]
    return table("| id | the report claims that | named in |", rows)


def bugs() -> list[str]:
    rows = []
    for id in case.case()["bugs"]:
        bug = case.bug(id)
        lines = [line["id"] for line in checklist_lines() if id in line["bugs"]]
        seen = "run" if bug.ran else "read"
        rows.append([id, bug.sentence, bug.symptom, seen, ", ".join(lines) or "–", links(id)])
    return table("| id | what was wrong | how it shows | seen | looked for in | named in |", rows)


def looks() -> list[str]:
    """What can be measured, the cheapest first."""
    found = sorted(the_list()["measurements"].items(), key=lambda item: item[1][0])
    return table("| look | price | what you do |", [[name, str(price), what] for name, (price, what) in found])


def checklist() -> list[str]:
    """The page to print, stage by stage."""
    page = []
    for stage, title in STAGES.items():
        rows = []
        for line in (line for line in checklist_lines() if line["stage"] == stage):
            ids = " ".join(line["bugs"])
            cause = f"**{line['cause']}**" + (f" ({ids})" if ids else "")
            what = [line["measurement"], line["symptom"], line["sign"], cause, line["cure"]]
            rows.append([line["id"], *what])
        page += [f"### {title}", "", *table("| | look | symptom | you see | cause | cure |", rows), ""]
    return page


def backing() -> list[str]:
    """What does each line's looking."""
    rows = [[line["id"], f"`{line['check']}`", line["notebook"]] for line in checklist_lines()]
    return table("| line | the check | learned in |", rows)


def without_a_line() -> list[str]:
    return [f"- {id}: {why}" for id, why in the_list()["without_a_line"].items()]


PARTS = {CASE_PAGE: (runs, claims, bugs), CHECKLIST_PAGE: (looks, checklist, backing, without_a_line)}


SHEET_STYLE = """@page { size: A4 landscape; margin: 5mm }
body { font: 5.9pt/1.1 "DejaVu Sans", Verdana, sans-serif; margin: 0 } h1 { font-size: 11pt; margin: 0 } p { margin: 1pt 0 3pt }
table { border-collapse: collapse; width: 100%; table-layout: fixed } code { font-size: 5.7pt }
td { border-top: .4pt solid #aaa; padding: .6pt 3pt; vertical-align: top } .stage { font-weight: bold; background: #eee }
@media screen { body { margin: 1em; font-size: 9pt } table { table-layout: auto } td:first-child { white-space: nowrap } code { font-size: inherit } }"""
WIDTHS = (2.4, 8.1, 18, 26, 20, 25.5)  # of the sheet's columns, %


def rich(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def sheet() -> str:
    """All lines on one side of A4, as a page of its own for a browser to print."""
    prices, rows = the_list()["measurements"], []
    for stage, title in STAGES.items():
        rows.append(f'<tr><td class="stage" colspan="{len(WIDTHS)}">{title}</td></tr>')
        for line in (line for line in checklist_lines() if line["stage"] == stage):
            look = f"{line['measurement'].replace('_', ' ')}, {prices[line['measurement']][0]}"
            cause = f"<b>{rich(line['cause'])}</b> {' '.join(line['bugs'])}"
            cells = [line["id"], look, rich(line["symptom"]), rich(line["sign"]), cause, rich(line["cure"])]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    columns = "".join(f'<col style="width:{width}%">' for width in WIDTHS)
    names = ["", "look, minutes", "symptom", "you see", "cause", "cure"]
    head = "".join(f'<td class="stage">{name}</td>' for name in names)
    intro = "Go down the lines. Where you see the sign, mend that cause and begin again: a run may have two faults."
    body = f"<h1>The checklist</h1><p>{intro}</p><table>{columns}<tr>{head}</tr>\n" + "\n".join(rows) + "</table>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>The checklist</title><style>{SHEET_STYLE}</style>{body}</html>\n'
