"""What batches of tokens say: are they text, do they repeat, and what is a target? One answer for batches that are handed over
before a run and for those that a watch hears in one."""

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from ctypes import string_at
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .findings import Finding, several
from .measures import collisions

IGNORED = -100  # a label that is no target, as in torch's cross_entropy
COLLISIONS = 3.0  # pairs of equal tokens over what uniform tokens show: text has 5 and more, uniform tokens 1
# zlib's size over that of the same rows in another order: text 0.60–0.93, without order 0.99–1.01
INCOMPRESSIBLE = 0.98
CONSTANT = 0.9  # share of one token from which on there is nothing to learn
REPEATED = 0.2  # share of rows seen before: the second epoch of a small text comes later than this
UNLIKELY = 1e-6  # chance that a token is never a target although its neighbours are
SHIFTED = 0.9  # share of labels that agree with the inputs at the best shift
PADDED = 8  # equal tokens at a row's end from which on they look like padding
ROWS_PADDED = 0.25  # share of the rows that end so: lines of code end in blanks less often
# share of rows that begin with targets and end in text without: of windows that are cut anywhere, a quarter
TURNED = 0.75
MOST_ROWS, FEWEST_ROWS = 512, 32  # that are compared with their neighbours
ALIKE = 6.0, 1.2  # standard deviations and times that neighbours are more alike than in 200 other orders
# share of rows that are a neighbour moved by a few places; tokens that show it, pairs at least
SLID, HEAD, PAIRS = 0.5, 8, 16
SELDOM, LENGTHS = 8, 4  # times that a token follows targets, and lengths of rows, that are no accident
END = "padding with the end token's id masks the end as well: give it its own, or keep each row's first end token"
COME_AGAIN = "workers that share one random generator, a loader made anew each step, or a few samples alone do this"
SHUFFLE = "shuffle the windows, or begin each where the last one ends: an update sees one text as often as it has rows"
ONE_END = 0.9  # share of one token right before it, from which on another one is the end, and this its padding


class Tokens(NamedTuple):
    ids: Tensor  # (B, T) int64
    labels: Tensor | None  # (B, T) int64, IGNORED where there is no target; None: not given
    beside: Tensor | None = None  # (B,) float32, a number for each row of all else that the model was given
    of_rows: bool = False  # whether targets came that are no tokens: a class for each row, say

    @property
    def rows(self) -> Tensor:
        """(B, T + 1): the few tokens may be the same for sounds, pictures or texts that differ."""
        if self.beside is None or len(self.beside) != len(self.ids):
            return self.ids
        return torch.cat([self.ids, self.beside.view(torch.int32).long().unsqueeze(1)], 1)


def beside(ids: Tensor, given: Iterable[Tensor]) -> Tensor | None:
    """`Tokens`' third of a batch: (B,) float32, or None."""
    numbers = [t.flatten(1).float().sum(1).to(ids.device) for t in given if t.ndim > 1 and len(t) == len(ids)]
    return sum(numbers) if numbers else None


def raw(x: Tensor) -> bytes:
    """The numbers of a tensor on the CPU as they stand in memory; torch alone may be installed, without NumPy."""
    x = x.contiguous()
    return string_at(x.data_ptr(), x.numel() * x.element_size())


def within(places: Tensor) -> Tensor:
    """Of places (B, T), or (T, B), those that others stand around, either way round: padding lies at an end of one of the two."""
    inside, others = places.cpu(), (~places).cpu().int()
    for dim in (0, 1):
        before, after = others.cumsum(dim), others.flip(dim).cumsum(dim).flip(dim)
        inside = inside & (before > 0) & (after > 0)
    return inside


def looks_random(rows: Sequence[Tensor], vocab_size: int) -> Finding | None:
    """`rows`: ids (B, T) of batches, or (T, B). Each row is compressed beside itself in another order."""
    ids = torch.cat([some.flatten() for some in rows])
    counts, n = torch.bincount(ids, minlength=vocab_size), len(ids)
    if counts.max() > CONSTANT * n:
        message = f"token {int(counts.argmax())} is {counts.max() / n:.0%} of the text: nothing to learn"
        advice = "look at one batch, decoded; an index that never advances, or padding alone, does this"
        return Finding("constant_tokens", "error", "data", message, advice, float(counts.max() / n), CONSTANT)
    order = 0.0 if n < 1000 else compressed(rows)
    if order >= INCOMPRESSIBLE:
        order = min(order, compressed([some.T for some in rows]))
    if order < INCOMPRESSIBLE:
        return None
    equal = collisions(ids, vocab_size)
    what = f"two are equal {equal:.2f} times as often as uniform ones (text: 5 and more)"
    if equal >= COLLISIONS:
        what = f"in another order a row compresses as well ({order:.3f}; text: 0.93 and less)"
    advice = "a loader that shuffles tokens, falls back to random ids, or reads the file as a wrong dtype does this"
    message = f"the tokens look random: {what}"
    return Finding("random_tokens", "warning", "data", message, advice, round(equal, 3), COLLISIONS)


