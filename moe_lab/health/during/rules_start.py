"""Rules about what a model begins with: what an init over all tensors overwrote, units that are alike, dropout that leaves nothing."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..measures import is_decay_rates
from ..sampling import plain
from .rule import Ill, Rule, rule
from .state import State

KEPT_SHARE = 0.85  # a dropout from it on: wide nets drop up to 0.8; shares to keep are 0.9 and 0.95
DELTAS = 1e-4, 0.2  # a fresh median; Mamba draws 0.001 to 0.1 (Gu & Dao 2023, sec. 3.6)
GAINS, GAINS_OFF = 16, 4.0  # of a norm, at least; standard errors of their mean that are chance
LARGE, SHIFTED = 3.0, 0.5  # a fresh norm's gain and bias, where 1 and 0 are meant
EPSILON = 0.03  # of norms; the largest that is published is Keras' 1e-3
ALIKE, FEW = 0.25, 4  # share of a matrix's units that are copies of others, and units or elements of each, at least
SOME = 8  # elements of each unit that are compared first


@rule(
    "{names} drops {value:.0%} of what it is given",
    "torch's dropout takes the share to drop, others the share to keep: 0.1 keeps nine of ten",
)
def heavy_dropout(state: State) -> Ill:
    drops = {name: m.p for name, m in state.modules.items() if isinstance(m, nn.modules.dropout._DropoutNd)}
    return {name: {"value": p, "limit": KEPT_SHARE} for name, p in drops.items() if p >= KEPT_SHARE}


@rule(
    "{names}: the time step of a fresh state space is {value:.2g} in the median, where 0.001 to 0.1 is meant",
    "an init over all linear layers overwrote its bias: set that last, to the inverse softplus of steps drawn from there",
)
def delta_start(state: State) -> Ill:
    """Of modules whose own matrix is log 1, log 2, …, log N in each row: decay rates that no update has touched. Of several biases
    of their length one may be the output's: then any that is as it should be is enough."""
    found = {}
    for name, module in state.modules.items() if not state.n_seen else ():
        rates = [p for p in module.parameters(recurse=False) if p.ndim == 2 and is_decay_rates(p)]
        layers = {key: m for key, m in module.named_children() if rates and isinstance(m, nn.Linear)}
        biases = {key: m.bias for key, m in layers.items() if m.bias is not None and len(m.bias) == len(rates[0])}
        steps = {key: float(nn.functional.softplus(plain(b).float()).median()) for key, b in biases.items()}
        if not any(DELTAS[0] <= step <= DELTAS[1] for step in steps.values()):
            found |= {f"{name}.{key}": {"value": s, "limit": DELTAS[s > DELTAS[1]]} for key, s in steps.items()}
    return found


def norms_of(state: State) -> dict[str, nn.Module]:
    """Those that have gains, before the first update."""
    norms = {} if state.n_seen else {n: m for n, m in state.modules.items() if "norm" in type(m).__name__.lower()}
    return {name: m for name, m in norms.items() if vector(m, "weight") is not None}


def norms_with(number: Callable[[nn.Module], float | None], at_least: int, state: State) -> Ill:
    """All norms, if `number` is told of each: what an init over all tensors reached. One by itself may be meant so."""
    norms = norms_of(state)
    found = {name: {"value": value} for name, m in norms.items() if (value := number(m)) is not None}
    return found if len(found) == len(norms) >= at_least else {}


def vector(norm: nn.Module, name: str) -> Tensor | None:
    values = getattr(norm, name, None)
    long = isinstance(values, Tensor) and values.ndim == 1 and len(values) >= GAINS
    return plain(values).float() if long else None


def drawn(norm: nn.Module) -> float | None:
    """The deviation of gains whose mean is nothing but their spread's chance: exact zeros or ones are chosen, and trained ones lie
    elsewhere."""
    gains = vector(norm, "weight")
    mean, std = float(gains.mean()), float(gains.std())
    return std if std < 0.5 and abs(mean) < GAINS_OFF * std / len(gains) ** 0.5 else None


