"""What one forward pass shows to who listens: copies that are scaled, memories that end early, positions that are ranks."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import RankPositions
from ..during.forward import memory
from ..during.heard import tensors_of
from ..during.listener import Listener
from ..findings import Finding, grouped, several
from ..sampling import tensor_kind
from ..tokens import PADDED, ROWS_PADDED, padding_of, within

WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # MambaMixer, GRUBlock
PROMISES = re.compile(
    r"mamba|lstm|rwkv|recurren|retention|retnet|delta_?net|state_?space|hyena|(?<![a-z])(?:gru|rnn|ssm|s4d?|s5|lru)(?![a-z])"
)
# distances of tokens: farthest asked for, since a real memory may fade to nothing, and least worth asking
FAR, NEAR = 32, 8
# share of the input in the output, in each block of a kind, from which on it is there twice or larger; of 20 families' fresh blocks
# it is 0.78 to 1.13
GROWN = 1.6
UNEVEN = 0.3  # deviation of that between tokens, over it
BEHIND = 10.0  # times that a padding may weigh more than a text's token: a mean over all places weighs them alike
READ_AT_END = (
    "the answer is read behind the padding: take a recurrent network's output at each text's last token (or pack_padded_sequence), a "
    "causal one's at the last token that is real"
)
UNHEARD = 0.2  # share of tokens that nothing depends on although they are there: one that is read out may be all
TURNED_ROUND = "a mask is the wrong way round: torch's key_padding_mask is True where a token is padding, transformers' attention_mask is 1 where it is none"
ASKED_FOR = 0.01  # share of the ids that are a row without a gradient
NO_PADDING = "leave padding_idx out, or number what is real from 1 on"
FEWEST = 3  # different tokens of which one factor is told


class Listening(Listener):
    """Listens to one forward pass; the questions afterwards."""

    where, what = "modules", "scaled copies, and memories that end early, are not looked for"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.ranks = model, RankPositions()
        self.factors: dict[str, float] = {}  # module → by how much the tokens are multiplied that it leaves alone
        # module of several matrices → how often its output holds its input, over all tokens
        self.shares: dict[str, float] = {}
        # … and whether it is there in each token about as often: else it is an answer that happens to have its shape
        self.even: set[str] = set()
        self.doubled: list[str] = []  # those that return nothing but their input, twice
        # of each call of a recurrent cell: whether its state has a graph, where that lies if there is one, and where the new one
        self.cells: dict[str, list[tuple]] = {}
        # ids (B, T) that tables were given, and the size of the loss's gradient at each
        self.looked_up: list[tuple[Tensor, list[Tensor]]] = []
        # table → its row without a gradient, the share of the ids that ask for it, padding not counted, and is it no zeros
        self.stuck_rows: dict[str, tuple[int, float, bool]] = {}
        self.calls: dict[tuple, tuple] = {}  # kind of module that promises memory → its name, itself, its first call

    def hooks(self, hook: Callable) -> Iterator[Any]:
        named = [(name, m) for name, m in self.model.named_modules() if name and any(True for _ in m.parameters())]
        for name, module in named:
            yield module.register_forward_hook(hook(partial(self.compare, name)))
            if isinstance(module, nn.RNNCellBase):
                yield module.register_forward_hook(hook(partial(self.count_call, name)), with_kwargs=True)
            if isinstance(module, nn.Embedding):
                yield module.register_forward_hook(hook(self.keep_ids))
                yield module.register_forward_hook(hook(partial(self.count_padding, name)))
        for name, module in promising(named):
            yield module.register_forward_pre_hook(hook(partial(self.keep_call, name)), with_kwargs=True)

    def keep_call(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls.setdefault((tensor_kind(name), type(module)), (name, module, args, kwargs))

    def keep_ids(self, module: nn.Module, args: tuple, output: Any) -> None:
        if args and args[0].ndim == 2 and output.requires_grad:
            taught: list[Tensor] = []
            output.register_hook(lambda gradient: taught.append(gradient.float().norm(dim=-1)))
            self.looked_up.append((args[0].detach(), taught))

    def count_padding(self, name: str, module: nn.Embedding, args: tuple, output: Any) -> None:
        """A row that never learns and stands where padding does not: within rows, or for the one id of an example."""
        row, ids = module.padding_idx, args[0].detach()
        if row is not None and ids.ndim < 3 and module.weight.requires_grad:
            is_row = (ids == row).view(len(ids), -1) if ids.ndim else (ids == row).view(1, 1)
            share = float((within(is_row) if is_row.shape[1] > 1 else is_row).float().mean())
            self.stuck_rows[name] = row, share, bool(module.weight[row].any())

    def rows_stay(self) -> Iterator[Finding]:
        for name, (row, share, has_values) in self.stuck_rows.items():
            if share > ASKED_FOR:  # zeros may stand for what is not known
                message = f"row {row} of {name} is its padding_idx and gets no gradient, and is {share:.0%} of what it is asked for, where no padding stands"
                yield Finding(
                    "no_gradient",
                    "warning" if has_values else "info",
                    name,
                    message,
                    NO_PADDING,
                    round(share, 3),
                    ASKED_FOR,
                )

    def padding_alone(self) -> Iterator[Finding]:
        """Tokens before the padding at their rows' ends, either way round, that no gradient reaches where it reaches the padding; or next to
        none, where an answer is read behind it."""
        for ids, taught in self.looked_up:
            told = sum((t.cpu() for t in taught), torch.zeros(ids.shape))
            ways = [(x, padding_of(x), t) for x, t in ((ids.cpu(), told), (ids.cpu().T, told.T))]
            x, is_padding, told = max(ways, key=lambda way: way[1].sum())
            if is_padding[:, -2:-1].float().mean() > ROWS_PADDED and (~is_padding).any():
                yield from self.heard_of(int(x[is_padding][0]), told, is_padding)

    def heard_of(self, pad: int, told: Tensor, is_padding: Tensor) -> Iterator[Finding]:
        """`told`: (B, T), the size of the gradient at each token."""
        of_text, of_padding = (float((told[which] > 0).float().mean()) for which in (~is_padding, is_padding))
        long = told[rows := (is_padding.sum(1) >= PADDED) & ~is_padding.all(1)]
        means = [(long * which[rows]).sum(1) / which[rows].sum(1) for which in (is_padding, ~is_padding)]
        times = float((means[0] / means[1].clamp(min=1e-30)).median()) if len(long) else 0.0
        if of_text < UNHEARD < 1 - UNHEARD < of_padding:
            message = f"the loss depends on {of_padding:.0%} of the padding (token {pad}) and on {of_text:.0%} of the tokens before it"
            yield Finding("no_effect", "warning", "mask", message, TURNED_ROUND, round(of_text, 3), UNHEARD)
        elif times > BEHIND:
            message = (
                f"a padding (token {pad}) moves the loss {times:.2g} times as much as a token of the text before it"
            )
            yield Finding("no_effect", "warning", "padding", message, READ_AT_END, round(times, 1), BEHIND)

    def count_call(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Of a cell that learns: the state that it was given, and that it gave the last time."""
        given, made = tensors_of([args[1:], kwargs.get("hx")]), tensors_of(output)
        if any(t.requires_grad for t in made):
            self.cells.setdefault(name, []).append(
                (any(t.requires_grad for t in given), *map(memory, given[:1]), memory(made[0]))
            )

    def compare(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Of modules (B, T, D) → (B, T, D) with a matrix, per token c = ⟨in, out⟩ / ⟨in, in⟩ and the rest: kept where 2–98 % of
        the tokens have no rest and one c that is not 1: several that differ, since a norm multiplies each by its own."""
        n_matrices = sum(p.ndim > 1 for p in module.parameters())
        if not n_matrices:
            return  # a norm gives each token a length of its own, and some the same
        given = args[0] if args else None
        out = output[0] if isinstance(output, (tuple, list)) and output else output
        if not all(isinstance(t, Tensor) and t.ndim == 3 and t.shape == given.shape for t in (given, out)):
            return
        x, y = given.detach().float().flatten(0, 1), out.detach().float().flatten(0, 1)
        c = (x * y).sum(1) / x.square().sum(1).clamp(min=1e-12)
        left = (y - c.unsqueeze(1) * x).norm(dim=1) / y.norm(dim=1).clamp(min=1e-12)
        alone = (left < 1e-3) & (y.norm(dim=1) > 0)
        copies = c[alone]
        is_some = 0.02 <= len(copies) / len(c) <= 0.98 and len(x[alone].norm(dim=1).unique()) >= FEWEST
        if is_some and float(copies.std(correction=0)) < 1e-3 and abs(float(copies.mean()) - 1) > 1e-2:
            self.factors[name] = float(copies.mean())
        if n_matrices > 1 and "norm" not in type(module).__name__.lower():  # one that scales by matrices of its own
            share = float((x * y).sum() / x.square().sum().clamp(min=1e-12))
            self.even |= {name} if float(c.std(correction=0)) < UNEVEN * abs(share) else set()
            self.shares.setdefault(name, share)
        if alone.all() and not torch.equal(x, y) and torch.equal(2 * x, y):
            self.doubled.append(name)

    def scaled_copies(self) -> Iterator[Finding]:
        for name, factor in list(self.factors.items())[:1]:
            message = f"tokens that {several(list(self.factors))} leaves alone come out {factor:.3g} times as large"
            advice = "add the residual once: where a token is skipped, put its input back, not the input and its copy"
            yield Finding("scaled_copies", "error", name, message, advice, round(factor, 4), 1)
        siblings = [names for names in grouped(self.shares, tensor_kind).values() if len(names) > 1]
        grown = [
            names for names in siblings if all(self.shares[name] > GROWN for name in names) and self.even & {*names}
        ]
        if ill := self.doubled or next(iter(grown), []):
            factor = 2 if self.doubled else round(min(self.shares[name] for name in ill), 2)
            message = (
                f"{several(ill)} returns its input {factor:.2g} times, beside what it adds: the stream grows with each"
            )
            advice = "add the residual once and as it is, in the block or in the layer that is left out, not in both"
            yield Finding("scaled_copies", "warning", ill[0], message, advice, factor, 1)

    def positions(self) -> Iterator[Finding]:
        for chosen, of in [self.ranks.found] if self.ranks.found else []:
            message = f"{chosen} of {of} tokens are chosen and get their ranks, 0 to {chosen - 1}, as positions"
            advice = "hand the chosen indices, in order of time, to the rotary embedding; its tables are not to be cut to a length"
            yield Finding("rank_positions", "warning", "positions", message, advice, chosen, of)

    def memories(self) -> Iterator[Finding]:
        """Outermost modules that promise memory by their name or class, called once more: does the output at one token depend on
        the first ones? By gradient, which shows what is too faint for a changed number. Cells of torch's own are counted."""
        for name, states in self.cells.items():
            calls, pairs = len(states), list(pairwise(states))
            # no state, or that of the call before
            handed = [len(now) == 2 or now[1] == before[-1] for before, now in pairs]
            if calls >= NEAR and all(handed) and not any(taught for taught, *_ in states):
                message = f"{name} is called {calls} times in a pass, and never with a state that has a graph: no step learns for the next"
                advice = "hand each call the state of the one before; detach it between windows, not between steps"
                yield Finding("short_memory", "warning", name, message, advice, 0, calls)
        for name, module, args, kwargs in self.calls.values():
            reach, asked = reach_of(module, args, kwargs)
            if asked >= NEAR and reach < asked:
                hears = f"hears the {reach} tokens before it and nothing of the others: it has no state"
                message = f"{name} ({type(module).__name__}) {hears}"
                advice = "a stand-in may have taken the place of a kernel package that is missing: install it, or use a plain scan"
                yield Finding("short_memory", "warning", name, message, advice, reach, asked)


def promising(named: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Outermost ones alone, of torch's own none: a norm inside of such a block bears its name as well. With a matrix."""
    inside: set[int] = set()
    for name, module in named:
        own = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        words = " ".join(WORDS.sub("_", word).lower() for word in (own, type(module).__name__))
        is_ours = not type(module).__module__.startswith("torch.nn")
        has_matrix = any(p.ndim > 1 for p in module.parameters())
        if id(module) not in inside and is_ours and has_matrix and PROMISES.search(words):
            inside |= {id(child) for child in module.modules()}
            yield name, module


def reach_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """How far before a token the farthest is that its output depends on, and how far was asked, 0 where it cannot be. Time is the
    second dimension, or the first."""
    given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in [*enumerate(args), *kwargs.items()]}
    x = next((v for v in given.values() if isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point()), None)
    if x is None:
        return 0, 0
    x.requires_grad_()
    at = min(x.shape[1] - 1, FAR)
    with torch.enable_grad():
        outputs = tensors_of(module(*(given[i] for i in range(len(args))), **{k: given[k] for k in kwargs}))
        y = next((y for y in outputs if y.ndim == 3 and y.shape[:2] == x.shape[:2] and y.grad_fn is not None), None)
        if y is None:
            return 0, 0
        grad = torch.autograd.grad(y[-1, at].float() @ torch.arange(1.0, y.shape[-1] + 1, device=y.device).cos(), x)[0]
    heard = grad.abs().amax(2) > 0
    if heard[:-1].any():  # another sequence, or time comes first
        return 0, 0
    return at - int(heard[-1].int().argmax()), at
