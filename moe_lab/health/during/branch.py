"""The branch probe: from one state, over one sequence of batches, a few updates under each of several settings.

What differs afterwards was caused by the setting: a proof that a learning rate is too low, or of any other cause.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import Finding
from ..random_state import RandomState
from ..torch_private import without_step_hooks
from .tracking import all_innermost, held_by

N_UPDATES = 30
N_EVALUATED = 20  # batches at most, of a loader, which may have no end
FACTOR = 3.0
GAIN = 0.05  # nats that a branch must gain over the settings as they are
SIGMAS = 3.0  # standard errors of the paired differences that the gain must exceed

Change = Callable[[list[Optimizer]], None]  # of the optimizers' options


class Branch(NamedTuple):
    """What one setting did, against the settings as they are."""

    name: str
    loss: float  # mean over the evaluation batches after the updates
    gain: float  # nats by which it is below the loss of the settings as they are, batch by batch
    error: float  # standard error of the gain over the evaluation batches

    @property
    def is_proof(self) -> bool:
        return self.gain > GAIN and self.gain > SIGMAS * self.error


def branch_probe(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    branches: Mapping[str, Change] | None = None,
    n_updates: int = N_UPDATES,
    max_grad_norm: float | None = 1.0,
) -> list[Branch]:
    """Train `n_updates` from here under each setting, then evaluate each on the batches that are left over.

    `loss_fn(model, batch)` gives a scalar in nats. The first `n_updates` of `batches` train, the rest (at least 5; 20 of what is
    no sequence, such as a DataLoader) evaluate, in the model's current mode. `branches` maps a name to a change of the optimizers' options; by default each
    parameter group's LR times 3, and all of them together. Ask it after warm-up: it holds LRs constant. Every branch draws
    the same random numbers from torch's generators (dropout). Model, gradients, optimizers and random state are put back,
    also after an error; it takes a copy of them. Step hooks, a watch's and others', are not called.
    Raises ValueError for too few batches.
    """
    optimizers = all_innermost(optimizer)
    batches = batches if isinstance(batches, Sequence) else list(islice(batches, n_updates + N_EVALUATED))
    if len(batches) < n_updates + 5:
        raise ValueError(f"batches has {len(batches)}; {n_updates} updates and at least 5 to evaluate on are needed")
    changes = lr_branches(optimizers) if branches is None else branches
    losses: dict[str, list[float]] = {}
    with kept(model, optimizers) as start_over:
        for name, change in {"": lambda optimizers: None, **changes}.items():
            start_over()
            change(optimizers)
            for batch in batches[:n_updates]:
                for owner in (model, *optimizers):  # also what no optimizer holds: clipping would see it add up
                    owner.zero_grad(set_to_none=True)
                loss_fn(model, batch).backward()
                if max_grad_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                for o in optimizers:
                    o.step()
            with torch.no_grad():
                evaluated = [loss_fn(model, batch).float() for batch in batches[n_updates:]]
            losses[name] = torch.stack(evaluated).tolist()
    base = losses.pop("")
    return [Branch(name, fmean(mine), *paired(base, mine)) for name, mine in losses.items()]


def lr_branches(optimizers: Sequence[Optimizer]) -> dict[str, Change]:
    """Each parameter group's LR times 3, and all together: `muon × 3`, `adamw × 3`, `all × 3`."""
    groups = [(o, number) for o in optimizers for number in range(len(o.param_groups))]
    chosen = {o.param_groups[n].get("name") or f"group {i}": [(o, n)] for i, (o, n) in enumerate(groups)}
    if len(groups) > 1:
        chosen["all"] = groups
    return {f"{name} × {FACTOR:g}": partial(raise_lrs, some) for name, some in chosen.items()}


def raise_lrs(groups: Sequence[tuple[Optimizer, int]], optimizers: list[Optimizer]) -> None:
    for optimizer, number in groups:  # looked up now: starting over puts other dicts in their place
        optimizer.param_groups[number]["lr"] = optimizer.param_groups[number]["lr"] * FACTOR


def branch_findings(branches: Sequence[Branch]) -> list[Finding]:
    """`lr_too_low`, an error, for the branch that gained most, if that is proof. For branches with raised LRs."""
    best = max((branch for branch in branches if branch.is_proof), key=lambda branch: branch.gain, default=None)
    if best is None:
        return []
    message = f"from the same state on the same batches, {best.name} ends {best.gain:.2f} ± {best.error:.2f} nats lower"
    advice = "raise that learning rate, and probe again until a factor of 3 gains nothing"
    return [Finding("lr_too_low", "error", best.name, message, advice, best.gain, GAIN)]


def paired(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of `base - other`, and its standard error. A branch that diverged gains minus infinity."""
    gains = [a - b for a, b in zip(base, other, strict=True)]
    if not all(map(math.isfinite, gains)):
        return -math.inf, math.inf
    return fmean(gains), stdev(gains) / math.sqrt(len(gains))


@contextmanager
def kept(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[Callable[[], None]]:
    """Gives a function that puts model, optimizers and random state back to how they are now; the end does so as well."""
    params = [*model.parameters(), *held_by(optimizers)]
    gradients = [(p, p.grad) for p in params]
    random_state = RandomState([*params, *model.buffers()])
    states = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers]))

    def start_over() -> None:
        # loading may keep the very tensors, which training would change
        model_state, optimizer_states = copy.deepcopy(states)
        model.load_state_dict(model_state)
        for optimizer, state in zip(optimizers, optimizer_states, strict=True):
            optimizer.load_state_dict(state)
        random_state.put_back()

    with without_step_hooks(optimizers):
        try:
            yield start_over
        finally:
            start_over()
            for p, gradient in gradients:
                p.grad = gradient
