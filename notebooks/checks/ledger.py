"""The ledger of notebook 07: a row for each claim of the report, made from what the other notebooks recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.course import case
from moe_lab.failures.results import Spread

NOTEBOOKS = Path(__file__).parents[1]

# what is still to be measured (of an open claim), or what would turn the verdict (of another)
WOULD_CHANGE = {
    "C01": "An update of a norm that survives at that learning rate: one above 2^-9 downwards or 2^-8 upwards.",
    "C02": "A format with more digits, an optimizer that keeps the remainder, or a weight far below 1.",
    "C03": "A model whose matrices keep their whole step in bf16: narrow, or at a high learning rate.",
    "C04": "The same runs at width 1536 and for thousands of updates: both widths here are small.",
    "C05": "The case's own learning rates, step by step: they are reconstructed from two numbers.",
    "C06": "The case's own record of a norm weight; the report gives its last value alone.",
    "C07": "A run of ours that needs thousands of updates for 1 % at that learning rate.",
    "C08": "A run at width 1536, or of millions of tokens an update, that stays at the unigram table.",
    "C09": "A sweep of both learning rates at a width where the claimed ratio is far from the equal step.",
    "C10": "An optimum at the case's width and horizon; ours are of small models and 200 updates.",
    "C11": "The sweep of the norms' learning rate at other widths and over thousands of updates.",
    "C12": "A cured run whose loss rises over a quarter of its first 125 updates.",
    "C13": "The case's own warm-up and count of steps: are they updates or micro-batches?",
    "C14": "The vocabulary and the kind of loss behind the report's 7.0.",
    "C15": "A healthy run with medians outside the range; that would not make the range a test.",
    "C16": "A healthy run with a tensor that stands still for 100 updates.",
    "C17": "A resume that loads the optimizer's state and keeps the new learning rate.",
    "C18": "A version of Trainer that makes bf16 weights float32 or refuses them; a run under FSDP, where accelerate is said to.",
    "C19": "A version of Trainer that takes two optimizers and a model without labels, or a run in which ours parts from our loop.",
    "C20": "A run at the case's size and length, on text, in which one of both switches gains most.",
    "C21": "A thousand updates of the cured model at its own size, on real text, below the trigram table.",
}


class Row(NamedTuple):
    id: str
    claim: str
    outcome: str
    sentence: str
    numbers: Mapping[str, Any]
    notebook: str  # the file's name without .ipynb; empty where no cell judges the claim
    cell: int
    run: str


def rows(entries: Mapping[str, Mapping[str, Any]], folder: Path = NOTEBOOKS) -> list[Row]:
    """All claims in their order. One without a fresh measurement is open, whatever an older entry says."""
    places, made, found = judging_cells(folder), commits(folder), []
    for id, about in case.case()["claims"].items():
        notebook, cell = places.get(id, ("", 0))
        entry = entries.get(id)
        if reason := why_not_fresh(entry, notebook, made.get(notebook)):
            found.append(Row(id, about, "open", reason, {}, notebook, cell, ""))
            continue
        origin = entry["provenance"]
        run = f"profile {origin['profile']}, seed {origin['seed']}, commit {origin['commit']}, {origin['machine']}"
        found.append(Row(id, about, entry["outcome"], entry["sentence"], entry["numbers"], notebook, cell, run))
    return found


def why_not_fresh(entry: Mapping[str, Any] | None, notebook: str, commit: str | None) -> str:
    """Why an entry says nothing about the code as it stands; empty: it does. `commit` made the notebook's own outputs."""
    if not notebook:
        return "no notebook measures it yet" if entry is None else "no notebook measures it any longer"
    if entry is None:
        return "its notebook has not recorded a verdict yet"
    origin = entry["provenance"]
    if origin["settings"]:
        return f"measured with other settings: {'; '.join(origin['settings'])}"
    if not origin["commit"] or origin["commit"].endswith("+"):
        return "measured with code that no commit holds"
    if origin["commit"] != commit:
        return f"measured at {origin['commit']}, and its notebook's outputs are of {commit}"
    return ""


def judging_cells(folder: Path) -> dict[str, tuple[str, int]]:
    """By claim: the notebook that judges it, and the number of the cell among its code cells."""
    places = {}
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        for count, source in enumerate(code_of(path), 1):
            for id in re.findall(r'\bjudge\(\s*"(C\d\d)"', source):
                places[id] = path.stem, count
    return places


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def commits(folder: Path) -> dict[str, str | None]:
    """By notebook: the commit in its own line of provenance."""
    found = {}
    for path in folder.glob("[0-9]*.ipynb"):
        said = re.search(r"commit ([0-9a-f]{7,}\+?) ·", path.read_text(encoding="utf-8"))
        found[path.stem] = said[1] if said else None
    return found


def judged_again(id: str, numbers: Mapping[str, Any]) -> tuple[str, str]:
    """Outcome and sentence that the claim's rule makes of recorded numbers: no run, no time."""
    return case.verdict_of(id)[1](**{name: restored(value) for name, value in numbers.items()})


def restored(value: Any) -> Any:
    """A recorded number, or a mapping of them, with its spreads as such."""
    if is_spread(value) and "sd" in value:
        return Spread(**value)
    return {name: restored(one) for name, one in value.items()} if isinstance(value, Mapping) else value


def mean_of(value: float | Spread) -> float:
    """A number, or the mean of one that is recorded with its spread."""
    return value.mean if isinstance(value, Spread) else value


def is_spread(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) | {"sd"} == {"mean", "sd", "n"}


def shown(value: Any) -> str:
    """A recorded number with its spread, a row of them, or a mapping of them, as a few words."""
    if is_spread(value):
        spread = f" ± {value['sd']:.3f} ({value['n']} runs)" if "sd" in value else " (1 run)"
        return f"{value['mean']:.3f}{spread}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, str | int) else f"{value:.3g}"


def numbers_of(row: Row, most: int = 4) -> str:
    """The row's first numbers; a mapping of many is told by its ends."""
    told = []
    for name, value in list(row.numbers.items())[:most]:
        flat = list(value.values()) if isinstance(value, Mapping) else value
        many = isinstance(flat, list) and len(flat) > 4 and all(isinstance(part, int | float) for part in flat)
        text = f"{shown(min(flat))} to {shown(max(flat))}" if many else shown(value)
        told.append(f"{name.replace('_', ' ')} {text}")
    return "; ".join(told) or "none"


def as_markdown(several: list[Row]) -> str:
    """The ledger as a table, a line for each claim, and below it the runs that they come from."""
    lines = ["| claim of the report | verdict | numbers | measured in | what would change it |", "| --- " * 5 + "|"]
    for row in several:
        where = f"[{row.notebook}]({row.notebook}.ipynb), code cell {row.cell}" if row.notebook else "nowhere yet"
        verdict = f"**{row.outcome}**: {row.sentence}"
        cells = [f"**{row.id}** {row.claim}", verdict, numbers_of(row), where, WOULD_CHANGE[row.id]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    by_run: dict[str, list[str]] = {}
    for row in (row for row in several if row.run):
        by_run.setdefault(row.run, []).append(row.id)
    return "\n".join([*lines, "", *(f"{', '.join(ids)}: {run}.\n" for run, ids in by_run.items())])
