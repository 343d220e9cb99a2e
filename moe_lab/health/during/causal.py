"""Does the model see the tokens that it is trained to foretell? One recorded forward pass is repeated with later tokens changed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..before.flow import LEAK, OVER_TIME
from ..choices import held, recorded
from ..findings import Finding
from ..tokens import IGNORED
from .forward import ForwardProbe, is_sharded
from .heard import tensors_of

LEAK_NARROW = 0.05  # the same in 16 bits, where other counts in a grouped kernel round otherwise
BY_CHOICE = (
    "with a choice over time (MoD, expert choice) training is not causal by design: evaluate and generate without it"
)


def future_leak(forward: ForwardProbe) -> Finding | None:
    """Of the pass that was heard last. None where nothing leaks, or it cannot be told: two passes differ by themselves, no targets
    are before the changed tokens, or the model's own code may not be made for being called so: that is kept, to be told."""
    heard = forward.heard
    if forward.inputs is None or is_sharded(forward.model):
        return None
    ids, labels = heard.passes[-1].tokens
    cut = ids.shape[1] // 2 | 1  # odd: blocks have even sizes
    row = int((labels[:, :cut] != IGNORED).sum(1).argmax())
    asked = (labels[row, :cut] != IGNORED).nonzero().flatten()
    if cut >= ids.shape[1] or not len(asked):
        return None
    changed = ids.clone()
    places = torch.randint(ids.numel(), (ids.shape[1] - cut,), generator=torch.Generator().manual_seed(0))
    others = ids.flatten()[places]
    changed[row, cut:] = torch.where(others == ids[row, cut:], ids[row, cut:].roll(1), others)
    read = partial(logits, forward, row=row, asked=asked)
    try:
        before, after = read(ids), read(changed)
        limit = (LEAK if before.dtype.itemsize >= 4 else LEAK_NARROW) * float(before.float().std())
        moved = float((after - before).abs().max())
        if not moved > limit:
            return None
        made: list[Tensor] = []
        again = read(ids, recorded(made))
        if float((again - before).abs().max()) > limit:
            return None
        otherwise = float((read(changed, held(made)) - before).abs().max())
    except Exception as error:
        heard.untried = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None
    message = (
        f"tokens changed from position {cut} on move the logits of targets before it by {moved:.2g} (limit {limit:.1g})"
    )
    if otherwise > limit:
        return Finding("future_leak", "error", "logits", message, OVER_TIME, moved, limit)
    message += ", and do not where the indices of every top-k and sort are held: it chooses over time"
    return Finding("future_leak", "info", "choices", message, BY_CHOICE, moved, limit)


def logits(
    forward: ForwardProbe, ids: Tensor, choices: AbstractContextManager | None = None, *, row: int, asked: Tensor
) -> Tensor:
    """(len(asked), V): of the recorded pass with these ids in the place of those that the table of tokens was asked for."""
    heard, calls = forward.heard, []

    def put(module: nn.Module, args: tuple) -> tuple | None:
        if not isinstance(args[0], Tensor) or args[0].ndim != 2:
            return None
        calls.append(args[0].shape)
        if len(calls) - 1 != heard.call:
            return None
        given = ids.T if heard.is_time_first else ids
        return (given.to(args[0]).reshape(args[0].shape), *args[1:])

    handles = [table.register_forward_pre_hook(put) for table in heard.tables]
    try:
        with choices or nullcontext():
            output = forward.repeat({}, exact=True)
    finally:
        for handle in handles:
            handle.remove()
    n = ids.numel()
    scores = next(
        t for t in tensors_of(output) if t.ndim > 1 and t.shape[-1] == heard.vocab_size and t.numel() == n * t.shape[-1]
    )
    scores = scores.reshape(*(ids.T if heard.is_time_first else ids).shape, -1)
    scores = scores.transpose(0, 1) if heard.is_time_first else scores
    return scores[row, asked.to(scores.device)]
