"""How information flows: from later tokens to earlier ones, from one sequence to another, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ..findings import Finding, several
from ..random_state import RandomState

LEAK = 1e-4  # of the logits' deviation: grouped kernels are not bit-stable when counts change
OVER_TIME = "look for a missing mask, a convolution padded on both sides, a top-k or a statistic over the sequence"
OVER_BATCH = "look for a statistic over the batch, or a mask or reshape that mixes sequences"
OVER_LENGTH = (
    "look for a sum or mean over the sequence, a scale or a table made from its length, positions counted from its end"
)
ROWS = 32  # sequences of a pass
SIGMAS = 5.0  # distances between two trainings' outputs that training and evaluation may be apart
SAME = 1e-3  # of the outputs' deviation: below it two modes are one
# of a layer that training left out: one that is left out half of the time stays away from all in one of 512
RETRIES = 8


@torch.no_grad()
def check_causality(
    fn: Callable[[Tensor], Tensor], vocab_size: int, seq_len: int, device: torch.device | str = "cpu", seed: int = 0
) -> Finding | None:
    """Does a token change the logits before it, or those of another sequence? By perturbation at every position. A warning where
    the first half of a text has other logits alone than with the rest after it: something grows with the length.

    `fn(ids)` maps ids (B, T) int64 to logits (B, T, …), in evaluation mode and without noise of its own; call it in float32.
    A top-k over time leaks through a discrete choice, which a gradient test does not see. It takes a forward pass of 32 sequences
    for every 31 positions, and four small ones. Raises ValueError where fn's answer has another shape, or two calls differ.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: two tokens are needed at least")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, seq_len), generator=generator)
    others = (ids + torch.randint(1, vocab_size, (seq_len, seq_len), generator=generator)) % vocab_size
    late = torch.arange(seq_len) >= torch.arange(seq_len).unsqueeze(1)  # row p: from position p on
    changed = torch.where(late, others, ids)  # (T, T)
    pair = torch.cat([ids, ids])
    before, again = (logits_of(fn, pair.to(device)) for _ in range(2))
    if not torch.equal(before, again):
        raise ValueError("fn(ids) gives other logits when it is called again: switch dropout off, fix its random state")
    limit = LEAK * float(before.std())
    leaks: dict[int, tuple[int, float]] = {}  # position that hears → position that changed, by how much
    for positions in torch.arange(1, seq_len).split(ROWS - 1):
        after = logits_of(fn, torch.cat([ids, changed[positions]]).to(device))
        for row, p in enumerate(positions.tolist(), 1):
            moved = (after[row, :p] - after[0, :p]).abs().flatten(1).amax(1)
            for hears in (moved > limit).nonzero().flatten().tolist():
                leaks.setdefault(hears, (p, float(moved[hears])))
    leak = partial(Finding, "future_leak", "error")
    if leaks:
        hears, (p, size) = next(iter(leaks.items()))
        others = f"{len(leaks)} of {seq_len - 1} positions hear of later tokens"
        message = f"a token changed at position {p} moves the logits at position {hears}, before it; {others}"
        return leak(f"position {hears}", message, OVER_TIME, round(size, 6), round(limit, 6))
    moved = float((logits_of(fn, torch.cat([ids, changed[:1]]).to(device))[0] - before[0]).abs().max())
    if moved > limit:
        message = "changing one sequence of a batch moves the logits of another"
        return leak("batch", message, OVER_BATCH, round(moved, 6), round(limit, 6))
    half = seq_len // 2
    moved = float((logits_of(fn, pair[:, :half].to(device)) - before[:, :half]).abs().max())
    if moved <= limit:
        return None
    message = f"the first {half} tokens have other logits alone than at the start of {seq_len}"
    return Finding("future_leak", "warning", "length", message, OVER_LENGTH, round(moved, 6), round(limit, 6))


def logits_of(fn: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
    """fn(ids) as (B, T, …) float32 on the CPU. Raises ValueError for another shape."""
    logits = fn(ids)
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        got = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"fn(ids) must give logits (B, T, …) for ids {tuple(ids.shape)}; it gave {got}")
    return logits.detach().float().cpu()


