"""Checks of notebook 04's exercises. Solutions: notebooks/solutions/04.md."""

from __future__ import annotations

import math
from collections.abc import Callable

from moe_lab.course.lessons import exercise


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


@exercise
def check_to_original(to_original: Callable) -> None:
    """`to_original(lr, rows, columns)`: the number in `original` of the step that `lr` names in `match_rms_adamw`."""
    square, factor = to_original(1e-3, 1536, 1536), 0.2 * math.sqrt(1536)
    assert not close(square, 1e-3), "the same number names two different steps, unless the matrix has a fan-in of 25"
    assert not close(square, 1e-3 / factor), (
        "you convert the other way round: in a wide matrix the number in `original` is the larger one"
    )
    assert close(square, 1e-3 * factor), "for 1536 × 1536 the factor is 0.2 · sqrt(1536), about 7.8"
    assert close(to_original(1e-3, 4096, 1536), 1e-3 * factor), (
        "a tall matrix (4096 rows, 1536 columns) has the factor of its columns, the fan-in: `original` has sqrt(rows / "
        "columns) in it already"
    )
    wide = to_original(1e-3, 1536, 4096)
    assert close(wide, 1e-3 * 0.2 * math.sqrt(4096)), "a wide matrix (1536 rows, 4096 columns) has a fan-in of 4096"
    assert close(to_original(2e-3, 100, 100), 4e-3), "it is proportional to lr"


@exercise
def check_updates_until(n_updates: Callable) -> None:
    """`n_updates(deviation, peak, warmup)`: the fewest of the case's schedule whose LRs sum to at least `deviation`."""
    assert n_updates(0.00008, 9e-5, 100) == 1, (
        "the case's first update runs at the full learning rate (B18): one update at 9e-5 is enough for 0.00008"
    )
    by_peaks = n_updates(0.0046, 9e-5, 100) == 52
    assert not by_peaks, "you divide by the peak; during the warm-up updates are smaller"
    found = n_updates(0.004, 9e-5, 100)
    assert found not in (376, 377), "count updates, not micro-batches"
    assert found == 94, (
        "0.004 is 44.4 peaks of 9e-5: 1 for the first update, then 0.01 + 0.02 + …; the 94th update passes it"
    )
    assert n_updates(0.05, 3e-4, 100) == 217, "after the warm-up every update adds one peak"


@exercise
def check_shares(shares_of_two: Callable) -> None:
    """`shares_of_two(none, muon, adamw, both)`, losses with no fix, with one, with both: Muon's share and AdamW's, in nats."""
    shares = tuple(round(share, 9) for share in shares_of_two(6.8, 6.7, 6.2, 6.0))
    assert sum(shares) > 0, "a fix that lowers the loss earned something: its share is positive"
    assert shares != (0.1, 0.6), (
        "each fix alone gives 0.1 and 0.6, together they gave 0.8: your shares leave 0.1 to nobody"
    )
    one_order = shares in ((0.1, 0.7), (0.2, 0.6))
    assert not one_order, "this is one order of fixing; take the mean over both orders"
    assert math.isclose(sum(shares), 0.8), "the shares must sum to what both together gave, 0.8"
    assert shares == (0.15, 0.65), "Muon's fix is worth 0.1 if it comes first and 0.2 if it comes last"
