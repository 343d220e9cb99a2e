"""Checks of notebook 01's exercises. Solutions: notebooks/solutions/01.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from math import isclose

from moe_lab.course.lessons import exercise

DIAGNOSES = ("random tokens", "frequencies only", "beats the tables", "another number")


@exercise
def check_step_0_loss(loss: Callable) -> None:
    """`loss(vocab_size, d_model, init_std)` that is expected of an untrained model, nats per token."""
    uniform = math.log(4096)
    assert isclose(loss(4096, 192, 0.0), uniform, abs_tol=1e-9), (
        "with init_std 0 every logit is 0, so every token has probability 1/V: the loss is the natural log of V"
    )
    added = loss(4096, 192, 0.1) - uniform
    assert abs(added) > 1e-8, "you give ln V whatever init_std is; logits that differ cost something on top"
    assert not isclose(added, 1.92, rel_tol=1e-6), "you add the whole variance of the logits; half of it is the cost"
    assert isclose(loss(50257, 1536, 0.02) - math.log(50257), 0.3072, rel_tol=1e-3), (
        "the variance of a logit is d_model * init_std**2: a sum of d_model terms, each of variance init_std**2"
    )


@exercise
def check_nats_to_match(nats: Callable) -> None:
    """`nats(bits_per_byte, bytes_per_token)`: the loss of the same quality, nats per token."""
    bits = math.log(2)
    assert isclose(nats(1.0, 1.0), bits, rel_tol=1e-6), (
        "at one byte a token, 1 bit per byte is one bit a token, and that is ln 2 nats"
    )
    assert isclose(nats(1.0, 3.0), 3 * bits, rel_tol=1e-6), (
        "a token of three bytes, at 1 bit per byte, costs three bits"
    )
    assert isclose(nats(2.0, 3.0), 6 * bits, rel_tol=1e-6), "twice the bits are twice the nats"


def mystery_runs(floors: Mapping[str, float], step_0: float) -> dict[str, tuple[float, float]]:
    """Four made-up runs beside the floors of this corpus: letter → what was shown at step 0 and at the end."""
    return {
        "A": (step_0, floors["unigram"] + 0.02),
        "B": (step_0 * 2 / 3, floors["bigram"] * 2 / 3),  # the record's weighted term, read as if it were the loss
        "C": (step_0, floors["uniform"] + 0.001),
        "D": (step_0, floors["trigram"] - 0.3),
    }


@exercise
def check_diagnosis(named: Mapping[str, str]) -> None:
    """`named`: the letter of each run of `mystery_runs` → one of DIAGNOSES."""
    assert set(named) == set("ABCD") and set(named.values()) <= set(DIAGNOSES), (
        f"name all four runs, A to D, and use these words: {', '.join(DIAGNOSES)}"
    )
    assert named["C"] == "random tokens", (
        "C: which loss is the best that any model can have where there is nothing to learn?"
    )
    assert named["A"] == "frequencies only", "A: beside which table does this run end?"
    assert named["B"] == "another number", "B: look at its start before you look at its end"
    assert named["D"] == "beats the tables", "D: its start is right, and which tables is its end below?"
