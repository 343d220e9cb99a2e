"""Checks of notebook 07's exercises. Solutions: notebooks/solutions/07.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from checks.exercise import exercise
from moe_lab import Trainer, load_config
from moe_lab.config import ROOT
from moe_lab.sections import ConfigError
from moe_lab.train.record import read_record

OUTCOMES = ("holds", "holds only if", "does not hold", "open")

# a claim, what was measured about it, and what it comes to
HANDED_IN = {
    "W": {
        "claim": "the new optimizer trains better than the old one",
        "measured": {"gain_nats": 0.004, "sd_over_seeds": 0.009, "seeds": 3, "widths": [96]},
    },
    "X": {
        "claim": "the norms move by less than 0.01 in 200 updates",
        "measured": {"norm_deviation": [0.031, 0.033, 0.029], "seeds": 3, "updates": 200},
    },
    "Y": {
        "claim": "float32 parameters cost no time",
        "measured": {"seconds_bf16": 0.210, "seconds_float32": {"with bf16 units": 0.212, "without": 0.119}},
    },
    "Z": {
        "claim": "a learning rate of 0.02 trains better than 0.002",
        "measured": {
            "gain_nats": {"width 96": 0.31, "width 192": 0.27, "width 768": -0.22},
            "sd_over_seeds": {"width 96": 0.01, "width 192": 0.02, "width 768": 0.02},
            "seeds": 3,
        },
    },
}
RIGHT = {"W": "open", "X": "does not hold", "Y": "holds", "Z": "holds only if"}
HINTS = {
    "W": "the gain is smaller than the spread over seeds; what does that allow you to say, in either direction?",
    "X": "three seeds agree, and each of them is far above the limit",
    "Y": "the claim is about what float32 *costs*: is it slower anywhere, by more than a timing can resolve?",
    "Z": "at which widths is it true, beyond the spread, and at which is the opposite true?",
}


@exercise
def check_verdicts(verdicts: Mapping[str, str]) -> None:
    """`verdicts`: an outcome for each of W, X, Y, Z."""
    assert set(verdicts) == set(RIGHT), f"give a verdict for each of {', '.join(RIGHT)}"
    unknown = [outcome for outcome in verdicts.values() if outcome not in OUTCOMES]
    assert not unknown, f"{unknown[0]!r} is no outcome: {', '.join(OUTCOMES)}"
    for letter, right in RIGHT.items():
        assert verdicts[letter] == right, f"{letter}: {HINTS[letter]}"


def damaged(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A copy of some entries of the record, in three of which something is wrong, under letters in place of ids."""
    chosen = [id for id, entry in entries.items() if entry["outcome"] in ("holds", "holds only if")][:4]
    copies = {letter: {"id": id, **entries[id]} for letter, id in zip("PQRS", chosen, strict=True)}
    copies["P"]["outcome"] = "does not hold"
    for letter, changes in (("Q", {"settings": ["training.max_lr: 0.004 → 0.4"]}), ("S", {"commit": "abcdef0+"})):
        copies[letter]["provenance"] = copies[letter]["provenance"] | changes
    return copies


FAULTS = {
    "P": "the numbers say something else",
    "Q": "other settings",
    "R": "nothing is wrong",
    "S": "code that no commit holds",
}


@exercise
def check_faults(faults: Mapping[str, str]) -> None:
    """`faults`: for each of P, Q, R, S one of the values of FAULTS."""
    assert set(faults) == set(FAULTS), f"say of each of {', '.join(FAULTS)} what is wrong with it"
    unknown = [fault for fault in faults.values() if fault not in FAULTS.values()]
    assert not unknown, f"{unknown[0]!r} is none of: {'; '.join(sorted(FAULTS.values()))}"
    assert faults["P"] == FAULTS["P"], "P: judge it again from its own numbers, and compare the outcomes"
    assert faults["Q"] == FAULTS["Q"], "Q: look at what its provenance says about the config"
    assert faults["S"] == FAULTS["S"], "S: a plus sign behind a commit means that files differed from it"
    assert faults["R"] == FAULTS["R"], (
        "R: which line of it makes you suspicious? Outcome and provenance agree with its numbers"
    )


@exercise
def check_settings(settings: Sequence[str]) -> None:
    """`settings`: overrides of configs/smoke.yaml with bf16 parameters and norms that nevertheless move."""
    try:
        config = load_config(ROOT / "configs" / "smoke.yaml", [*settings, "training.steps=8"])
    except ConfigError as error:
        raise AssertionError(str(error)) from None
    assert config.precision.parameters == "bfloat16", "the parameters must stay bf16: precision.parameters=bfloat16"
    with TemporaryDirectory() as folder:
        Trainer(config, folder).fit()
        moved = max(row.get("norm_deviation") or 0 for row in read_record(folder))
    assert moved > 0, (
        "after 8 updates every norm weight is exactly 1: AdamW's step for the norms is at most about its learning rate, and "
        "only steps above 2^-9 arrive"
    )
