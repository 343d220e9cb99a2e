"""Whether ranks that train together agree. They tell each other through the store at which they met: no rank waits for another."""

import hashlib
import json
import math
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..torch_private import meeting_store

TENSORS = 64  # whose samples are told


class Ranks:
    """What each rank said of itself, by step: at the start, and at each check."""

    n_watches: Counter[str] = Counter()  # of this process, by what is watched: the others number theirs alike

    def __init__(self, model: nn.Module) -> None:
        shapes = str([(name, tuple(p.shape)) for name, p in model.named_parameters()])
        name = hashlib.sha256(shapes.encode()).hexdigest()[:16]
        self.n_watches[name] += 1
        self.place = f"health/{name}/{self.n_watches[name]}"
        self.told: list[int] = []
        self.heard: dict[int, list[dict]] = {}  # by step, of all ranks, in their order; steps that every rank has told

    def exchange(self, state: Any) -> None:
        """Say what a State sees here, and take in what all others have said. Nothing without other ranks."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        store, n_ranks, step = meeting_store(), dist.get_world_size(), state.step
        if step not in self.told:
            store.set(f"{self.place}/{step}/{dist.get_rank()}", json.dumps(seen_here(state)))
            self.told.append(step)
        for step in self.told:
            keys = [f"{self.place}/{step}/{rank}" for rank in range(n_ranks)]
            if step not in self.heard and store.check(keys):
                self.heard[step] = [json.loads(store.get(key)) for key in keys]


def seen_here(state: Any) -> dict:
    """Numbers of this rank: of whole tensors' samples, of the last batch's tokens, and which loss was the first that is not finite."""
    whole = [t for t in state.tracked if not hasattr(t.param, "to_local") and not t.is_master]
    samples = [t.sample(t.param).float() for t in whole[:: -(-len(whole) // TENSORS) or 1]]
    args, kwargs = (state.forward.in_training and state.forward.inputs) or ((), {})  # evaluations may well be shared
    ids = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    bad = [i for i, loss in enumerate(state.losses) if not math.isfinite(loss)]
    before = state.events.n_observed - len(state.losses)  # losses that are not kept
    return {
        "weights": digest(samples),
        "size": sum(float(x.norm()) for x in samples),
        "data": digest([x.float() for x in ids]) if ids else None,
        "first_nonfinite": before + bad[0] if bad else None,  # loss; a gradient that was averaged is NaN on all
    }


def digest(tensors: list[Tensor]) -> float:
    """A number that follows from every element and its place."""
    flat = [x.flatten() for x in tensors]
    return sum(float((x * torch.linspace(1, 2, len(x), device=x.device)).sum()) for x in flat)
