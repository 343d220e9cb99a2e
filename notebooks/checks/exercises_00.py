"""Checks of notebook 00's exercises. Solutions: notebooks/solutions/00.md."""

from __future__ import annotations

import math
from collections.abc import Callable

from moe_lab.course.lessons import check_exercise


def check_run_minutes(answer: Callable | None) -> bool:
    """`answer(steps, tokens_per_step, tokens_per_s)` → minutes of a run."""
    tests = [
        (
            lambda f: not math.isclose(f(600, 1000, 10_000), 60.0),
            "600 steps of 1,000 tokens at 10,000 tokens/s take 60 seconds: give minutes",
        ),
        (
            lambda f: math.isclose(f(600, 1000, 10_000), 1.0),
            "600 steps of 1,000 tokens at 10,000 tokens/s take 1 minute: tokens over tokens per second are seconds",
        ),
        (lambda f: math.isclose(f(600, 1000, 20_000), 0.5), "twice the speed takes half the time"),
    ]
    return check_exercise(answer, tests)


def check_next_token_loss(answer: Callable | None) -> bool:
    """`answer(row, weights)` → the next token's loss of a record's row, nats per token."""
    one_head = {"losses": {"next_token": 6.0, "moe_balance": 0.02}}
    two_heads = {"losses": {"next_token": 4.0, "future_2": 2.1, "moe_balance": 0.02}}
    weighted_twice = {"losses": {"next_token": 4.0, "future_2": 2.1}}
    tests = [
        (
            lambda f: math.isclose(f(one_head, (1.0,)), 6.0),
            "with one head the weight is 1: take the term next_token, and leave the routers' terms out",
        ),
        (
            lambda f: not math.isclose(f(two_heads, (1.0, 0.5)), 4.0),
            "the record holds weighted terms; undo the weight of the first head",
        ),
        (
            lambda f: math.isclose(f(two_heads, (1.0, 0.5)), 6.0),
            "weights 1.0 and 0.5 are normalised to sum 1, so the first head counts 2/3: divide by that",
        ),
        (
            lambda f: math.isclose(f(weighted_twice, (2.0, 1.0)), 6.0),
            "weights 2.0 and 1.0 are the same shares as 1.0 and 0.5",
        ),
    ]
    return check_exercise(answer, tests)
