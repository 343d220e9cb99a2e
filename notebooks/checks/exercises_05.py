"""Checks of notebook 05's exercises. Solutions: notebooks/solutions/05.md."""

from __future__ import annotations

from collections.abc import Callable

from moe_lab.course.lessons import check_exercise

# Two made-up runs, small enough to read: (step, validation loss). The answers below follow from them by hand.
FALLS = [(0, 8.0), (100, 6.0), (200, 4.4), (300, 3.9)]
STUCK = [(0, 8.0), (100, 6.7), (200, 6.6), (300, 6.6)]
FLOORS = {"uniform": 8.3, "unigram": 6.6, "bigram": 4.5, "trigram": 4.1}


def check_first_below(answer: Callable | None) -> bool:
    """`answer(evaluations, floor)` → the first step whose validation loss is below the floor, or None."""
    tests = [
        (
            lambda f: f(FALLS, 4.5) == 200,
            "in [(0, 8.0), (100, 6.0), (200, 4.4), (300, 3.9)] step 200 is first below 4.5",
        ),
        (lambda f: f(STUCK, 4.5) is None, "a run that never gets there has no such step: return None"),
        (lambda f: f(STUCK, 6.6) is None, "equal to the floor is not below it"),
    ]
    return check_exercise(answer, tests)


def check_tokens(answer: int | None, batch_size: int, n_micro: int, seq_len: int, steps: int) -> bool:
    """The tokens that a run of this size has trained on."""
    micro_batches_only = steps * batch_size * seq_len
    right = micro_batches_only * n_micro
    tests = [
        (lambda a: isinstance(a, int), "a count of tokens is a whole number"),
        (lambda a: a != micro_batches_only or n_micro == 1, "a step is an update: it takes every micro-batch with it"),
        (lambda a: a == right, "tokens = steps × micro-batches a step × windows a micro-batch × tokens a window"),
    ]
    return check_exercise(answer, tests)


def check_verdict(answer: Callable | None) -> bool:
    """`answer(validation_loss, floors)` → the name of the best table that the model has reached, or 'nothing'."""
    tests = [
        (lambda f: f(3.9, FLOORS) == "trigram", "3.9 is below every floor: the best table reached is the trigram"),
        (lambda f: f(4.4, FLOORS) == "bigram", "4.4 is below the bigram's 4.5 and above the trigram's 4.1"),
        (lambda f: f(6.5, FLOORS) == "unigram", "6.5 is below the unigram's 6.6 only: word frequencies, no context"),
        (lambda f: f(9.0, FLOORS) == "nothing", "9.0 is above ln V: worse than knowing nothing"),
    ]
    return check_exercise(answer, tests)
