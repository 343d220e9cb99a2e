"""The checks of notebook 03 accept the printed solutions and refuse what a reader is likely to get wrong."""

import math
import re

import helpers
import pytest
import torch
from checks import exercises_03

from moe_lab.health.measures import is_lost, ulp

RIGHT = {"A": "rounded away", "B": "no gradient", "C": "not in the optimizer", "D": "healthy"}


@pytest.fixture
def solved() -> dict:
    return helpers.solved("03")


def test_the_solutions_pass(solved) -> None:
    assert exercises_03.check_gap(solved["gap"])
    assert exercises_03.check_lr_to_move(solved["lr_to_move"])
    assert exercises_03.check_causes(solved["causes"])


@pytest.mark.parametrize("weight", [0.02001953125, 0.1, 0.25, 1.0, 1.0078125, 1.5, 3.0, 6.0])
def test_the_solutions_agree_with_the_package(solved, weight) -> None:
    kept = torch.tensor(weight).bfloat16()
    assert solved["gap"](kept.item()) == ulp(kept, torch.bfloat16).item()
    limit = solved["lr_to_move"](kept.item())
    just_below, just_above = torch.tensor(-limit * (1 - 2**-10)), torch.tensor(-limit * (1 + 2**-10))
    assert is_lost(kept, just_below, torch.bfloat16) and not is_lost(kept, just_above, torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda w: 2.0 ** (math.floor(math.log2(w)) - 8), "smaller"),
        (lambda w: w * 2**-7, "does not grow"),
        (lambda w: 2.0**-7, "below 1"),
        (lambda w: 2.0 ** (round(math.log2(w)) - 7), "does not grow"),
        (lambda w: 2.0 ** (math.ceil(math.log2(w)) - 7), "does not grow"),
        (lambda w: 2.0 ** (min(math.floor(math.log2(w)), 1) - 7), "from 4 to 8"),
        (lambda w: torch.finfo(torch.float16).eps, "128 steps"),
        (lambda: 1, "TypeError"),
    ],
)
def test_gap_refuses(wrong, hint, capsys) -> None:
    assert not exercises_03.check_gap(wrong)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda w: 2.0 ** (math.floor(math.log2(w)) - 7), "no whole gap"),
        (lambda w: 2.0 ** (math.floor(math.log2(w)) - 8), "at a power of two"),
        (lambda w: w / 512, "at 1.5 the gap"),
        (lambda w: 2.0**-8 if w > 1 else 2.0**-9, "right near 1"),
        (lambda w: w / 0, "ZeroDivisionError"),
    ],
)
def test_lr_to_move_refuses(wrong, hint, capsys) -> None:
    assert not exercises_03.check_lr_to_move(wrong)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"A": "no gradient", "B": "rounded away"}, "B: an optimizer"),
        ({"C": "rounded away"}, "C: it has a gradient"),
        ({"A": "not in the optimizer"}, "A: somebody intended"),
        ({"D": "no gradient"}, "D: compare"),
        ({"A": "frozen"}, "use these words"),
    ],
    ids=str,
)
def test_causes_refuses(changes, hint, capsys) -> None:
    assert not exercises_03.check_causes(RIGHT | changes)
    assert re.search(hint, capsys.readouterr().out)


def test_causes_refuses_a_missing_tensor(capsys) -> None:
    assert not exercises_03.check_causes({"A": "healthy"})
    assert "name all four" in capsys.readouterr().out
