"""Checks of notebook 00's exercises. Solutions: notebooks/solutions/00.md."""

from __future__ import annotations

from collections.abc import Callable
from math import isclose

from moe_lab.course.lessons import exercise


@exercise
def check_run_minutes(minutes: Callable) -> None:
    """`minutes(steps, tokens_per_step, tokens_per_s)` of a run."""
    found = minutes(600, 1000, 10_000)
    assert not isclose(found, 60), "600 steps of 1,000 tokens at 10,000 tokens/s take 60 seconds: give minutes"
    assert isclose(found, 1), (
        "600 steps of 1,000 tokens at 10,000 tokens/s take 1 minute: tokens over tokens per second are seconds"
    )
    assert isclose(minutes(600, 1000, 20_000), 0.5), "twice the speed takes half the time"


@exercise
def check_next_token_loss(loss: Callable) -> None:
    """`loss(row, weights)`: the next token's loss of a record's row, nats per token."""
    one_head = {"losses": {"next_token": 6.0, "moe_balance": 0.02}}
    assert isclose(loss(one_head, (1.0,)), 6), (
        "with one head the weight is 1: take the term next_token, and leave the routers' terms out"
    )
    found = loss({"losses": {"next_token": 4.0, "future_2": 2.1, "moe_balance": 0.02}}, (1.0, 0.5))
    assert not isclose(found, 4), "the record holds weighted terms; undo the weight of the first head"
    assert isclose(found, 6), (
        "weights 1.0 and 0.5 are normalised to sum 1, so the first head counts 2/3: divide by that"
    )
    found = loss({"losses": {"next_token": 4.0, "future_2": 2.1}}, (2.0, 1.0))
    assert isclose(found, 6), "weights 2.0 and 1.0 are the same shares as 1.0 and 0.5"
