"""Rules about units and their weights: alike, dead, shrunk; and what a first layer is given."""

import math
from itertools import pairwise

from torch import nn

from .bank import DARK_IN
from .rule import Ill, by_kind, rule
from .state import State
from .steps import divides_decay
from .tracking import Tracked

MOST_DARK, FEWEST = 0.75, 16  # share of a layer's units, and how many it has
HALF, LEAST_LEFT = 0.5, 0.01  # of a matrix's size; of a momentum, which multiplies a decay by a hundred at most
SETTLED, LATEST, SAME_ANSWER = 40, 3, 1e-3  # updates; looks; deviation between answers, over that at the first look
LARGE = 32.0  # root mean square of a feature, where weights are drawn for 1: a thousand times the variance
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@rule(
    "{n} matrices have units that hold the same numbers and get the same gradients, so that they stay one: {names}",
    "draw the weights at random: a constant, or zeros in two layers that follow each other, leaves one unit of each",
)
def alike_units(state: State) -> Ill:
    return by_kind(t for t in state.tracked if t.alike and t.owner)


@rule(
    "{value:.0%} of the units of {names} had no gradient whenever it was looked at in {limit} updates: they are off, and may never come back",
    "lower the learning rate, or warm it up, before it throws ReLUs below zero; look at their biases' start; try a leaky one",
)
def dead_units(state: State) -> Ill:
    """By biases: a unit's weights have no gradient, either, where its inputs are 0. A layer without any is another rule's; of the last
    ones a batch may ask for few answers."""
    owners = {id(m.bias): m for m in state.modules.values() if isinstance(m, LAYERS) and m.bias is not None}
    owners = {key: m for key, m in owners.items() if key not in state.forward.last}
    dark = [t for t in state.tracked if id(t.param) in owners and t.n_elements >= FEWEST and t.dark > MOST_DARK]
    return {t.name: {"value": t.dark, "limit": DARK_IN} for t in sorted(dark, key=lambda t: -t.dark)}


def decayed_away(t: Tracked) -> bool:
    """Whether a matrix has lost half of its size, and its decay alone would have taken as much, or is divided and outweighs the largest
    gradient."""
    left = t.touched_square + 2 * t.along + t.moved_square
    decay, momentum = t.group.get("weight_decay") or 0.0, t.group.get("momentum") or 0.0
    if not decay or not t.touched_square or left > HALF**2 * t.touched_square:
        return False
    if t.owner.total * decay / max(1 - momentum, LEAST_LEFT) > -math.log(HALF) / 2:  # as a logarithm
        return True
    if t.owner.divides == "untried":
        t.owner.divides = divides_decay(t.optimizer, t.group)
    return t.owner.divides and decay * math.sqrt(t.weight_square / t.n_elements * t.param.numel()) > t.grad_norm


@rule(
    "weight decay has taken more than half of {n} matrices' size in {updates} updates: {names}",
    "AdamW takes 0.01 to 0.1, times its rate, SGD 1e-4 to 5e-4; Adam's own is divided by its gradients' size, and far stronger",
)
def heavy_decay(state: State) -> Ill:
    return by_kind(t for t in state.readings if t.param.ndim > 1 and t.owner and decayed_away(t))


@rule(
    "{names}: what comes in with the batch has a root mean square of {value:.3g} in its largest feature, and goes into a product as it is",
    "divide pictures by 255, standardise columns by the training set's mean and deviation, count times from a near start",
)
def input_scale(state: State) -> Ill:
    ordered, sizes = list(state.modules.items()), state.forward.sizes()
    found = {}
    for (name, module), (_, after) in pairwise([*ordered, ("", None)]):
        size = sizes.get(module, 0.0)
        if size > LARGE and not isinstance(after, LAYERS[2:]):  # a norm right behind it makes it small again
            found[name or "the model"] = {"value": size, "limit": LARGE}
    return found


@rule(
    "answers to different examples, or places, differ by {value:.1g} of what they differed by at first",
    "the way from the input is dead: units below zero, saturated ones, features that have collapsed into one, a decay that has taken all",
)
def constant_output(state: State) -> Ill:
    """Of the first wide tensor that the model returns, at the last three looks; what is wrong came before it."""
    spreads = state.outside.reached.spreads
    if state.n_seen < SETTLED or len(spreads) <= LATEST or not spreads[0]:
        return {}
    share = max(spreads[-LATEST:]) / spreads[0]
    return {"answers": {"value": share, "limit": SAME_ANSWER}} if share < SAME_ANSWER else {}


RULES = (alike_units, input_scale, dead_units, heavy_decay, constant_output)
