"""Checks of notebook 05's exercises. Solutions: notebooks/solutions/05.md."""

from __future__ import annotations

from collections.abc import Callable

from moe_lab.course.lessons import exercise

# Two made-up runs, small enough to read: (step, validation loss). The answers below follow from them by hand.
FALLS = [(0, 8.0), (100, 6.0), (200, 4.4), (300, 3.9)]
STUCK = [(0, 8.0), (100, 6.7), (200, 6.6), (300, 6.6)]
FLOORS = {"uniform": 8.3, "unigram": 6.6, "bigram": 4.5, "trigram": 4.1}


@exercise
def check_first_below(first: Callable) -> None:
    """`first(evaluations, floor)`: the first step whose validation loss is below the floor, or None."""
    assert first(FALLS, 4.5) == 200, "in [(0, 8.0), (100, 6.0), (200, 4.4), (300, 3.9)] step 200 is first below 4.5"
    assert first(STUCK, 4.5) is None, "a run that never gets there has no such step: return None"
    assert first(STUCK, 6.6) is None, "equal to the floor is not below it"


@exercise
def check_tokens(n_tokens: int, batch_size: int, n_micro: int, seq_len: int, steps: int) -> None:
    """The tokens that a run of this size has trained on."""
    of_one = steps * batch_size * seq_len
    assert isinstance(n_tokens, int), "a count of tokens is a whole number"
    assert n_tokens != of_one or n_micro == 1, "a step is an update: it takes every micro-batch with it"
    assert n_tokens == of_one * n_micro, (
        "tokens = steps × micro-batches a step × windows a micro-batch × tokens a window"
    )


@exercise
def check_verdict(verdict: Callable) -> None:
    """`verdict(validation_loss, floors)`: the name of the best table that the model has reached, or 'nothing'."""
    assert verdict(3.9, FLOORS) == "trigram", "3.9 is below every floor: the best table reached is the trigram"
    assert verdict(4.4, FLOORS) == "bigram", "4.4 is below the bigram's 4.5 and above the trigram's 4.1"
    assert verdict(6.5, FLOORS) == "unigram", "6.5 is below the unigram's 6.6 only: word frequencies, no context"
    assert verdict(9.0, FLOORS) == "nothing", "9.0 is above ln V: worse than knowing nothing"
