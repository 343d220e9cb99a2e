"""The checks of notebook 04 accept the printed solutions and refuse what a reader is likely to get wrong."""

import math

import helpers
import pytest
from checks import exercises_04

from moe_lab.failures.surface import case_lrs, shapley
from moe_lab.health.conventions import lr_original_from_match


@pytest.fixture
def solved() -> dict:
    return helpers.solved("04")


def test_the_solutions_pass(solved) -> None:
    assert exercises_04.check_to_original(solved["to_original"])
    assert exercises_04.check_updates_until(solved["updates_until"])
    assert exercises_04.check_shares(solved["shares_of_two"])


def test_the_solutions_say_what_the_package_says(solved) -> None:
    for shape in ((96, 96), (4096, 1536), (512, 1536), (1536, 4096)):
        assert math.isclose(solved["to_original"](3e-4, *shape), lr_original_from_match(3e-4, shape))
    for deviation, peak in ((0.004, 9e-5), (0.05, 3e-4), (0.00008, 9e-5)):
        n = solved["updates_until"](deviation, peak, 100)
        assert case_lrs(n - 1, peak).sum() < deviation <= case_lrs(n, peak).sum()
    losses = {frozenset(): 6.8, frozenset("m"): 6.7, frozenset("a"): 6.2, frozenset("ma"): 6.0}
    shares = shapley({fixed: -loss for fixed, loss in losses.items()}, "ma")
    assert solved["shares_of_two"](6.8, 6.7, 6.2, 6.0) == pytest.approx((shares["m"], shares["a"]))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda lr, rows, columns: lr, "two different steps"),
        (lambda lr, rows, columns: lr / (0.2 * math.sqrt(columns)), "the other way round"),
        (lambda lr, rows, columns: lr * math.sqrt(columns), "about 7.8"),
        (lambda lr, rows, columns: 0.2 * columns * lr, "about 7.8"),
        (lambda lr, rows, columns: 0.2 * math.sqrt(max(rows, columns)) * lr, "a tall matrix"),
        (lambda lr, rows, columns: 0.2 * math.sqrt(rows) * lr, "a tall matrix"),
        (lambda lr, rows, columns: 0.2 * math.sqrt(min(rows, columns)) * lr, "a fan-in of 4096"),
        (lambda lr, columns: lr, "TypeError"),
    ],
)
def test_to_original_refuses(wrong, hint, capsys) -> None:
    assert not exercises_04.check_to_original(wrong)
    assert hint in capsys.readouterr().out


def without_b18(deviation, peak, warmup):
    total, n = 0.0, 0
    while total < deviation:
        n += 1
        total += peak * min(n / warmup, 1.0)
    return n


def one_too_many(deviation, peak, warmup):
    return 1 if deviation < peak else helpers.solved("04")["updates_until"](deviation, peak, warmup) + 1


def micro_batches(deviation, peak, warmup):
    return 1 if deviation < peak else 4 * helpers.solved("04")["updates_until"](deviation, peak, warmup)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda deviation, peak, warmup: math.ceil(deviation / peak), "you divide by the peak"),
        (lambda deviation, peak, warmup: int(deviation / peak), "B18"),
        (without_b18, "B18"),
        (micro_batches, "not micro-batches"),
        (one_too_many, "the 94th update"),
        (lambda deviation, peak, warmup: 1 if deviation < peak else 94, "adds one peak"),
    ],
)
def test_updates_until_refuses(wrong, hint, capsys) -> None:
    assert not exercises_04.check_updates_until(wrong)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda none, muon, adamw, both: (muon - none, adamw - none), "positive"),
        (lambda none, muon, adamw, both: (none - muon, none - adamw), "leave 0.1 to nobody"),
        (lambda none, muon, adamw, both: (none - muon, muon - both), "one order of fixing"),
        (lambda none, muon, adamw, both: (adamw - both, none - adamw), "one order of fixing"),
        (lambda none, muon, adamw, both: (adamw - both, muon - both), "sum to what both"),
        (lambda none, muon, adamw, both: ((none - both) / 2,) * 2, "if it comes last"),
        (lambda none, muon, adamw, both: ((none - both) / 7, (none - both) * 6 / 7), "if it comes last"),
        (lambda none, muon, adamw, both: none - both, "TypeError"),
    ],
)
def test_shares_refuses(wrong, hint, capsys) -> None:
    assert not exercises_04.check_shares(wrong)
    assert hint in capsys.readouterr().out
