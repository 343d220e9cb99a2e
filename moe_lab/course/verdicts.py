"""What the notebooks found about each claim of the report, for a reader and, as JSON, for the ledger.

    verdicts.check("C07", {"holds": ratio < 2, "does not hold": ratio >= 2}, "…", lab=lab, notebook="04_…", ratio=ratio)

A printed line holds no number that was just measured, so that it is the same in every run; the numbers go to the file.
Profile `lab` writes the file; other profiles only print, since their numbers are not the ones to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lab.config import ROOT
from moe_lab.course import case
from moe_lab.course.case import OUTCOMES, origin_of, store
from moe_lab.course.notebook import Lab
from moe_lab.failures.results import plain
from moe_lab.sections import ConfigError, suggestion


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