@torch.no_grad()
def check_train_eval(fn_train: Callable[[Any], Any], fn_eval: Callable[[Any], Any], batch: Any) -> Finding | None:
    """Is a mechanism missing in one mode? Both functions map a batch to the same kind of output, say logits.

    Layers that each pass makes anew are named, with other weights; else modules with parameters that compute in one mode only.
    Else outputs that are further apart than 5 times what two calls of `fn_train` differ by (dropout) are an `info`; and where these
    differ, two of `fn_eval` are compared: a dropout that still drops is a warning, other noise an `info`. Random state is put back.
    """
    with RandomState([]):
        with modules_called() as (in_training, made):
            trained = fn_train(batch)
        with modules_called() as (in_evaluation, made_again):
            evaluated = fn_eval(batch)
        if anew := [in_evaluation.pop(key) for key in made_again.keys() - made if key in in_evaluation]:
            if finding := noise_in_evaluation(fn_eval, batch, evaluated, anew):
                return finding
            in_training = {key: name for key, name in in_training.items() if key not in made or key in in_evaluation}
        for _ in range(RETRIES if in_evaluation.keys() - in_training.keys() else 0):  # layers may be left out at random
            with modules_called() as (more, _):
                fn_train(batch)
            in_training |= {key: more[key] for key in more.keys() & in_evaluation.keys()}
        for ran, missing, word in (
            (in_training, in_evaluation, "training"),
            (in_evaluation, in_training, "evaluation"),
        ):
            if only := [name for key, name in ran.items() if key not in missing]:
                message = f"{len(only)} modules with parameters compute in {word} only: {several(only)}"
                advice = "let both modes take the same way; a head that is meant for training alone may be ignored here"
                return Finding("mode_mismatch", "warning", only[0], message, advice, len(only), 0)
        trained, evaluated = (getattr(o, "logits", o) for o in (trained, evaluated))
        if not all(isinstance(o, Tensor) and o.shape == trained.shape for o in (trained, evaluated)):
            return None
        apart, least = rms(trained - evaluated), SAME * float(evaluated.float().std(correction=0))
        if apart <= least:
            return None
        again = fn_train(batch)
        noise = rms(trained - getattr(again, "logits", again))
        if noise > least and (finding := noise_in_evaluation(fn_eval, batch, evaluated)):
            return finding
    limit = max(SIGMAS * noise, least)
    if apart <= limit:
        return None
    message = f"outputs of the two modes are {apart:.3g} apart (RMS), those of two trainings {noise:.3g}"
    advice = "batch statistics and top-k choices differ so by design; else look for what one mode leaves out"
    return Finding("mode_mismatch", "info", "outputs", message, advice, round(apart, 6), round(limit, 6))


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


class Dropping(TorchFunctionMode):
    """Hears which of torch's functions drop something."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if "dropout" in name:
            with suppress(ValueError, TypeError):  # one of C has no signature: (input, p, train)
                given = dict(zip(("input", "p", "training"), args, strict=False)) | given
                given = {k: p.default for k, p in signature(function).parameters.items()} | given
        if given.get("dropout_p") or (given.get("training") is True and given.get("p")):
            self.heard.add(name)
        return function(*args, **kwargs or {})


def noise_in_evaluation(fn: Callable, batch: Any, before: Any, anew: Sequence[str] = ()) -> Finding | None:
    """A second evaluation beside the first: do they differ, and is it layers made `anew`, a dropout, or other random numbers?"""
    with Dropping() as dropping:
        again = fn(batch)
    before, again = (getattr(o, "logits", o) for o in (before, again))
    if not isinstance(again, Tensor) or again.shape != before.shape:
        return None
    apart, least = rms(again - before), SAME * float(before.float().std(correction=0))
    if apart <= least:
        return None
    told = round(apart, 6), round(least, 6)
    if anew:
        message = f"each forward pass makes {len(anew)} layers anew, with other weights: {several(anew)}"
        advice = "make them once, in the module's __init__, and before the optimizer: these never learn anything"
        return Finding("not_in_optimizer", "error", anew[0], message, advice, *told)
    message, names = f"two evaluations of one batch are {apart:.3g} apart (RMS)", sorted(dropping.heard)
    if not names:
        advice = "random numbers that are drawn by design, as samples or noise; a dropout of one's own would look alike"
        return Finding("mode_mismatch", "info", "evaluation", message, advice, *told)
    advice = "give F.dropout training=self.training, and attention's dropout_p 0 in evaluation; a few models are meant to drop there"
    return Finding("mode_mismatch", "warning", names[0], f"{message}: {several(names)} still drops", advice, *told)


Modules = dict[int, str]


@contextmanager
def modules_called() -> Iterator[tuple[Modules, dict[int, nn.Module]]]:
    """The modules with parameters whose forward pass runs, id → class and shape; those that got a parameter meanwhile, by id."""
    called: Modules = {}
    made: dict[int, nn.Module] = {}

    def note(module: nn.Module, args: tuple) -> None:
        if (first := next(module.parameters(), None)) is not None:
            called.setdefault(id(module), f"{type(module).__name__}{tuple(first.shape)}")

    def given(module: nn.Module, name: str, p: Tensor) -> None:
        made[id(module)] = module

    handles = [register_module_forward_pre_hook(note), register_module_parameter_registration_hook(given)]
    try:
        yield called, made
    finally:
        for handle in handles:
            handle.remove()
