"""Does a token change what is foretold before it, or beside it? By perturbation, which shows discrete choices as well."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import held, recorded
from ..findings import Finding
from ..tokens import IGNORED
from .forward import ForwardProbe, Unrepeatable, is_sharded
from .heard import tensors_of

LEAK = 1e-4  # of the logits' deviation: grouped kernels are not bit-stable when counts change
LEAK_NARROW = 0.05  # the same in 16 bits, where other counts in a grouped kernel round otherwise
ROWS = 32  # sequences of a pass
BESIDE = 7  # sequences that check_causality reads beside its own, shorter ones put together
ROWS_MIX, FUTURE_LEAK = 3, 4  # passes of the batch that these take at most
OVER_TIME = "look for a missing mask, a convolution padded on both sides, a top-k or a statistic over the sequence"
OVER_BATCH = "look for a layer that takes (T, B, …) unless batch_first=True, a statistic over the batch, or a reshape that mixes rows"
LENGTH = (
    "look for a sum or mean over the sequence, a scale or a table made from its length, positions counted from its end"
)
CHOICE = (
    "with a choice over time (MoD, expert choice) training is not causal by design: evaluate and generate without it"
)


@torch.no_grad()
def check_causality(
    fn: Callable[[Tensor], Tensor], vocab_size: int, seq_len: int, device: torch.device | str = "cpu", seed: int = 0
) -> Finding | None:
    """Does a token change the logits before it, or those of another sequence? By perturbation at every position. A warning where
    the first half of a text has other logits alone than with the rest after it: something grows with the length.

    `fn(ids)` maps ids (B, T) int64 to logits (B, T, …), in evaluation mode and without noise of its own; call it in float32.
    It takes a forward pass of 32 sequences for every 31 positions, and four small ones. Raises ValueError where fn's answer has
    another shape, or two calls differ.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: two tokens are needed at least")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, seq_len), generator=generator)
    others = (ids + torch.randint(1, vocab_size, (seq_len, seq_len), generator=generator)) % vocab_size
    late = torch.arange(seq_len) >= torch.arange(seq_len).unsqueeze(1)  # row p: from position p on
    changed, half = torch.where(late, others, ids), seq_len // 2  # (T, T)
    read = partial(logits_of, fn, device)
    before = read(ids, ids)
    if not torch.equal(before, read(ids, ids)):
        raise ValueError("fn(ids) gives other logits when it is called again: switch dropout off, fix its random state")
    limit = LEAK * float(before.std())
    leaks: dict[int, tuple[int, float]] = {}  # position that hears → position that changed, by how much
    for positions in torch.arange(1, seq_len).split(ROWS - 1):
        after = read(ids, changed[positions])
        for row, p in enumerate(positions.tolist(), 1):
            moved = (after[row, :p] - after[0, :p]).abs().flatten(1).amax(1)
            for hears in (moved > limit).nonzero().flatten().tolist():
                leaks.setdefault(hears, (p, float(moved[hears])))
    if leaks:
        hears, (p, moved) = next(iter(leaks.items()))
        message = f"a token changed at position {p} moves the logits at position {hears}, before it"
        message += f"; {len(leaks)} of {seq_len - 1} positions hear of later tokens"
        return leak(moved, limit, "error", f"position {hears}", message, OVER_TIME)
    if (moved := float((read(ids, changed[:1])[0] - before[0]).abs().max())) > limit:
        message = "changing one sequence of a batch moves the logits of another"
        return leak(moved, limit, "error", "batch", message, OVER_BATCH)
    if (moved := float((read(ids[:, :half], ids[:, :half]) - before[:, :half]).abs().max())) > limit:
        message = f"the first {half} tokens have other logits alone than at the start of {seq_len}"
        return leak(moved, limit, "warning", "length", message, LENGTH)
    return None


@torch.no_grad()
def rows_mix(model: nn.Module, args: tuple, kwargs: dict[str, Any], repeats: bool = False) -> Finding | None:
    """Does one example of a batch change the answers to others, of which one dimension is B? In evaluation mode. Not told of numbers with
    two dimensions, which may be a graph's nodes, nor where another dimension is as long. `repeats`: two calls are known to be the same.
    Raises ValueError where they differ."""
    given = [t for t in tensors_of([args, kwargs]) if t.ndim]
    n = len(given[0]) if any(t.ndim > 1 for t in given) else 0
    if n < 3 or any(len(t) != n or n in t.shape[1:] or (t.ndim == 2 and t.is_floating_point()) for t in given):
        return None

    of_numbers = all(
        t.is_floating_point() for t in given
    )  # experts of a text may have room for so many tokens of the batch

    def answer(first: Callable) -> Tensor:
        answers = tensors_of(model(*map(first, args), **{key: first(value) for key, value in kwargs.items()}))
        mine = [t for t in answers if list(t.shape).count(n) == 1 and (t.ndim < 3 or of_numbers)]
        return mine[0].float().movedim(mine[0].shape.index(n), 0) if mine else torch.zeros(n)

    before = answer(lambda v: v)
    if not repeats and not torch.equal(before, answer(lambda v: v)):
        raise ValueError("two evaluations of one batch differ by themselves")
    after = answer(lambda v: torch.cat([v[1:2], v[1:]]) if isinstance(v, Tensor) and v.ndim else v)
    moved, limit = float((after - before)[1:].abs().max()), LEAK * float(before.std())
    message = "changing one example of a batch moves the answers to others, in evaluation mode, too"
    return leak(moved, limit, "warning", "batch", message, OVER_BATCH) if moved > limit else None