def compressed(rows: Sequence[Tensor]) -> float:
    """The size of all rows over that of the same rows, each in another order."""
    generator = torch.Generator().manual_seed(0)
    ids = [row for some in rows for row in some]
    shuffled = [row[torch.randperm(len(row), generator=generator)] for row in ids]
    size, of_shuffled = (len(zlib.compress(raw(torch.cat(x).to(torch.int32)))) for x in (ids, shuffled))
    return size / of_shuffled


def rows_repeat(seen: Sequence[Tokens]) -> Finding | None:
    rows = [raw(row) for tokens in seen for row in tokens.rows]
    again = 1 - len(set(rows)) / len(rows)
    if len(rows) < 8 or again <= REPEATED:
        return None
    most = Counter(rows).most_common(1)[0][1]
    message = f"{again:.0%} of {len(rows)} rows stood in an earlier place already; one came {most} times"
    return Finding("repeated_data", "warning", "data", message, COME_AGAIN, round(again, 3), REPEATED)


def labels_elsewhere(labelled: Sequence[Tokens]) -> Finding | None:
    """`labels[t]` should be `ids[t + 1]`, or `ids[t]` where the model shifts. Masked language models match at few places."""
    best = {shift: agreement(labelled, shift) for shift in (-2, -1, 0, 1, 2)}
    shift = max(best, key=best.__getitem__)
    if shift in (0, 1) or best[shift] < SHIFTED or max(best[0], best[1]) > SHIFTED:
        return None
    message = f"{best[shift]:.0%} of the labels are the token {shift:+d} places on, {best[1]:.0%} the next one"
    advice = "labels are shifted twice, or the wrong way: shift them once, in the collator or in the model"
    return Finding("label_shift", "error", "labels", message, advice, shift, 1)


def copies_inputs(labelled: Sequence[Tokens]) -> Finding | None:
    """Of targets that a loss was really made of: is the answer what stands in the input at the same place?"""
    same, next_one = (agreement(labelled, shift) for shift in (0, 1))
    if same < SHIFTED or next_one >= SHIFTED:
        return None
    message = f"{same:.0%} of the targets are the very token that the model is given at that place: it learns to copy"
    advice = "next-token labels are shifted once, by the collator or the model; masked places get the mask token in the input"
    return Finding("label_shift", "error", "targets", message, advice, 0, 1)


def agreement(labelled: Sequence[Tokens], shift: int) -> float:
    """Share of the targets that are the token `shift` places on."""
    equal = targets = 0
    for ids, labels, *_ in labelled:
        length = ids.shape[1] - abs(shift)
        there, here = ids[:, max(shift, 0) :][:, :length], labels[:, max(-shift, 0) :][:, :length]
        equal += int(((here != IGNORED) & (here == there)).sum())
        targets += int((here != IGNORED).sum())
    return equal / max(targets, 1)


def never_a_target(labelled: Sequence[Tokens]) -> Finding | None:
    """Tokens that come right after what is asked for, after many different tokens, and are never asked for themselves.

    Padding of its own comes after the end token alone, and so does the next prompt.
    """
    shift = max((0, 1), key=lambda shift: agreement(labelled, shift))
    if agreement(labelled, shift) < SHIFTED:
        return None
    before: dict[int, Counter] = {}  # token → those right before it that are asked for
    inner: Counter = Counter()  # … → how often it stands before a row's last run
    asked, n_asked, n_places = set(), 0, 0
    for ids, labels, *_ in labelled:
        is_asked = torch.zeros_like(ids, dtype=torch.bool)
        is_asked[:, shift:] = (labels != IGNORED)[:, : ids.shape[1] - shift]
        asked.update(ids[is_asked].tolist())
        inner.update(ids[~runs_of(ids)[1]].tolist())
        n_asked, n_places = n_asked + int(is_asked.sum()), n_places + is_asked[:, 1:].numel()
        ends = is_asked[:, :-1] & ~is_asked[:, 1:]
        for token, last in zip(ids[:, 1:][ends].tolist(), ids[:, :-1][ends].tolist(), strict=True):
            before.setdefault(token, Counter())[last] += 1
    skipped = max(1 - n_asked / max(n_places, 1), 0)  # share of places that are no target
    never = {
        token: last.total()
        for token, last in before.items()
        if token not in asked
        and last.total() >= SELDOM
        and skipped ** last.total() < UNLIKELY
        and inner[token] < n_asked  # else it fills holes between targets, as a decoder is given them
        and last.most_common(1)[0][1] < ONE_END * last.total()
    }
    if not never:
        return None
    names = several([str(token) for token in sorted(never, key=never.__getitem__, reverse=True)])
    message = f"token {names} ends the targets {sum(never.values())} times and is never one: it cannot be learned"
    return Finding("never_a_target", "warning", "labels", message, END, sum(never.values()), 0)


