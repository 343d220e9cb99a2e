"""What a language model is asked for: ids, targets and what each weighs, read off the gradient of its first passes' logits.

For any softmax cross-entropy, wherever it is computed, a row of that gradient is w · (p − onehot): the negative entry is the
target, a row of zeros is no target, and w is the weight of that token in the loss that is minimised.
"""

# Shapes: B batch, T time, V vocabulary, N = B·T rows, R rows that are looked at closely.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import tokens as about
from ..findings import Finding
from ..tokens import IGNORED, SHIFTED, Tokens, agreement

MOST = 64  # passes that are heard
ELEMENTS = 2**21  # R · V, the logits that are kept until the backward pass: 8 MB in float32
FIT = 0.05  # share of the gradient, squared, that w · (p − onehot) may leave: label smoothing leaves less


class Pass(NamedTuple):
    """One forward and backward pass; all but the tokens is of R of its rows."""

    update: int  # that it is for, from 1
    tokens: Tokens
    loss: float  # mean cross-entropy of the targets, nats
    weight: float  # the one w that fits best
    rest: float  # share of the gradient, squared, that is no cross-entropy, whatever the weights
    least: float  # the smallest w's sign: below 0 in preferences and rewards

    @property
    def n_targets(self) -> int:
        return int((self.tokens.labels != IGNORED).sum())

    @property
    def is_likelihood(self) -> bool:
        return self.rest < FIT and self.least > 0


