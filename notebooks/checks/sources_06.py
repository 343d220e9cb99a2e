"""What notebook 06 shows of a bug's source: the healthy lines and the sick ones."""

import difflib
import html
from collections.abc import Iterable

from IPython.display import display

from moe_lab.failures.bugs import BUGS, sources

AROUND = 3  # unchanged lines that are shown about a change
MARKED = {"-": "background:rgba(0,114,178,.18)", "+": "background:rgba(213,94,0,.22)"}  # blue, vermilion


def show_difference(id: str) -> None:
    """The healthy lines and the sick ones, with a few lines about each change; in plain text the changed ones alone."""
    lines = difference(*sources(id))
    names = ", ".join(dict.fromkeys(edit["in"].removeprefix("moe_lab.") for edit in BUGS["edits"].get(id, ())))
    text = "\n".join([f"{id}: {names}", *(line for line in lines if line[0] in "-+")])
    display({"text/html": as_html(f"{names}  (− healthy, + with {id})", lines), "text/plain": text}, raw=True)


def difference(healthy: str, sick: str) -> list[str]:
    """The two sources as one, a line bears its sign: - is healthy, + is sick, dots where lines are left out."""
    lines = list(difflib.unified_diff(healthy.splitlines(), sick.splitlines(), n=AROUND, lineterm=""))
    return ["  …" if line.startswith("@@") else f"{line[:1]} {line[1:]}" for line in lines[3:]]


def as_html(title: str, lines: Iterable[str]) -> str:
    """Lines below each other, since two columns of code are wider than a page; changed ones have a colour too."""
    shown = "".join(f'<div style="{MARKED.get(line[:1], "")}">{html.escape(line)}</div>' for line in lines)
    return f'<div>{html.escape(title)}</div><pre style="font-size:12px;white-space:pre-wrap">{shown}</pre>'
