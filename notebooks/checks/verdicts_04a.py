"""What notebook 04a's numbers make of the report's claims, one function each: an outcome and its sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from checks.ledger import mean_of
from moe_lab.failures.results import Spread


def C05(observed: float, ceiling: float, travel: float, norms_by_muon: float) -> tuple[str, str]:
    if observed > ceiling:
        return "does not hold", "the learning rates of 102 updates cannot add up to it"
    if norms_by_muon > 1.15:
        return "open", "Muon's learning rate changes how far norms get, in our runs"
    return (
        "holds only if",
        "it is read as AdamW's: at 9e-5 the learning rates bound the norms of any run, sick or healthy, and in our runs "
        "(widths 96 and 192) Muon's number does not enter",
    )


def C06(per_update: float, per_micro_batch: float, mean_lr: float) -> tuple[str, str]:
    if 3e-5 < per_update < 7e-5 and per_micro_batch < 3e-5:
        return (
            "holds only if",
            "a step is an optimizer update; in the micro-batches that the report counts it is a quarter",
        )
    return "does not hold", "neither an update nor a micro-batch moved a norm by that much"


def C07(claimed: float, by_c06: float, own_deviation_after_200: float | Spread) -> tuple[str, str]:
    if claimed < 2 * by_c06:
        return "holds", "C06's rate and this number agree"
    if mean_of(own_deviation_after_200) > 0.01:
        return (
            "does not hold",
            "by C06's own rate it takes a hundredth of that, and our failing runs (widths 96 and 192) were past 1 % within "
            "200 updates",
        )
    return "open", "C06 contradicts it, and our runs did not get that far"


def C08(
    crossings: Sequence[float],
    fall_by_125: float | Spread,
    loss_at_125: float | Spread,
    unigram: float,
    last: float | Spread,
) -> tuple[str, str]:
    """`crossings`: the updates at which the runs cross the unigram table, infinite runs left out and counted as -1."""
    crossed = [n for n in crossings if n > 0]
    if not crossed:
        return "holds", "no run came below the unigram table within 800 updates"
    if mean_of(loss_at_125) > unigram and mean_of(last) < unigram - 0.1:
        return (
            "holds only if",
            "one looks at the first updates alone: there the loss stays above the unigram table, so nothing about order is "
            "learned; at widths 96 and 192, three seeds, every run then crosses it and keeps falling: hundreds of updates, "
            "not millions. At width 1536 nobody ran it",
        )
    return "does not hold", "at widths 96 and 192 it learns about order within 125 updates"


def C11(norms_above_best: Mapping[str, float], norms_sd: Mapping[str, float]) -> tuple[str, str]:
    inside = {lr: gap for lr, gap in norms_above_best.items() if 3e-4 <= float(lr) <= 1e-3}
    best = min(norms_above_best, key=norms_above_best.get)
    if 3e-4 <= float(best) <= 1e-3:
        return "holds", "for the norms alone, at width 96 over 200 updates, three seeds"
    if min(inside.values()) < 0.05:
        return (
            "open",
            "for the norms alone the range costs a hundredth of a nat or two at width 96 over 200 updates (three seeds), which "
            "decides nothing about longer or larger runs; for embeddings and heads, to which the case gave the same number, the "
            "range is too low there",
        )
    return "does not hold", "at width 96 over 200 updates other learning rates of the norms are clearly better"


def C12(cure_falls: bool, failure_falls: bool, fallen: Mapping[str, float | Spread]) -> tuple[str, str]:
    if not cure_falls:
        return "does not hold", "in some of our runs a quarter of the first 125 updates lies above the one before"
    also = "; so it does in the failing runs, which this claim cannot tell apart" if failure_falls else ""
    return (
        "holds",
        "each quarter of the first 125 updates (500 micro-batches) lies below the one before, at widths 96 and 192 and a "
        f"warm-up of 20{also}",
    )


def C13(ceiling_after_125_updates: float, own_deviation_after_200: float | Spread) -> tuple[str, str]:
    if ceiling_after_125_updates >= 0.05:
        return "holds", "the learning rates of 125 updates allow it"
    if mean_of(own_deviation_after_200) >= 0.05:
        return (
            "holds only if",
            "steps are updates: 500 micro-batches are 125 updates, whose learning rates cannot add up to 0.05; 200 of our "
            "updates can",
        )
    return "does not hold", "the learning rates of 125 updates cannot add up to it, nor did those of 200 of ours"


def C14(expected_start: float, claimed_start: float, own_fall: Mapping[str, float | Spread]) -> tuple[str, str]:
    if expected_start > claimed_start + 1:
        return (
            "open",
            "7.0 is no start of a vocabulary of 50257, so the two numbers are not known to be next-token losses, and ours, of "
            "another vocabulary, cannot be held against them",
        )
    return "does not hold", "its start is that of its vocabulary, and our runs at its rates fall otherwise"


def C15(healthy: Sequence[float], failing: Sequence[float], claimed: Sequence[float]) -> tuple[str, str]:
    low, high = claimed
    if not low <= min(healthy) <= max(healthy) <= high:
        return "does not hold", "medians of our healthy runs do not all lie there"
    failing_too = low <= min(failing) <= max(failing) <= high
    rest = "so do those of failing ones, so the range finds nothing" if failing_too else "those of failing ones not all"
    return "holds", f"medians of our healthy runs (widths 96 and 192) lie there; {rest}"


def C17(plain: float, trainer: float) -> tuple[str, str]:
    if plain != 3e-4:
        return "does not hold", "a plain load_state_dict kept the new learning rate"
    if trainer == 3e-4:
        return "holds", "a plain load_state_dict and our trainer both bring the old learning rate back"
    return (
        "holds only if",
        "the resume is a plain load_state_dict; a trainer that lets the config win is not caught by it",
    )
