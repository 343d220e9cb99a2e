"""Rules about the loss, and about weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..findings import Finding
from ..measures import trend
from .state import HISTORY, LR_STEADY, PRETRAINED, State, several, static

SIGMAS = 3.0  # standard errors of a difference of losses
START_OFF = 0.2  # nats between the first loss and ln V + var/2
LR_ACTED = 30.0  # updates' worth of peak LR before the loss must have fallen
LR_LATE = 0.2  # share of the peak LR below which the loss need not fall


@static
def weight_decay_on_norms(state: State) -> Iterator[Finding]:
    names = [t.name for t in state.tracked if t.group.get("weight_decay") and t.param.ndim <= 1]
    if names:
        yield state.finding(
            "weight_decay_on_norms",
            "info",
            several(names),
            f"vectors (norm weights, biases) decay towards 0: {several(names)}",
            "give them a group with weight_decay=0",
            value=len(names),
        )


def initial_loss(state: State) -> Iterator[Finding]:
    expected = state.expected_start
    if expected is None or not state.losses or not state.is_fresh or not math.isfinite(state.losses[0]):
        return
    first = state.losses[0]
    if abs(first - expected) <= START_OFF:
        return
    factor = next((a for a in range(2, 65) if abs(first * a - expected) < START_OFF * a**0.5), None)
    factor_up = next((a for a in range(2, 65) if abs(first / a - expected) < START_OFF), None)
    if factor is None and factor_up is None and first < expected - PRETRAINED:
        return  # trained before, or another loss altogether
    told = f"the first loss is {first:.3f}; an untrained model of this vocabulary shows {expected:.3f}"
    if factor or factor_up:
        told += f": it is {factor or factor_up} times too {'small' if factor else 'large'}"
    yield state.finding(
        "initial_loss",
        "warning",
        "loss",
        told,
        "look for a division by the accumulation that is done twice or not at all, padding in the loss, or a wrong init",
        value=first,
        limit=expected,
    )


def loss_trend(state: State) -> Iterator[Finding]:
    """The loss of a fresh model must fall once the LR has acted, and must not rise."""
    losses = list(state.losses)
    if any(not math.isfinite(loss) for loss in losses):
        yield state.finding(
            "lr_too_high", "error", "loss", "the loss is not finite", "go back to a sound checkpoint with a lower LR"
        )
        return
    if len(losses) < 2 * LR_STEADY or not state.is_fresh:
        return
    first, last = losses[:LR_STEADY], losses[-LR_STEADY:]
    noise = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
    change = sum(last) / len(last) - sum(first) / len(first)
    if change > SIGMAS * noise + START_OFF and losses[0] > 0:
        yield state.finding(
            "lr_too_high",
            "error",
            "loss",
            f"the loss rose from {sum(first) / len(first):.2f} to {sum(last) / len(last):.2f}",
            "lower the learning rate, or lengthen the warm-up",
            value=change,
            limit=START_OFF,
        )
        return
    acted = max((g.total / g.peak for g in state.groups if g.peak), default=0.0)
    late = all(g.last < LR_LATE * g.peak for g in state.groups if g.peak)
    if acted >= LR_ACTED and not late and change > -SIGMAS * noise:
        slope = trend(losses[-HISTORY:])
        yield state.finding(
            "loss_not_falling",
            "warning",
            "loss",
            f"after {acted:.0f} updates' worth of the peak LR the loss has not fallen: {slope.slope:.1e} ± {slope.error:.0e} an update",
            "check the data first (random tokens? shuffled labels?), then the learning rate by a branch probe",
            value=slope.slope,
            limit=0.0,
        )


def variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
