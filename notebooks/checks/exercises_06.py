"""Checks of notebook 06's exercises. Solutions: notebooks/solutions/06.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from checks.exercise import exercise
from checks.runs_06 import Patient, small_config
from moe_lab.config import Config
from moe_lab.failures import bugs
from moe_lab.failures.bugs import planted

WARD = {"A": ("B05",), "B": (), "C": ("B04",), "D": ("B03", "B06")}
MICRO, LINES = 754, 10


def patient(letter: str) -> Patient:
    """An untrained run with no bug, one or two of B03 to B06. Look at it inside `with run.code():`."""
    return Patient(small_config(steps=40), *WARD[letter])


@exercise
def check_diagnoses(answer: Mapping[str, set[str]]) -> None:
    """`answer`: the bugs of each patient, a set."""
    assert set(answer) == set(WARD), f"answer with a dict of {', '.join(WARD)}"
    assert all(isinstance(found, set | frozenset) for found in answer.values()), (
        "give a set of ids each: set() is healthy"
    )
    ids = set().union(*answer.values())
    assert ids <= {"B03", "B04", "B05", "B06"}, f"only B03 to B06 are in question, not {', '.join(sorted(ids))}"
    for letter, found in answer.items():
        true = set(WARD[letter])
        assert not found - true, f"{letter}: {min(found - true)} is not there; which measurement showed it?"
        assert found == true, f"{letter}: something is missing; you have four measurements, take all of them"


def heard(config: Config) -> Counter:
    """What the loop of that day (B07) does in 754 micro-batches with a config's accumulation and intervals."""
    events: Counter = Counter()
    training = config.training
    with planted("B07"):
        bugs.loop(
            MICRO, training.gradient_accumulation_steps, training.log_interval, lambda what: events.update([what])
        )
    return events


@exercise
def check_settings(config: Config) -> None:
    """`config`: that of the case, with another `log_interval`, with which the loop of that day logs."""
    assert isinstance(config, Config), "give a config: case_config.with_(training={…})"
    assert config.training.gradient_accumulation_steps == 4, "leave the accumulation at 4: it makes the batch"
    assert config.training.log_interval >= 2, (
        "an interval of 1 logs at each update, and says nothing about the two conditions"
    )
    logs = heard(config)["log"]
    assert logs, (
        f"with an interval of {config.training.log_interval} it logs nothing: an update comes where step + 1 is a multiple of 4; "
        "which multiples of your interval are among these steps?"
    )
    assert logs >= LINES, f"it logs {logs} times in {MICRO} steps; find an interval with at least {LINES}"


@exercise
def check_worth(worth: Callable[[Mapping[frozenset, float], str], tuple[float, float]]) -> None:
    """`worth(losses, bug)`: what mending a bug gains as the first repair and as the last one; `losses` by the set of bugs."""
    losses = {frozenset(): 4.0, frozenset({"B04"}): 4.7, frozenset({"B06"}): 4.3, frozenset({"B04", "B06"}): 4.4}
    found = tuple(round(value, 6) for value in worth(losses, "B04"))
    assert len(found) == 2, "return two numbers: as the first repair, and as the last"
    assert found != (0.7, 0.1), (
        "these are the right numbers in the wrong order: the first repair is made while all bugs are there"
    )
    assert found != (-0.1, -0.7), "a gain is the loss before the repair minus the loss after it"
    assert found == (0.1, 0.7), "first: from all bugs to all but this one; last: from this one alone to none"
    losses = {frozenset(): 1.0, frozenset({"a"}): 1.5, frozenset({"b"}): 2.0, frozenset({"a", "b"}): 3.5}
    assert tuple(round(value, 6) for value in worth(losses, "b")) == (2.0, 1.0), (
        "it must work for any bugs: read all of them off `losses`"
    )
