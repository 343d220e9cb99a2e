"""What batches of numbers with targets say before a second of training: pictures, tables, series."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..findings import Finding, several
from ..tokens import COME_AGAIN, REPEATED, raw

TARGET = re.compile(r"label|target|^y$")
# share of a batch's examples that are doubles: draws from a small set give a third of a single batch by chance
OF_ONE = 0.5
MOST = 4096  # numbers of an example that are looked at
MANY = 256  # targets that are not all one number by chance, even where one class is rare
ROWS, LEAST = 64, 5  # examples whose order says anything, and the least of a class
FEW = 8  # numbers of a target that may all stand in the input
OVERLAP, TIMES = 0.05, 4  # share of the validation's examples in training, and over what training says itself
APART, WIDER = 1.0, 3.0  # deviations between the means of training and validation; ratio of their deviations


class Examples(NamedTuple):
    x: Tensor  # (B, F) float32 or float64
    y: Tensor | None  # (B, …) targets


def examples_of(batch: Any) -> Examples:
    """Of a tensor, a pair (inputs, targets), more of them, or a mapping: the largest tensor of numbers, or of pictures in whole ones; and its
    targets, by their name, or as the other of two. Raises ValueError."""
    given = {"x": batch} if isinstance(batch, Tensor) else batch if isinstance(batch, Mapping) else {}
    if isinstance(batch, (tuple, list)):
        names = ["target" if len(batch) == 2 and n else "input" for n in range(len(batch))]
        parts = [(name, leaf) for name, part in zip(names, batch, strict=True) for leaf in leaves(part)]
        given = {f"{name} {n}": leaf for n, (name, leaf) in enumerate(parts)}
    tensors = {str(key): t.detach() for key, t in given.items() if isinstance(t, Tensor) and is_plain(t)}
    inputs = [t for key, t in tensors.items() if t.ndim > 1 + (not t.is_floating_point()) and not TARGET.search(key)]
    if not inputs:
        form = "ids (B, T), numbers (B, …), a pair of one of them and targets, or a mapping"
        raise ValueError(
            f"a batch must be {form}; this one holds {several(list(map(described, leaves(batch) or [batch])))}"
        )
    x = max(inputs, key=lambda t: t.numel()).flatten(1)
    named = (t for key, t in tensors.items() if TARGET.search(key) and len(t) == len(x))
    x = x[:, :: -(-x.shape[1] // MOST)].cpu()
    y = next(named, None)
    return Examples(x if x.dtype == torch.float64 else x.float(), None if y is None else y.cpu())


def leaves(batch: Any) -> list[Any]:
    """What stands in tuples and lists, in those within them, and in mappings."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else None
    return [batch] if parts is None else [leaf for part in parts for leaf in leaves(part)]


def described(thing: Any) -> str:
    return f"{thing.dtype} {tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__


def is_plain(t: Tensor) -> bool:
    return bool(t.layout is torch.strided and not t.is_nested and t.ndim and t.numel()) and not t.is_complex()


def rows_of(seen: Sequence[Examples]) -> list[bytes]:
    return [raw(row) for examples in seen for row in examples.x]


def not_finite(seen: Sequence[Examples]) -> Iterator[Finding]:
    for what, tensors in (("inputs", [e.x for e in seen]), ("targets", [e.y for e in seen if e.y is not None])):
        ill = sum(int((~torch.isfinite(t)).sum()) for t in tensors if t.is_floating_point())
        if ill:
            message = f"{ill} of the {what} are NaN or infinite, in {len(tensors)} batches"
            advice = "unless the model fills or the loss masks them, one makes a whole batch's gradient NaN: drop or fill them where the data are read"
            yield Finding("nonfinite_values", "warning", what, message, advice, ill, 0)


def come_again(seen: Sequence[Examples]) -> Iterator[Finding]:
    """Within a batch, or in the next one. What whole numbers alone describe, such as a board, may come twice."""
    again, n, last = 0, 0, set()
    for examples in seen:
        rows = [raw(row) for row in examples.x if (row != row.round()).any()]
        again, n, last = again + len(rows) - len(set(rows) - last), n + len(rows), set(rows)
    limit = REPEATED if len(seen) > 1 else OF_ONE
    if n >= 8 and again > limit * n:
        message = f"{again / n:.0%} of {n} examples stood in the same batch, or in the one before, already"
        yield Finding("repeated_data", "warning", "data", message, COME_AGAIN, round(again / n, 3), limit)