def constant(name: str, limit: float, norm: nn.Module) -> float | None:
    """The one number that all of them are, beyond the limit: trained ones differ."""
    values = vector(norm, name)
    value = None if values is None or (values != values[0]).any() else float(values[0])
    return value if value is not None and abs(value) > limit else None


def epsilon(norm: nn.Module) -> float | None:
    value = next((v for key in ("eps", "variance_epsilon", "epsilon") if (v := getattr(norm, key, None))), 0.0)
    return float(value) if value > EPSILON else None


@rule(
    "{names}: {value:.0%} of the units begin as copies of others{zeros}",
    "draw each unit by itself: look for an init by a constant, for heads that were repeated, for rows that were zeroed",
)
def alike_units(state: State) -> Ill:
    """Rows or columns of fresh matrices; an info of zeros, as a fused projection's queries. All zeros are chosen, as at a branch's end,
    and convolutions by group see a channel each. Whether gradients tell them apart is another rule's."""
    found: dict[str, dict] = {}
    norms = norms_of(state).values()
    is_trained = state.start_step or (norms and all(constant("weight", -1.0, norm) is None for norm in norms))
    for name, module in () if state.n_seen or is_trained else state.modules.items():
        weight = getattr(module, "weight", None)
        kinds = nn.Linear, nn.Embedding, _ConvNd
        is_matrix = isinstance(module, kinds) or type(module).__name__ == "Conv1D"  # transformers' layer, turned round
        if is_matrix and weight.requires_grad and getattr(module, "groups", 1) == 1:
            values = plain(weight).flatten(1) if weight.is_floating_point() else weight.new_zeros(0, 0)
            ways = [values] if isinstance(module, nn.Embedding) or weight.ndim > 2 else [values, values.T]
            share, zeros = max(map(copies, ways))
            if share >= ALIKE:
                facts = {"zeros": f" ({zeros:.0%} are zeros)", "severity": "info"} if zeros else {"zeros": ""}
                found[name] = {"value": share, "limit": ALIKE} | facts
    return found


def copies(units: Tensor) -> tuple[float, float]:
    """Of units (U, N): the share that are equal to another one, and the share of zeros; none where all are zeros."""
    if min(units.shape) < FEW or not units.any():
        return 0.0, 0.0
    for some in (units[:, :: max(1, units.shape[1] // SOME)], units):  # a diagonal's few may all be zeros
        kinds, n = torch.unique(some.float().cpu(), dim=0, return_counts=True)
        share = float(n[n > 1].sum()) / len(units)
        if share < ALIKE:
            return 0.0, 0.0
    return share, float(n[(kinds == 0).all(1)].sum()) / len(units)


OVERWROTE = "an init over all tensors overwrote what norms begin with, gains of 1 and biases of 0: set them after it"
DRAWN = "{names}: gains of {n} fresh norms are drawn around 0, with a deviation of {value:.2g}: they turn round half of what passes"
SIZED = "{names}: gains of {n} fresh norms are {value:.3g}, where 1 is meant"
MOVED = "{names}: biases of {n} fresh norms are {value:.3g}, where 0 is meant"
DAMPED = "{names}: {value:.3g} is added to variances under the root, where norms have 1e-5: what is smaller is not brought to one size"
RULES = (
    delta_start,
    Rule("norm_start", "warning", partial(norms_with, drawn, 1), DRAWN, OVERWROTE),
    Rule("norm_start", "warning", partial(norms_with, partial(constant, "weight", LARGE), 2), SIZED, OVERWROTE),
    Rule("norm_start", "warning", partial(norms_with, partial(constant, "bias", SHIFTED), 2), MOVED, OVERWROTE),
    Rule("norm_start", "warning", partial(norms_with, epsilon, 2), DAMPED, "give norms an epsilon of 1e-5 or 1e-6"),
    heavy_dropout,
    alike_units,
)
