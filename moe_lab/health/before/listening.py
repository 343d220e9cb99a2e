"""What one forward pass shows to who listens: copies that are scaled, memories that end early, positions that are ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..during.forward import tensors_of
from ..findings import Finding, several
from ..sampling import tensor_kind

WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # MambaMixer, GRUBlock
PROMISES = re.compile(
    r"mamba|lstm|rwkv|recurren|retention|retnet|delta_?net|state_?space|hyena|(?<![a-z])(?:gru|rnn|ssm|s4d?|s5|lru)(?![a-z])"
)
FAR, NEAR = (
    32,
    8,
)  # distances of tokens: farthest asked for, since a real memory may fade to nothing, and least worth asking
TABLE = 0.02  # from a cosine to what 16 bits make of it


class Listening:
    """`with Listening(model) as heard:` around one forward pass, and the questions afterwards."""

    def __init__(self, model: nn.Module):
        self.model, self.ranks = model, Ranks()
        self.factors: dict[str, float] = {}  # module → by how much the tokens are multiplied that it leaves alone
        self.calls: dict[tuple, tuple] = {}  # kind of module that promises memory → its name, itself, its first call

    def __enter__(self) -> Listening:
        named = [(name, m) for name, m in self.model.named_modules() if name and any(True for _ in m.parameters())]
        self.handles = [module.register_forward_hook(self.copies(name)) for name, module in named]
        self.handles += [
            module.register_forward_pre_hook(self.keeper(name), with_kwargs=True) for name, module in promising(named)
        ]
        self.ranks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.ranks.__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def keeper(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.calls.setdefault((tensor_kind(name), type(module)), (name, module, args, kwargs))

        return hook

    def copies(self, name: str) -> Callable:
        """Of modules (B, T, D) → (B, T, D) with parameters, per token c = ⟨in, out⟩ / ⟨in, in⟩ and the rest: kept where 2–98 % of the tokens have no
        rest and one c that is not 1."""

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            out = output[0] if isinstance(output, (tuple, list)) and output else output
            if not (args and all(isinstance(t, Tensor) and t.ndim == 3 for t in (args[0], out))):
                return
            if args[0].shape != out.shape:
                return
            x, y = args[0].float().flatten(0, 1), out.float().flatten(0, 1)
            c = (x * y).sum(1) / x.square().sum(1).clamp(min=1e-12)
            left = (y - c.unsqueeze(1) * x).norm(dim=1) / y.norm(dim=1).clamp(min=1e-12)
            copies = c[(left < 1e-3) & (y.norm(dim=1) > 0)]
            is_some = 0.02 <= len(copies) / len(c) <= 0.98
            if is_some and float(copies.std(correction=0)) < 1e-3 and abs(float(copies.mean()) - 1) > 1e-2:
                self.factors[name] = float(copies.mean())

        return hook

    def scaled_copies(self) -> Finding | None:
        if not self.factors:
            return None
        name, factor = next(iter(self.factors.items()))
        message = f"tokens that {several(list(self.factors))} leaves alone come out {factor:.3g} times as large"
        advice = "add the residual once: where a token is skipped, put its input back, not the input and its copy"
        return Finding("scaled_copies", "error", name, message, advice, round(factor, 4), 1)

    def positions(self) -> Finding | None:
        if not self.ranks.found:
            return None
        chosen, of = self.ranks.found
        message = (
            f"{chosen} of {of} tokens are chosen and get the positions 0 to {chosen - 1}: their ranks, not their places"
        )
        advice = "hand the chosen indices, in order of time, to the rotary embedding as positions; tables are not to be cut to a length"
        return Finding("rank_positions", "warning", "positions", message, advice, chosen, of)

    def memories(self) -> Iterator[Finding]:
        """Outermost modules that promise memory by their name or class, called once more: does the output at one token depend on
        the first ones? By gradient, which shows what is too faint for a changed number."""
        for name, module, args, kwargs in self.calls.values():
            reach, asked = reach_of(module, args, kwargs)
            if asked >= NEAR and reach < asked:
                kind = type(module).__name__
                message = (
                    f"{name} ({kind}) hears the {reach} tokens before it and nothing of the others: it has no state"
                )
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
    given = {i: v for i, v in [*enumerate(args), *kwargs.items()]}
    key = next((k for k, v in given.items() if isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point()), None)
    if key is None:
        return 0, 0
    given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
    x = given[key].requires_grad_()
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


class Ranks(TorchFunctionMode):
    """Hears whether a top-k takes some of a dimension's places, and a table of cosines or sines has as many rows, 0 … k - 1."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: dict[int, int] = {}  # k → of how many
        self.found: tuple[int, int] | None = None

    def __torch_function__(self, func: Callable, types: Sequence, args: tuple = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "topk" and isinstance(answer, tuple):
            dim = next((d for d, (a, b) in enumerate(zip(args[0].shape, answer[0].shape, strict=True)) if a != b), None)
            if dim is not None and answer[0].shape[dim] >= NEAR:
                self.chosen[answer[0].shape[dim]] = args[0].shape[dim]
        elif self.chosen and name in ("cos", "sin", "__getitem__", "index_select", "embedding"):
            for dim in range(answer.ndim - 1 if isinstance(answer, Tensor) else 0):
                if (k := answer.shape[dim]) in self.chosen and is_table(answer.movedim(dim, -2)):
                    self.found = k, self.chosen[k]
        return answer


@torch.no_grad()
def is_table(x: Tensor) -> bool:
    """Whether the fastest column of (…, k, F) holds cosines or sines of 0 … k - 1."""
    if not (x.is_floating_point() or x.is_complex()) or x.shape[-1] < 2 or not x.numel():
        return False
    column = (x.real if x.is_complex() else x)[..., 0].float()
    places = torch.arange(x.shape[-2], device=x.device).float()
    return bool(torch.minimum((column - places.cos()).abs(), (column - places.sin()).abs()).max() < TABLE)