def targets(seen: Sequence[Examples]) -> Iterator[Finding]:
    """All one number, but for a difference that is to become 0; or, of classes, each in one piece, as a folder or a table has them."""
    y = [e.y for e in seen if e.y is not None]
    if not y or len({t.shape[1:] for t in y}) > 1:
        return
    together = torch.cat(y)
    is_whole, first = not together.is_floating_point(), together.flatten()[0]
    n_alike = ROWS if together[0].numel() > 1 else MANY
    if len(together) >= n_alike and (together == first).all() and (is_whole or first != 0):
        message = f"all {len(together)} targets are {first.item():.6g}"
        advice = "if a loss uses them, look where they are read: a key that is not there, a default, a column or a folder taken for another"
        yield Finding("constant_targets", "warning", "targets", message, advice, 1, 1)
    elif together.ndim == 1 and is_whole and len(together) >= ROWS:
        counts = together.unique(return_counts=True)[1]
        n_runs = 1 + int((together[1:] != together[:-1]).sum())
        if n_runs == len(counts) > 1 and counts.min() >= LEAST:
            message = f"the {len(together)} examples come class by class, {n_runs} of them"
            advice = "shuffle the training set: an update that sees one class alone unlearns the others"
            yield Finding("sorted_data", "warning", "data", message, advice, n_runs, len(counts))


def stands_in_input(seen: Sequence[Examples]) -> Iterator[Finding]:
    """Each number of the targets, which are few beside the inputs, is the one at some fixed place of its example."""
    y = [e.y.reshape(len(e.y), -1) for e in seen if e.y is not None and len(e.y) == len(e.x)]
    if len(y) < len(seen) or len({(e.x.shape[1], t.shape[1]) for e, t in zip(seen, y, strict=True)}) > 1:
        return
    n_asked, n_given, n_batches = y[0].shape[1], seen[0].x.shape[1], -(-MANY // len(y[0]))
    if not 0 < n_asked <= FEW or not 2 * n_asked <= n_given < MOST:
        return
    x, wanted = (torch.cat(list(some))[:MANY] for some in ((e.x for e in seen[:n_batches]), y[:n_batches]))
    enough = ROWS if len(wanted.unique()) < LEAST else LEAST
    if len(x) < enough or (wanted == wanted[0]).all(0).any():
        return
    places = [(x == column.to(x.dtype).unsqueeze(1)).all(0).nonzero().flatten().tolist() for column in wanted.T]
    if all(places):
        at = several([f"{found[0] + 1} of {n_given}" for found in places])
        message = f"all targets of {len(x)} examples stand in their inputs, as number {at}: the model learns to copy"
        advice = "take targets out of the inputs; of a series the target comes after the window: shift it the other way"
        yield Finding("label_shift", "warning", "targets", message, advice, len(x), 0)


def beside(seen: Sequence[Examples], validation: Sequence[Examples]) -> Iterator[Finding]:
    """Examples that stand in both, and numbers of another size."""
    mine, others = rows_of(seen), rows_of(validation)
    counts = Counter(mine)
    share = sum(row in counts for row in others) / max(len(others), 1)
    own = sum(n for n in counts.values() if n > 1) / max(len(mine), 1)
    if share > (limit := max(OVERLAP, TIMES * own)):
        message = f"{share:.0%} of the validation's examples also stand in the training batches"
        advice = "split before examples are doubled or augmented, by person, place or day where there are such"
        yield Finding("split_overlap", "warning", "data", message, advice, round(share, 3), round(limit, 3))
    a, b = (torch.cat([e.x[torch.isfinite(e.x)] for e in some]) for some in (seen, validation))
    away, wider = float((a.mean() - b.mean()).abs() / a.std()), float(a.std() / b.std())
    if min(len(a), len(b)) > 1 and a.std() and (away > APART or not 1 / WIDER < wider < WIDER):
        message = (
            f"validation has mean {b.mean():.3g} and deviation {b.std():.3g}, training {a.mean():.3g} and {a.std():.3g}"
        )
        advice = "normalise both in the same way, by the training set's numbers"
        yield Finding("input_scale", "warning", "validation", message, advice, round(away, 3), APART)


def check_examples(seen: Sequence[Examples], validation: Sequence[Examples]) -> list[Finding]:
    found = [finding for check in (not_finite, come_again, targets, stands_in_input) for finding in check(seen)]
    return [*found, *(beside(seen, validation) if validation else ())]