def of_other_rows(labelled: Sequence[Tokens]) -> Finding | None:
    """Rows that have as many targets as others have tokens before their padding, and not as many as their own."""
    counts = [((~padding_of(ids)).sum(1), (labels != IGNORED).sum(1)) for ids, labels, *_ in labelled]
    alike = [(a, b) for a, b in counts if len(a.unique()) >= LENGTHS and torch.equal(a.sort().values, b.sort().values)]
    n_rows, n_off = sum(len(a) for a, _ in alike), sum(int((a != b).sum()) for a, b in alike)
    if n_off <= n_rows / 2:
        return None
    message = f"{n_off} of {n_rows} rows have as many targets as another row has tokens: the labels belong to others"
    advice = "sort, shuffle and pad inputs and labels together: one of the two is in another order"
    return Finding("label_shift", "error", "labels", message, advice, n_off, round(n_rows / 2))


def padding_is_target(labelled: Sequence[Tokens]) -> Finding | None:
    """Rows that end in a run of one token, far longer than its runs elsewhere, and ask for it; not where it is asked for others' tokens."""
    runs, longest = [runs_of(ids) for ids, *_ in labelled], Counter()  # of each token but at the ends
    for (ids, *_), (length, at_end) in zip(labelled, runs, strict=True):
        for token in ids[:, -1].unique().tolist():
            inner = length[(ids == token) & ~at_end]
            longest[token] = max(longest[token], int(inner.max()) if len(inner) else 0)
    padded = asked = rows = 0
    for (ids, labels, *_), (length, at_end) in zip(labelled, runs, strict=True):
        least = torch.tensor([max(PADDED, 2 * longest[token] + 1) for token in ids[:, -1].tolist()])
        at_end = at_end & ((length[:, -1] >= least) & ~at_end.all(1)).unsqueeze(1)
        rows += len(ids)
        padded += int(at_end.any(1).sum())
        asked += int((at_end[:, :-1] & (labels == ids)[:, 1:]).sum())  # but for the first, which may be the text's end
    targets = sum(int((labels != IGNORED).sum()) for _, labels, *_ in labelled)
    if padded < max(2, ROWS_PADDED * rows) or asked <= 0.02 * targets or of_other_rows(labelled):
        return None
    message = f"{padded} of {rows} rows end in a run of one token, which is {asked / targets:.0%} of all targets"
    advice = "set the labels of padding to -100, but for the first end token"
    return Finding("padding_in_loss", "warning", "labels", message, advice, round(asked / targets, 3), 0.02)


def prompt_is_target(labelled: Sequence[Tokens]) -> Finding | None:
    """Rows that begin with targets and end in other text that is none; or that share a beginning which is asked for."""
    if max(agreement(labelled, shift) for shift in (0, 1)) < SHIFTED:
        return None
    n_turned = n_rows = n_targets = 0
    for ids, labels, *_ in labelled:
        is_target, at_end = labels != IGNORED, runs_of(ids)[1]
        after = (is_target.flip(1).cummax(1).values.flip(1) | at_end).logical_not().sum(1)  # a last run may be padding
        is_cut = len(after) > 1 and (after == after[0]).all()  # all at one place, as no prompts end
        n_turned += 0 if is_cut else int((is_target[:, :2].any(1) & (after >= PADDED)).sum())
        n_rows, n_targets = n_rows + len(ids), n_targets + int(is_target.sum())
    if n_turned >= max(2, TURNED * n_rows):
        message = f"{n_turned} of {n_rows} rows begin with targets and end in text that is none: prompts are learned, not answers"
        advice = "the mask is the wrong way round: labels of -100 belong to the prompts"
        return Finding("prompt_in_loss", "warning", "labels", message, advice, n_turned, round(TURNED * n_rows))
    # what nine in ten have in common is the median, too
    begins = torch.cat([ids[:, : min(ids.shape[1] for ids, *_ in labelled)] for ids, *_ in labelled])
    differ = (begins != begins.median(0).values).float().mean(0) > 1 - SHIFTED
    n_shared = int(differ.int().argmax())  # 0 where all differ at once, or none ever does
    share = sum(int((labels[:, :n_shared] != IGNORED).sum()) for _, labels, *_ in labelled) / max(n_targets, 1)
    if n_shared < PADDED or len(begins.unique(dim=0)) < FEWEST_ROWS or share <= ROWS_PADDED:
        return None
    message = f"rows share their first {n_shared} tokens, which are {share:.0%} of all targets and soon known"
    advice = "labels of -100 belong to the prompts"
    return Finding("prompt_in_loss", "warning", "labels", message, advice, round(share, 3), ROWS_PADDED)