class Heard:
    """Listens to the table of tokens, the head and the whole model. Ids, targets and four numbers a pass wait for `fetch`."""

    def __init__(self, model: nn.Module, table: nn.Module | None, head: nn.Module | None):
        self.model, self.head = model, head
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        # an encoder and a decoder may each have one, of the same weights or not, and an adapter a copy that takes its place
        self.tables = [m for m in embeddings if table is not None and m.weight.shape == table.weight.shape]
        self.update, self.n_heard, self.vocab_size, self.elements = 1, 0, 0, ELEMENTS
        self.is_inside = False  # of the model's own forward pass, which may do more than its head
        self.ids: list[Tensor] = []  # what the table was asked for in this pass: the last is a decoder's
        self.given: list[Tensor] = []  # … and the model
        self.scores: Any = None
        self.waiting: list[tuple[int, Tensor, Tensor, Tensor, Tensor | None]] = []
        self.passes: list[Pass] = []
        self.found: list[Finding] = []  # in the batches that were heard
        self.first_loss: float | None = None  # mean cross-entropy of the first update's targets, over
        self.n_first = 0  # passes
        self.call = 0  # of the table, in the last pass that was heard: which one holds the ids
        self.is_time_first = False
        self.is_told_more = False  # than a decoder's tokens, as by an encoder: these alone need not be a text
        self.was_tried, self.leak = False, None  # whether the model sees the future

    def hooks(self, hook: Callable) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(hook(self.begin), with_kwargs=True)
        for table in self.tables:
            yield table.register_forward_pre_hook(hook(self.note_ids))
        if self.head is not None:
            yield self.head.register_forward_hook(hook(partial(self.note_scores, hook)))
        yield self.model.register_forward_hook(hook(partial(self.end, hook)))

    def forget(self) -> None:
        self.ids, self.given, self.scores, self.waiting, self.passes = [], [], None, [], []

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.is_inside, self.ids, self.scores = True, [], None
        self.given = [t.detach() for t in tensors_of([args, kwargs]) if t.ndim > 1] if self.n_heard < MOST else []

    def note_ids(self, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 2:
            self.ids = [*self.ids[-3:], args[0]]

    def note_scores(self, hook: Callable, module: nn.Module, args: tuple, output: Any) -> None:
        if self.is_inside:
            self.scores = output
        else:
            self.hear(hook, output)

    def end(self, hook: Callable, module: nn.Module, args: tuple, output: Any) -> None:
        self.is_inside = False
        self.hear(hook, next((t for t in tensors_of(output) if self.ids_of(t) is not None), self.scores))

    def ids_of(self, scores: Any) -> int | None:
        """Which call of the table was for these scores, (B, T, V), or (B·T, V)."""
        if not isinstance(scores, Tensor) or not scores.requires_grad or not scores.is_floating_point():
            return None
        for n in reversed(range(len(self.ids))):
            shape = self.ids[n].shape
            if scores.ndim in (2, 3) and scores.shape[:-1] in (shape, (shape.numel(),)) and scores.shape[-1] > 2:
                return n
        return None

    def hear(self, hook: Callable, scores: Any) -> None:
        """Wait for the gradient of a pass's scores; of some of its rows they are kept until then."""
        call, ids, given = self.ids_of(scores), self.ids, self.given
        self.ids, self.given, self.scores = [], [], None
        if call is None or self.n_heard >= MOST:
            return
        self.n_heard, self.call, self.vocab_size = self.n_heard + 1, call, scores.shape[-1]
        self.is_told_more |= len(ids) > 1
        rows = scores.detach().reshape(-1, self.vocab_size)
        stride = -(-rows.numel() // self.elements)
        kept = ids[call].to(torch.int32), rows[::stride].clone(), stride, about.beside(ids[call], given)
        scores.register_hook(hook(partial(self.answer, *kept)))

    def answer(self, ids: Tensor, scores: Tensor, stride: int, beside: Tensor | None, gradient: Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        least, target = rows.min(-1)  # (N,)
        target = torch.where(least < 0, target, IGNORED)
        numbers = compared(scores.float(), rows[::stride].float(), target[::stride])
        self.waiting.append((self.update, ids, target.to(torch.int32).view(ids.shape), numbers, beside))

    # ---- what was heard ----------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        if not self.waiting:
            return
        for update, ids, labels, numbers, beside in self.waiting:
            tokens = Tokens(ids.cpu().long(), labels.cpu().long(), None if beside is None else beside.cpu())
            self.passes.append(Pass(update, tokens, *numbers.tolist()))
        self.waiting = []
        labelled = [p.tokens for p in self.passes]
        turned = [tokens._replace(ids=tokens.ids.T, labels=tokens.labels.T) for tokens in labelled]
        if agreement(labelled, 1) < SHIFTED < agreement(turned, 1):  # (T, B), as in torch's own recurrent layers
            self.is_time_first = True
            self.passes = [p._replace(tokens=tokens) for p, tokens in zip(self.passes, turned, strict=True)]
        if first := [p for p in self.once if p.update == 1]:
            self.n_first = len(first)
            self.first_loss = sum(p.loss * p.n_targets for p in first) / sum(p.n_targets for p in first)
        self.found = [finding for finding in self.judged() if finding is not None]

    @property
    def likelihoods(self) -> list[Pass]:
        return [p for p in self.passes if p.is_likelihood]

    @property
    def once(self) -> list[Pass]:
        """The first of each batch: it may be used several times for one update, by LBFGS, SAM, or for two draws of dropout."""
        return [*{(p.update, about.raw(p.tokens.rows)): p for p in reversed(self.likelihoods)}.values()][::-1]

    @property
    def is_next_token(self) -> bool:
        """Whether the targets are the next tokens: then the model must not see them."""
        return agreement([p.tokens for p in self.likelihoods], 1) >= SHIFTED

    def judged(self) -> Iterator[Finding | None]:
        """What `check_data` would say of these batches."""
        labelled = [p.tokens for p in self.likelihoods]
        if labelled:
            asked = sum(int((t.labels != IGNORED).sum()) for t in labelled)
            is_whole = 2 * asked > sum(t.ids.numel() for t in labelled)  # else there are holes
            if self.is_next_token and is_whole and not self.is_told_more:
                yield about.looks_random([t.ids for t in labelled], self.vocab_size)
            for check in (about.copies_inputs, *about.TARGETS):
                yield check(labelled)
            once = [p.tokens for p in self.once]
            yield about.rows_repeat(once) or about.windows_slide(once)


def compared(scores: Tensor, gradient: Tensor, target: Tensor) -> Tensor:
    """(4,) float32: `Pass`'s numbers of scores and gradient (R, V) and targets (R,)."""
    asked = target >= 0
    p = scores.softmax(-1)
    at = target.clamp(min=0).unsqueeze(-1)
    likely = p.gather(-1, at).squeeze(-1)
    p.scatter_add_(-1, at, -torch.ones_like(at, dtype=p.dtype))
    p *= asked.unsqueeze(-1)
    size = gradient.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    gradient = gradient / size
    both, own = (gradient * p).sum(-1), p.square().sum(-1)  # (R,)
    whole = gradient.square().sum().clamp(min=1e-30)
    weight = both.sum() / own.sum().clamp(min=1e-30)
    explained = (both.square() / own.clamp(min=1e-30)).sum() / whole
    loss = -(likely.clamp(min=1e-30).log() * asked).sum() / asked.sum()
    least = torch.where(asked, both, torch.inf).min()
    return torch.stack([loss, weight * size, 1 - explained, least.sign()])


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's answer and their places in it, in their order."""
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = {key: getattr(output, key, None) for key in output.__dataclass_fields__}
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, part in output.items():
            yield from named_tensors(part, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):  # what else can be gone through may be gone afterwards
        for n, part in enumerate(output):
            yield from named_tensors(part, f"{name}[{n}]")
    else:  # a distribution, or another object that has some, or is made of another one
        parts = vars(output) if isinstance(getattr(output, "__dict__", None), dict) else {}
        yield from ((f"{name}.{key}", part) for key, part in parts.items() if isinstance(part, Tensor))
        for key, part in parts.items():
            if isinstance(part, torch.distributions.Distribution):
                yield from named_tensors(part, f"{name}.{key}")


def tensors_of(output: Any) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(output)]
