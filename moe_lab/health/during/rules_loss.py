"""Rules about the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, variance
from typing import NamedTuple

from ..measures import trend
from .state import HISTORY, LR_STEADY, PRETRAINED, Rule, State

SIGMAS = 3.0  # standard errors of a difference of losses
START_OFF = 0.2  # nats between the first loss and ln V + var/2; nats by which a loss rose
LR_ACTED = 30.0  # updates' worth of peak LR before the loss must have fallen
LR_LATE = 0.2  # share of the peak LR below which the loss need not fall
MOST_ACCUMULATED = 64  # the largest factor that a first loss is tried with


def initial_loss(state: State) -> dict[str, str]:
    """By which factor the first loss is off, in words."""
    expected = state.expected_start
    if expected is None or not state.losses or not state.is_fresh or not math.isfinite(state.losses[0]):
        return {}
    first = state.losses[0]
    if abs(first - expected) <= START_OFF:
        return {}
    factors = range(2, MOST_ACCUMULATED + 1)
    small = next((a for a in factors if abs(first * a - expected) < START_OFF * a**0.5), None)
    large = next((a for a in factors if abs(first / a - expected) < START_OFF), None)
    if small is None and large is None:
        # trained before, or another loss altogether
        return {} if first < expected - PRETRAINED else {"loss": ""}
    return {"loss": f": it is {small or large} times too {'small' if small else 'large'}"}


def tell_initial_loss(state: State, ill: Mapping[str, str]) -> tuple:
    first, expected = state.losses[0], state.expected_start
    message = f"the first loss is {first:.3f}; an untrained model of this vocabulary shows {expected:.3f}{ill['loss']}"
    advice = (
        "look for a division by the accumulation that is done twice or not at all, padding in the loss, or a wrong init"
    )
    return "loss", message, advice, first, expected


def nonfinite_loss(state: State) -> dict[str, bool]:
    return {} if all(map(math.isfinite, state.losses)) else {"loss": True}


def tell_nonfinite_loss(state: State, ill: Mapping) -> tuple:
    return "loss", "the loss is not finite", "go back to a sound checkpoint with a lower LR"


class Change(NamedTuple):
    first: float  # mean of the first LR_STEADY losses
    last: float  # … of the last
    noise: float  # standard error of their difference


def change(state: State) -> Change | None:
    """From the first losses to the last, of a fresh model with enough of them, all finite."""
    losses = list(state.losses)
    if len(losses) < 2 * LR_STEADY or not state.is_fresh or nonfinite_loss(state):
        return None
    first, last = losses[:LR_STEADY], losses[-LR_STEADY:]
    noise = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
    return Change(fmean(first), fmean(last), noise)


def loss_rose(state: State) -> dict[str, Change]:
    seen = change(state)
    rose = seen and seen.last - seen.first > SIGMAS * seen.noise + START_OFF and state.losses[0] > 0
    return {"loss": seen} if rose else {}


def tell_rise(state: State, ill: Mapping[str, Change]) -> tuple:
    seen = ill["loss"]
    message = f"the loss rose from {seen.first:.2f} to {seen.last:.2f}"
    return "loss", message, "lower the learning rate, or lengthen the warm-up", seen.last - seen.first, START_OFF


def updates_worth(state: State) -> float:
    """Updates' worth of the peak LR that a group has had, of the group that had most."""
    return max((g.total / g.peak for g in state.groups if g.peak), default=0.0)


def loss_not_falling(state: State) -> dict[str, Change]:
    """The loss of a fresh model must fall once the LR has acted."""
    seen = None if loss_rose(state) else change(state)
    late = all(g.last < LR_LATE * g.peak for g in state.groups if g.peak)
    flat = seen and updates_worth(state) >= LR_ACTED and not late and seen.last - seen.first > -SIGMAS * seen.noise
    return {"loss": seen} if flat else {}


def tell_not_falling(state: State, ill: Mapping[str, Change]) -> tuple:
    line = trend(list(state.losses)[-HISTORY:])
    message = f"after {updates_worth(state):.0f} updates' worth of the peak LR the loss has not fallen: "
    message += f"{line.slope:.1e} ± {line.error:.0e} an update"
    advice = "check the data first (random tokens? shuffled labels?), then the learning rate by a branch probe"
    return "loss", message, advice, line.slope, 0.0


RULES = (
    Rule("nonfinite_loss", "error", nonfinite_loss, tell_nonfinite_loss),
    Rule("lr_too_high", "error", loss_rose, tell_rise),
    Rule("loss_not_falling", "warning", loss_not_falling, tell_not_falling),
    Rule("initial_loss", "warning", initial_loss, tell_initial_loss),
)
