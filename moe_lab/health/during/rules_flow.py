"""Rules about what flows through a model: targets and data, looks into the future, modes."""

from functools import partial
from statistics import median

from torch import nn

from ..findings import RULES as SAID
from ..findings import grouped
from ..tokens import REPEATED
from .causal import future_leak
from .rule import Ill, Rule, found_in, rule
from .state import MODES, State

OFF, SETTLED, LATEST = 1.0, 50, 3  # deviations or doublings; updates before they are judged; looks, 5 updates apart
START_LEFT = 0.1  # share of the first statistics that the budget leaves
UNEVEN = 2.0  # a token's weight over that of another in the same update
SAME_MEANS = 1.05  # … while the micro-batches' own weights are this much the same


def leaks(state: State) -> Ill:
    """Whether the model sees what it is to foretell; tried once, at the first check that knows the targets."""
    heard = state.forward.heard
    if heard.is_next_token and not heard.was_tried:
        heard.was_tried = True
        heard.leak = state.forward.tried("whether the model sees the future", future_leak, state.forward)
    return {heard.leak.where: heard.leak.to_dict()} if heard.leak else {}


@rule(
    "tokens of one update weigh up to {value:.1f} times as much as others: each micro-batch's mean counts alike, whatever its targets",
    "divide the summed loss of all micro-batches by the number of all their targets",
)
def token_weights(state: State) -> Ill:
    """The largest over the smallest weight among the micro-batches of an update, the median over updates."""
    ratios = []
    for passes in grouped(state.forward.heard.likelihoods, lambda p: p.update).values():
        weights = [p.weight for p in passes]
        means = [p.weight * p.n_targets for p in passes]
        if len(passes) > 1 and max(means) < SAME_MEANS * min(means):
            ratios.append(max(weights) / min(weights))
    value = median(ratios) if ratios else 0.0
    return {"loss": {"value": value, "limit": UNEVEN}} if value > UNEVEN else {}


def evaluating(state: State, has_trained: bool) -> Ill:
    """Updates while no module at all is in training mode, and some compute otherwise there. A frozen backbone in evaluation mode
    has a head, or a root, in training mode; frozen batch norms are meant to keep their statistics."""
    if len(state.modes) < MODES or any(state.modes) or state.has_trained != has_trained:
        return {}
    return {name: {} for name, module in state.modules.items() if differs_by_mode(module)}


def differs_by_mode(module: nn.Module) -> bool:
    """A dropout that drops, by class or by an attribute of that name, or a batch norm that is trained."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.track_running_stats and all(p.requires_grad for p in module.parameters())
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(isinstance(v, float) and 0 < v < 1 and "drop" in name for name, v in vars(module).items())


@rule(
    "{value:.0%} of the last batches had come a short while before, though none did at first",
    "look for a worker or shard that has come to its end and starts over, a buffer that is not filled again, or a sampler made anew",
)
def repeated_data(state: State) -> Ill:
    share = state.outside.repeats.share
    return {"batches": {"value": share, "limit": REPEATED, "where": "data"}} if share > REPEATED else {}


@rule(
    "{names}: after {updates} updates the statistics that evaluation uses are {value:.2g} deviations, or doublings of the variance, "
    "off the batches': a momentum of {momentum:g} keeps those of a fresh model",
    "torch's momentum is the share of the new batch: 0.1 where others say 0.9; or evaluate after many more updates",
)
def mode_mismatch(state: State) -> Ill:
    """Batch norms, where the budget does not do away with what they began with."""
    averages, found = state.outside.averages, {}
    for name, looks in averages.off.items() if state.n_seen >= SETTLED else ():
        momentum, off = averages.slow[name].momentum, median(looks[-LATEST:])
        if off > OFF and (state.budget is None or (1 - momentum) ** state.budget > START_LEFT):
            found[name] = {"value": off, "limit": OFF, "momentum": momentum}
    return found


EVALUATING = "{n} modules would compute otherwise in training, and updates are made in evaluation mode: {names}"
TRAIN = "call model.train() after each evaluation, and before the first update"

GRAPHS = "shared_target", "squashed_twice"
TEXTS = "constant_tokens", "random_tokens", "repeated_data", "one_text"
LABELS = "label_shift", "never_a_target", "padding_in_loss"

RULES = (
    Rule("future_leak", "error", leaks),
    Rule("evaluation_mode", "error", partial(evaluating, has_trained=True), EVALUATING, TRAIN),
    Rule("evaluation_mode", "warning", partial(evaluating, has_trained=False), EVALUATING, TRAIN),
    repeated_data,
    mode_mismatch,
    *(Rule(name, SAID[name][0], partial(found_in, name=name)) for name in GRAPHS + TEXTS + LABELS),
)