def leak(moved: float, limit: float, severity: str, where: str, message: str, advice: str) -> Finding:
    return Finding("future_leak", severity, where, message, advice, round(moved, 6), round(limit, 6))


def logits_of(fn: Callable[[Tensor], Any], device: torch.device | str, *rows: Tensor) -> Tensor:
    """fn(ids) as (B, T, …) float32 on the CPU. Raises ValueError for another shape."""
    ids = torch.cat(rows)
    scores = fn(ids.to(device))
    scores = getattr(scores, "logits", scores)
    if not isinstance(scores, Tensor) or scores.shape[:2] != ids.shape:
        got = getattr(scores, "shape", type(scores).__name__)
        raise ValueError(f"fn(ids) must give logits (B, T, …) for ids {tuple(ids.shape)}; it gave {got}")
    return scores.detach().float().cpu()


def future_leak(forward: ForwardProbe, repeats: bool = False) -> Finding | None:
    """Of the pass that was heard last, repeated with later tokens changed. `repeats`: two passes of one input are known to be the
    same. Raises `Unrepeatable` where it cannot be told."""
    heard = forward.heard
    if forward.inputs is None or is_sharded(forward.model):
        raise Unrepeatable("no input was kept" if forward.inputs is None else "the weights are spread over processes")
    ids, labels, *_ = heard.passes[-1].tokens
    cut = ids.shape[1] // 2 | 1  # odd: blocks have even sizes
    row = int((labels[:, :cut] != IGNORED).sum(1).argmax())
    asked = (labels[row, :cut] != IGNORED).nonzero().flatten()
    if cut >= ids.shape[1] or not len(asked):
        raise Unrepeatable("no target stands in the first half of the texts")
    changed = ids.clone()
    places = torch.randint(ids.numel(), (ids.shape[1] - cut,), generator=torch.Generator().manual_seed(0))
    others = ids.flatten()[places]
    changed[row, cut:] = torch.where(others == ids[row, cut:], ids[row, cut:].roll(1), others)
    read = partial(logits, forward, row=row, asked=asked)
    made: list[Tensor] = []
    before, after = read(ids, recorded(made)), read(changed)
    limit = (LEAK if before.dtype.itemsize >= 4 else LEAK_NARROW) * float(before.float().std())
    moved = float((after - before).abs().max())
    if not moved > limit:
        return None
    if not repeats and float((read(ids) - before).abs().max()) > limit:
        raise Unrepeatable("two passes of one input differ by themselves")
    by = f"{moved:.2g} (limit {limit:.1g})"
    message = f"tokens changed from position {cut} on move the logits of targets before it by {by}"
    if float((read(changed, held(made)) - before).abs().max()) > limit:
        return leak(moved, limit, "error", "logits", message, OVER_TIME)
    message += ", and do not where the indices of every top-k and sort are held: it chooses over time"
    return leak(moved, limit, "info", "choices", message, CHOICE)


def logits(
    forward: ForwardProbe, ids: Tensor, choices: AbstractContextManager | None = None, *, row: int, asked: Tensor
) -> Tensor:
    """(len(asked), V): of the recorded pass with these ids in the place of those that the table of tokens was asked for."""
    heard, calls = forward.heard, []
    ids = ids.T if heard.is_time_first else ids

    def put(module: nn.Module, args: tuple) -> tuple | None:
        is_call = isinstance(args[0], Tensor) and args[0].ndim == 2
        calls.extend([module] * is_call)
        is_mine = is_call and len(calls) - 1 == heard.call
        return (ids.to(args[0]).reshape(args[0].shape), *args[1:]) if is_mine else None

    with choices or nullcontext(), ExitStack() as stack:
        for table in heard.tables:
            stack.callback(table.register_forward_pre_hook(put).remove)
        output: Any = forward.repeat({}, exact=True)
    shape = ids.numel(), heard.vocab_size
    scores = next((t for t in tensors_of(output) if t.ndim > 1 and t.reshape(-1, t.shape[-1]).shape == shape), None)
    if scores is None:
        raise Unrepeatable("it gives no logits")
    scores = scores.reshape(*ids.shape, -1)
    return (scores.transpose(0, 1) if heard.is_time_first else scores)[row, asked.to(scores.device)]
