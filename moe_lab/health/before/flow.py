"""How information flows: from later tokens to earlier ones, from one sequence to another, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..findings import Finding, several
from ..random_state import RandomState

LEAK = 1e-4  # of the logits' deviation: grouped kernels are not bit-stable when counts change
OVER_TIME = "look for a missing mask, a convolution padded on both sides, a top-k or a statistic over the sequence"
OVER_BATCH = "look for a statistic over the batch, or a mask or reshape that mixes sequences"
SIGMAS = 5.0  # distances between two trainings' outputs that training and evaluation may be apart
SAME = 1e-3  # of the outputs' deviation: below it two modes are one


@torch.no_grad()
def check_causality(
    fn: Callable[[Tensor], Tensor], vocab_size: int, seq_len: int, device: torch.device | str = "cpu", seed: int = 0
) -> Finding | None:
    """Does a token change the logits before it, or those of another sequence? By perturbation at every position.

    `fn(ids)` maps ids (B, T) int64 to logits (B, T, …), in evaluation mode and without noise of its own; call it in float32.
    A top-k over time leaks through a discrete choice, which a gradient test does not see. It takes
    seq_len + 3 forward passes. Raises ValueError where fn's answer has another shape, or two calls differ.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: two tokens are needed at least")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, seq_len), generator=generator)
    others = (ids + torch.randint(1, vocab_size, (seq_len, seq_len), generator=generator)) % vocab_size
    late = torch.arange(seq_len) >= torch.arange(seq_len).unsqueeze(1)  # row p: from position p on
    changed = torch.where(late, others, ids)  # (T, T)
    before, again = (logits_of(fn, ids.to(device)) for _ in range(2))
    if not torch.equal(before, again):
        raise ValueError("fn(ids) gives other logits when it is called again: switch dropout off, fix its random state")
    limit = LEAK * float(before.std())
    leaks: dict[int, tuple[int, float]] = {}  # position that hears → position that changed, by how much
    for p in range(1, seq_len):
        after = logits_of(fn, changed[p : p + 1].to(device))
        moved = (after[0, :p] - before[0, :p]).abs().flatten(1).amax(1)
        for hears in (moved > limit).nonzero().flatten().tolist():
            leaks.setdefault(hears, (p, float(moved[hears])))
    leak = partial(Finding, "future_leak", "error")
    if leaks:
        hears, (p, size) = next(iter(leaks.items()))
        others = f"{len(leaks)} of {seq_len - 1} positions hear of later tokens"
        message = f"a token changed at position {p} moves the logits at position {hears}, before it; {others}"
        return leak(f"position {hears}", message, OVER_TIME, round(size, 6), round(limit, 6))
    pair = torch.cat([ids, changed[:1]]).to(device)
    moved = float((logits_of(fn, pair)[0] - logits_of(fn, torch.cat([ids, ids]).to(device))[0]).abs().max())
    if moved <= limit:
        return None
    message = "changing one sequence of a batch moves the logits of another"
    return leak("batch", message, OVER_BATCH, round(moved, 6), round(limit, 6))


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

    Modules with parameters that compute in one mode only are named. Else outputs that are further apart than 5 times what two
    calls of `fn_train` differ by (dropout) are an `info`. Random state is put back.
    """
    state = RandomState([])
    try:
        with modules_called() as in_training:
            first, second = (fn_train(batch) for _ in range(2))
        with modules_called() as in_evaluation:
            evaluated = fn_eval(batch)
    finally:
        state.put_back()
    for ran, missing, word in ((in_training, in_evaluation, "training"), (in_evaluation, in_training, "evaluation")):
        if only := [name for key, name in ran.items() if key not in missing]:
            message = f"{len(only)} modules with parameters compute in {word} only: {several(only)}"
            advice = "let both modes take the same way; a head that is meant for training alone may be ignored here"
            return Finding("mode_mismatch", "warning", only[0], message, advice, len(only), 0)
    outputs = [getattr(o, "logits", o) for o in (first, second, evaluated)]
    if not all(isinstance(o, Tensor) and o.shape == outputs[0].shape for o in outputs):
        return None
    noise, apart = (float((outputs[0] - o).float().square().mean().sqrt()) for o in outputs[1:])
    limit = max(SIGMAS * noise, SAME * float(outputs[2].float().std(correction=0)))
    if apart <= limit:
        return None
    message = f"outputs of the two modes are {apart:.3g} apart (RMS), those of two trainings {noise:.3g}"
    advice = "batch statistics and top-k choices differ so by design; else look for what one mode leaves out"
    return Finding("mode_mismatch", "info", "outputs", message, advice, round(apart, 6), round(limit, 6))


@contextmanager
def modules_called() -> Iterator[dict[int, str]]:
    """The modules with parameters of their own whose forward pass runs: id → class and shapes."""
    called: dict[int, str] = {}

    def note(module: nn.Module, args: tuple) -> None:
        own = [tuple(p.shape) for p in module.parameters(recurse=False)]
        if own:
            called.setdefault(id(module), f"{type(module).__name__}{own[0]}")

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


@torch.no_grad()
def scaled_copies(model: nn.Module, run: Callable[[], Any]) -> Finding | None:
    """Modules (B, T, D) → (B, T, D) that give some tokens back multiplied: a residual that is added twice.

    Per token c = ⟨in, out⟩ / ⟨in, in⟩ and the rest; a finding where 2–98 % of the tokens have no rest and one c that is not 1.
    """
    found: dict[str, float] = {}

    def look(name: str) -> Callable:
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
            if 0.02 <= len(copies) / len(c) <= 0.98 and float(copies.std(correction=0)) < 1e-3:
                found[name] = float(copies.mean())

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: factor for name, factor in found.items() if abs(factor - 1) > 1e-2}
    if not found:
        return None
    name, factor = next(iter(found.items()))
    message = f"tokens that {several(list(found))} leaves alone come out {factor:.3g} times as large"
    advice = "add the residual once: where a token is skipped, put its input back, not the input and its copy"
    return Finding("scaled_copies", "error", name, message, advice, round(factor, 4), 1)
