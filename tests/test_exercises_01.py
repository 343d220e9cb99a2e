"""The checks of notebook 01 accept the printed solutions and refuse what a reader is likely to get wrong."""

import math
import re

import helpers
import pytest
from checks import exercises_01

RIGHT = {"A": "frequencies only", "B": "another number", "C": "random tokens", "D": "beats the tables"}


@pytest.fixture
def solved() -> dict:
    return helpers.solved("01")


def test_the_solutions_pass(solved) -> None:
    assert exercises_01.check_step_0_loss(solved["step_0_loss"])
    assert exercises_01.check_nats_to_match(solved["nats_to_match"])
    assert exercises_01.check_diagnosis(solved["diagnosis"])


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda v, d, s: math.log(v), "whatever init_std is"),
        (lambda v, d, s: math.log2(v) + d * s**2 / 2, "natural log"),
        (lambda v, d, s: math.log(v) + d * s**2, "the whole variance"),
        (lambda v, d, s: math.log(v) + d * s / 2, r"init_std\*\*2"),
        (lambda v, d, s: math.log(v) + s**2 / 2, r"init_std\*\*2"),
        (lambda v, d: math.log(v), "TypeError"),
    ],
)
def test_step_0_loss_refuses(wrong, hint, capsys) -> None:
    assert not exercises_01.check_step_0_loss(wrong)
    assert re.search(hint, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda bits, size: bits * size, "ln 2 nats"),
        (lambda bits, size: bits * size / math.log(2), "ln 2 nats"),
        (lambda bits, size: bits / size * math.log(2), "costs three bits"),
        (lambda bits, size: bits * math.log(2), "costs three bits"),
        (lambda bits, size: size * math.log(2), "twice the bits"),
        (lambda bits: bits, "TypeError"),
    ],
)
def test_nats_to_match_refuses(wrong, hint, capsys) -> None:
    assert not exercises_01.check_nats_to_match(wrong)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"C": "frequencies only", "A": "random tokens"}, "C: which loss"),
        ({"A": "beats the tables"}, "A: beside which table"),
        ({"B": "beats the tables"}, "B: look at its start"),
        ({"D": "another number"}, "D: its start is right"),
        ({"B": "Beats the tables!"}, "use these words"),
    ],
    ids=str,
)
def test_diagnosis_refuses(changes, hint, capsys) -> None:
    assert not exercises_01.check_diagnosis(RIGHT | changes)
    assert hint in capsys.readouterr().out


def test_diagnosis_refuses_a_missing_run(capsys) -> None:
    assert not exercises_01.check_diagnosis({"A": "frequencies only"})
    assert "name all four" in capsys.readouterr().out


@pytest.mark.parametrize(  # of profiles smoke and lab, rounded
    "floors",
    [
        {"uniform": 6.24, "unigram": 5.34, "bigram": 3.59, "trigram": 2.85},
        {"uniform": 8.32, "unigram": 6.65, "bigram": 4.74, "trigram": 4.44},
    ],
)
def test_each_mystery_run_shows_what_its_diagnosis_says(floors) -> None:
    step_0 = floors["uniform"] + 0.04
    runs = exercises_01.mystery_runs(floors, step_0)
    told = {"random tokens": "uniform", "frequencies only": "unigram"}
    for letter, diagnosis in RIGHT.items():
        start, end = runs[letter]
        assert (start == step_0) == (diagnosis != "another number")
        if diagnosis in told:  # beside its table, and not beside another
            assert min(floors, key=lambda name: abs(floors[name] - end)) == told[diagnosis]
        else:  # both look good at the end; the start tells them apart
            assert end < min(floors.values())
