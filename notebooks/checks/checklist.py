"""The lines that a notebook adds to the checklist: symptom, measurement, cause, cure. All of them: notebooks/CHECKLIST.md."""

from __future__ import annotations

from IPython.display import Markdown, display

from moe_lab.config import ROOT
from moe_lab.sections import read_yaml

LIST = ROOT / "notebooks" / "checklist.yaml"  # not from here: a working copy has its own checks/


def lines_of(notebook: str) -> list[dict]:
    """Those that are learned in notebook "01", "03a", …"""
    return [line for line in read_yaml(LIST)["lines"] if line["notebook"] == notebook]


def map_of(notebook: str) -> str:
    lines = lines_of(notebook)
    if not lines:
        raise ValueError(f"no line of {LIST.name} is learned in notebook {notebook!r}")
    rows = ["| | symptom | look | you see | cause | cure |", "| --- | --- | --- | --- | --- | --- |"]
    for line in lines:
        cause = " ".join([line["cause"], *line["bugs"]])
        rows.append(
            f"| {line['id']} | {line['symptom']} | {line['measurement']} | {line['sign']} | {cause} | {line['cure']} |"
        )
    return "\n".join(rows)


def show_map(notebook: str) -> None:
    """Display the lines that the notebook adds."""
    display(Markdown(map_of(notebook)))