def runs_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T): how many equal tokens end at each place, and whether the run is the row's last."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    is_new = torch.cat([torch.ones_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], 1)
    starts = (places * is_new).cummax(1).values
    return places - starts + 1, starts == starts[:, -1:]


def padding_of(ids: Tensor) -> Tensor:
    """(B, T): where rows end in runs of the token that most of them end in."""
    return runs_of(ids)[1] & (ids == torch.bincount(ids[:, -1]).argmax())


def windows_slide(seen: Sequence[Tokens]) -> Finding | None:
    """Rows that are the one before, or the same row of the batch before, moved on by a quarter of their length at most."""
    ids = torch.stack([tokens.ids for tokens in seen if tokens.ids.shape == seen[0].ids.shape])  # (n, B, T)
    rows = ids.flatten(0, 1)
    moved = [moved_on(rows[:-1], rows[1:]), moved_on(ids[:-1].flatten(0, 1), ids[1:].flatten(0, 1))]
    share, places = max(moved, key=lambda told: (told[0], -told[1]))
    if share <= SLID:
        return None
    on = f"{places} of {ids.shape[2]} places on"
    message = f"{share:.0%} of the rows are a neighbour, {on}: one text, again and again"
    return Finding("one_text", "warning", "data", message, SHUFFLE, round(share, 3), SLID)


def moved_on(before: Tensor, after: Tensor) -> tuple[float, int]:
    """Of pairs of rows (n, T) the share in which one is the other, moved on, and by how many places most are."""
    length, found = before.shape[1], {}
    if len(before) < PAIRS or length < 2 * HEAD:
        return 0.0, 0
    for first, second in ((before, after), (after, before)):
        begins = first.unfold(1, HEAD, 1)[:, 1 : length // 4 + 1]  # (n, places, HEAD)
        for i, place in (begins == second[:, None, :HEAD]).all(-1).nonzero().tolist():
            is_moved = torch.equal(first[i, place + 1 :], second[i, : length - place - 1])
            if is_moved and not torch.equal(first[i], second[i]):
                found[i] = place + 1
    return len(found) / len(before), Counter(found.values()).most_common(1)[0][0] if found else 0


def neighbours_alike(seen: Sequence[Tokens]) -> Finding | None:
    """Do rows share more of their rarer tokens with the row right before than with others? Held against other orders of them."""
    rows = [row for tokens in seen for row in tokens.ids][:MOST_ROWS]
    has = torch.zeros(len(rows), max(int(row.max()) for row in rows) + 1)
    for i, row in enumerate(rows):
        has[i, row] = 1.0
    has = has[:, (has.sum(0) > 1) & (has.sum(0) < len(rows) / 2)]  # those that tell texts apart
    if len(rows) < FEWEST_ROWS or not has.any():
        return None
    alike = F.normalize(has, dim=1) @ F.normalize(has, dim=1).T
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(200)]
    by_chance = torch.stack([alike[order[1:], order[:-1]].mean() for order in orders])
    mine = alike.diagonal(1).mean()
    sigmas = float((mine - by_chance.mean()) / by_chance.std().clamp(min=1e-9))
    if sigmas < ALIKE[0] or mine < ALIKE[1] * by_chance.mean():
        return None
    times = mine / by_chance.mean()
    message = f"rows are {times:.2g} times as like the row before as others: neighbours are of one text"
    advice = "shuffle windows over all documents, or pack several into a batch: one update then sees one document alone"
    return Finding("one_text", "warning", "data", message, advice, round(sigmas, 1), ALIKE[0])


def uneven(labelled: Sequence[Tokens]) -> Finding | None:
    counts = [int((labels != IGNORED).sum()) for _, labels, *_ in labelled]
    low, high = min(counts), max(counts)
    if len(counts) < 2 or high <= 2 * max(low, 1):
        return None
    message = f"batches have {low} to {high} targets: under accumulation the mean of their means is not the mean of their targets"
    advice = "divide the summed loss of all micro-batches by the number of all their targets"
    return Finding("uneven_targets", "info", "labels", message, advice, round(high / low, 2) if low else math.inf, 2)


TARGETS = (labels_elsewhere, of_other_rows, never_a_target, padding_is_target, prompt_is_target)  # asked of labels
