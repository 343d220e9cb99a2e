"""Checks of notebook 01's exercises. Solutions: notebooks/solutions/01.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from moe_lab.course.lessons import check_exercise

DIAGNOSES = ("random tokens", "frequencies only", "beats the tables", "another number")


def check_step_0_loss(answer: Callable | None) -> bool:
    """`answer(vocab_size, d_model, init_std)` → expected loss of an untrained model, nats per token."""
    tests = [
        (
            lambda f: math.isclose(f(4096, 192, 0.0), math.log(4096), abs_tol=1e-9),
            "with init_std 0 every logit is 0, so every token has probability 1/V: the loss is the natural log of V",
        ),
        (
            lambda f: not math.isclose(f(4096, 192, 0.1), math.log(4096), abs_tol=1e-9),
            "you give ln V whatever init_std is; logits that differ cost something on top",
        ),
        (
            lambda f: not math.isclose(f(4096, 192, 0.1) - math.log(4096), 1.92, rel_tol=1e-6),
            "you add the whole variance of the logits; half of it is the cost",
        ),
        (
            lambda f: math.isclose(f(50257, 1536, 0.02) - math.log(50257), 0.3072, rel_tol=1e-3),
            "the variance of a logit is d_model * init_std**2: a sum of d_model terms, each of variance init_std**2",
        ),
    ]
    return check_exercise(answer, tests)


def check_nats_to_match(answer: Callable | None) -> bool:
    """`answer(bits_per_byte, bytes_per_token)` → the loss of the same quality, nats per token."""
    ln2 = math.log(2)
    tests = [
        (
            lambda f: math.isclose(f(1.0, 1.0), ln2, rel_tol=1e-6),
            "at one byte a token, 1 bit per byte is one bit a token, and that is ln 2 nats",
        ),
        (
            lambda f: math.isclose(f(1.0, 3.0), 3 * ln2, rel_tol=1e-6),
            "a token of three bytes, at 1 bit per byte, costs three bits",
        ),
        (lambda f: math.isclose(f(2.0, 3.0), 6 * ln2, rel_tol=1e-6), "twice the bits are twice the nats"),
    ]
    return check_exercise(answer, tests)


def mystery_runs(floors: Mapping[str, float], step_0: float) -> dict[str, tuple[float, float]]:
    """Four made-up runs beside the floors of this corpus: letter → what was shown at step 0 and at the end."""
    return {
        "A": (step_0, floors["unigram"] + 0.02),
        "B": (step_0 * 2 / 3, floors["bigram"] * 2 / 3),  # the record's weighted term, read as if it were the loss
        "C": (step_0, floors["uniform"] + 0.001),
        "D": (step_0, floors["trigram"] - 0.3),
    }


def check_diagnosis(answer: Mapping[str, str] | None) -> bool:
    """`answer`: the letter of each run of `mystery_runs` → one of DIAGNOSES."""
    tests = [
        (
            lambda a: set(a) == set("ABCD") and set(a.values()) <= set(DIAGNOSES),
            f"name all four runs, A to D, and use these words: {', '.join(DIAGNOSES)}",
        ),
        (
            lambda a: a["C"] == "random tokens",
            "C: which loss is the best that any model can have where there is nothing to learn?",
        ),
        (lambda a: a["A"] == "frequencies only", "A: beside which table does this run end?"),
        (lambda a: a["B"] == "another number", "B: look at its start before you look at its end"),
        (lambda a: a["D"] == "beats the tables", "D: its start is right, and which tables is its end below?"),
    ]
    return check_exercise(answer, tests)
