"""Rules about the loss."""

from __future__ import annotations

import math
from statistics import fmean, variance

from ..measures import trend
from .rule import Rule
from .state import PRETRAINED, State
from .tracking import HISTORY, LR_STEADY

SIGMAS = 3.0  # standard errors of a difference of losses
START_OFF = 0.2  # nats between the first loss and ln V + var/2; nats by which a loss rose
LR_ACTED = 30.0  # updates' worth of peak LR before the loss must have fallen
LR_LATE = 0.2  # share of the peak LR below which the loss need not fall
MOST_ACCUMULATED = 64  # the largest factor that a first loss is tried with


def initial_loss(state: State) -> dict[str, dict]:
    """The first loss, and by which factor it is off, in words."""
    expected = state.expected_start
    if expected is None or not state.losses or not state.is_fresh or not math.isfinite(state.losses[0]):
        return {}
    first = state.losses[0]
    if abs(first - expected) <= START_OFF:
        return {}
    factors = range(2, MOST_ACCUMULATED + 1)
    small = next((a for a in factors if abs(first * a - expected) < START_OFF * a**0.5), None)
    large = next((a for a in factors if abs(first / a - expected) < START_OFF), None)
    if small or large:
        factor = f": it is {small or large} times too {'small' if small else 'large'}"
    elif first < expected - PRETRAINED:
        return {}  # trained before, or another loss altogether
    else:
        factor = ""
    return {"loss": {"value": first, "limit": expected, "factor": factor}}


def nonfinite_loss(state: State) -> dict[str, dict]:
    return {} if all(map(math.isfinite, state.losses)) else {"loss": {}}


def change(state: State) -> tuple[float, float, float] | None:
    """Mean of the first and the last LR_STEADY losses of a fresh model with enough of them, all finite, and the standard error
    of their difference."""
    losses = state.losses
    if len(losses) < 2 * LR_STEADY or not state.is_fresh or nonfinite_loss(state):
        return None
    first, last = losses[:LR_STEADY], losses[-LR_STEADY:]
    return fmean(first), fmean(last), math.sqrt(variance(first) / len(first) + variance(last) / len(last))


def loss_rose(state: State) -> dict[str, dict]:
    first, last, noise = change(state) or (0.0, 0.0, 0.0)
    if last - first <= SIGMAS * noise + START_OFF or state.losses[0] <= 0:
        return {}
    return {"loss": {"value": last - first, "limit": START_OFF, "first": first, "last": last}}


def loss_not_falling(state: State) -> dict[str, dict]:
    """The loss of a fresh model must fall once the LR has acted."""
    seen = change(state)
    if seen is None or loss_rose(state):
        return {}
    first, last, noise = seen
    groups = [group for group in state.groups if group.peak]
    acted = max((group.total / group.peak for group in groups), default=0.0)
    late = all(group.last < LR_LATE * group.peak for group in groups)
    if acted < LR_ACTED or late or last - first <= -SIGMAS * noise:
        return {}
    slope, error = trend(state.losses[-HISTORY:])
    return {"loss": {"value": slope, "limit": 0.0, "error": error, "acted": acted}}


RULES = (
    Rule(
        "nonfinite_loss",
        "error",
        nonfinite_loss,
        "the loss is not finite",
        "go back to a sound checkpoint with a lower LR",
    ),
    Rule(
        "lr_too_high",
        "error",
        loss_rose,
        "the loss rose from {first:.2f} to {last:.2f}",
        "lower the learning rate, or lengthen the warm-up",
    ),
    Rule(
        "loss_not_falling",
        "warning",
        loss_not_falling,
        "after {acted:.0f} updates' worth of the peak LR the loss has not fallen: {value:.1e} ± {error:.0e} an update",
        "check the data first (random tokens? shuffled labels?), then the learning rate by a branch probe",
    ),
    Rule(
        "initial_loss",
        "warning",
        initial_loss,
        "the first loss is {value:.3f}; an untrained model of this vocabulary shows {limit:.3f}{factor}",
        "look for a division by the accumulation that is done twice or not at all, padding in the loss, or a wrong init",
    ),
)
