"""Rules about ranks that train together: copies that went apart, one batch for all, NaN on one of them."""

import math

from torch import Tensor

from ..findings import several
from .ranks import digest
from .rule import Ill, rule
from .state import State

TENSORS = 64  # whose samples are told
APART = 1e-4  # of the weights' size: averaged gradients leave copies equal to the bit, or nearly so


def seen_here(state: State) -> dict:
    """Numbers of this rank: of whole tensors' samples, of the last batch's tokens, and which loss was the first that is not finite."""
    whole = [t for t in state.tracked if not hasattr(t.param, "to_local") and not t.is_master]
    samples = [t.sample(t.param).float() for t in whole[:: -(-len(whole) // TENSORS) or 1]]
    args, kwargs = (state.forward.in_training and state.forward.inputs) or ((), {})  # evaluations may well be shared
    ids = [t.float() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    bad = [i for i, loss in enumerate(state.losses) if not math.isfinite(loss)]
    before = state.events.n_observed - len(state.losses)  # losses that are not kept
    return {
        "weights": digest(samples),
        "size": sum(float(x.norm()) for x in samples),
        "data": digest(ids) if ids else None,
        "first_nonfinite": before + bad[0] if bad else None,  # loss; a gradient that was averaged is NaN on all
    }


def apart(told: list[dict]) -> list[int]:
    """Ranks whose weights are not rank 0's."""
    limit = APART * max(told[0]["size"], 1e-12)
    return [rank for rank, facts in enumerate(told) if not abs(facts["weights"] - told[0]["weights"]) <= limit]


def copies(state: State) -> bool:
    """Whether the ranks began as copies of one model: parts of one model differ, and nothing is said of them."""
    heard = state.ranks.heard
    return bool(heard) and not apart(heard[min(heard)])


@rule(
    "rank {names} has other weights than rank 0, and began with the same: gradients are not averaged",
    "call the wrapped model (DDP's, not .module), leave no_sync() for the last micro-batch, wrap before the optimizer is built",
)
def ranks_apart(state: State) -> Ill:
    told = state.ranks.heard.get(max(state.ranks.heard, default=0), [])
    finite = all(facts["first_nonfinite"] is None for facts in told)
    others = apart(told) if told and copies(state) and finite else []
    return {several(list(map(str, others))): {"value": len(others), "limit": 0}} if others else {}


@rule(
    "{n_same} ranks train on the same batches: {n_looks} of {n_looks} were equal",
    "give the sampler the rank (DistributedSampler), or seed the data of each rank by its number",
)
def ranks_same_data(state: State) -> Ill:
    told = [facts for step, facts in state.ranks.heard.items() if step > state.start_step and facts[0]["data"]]
    same = [facts for facts in told if len({f["data"] for f in facts}) == 1]
    if len(told) < 2 or len(same) < len(told) or not copies(state):
        return {}
    return {"data": {"value": len(same), "limit": 0, "n_same": len(same[0]), "n_looks": len(same)}}


@rule(
    "the loss of rank {names} was NaN or infinite before the others': averaging the gradients hands it to all",
    "look at that rank's batch and device first; stop, and go back to the last sound checkpoint",
)
def one_rank_nonfinite(state: State) -> Ill:
    told = state.ranks.heard.get(max(state.ranks.heard, default=0), [])
    first = [math.inf if facts["first_nonfinite"] is None else facts["first_nonfinite"] for facts in told]
    bad = [str(rank) for rank, n in enumerate(first) if n == min(first) < math.inf]
    return {several(bad): {"value": len(bad), "limit": 0}} if 0 < len(bad) < len(told) else {}


RULES = (one_rank_nonfinite, ranks_apart, ranks_same_data)
