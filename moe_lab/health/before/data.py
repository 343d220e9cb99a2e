"""What batches say before a second of training: of tokens tokens.py's answers, of numbers examples.py's, and what stands in training
and validation."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .. import tokens as about
from ..findings import Finding
from ..random_state import RandomState
from ..tokens import Tokens, raw
from .examples import TARGET, check_examples, examples_of, is_plain, leaves

LOOKED_AT = 64  # batches at most
OVERLAP = 0.05  # share of the validation windows that also stand in training
# of few batches even a split that is part of the training shows little: less is enough where training text says itself this much
# more seldom (licences, headings and other lines that many texts share do so as often)
LEAST, RARER = 0.01, 4
WINDOW, TOLD = 32, 8  # tokens of such a window, or of the longest row; those of it that are no padding, at least


def parts_of(batch: Any) -> Sequence[Any]:
    """What may be ids, and what follows them; of a mapping what is named so, or the first ids where no numbers are, and a target."""
    if not isinstance(batch, Mapping):
        return leaves(batch) or [batch]
    has_numbers = any(isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1 for t in batch.values())
    ids = [
        t
        for key, t in batch.items()
        if are_ids(t) and not TARGET.search(str(key)) and not is_mask(t) and not has_numbers
    ]
    labels = [t for key, t in batch.items() if TARGET.search(str(key))]
    return batch.get("input_ids", next(iter(ids), None)), batch.get("labels", next(iter(labels), None))


def is_mask(t: Any) -> bool:
    return isinstance(t, Tensor) and is_plain(t) and bool(((t == 0) | (t == 1)).all())


def are_ids(ids: Any) -> bool:
    return isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()


def tokens_of(batch: Any) -> Tokens:
    """Of ids (B, T), of a tuple of ids and, perhaps behind a mask or lengths, labels, or of a mapping with `input_ids` and perhaps
    `labels`. Raises ValueError."""
    ids, *rest = parts_of(batch)
    if not are_ids(ids):
        raise ValueError("batches must all be ids (B, T), pairs (ids, labels), or mappings with input_ids")
    others = [t for t in rest if isinstance(t, Tensor) and (isinstance(batch, Mapping) or not is_mask(t))]
    labels = next((t for t in reversed(others) if t.shape == ids.shape and not t.is_floating_point()), None)
    of_rows = labels is None and bool(others)
    others = [t.detach() for t in (batch.values() if isinstance(batch, Mapping) else ()) if isinstance(t, Tensor)]
    others = [t for t in others if is_plain(t) and t is not ids and t is not labels]
    labels = None if labels is None else labels.detach().cpu().long()
    return Tokens(ids.detach().cpu().long(), labels, about.beside(ids, others), of_rows)


def check_data(
    batches: Iterable[Any], vocab_size: int | None = None, validation: Iterable[Any] | None = None
) -> list[Finding]:
    """Look at up to 64 batches as the training would get them, in their order.

    A batch is ids (B, T), a pair (ids, labels), or a mapping with `input_ids` and `labels`; labels of -100 are no target. Or numbers
    (B, …), such as pictures, alone, with targets (B, …), or in a mapping.
    `vocab_size` defaults to the largest id seen, and one. `validation`: batches that must not stand in training too.
    The random state is put back. Raises ValueError, one line, for something that is neither a batch of tokens nor of numbers, or none.
    """
    with RandomState([]):  # a loader that shuffles draws from it: the run to come is not to change
        kind, seen = read(batches)
        _, others = read(validation, kind) if validation is not None else (kind, [])
    if not seen:
        raise ValueError("batches is empty: give at least one")
    if kind is examples_of:
        return check_examples(seen, others)
    ids = torch.cat([tokens.ids.flatten() for tokens in seen])
    vocab_size = vocab_size or int(ids.max()) + 1
    labelled = [tokens for tokens in seen if tokens.labels is not None]
    found = [looks_random(seen, vocab_size)]
    found += [about.rows_repeat(seen) or about.windows_slide(seen) or about.neighbours_alike(seen)]
    found += [check(labelled) for check in (*about.TARGETS, about.uneven) if labelled]
    if validation is not None:
        random = looks_random(others, vocab_size) if others else None
        found += [random and replace(random, where="validation"), stands_in_both(seen, others)]
    return [finding for finding in found if finding is not None]


def looks_random(seen: list[Tokens], vocab_size: int) -> Finding | None:
    """An info where nobody is asked for tokens: what a row is of need not have an order, as things that were bought."""
    found = about.looks_random([tokens.ids for tokens in seen], vocab_size)
    of_rows = found is not None and found.rule == "random_tokens" and all(tokens.of_rows for tokens in seen)
    return replace(found, severity="info") if found and of_rows else found


def read(batches: Iterable[Any], kind: Callable | None = None) -> tuple[Callable, list]:
    """As they come, since they may be large. The first one's kind, where none is given, is that of all."""
    seen = []
    for batch in islice(batches, LOOKED_AT):
        kind = kind or (tokens_of if are_ids(parts_of(batch)[0]) else examples_of)
        seen.append(kind(batch))
    return kind or tokens_of, seen


def stands_in_both(seen: list[Tokens], validation: list[Tokens]) -> Finding | None:
    length = min(WINDOW, max(tokens.ids.shape[1] for tokens in (*seen, *validation)))

    def rows(batches: list[Tokens]) -> list[Tensor]:
        return [row for tokens in batches for row in tokens.ids if len(row) >= length]

    def windows(row: Tensor, stride: int) -> list[bytes]:
        return [raw(span) for span in row.unfold(0, length, stride) if (span != span[-1]).sum() >= TOLD]

    in_rows = Counter(window for row in rows(seen) for window in set(windows(row, 1)))
    own = [in_rows[window] > 1 for row in rows(seen) for window in windows(row, length)]
    asked = [in_rows[window] > 0 for row in rows(validation) for window in windows(row, length)]
    share = sum(asked) / max(len(asked), 1)
    limit = min(OVERLAP, max(LEAST, RARER * sum(own) / max(len(own), 1)))
    if share <= limit:
        return None
    message = f"{share:.0%} of the validation windows of {length} tokens also stand in the training batches"
    advice = "split by document, drop near-copies, and split before windows are cut"
    return Finding("split_overlap", "warning", "data", message, advice, round(share, 3), round(limit, 3))
