"""Checks of notebook 03's exercises. Solutions: notebooks/solutions/03.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isclose

from moe_lab.course.lessons import exercise

CAUSES = ("healthy", "no gradient", "not in the optimizer", "rounded away")


@exercise
def check_gap(gap: Callable) -> None:
    """`gap(weight)`: distance from a positive number to the next larger one of bf16, at normal numbers."""
    assert not isclose(gap(1.0), 2**-8), (
        "2^-8 is the distance from 1 to the next *smaller* number; upwards the numbers lie twice as far apart"
    )
    assert isclose(gap(1.0), 2**-7), "between 1 and 2, 7 stored bits make 128 steps of one size: 2^-7"
    assert isclose(gap(1.5), 2**-7), (
        "between two powers of two the distance does not grow with the weight: at 1.5 it is what it is at 1"
    )
    assert all(isclose(gap(w), g) for w, g in ((0.02, 2**-13), (0.5, 2**-8), (0.1, 2**-11))), (
        "below 1 the exponent is negative: take the power of two at or below the weight, by floor and not by rounding"
    )
    assert isclose(gap(6.0), 2**-5), "from 4 to 8 the power of two is 4"


@exercise
def check_lr_to_move(limit: Callable) -> None:
    """`limit(weight)`: the size that an update must exceed to move a bf16 weight *down*."""
    whole = isclose(limit(1.5), 2**-7)
    assert not whole, "an update needs no whole gap: past the middle it rounds to the neighbour"
    assert isclose(limit(1.5), 2**-8), "at 1.5 the gap is 2^-7 on both sides, and half of it is lost"
    assert isclose(limit(1.0), 2**-9), (
        "at a power of two the gap downwards is half of the gap upwards: look at the number line at 1"
    )
    elsewhere = ((0.1, 2**-12), (3.0, 2**-7), (4.0, 2**-7), (0.25, 2**-11))
    assert all(isclose(limit(w), half) for w, half in elsewhere), (
        "right near 1, wrong elsewhere: the gap halves at every power of two"
    )


def mystery_tensors() -> dict[str, dict[str, float | None]]:
    """Four made-up tensors after 25 updates: norm of the gradient, and root mean square of intended and real movement.

    None: there is none.
    """
    return {
        "A": {"gradient": 0.31, "intended": 0.0051, "moved": 0.0},
        "B": {"gradient": None, "intended": 0.0, "moved": 0.0},
        "C": {"gradient": 0.28, "intended": None, "moved": 0.0},
        "D": {"gradient": 0.0004, "intended": 0.0048, "moved": 0.0047},
    }


@exercise
def check_causes(named: Mapping[str, str]) -> None:
    """`named`: the letter of each of `mystery_tensors` → one of CAUSES."""
    assert set(named) == set("ABCD") and set(named.values()) <= set(CAUSES), (
        f"name all four tensors, A to D, and use these words: {', '.join(CAUSES)}"
    )
    assert named["B"] == "no gradient", "B: an optimizer can only move what has a gradient"
    assert named["C"] == "not in the optimizer", "C: it has a gradient, and nobody intends anything with it"
    assert named["A"] == "rounded away", "A: somebody intended a displacement, and none arrived"
    assert named["D"] == "healthy", (
        "D: compare intended with real movement; AdamW's step does not depend on the gradient's size"
    )
