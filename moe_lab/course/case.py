"""The case: what the report claims, what it missed and what it observed, from case.yaml beside this file; and what the
notebooks found about each claim, in notebooks/results/verdicts.json.
An id or a name that the case does not have raises ConfigError, with the nearest one.
"""

import json
import os
import re
import runpy
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from moe_lab.config import ROOT, differences, load_config
from moe_lab.course.notebook import Lab
from moe_lab.failures.results import plain, provenance
from moe_lab.sections import ConfigError, read_yaml, suggestion
from moe_lab.train.record import write_atomically

CASE = Path(__file__).with_name("case.yaml")
NOTEBOOKS = ROOT / "notebooks"
VERDICTS = NOTEBOOKS / "results" / "verdicts.json"
OUTCOMES = ("holds", "holds only if", "does not hold", "open")


def claim(id: str) -> SimpleNamespace:
    """Claim C01 … C21: its `sentence`, in the report's own numbers."""
    return SimpleNamespace(sentence=entry("claims", id))


def bug(id: str) -> SimpleNamespace:
    """Bug B01 … B26: `sentence`, `symptom`, and whether it was seen by running that day's code (`ran`), or read."""
    return SimpleNamespace(**{"ran": False} | entry("bugs", id))


def observed_run(name: str) -> SimpleNamespace:
    """Run `first` (bf16 parameters) or `second` (LR too low), as in case.yaml; None: the report does not say."""
    return SimpleNamespace(**entry("runs", name))


def facts(group: str) -> Mapping[str, Any]:
    """Figures by name, read-only: of `training_1.5b`, `sibling_3b`, `training`, `optimizer` and the `report`."""
    return MappingProxyType(entry("facts", group))


@cache
def case() -> Mapping[str, Mapping[str, Any]]:
    return read_yaml(CASE)


def entry(section: str, id: str) -> Any:
    known = case()[section]
    if id in known:
        return known[id]
    what = {"claims": "claim", "bugs": "bug", "runs": "run", "facts": "group of facts"}[section]
    short = re.fullmatch(r"([a-z]?)(\d+)", str(id).strip().lower())  # c5 and 5 mean C05
    near = suggestion(f"{(short[1] or what[0]).upper()}{int(short[2]):02d}" if short else str(id), known)
    raise ConfigError(f"{id!r} is no {what} of the case{near or '; known are ' + ', '.join(known)}")


def judge(id: str, lab: Lab, /, *, corpus: str | None = None, **numbers: Any) -> None:
    """Print what the numbers make of a claim, `C05 holds only if: sentence`; in profile lab, `make outputs` also puts it in
    VERDICTS in place of the claim's older entry (by MOE_LAB_KEEP_VERDICTS: a reader's run leaves the record alone).

    Outcome and sentence are what the function of that name in notebooks/checks/verdicts_NN.py returns of the `numbers`,
    which are as in `notebook.claim`; `corpus` is the hash of the text. Raises ConfigError for an unknown id or outcome, no
    function or two, and a number that is not finite.
    """
    about = claim(id).sentence
    notebook, verdict = verdict_of(id)
    kept = {name: plain(f"{id}: {name}", value) for name, value in numbers.items()}
    outcome, sentence = verdict(**numbers)
    if outcome not in OUTCOMES:
        raise ConfigError(f"{id}: {outcome!r} is no outcome: {', '.join(OUTCOMES)}{suggestion(outcome, OUTCOMES)}")
    print(textwrap.fill(f"{id} {outcome}: {sentence}", 100, subsequent_indent="  "))
    if lab.profile == "lab" and os.environ.get("MOE_LAB_KEEP_VERDICTS"):
        # what differs from the profile's file: overrides of a reader
        settings = differences(load_config(ROOT / "configs" / f"{lab.profile}.yaml"), lab.config)
        made = {"notebook": notebook, "profile": lab.profile, "seed": lab.config.training.seed, "settings": settings}
        made |= provenance() | ({"corpus": corpus} if corpus is not None else {})
        entry = {"claim": about, "outcome": outcome, "sentence": sentence, "numbers": kept, "provenance": made}
        write_verdicts(read_verdicts() | {id: entry})


def verdict_of(id: str) -> tuple[str, Callable[..., tuple[str, str]]]:
    """The notebook that judges the claim, and its function."""
    found = {}
    for path in sorted((NOTEBOOKS / "checks").glob("verdicts_*.py")):
        if verdict := runpy.run_path(str(path)).get(id):
            found[path.stem.removeprefix("verdicts_")] = verdict
    if len(found) != 1:
        where = f"notebooks {' and '.join(found)}" if found else "no notebook"
        raise ConfigError(f"{id}: judged by {where}; it must be one checks/verdicts_NN.py")
    [(number, verdict)] = found.items()
    if not (notebooks := list(NOTEBOOKS.glob(f"{number}_*.ipynb"))):
        raise ConfigError(f"{id}: checks/verdicts_{number}.py belongs to no notebook")
    return notebooks[0].stem, verdict


def read_verdicts() -> dict[str, dict[str, Any]]:
    """Entries by claim id, in order: claim, outcome, sentence, numbers, provenance; empty before the first. Raises
    ConfigError if VERDICTS cannot be read."""
    if not VERDICTS.exists():
        return {}
    try:
        return json.loads(VERDICTS.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{VERDICTS}: cannot be read: {str(error).splitlines()[0]}; restore it from git") from None


def write_verdicts(entries: Mapping[str, Any]) -> None:
    VERDICTS.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(entries.items())), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(VERDICTS, text + "\n")
