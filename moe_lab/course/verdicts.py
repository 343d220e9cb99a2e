"""What the notebooks found about each claim of the report, for a reader and, as JSON, for the ledger.

    verdicts.check("C07", {"holds": ratio < 2, "does not hold": ratio >= 2}, "…", lab=lab, notebook="04_…", ratio=ratio)

A printed line holds no number that was just measured, so that it is the same in every run; the numbers go to the file.
Profile `lab` writes the file; other profiles only print, since their numbers are not the ones to keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from filelock import FileLock

from moe_lab.config import ROOT, differences, load_config
from moe_lab.course import case
from moe_lab.course.notebook import Lab
from moe_lab.data.prepare import CACHE
from moe_lab.failures.results import provenance
from moe_lab.sections import ConfigError, suggestion
from moe_lab.train.record import write_atomically

VERDICTS = ROOT / "notebooks" / "results" / "verdicts.json"
OUTCOMES = ("holds", "holds only if", "does not hold", "open")


def check(
    id: str,
    conditions: Mapping[str, Any],
    sentence: str | Mapping[str, str],
    *,
    lab: Lab,
    notebook: str,
    corpus: str | None = None,
    **numbers: Any,
) -> str:
    """Print the verdict whose condition is true, `C05 holds only if: sentence`, and return its outcome; in profile lab, also
    put it in VERDICTS in place of the claim's older entry.

    `conditions` maps outcomes to what was measured about them, `sentence` is one for all of them or one for each,
    `notebook` is the file's name without .ipynb, `corpus` the hash of the text, `numbers` are finite numbers, truth values,
    or lists and mappings of them; six digits of each are kept. Raises AssertionError, naming the claim, unless exactly one
    condition is true, and ConfigError for an unknown id, outcome or notebook, for an outcome without a sentence, and for
    a number that is not finite.
    """
    about = case.claim(id).sentence
    sentences = dict.fromkeys(conditions, sentence) if isinstance(sentence, str) else sentence
    for outcome in conditions:
        if outcome not in OUTCOMES:
            raise ConfigError(f"{id}: {outcome!r} is no outcome: {', '.join(OUTCOMES)}{suggestion(outcome, OUTCOMES)}")
        if outcome not in sentences:
            raise ConfigError(f"{id}: no sentence for the outcome {outcome!r}")
    if notebook not in (notebooks := [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]):
        raise ConfigError(f"{id}: {notebook!r} is no notebook{suggestion(notebook, notebooks)}")
    kept = {name: plain(f"{id}: {name}", value) for name, value in numbers.items()}
    true = [outcome for outcome, condition in conditions.items() if bool(condition)]
    if len(true) != 1:
        found = f"all of {', '.join(true)} are" if true else f"none of {', '.join(conditions)} is"
        raise AssertionError(f"{id}: {found} what was measured; exactly one outcome must be")
    entry = {"claim": about, "outcome": true[0], "sentence": sentences[true[0]], "numbers": kept}
    print(f"{id} {true[0]}: {entry['sentence']}")
    if lab.profile == "lab":
        store(id, entry | {"provenance": origin_of(lab, notebook, corpus)})
    return true[0]


def read_verdicts() -> dict[str, dict[str, Any]]:
    """Entries by claim id, in order: claim, outcome, sentence, numbers, provenance; empty before the first. Raises
    ConfigError if VERDICTS cannot be read."""
    if not VERDICTS.exists():
        return {}
    try:
        return json.loads(VERDICTS.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{VERDICTS}: cannot be read: {str(error).splitlines()[0]}; restore it from git") from None


def store(id: str, entry: Mapping[str, Any]) -> None:
    VERDICTS.parent.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "verdicts.lock"):  # two notebooks at once would lose one of two entries
        entries = read_verdicts() | {id: entry}
        text = json.dumps(dict(sorted(entries.items())), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(VERDICTS, text + "\n")


def origin_of(lab: Lab, notebook: str, corpus: str | None) -> dict[str, Any]:
    """What made the numbers. `settings` lists where the config is not the profile's file: overrides of a reader."""
    settings = differences(load_config(ROOT / "configs" / f"{lab.profile}.yaml"), lab.config)
    made = {"notebook": notebook, "profile": lab.profile, "seed": lab.config.training.seed, "settings": settings}
    return made | provenance() | ({"corpus": corpus} if corpus is not None else {})


def plain(name: str, value: Any) -> Any:
    """`value` as JSON holds it (numpy's and torch's too), with six digits of a fraction. Raises ConfigError for what is
    not finite."""
    try:
        text = json.dumps(value, default=lambda array: array.tolist(), allow_nan=False)
    except ValueError:
        raise ConfigError(f"{name}={value!r} must be finite") from None
    return json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
