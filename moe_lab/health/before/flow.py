"""What training and evaluation compute: by who is called in which mode, and by what comes of it."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..findings import Finding, grouped, several
from ..random_state import RandomState

SIGMAS = 5.0  # distances between two trainings' outputs that training and evaluation may be apart
DIVIDE = "a dropout of one's own must divide what it keeps by its share in training, or multiply by it in evaluation"
ONES, DRAWS, AWAY = (
    (16, 16),
    256,
    0.15,
)  # a batch that a dropout is tried on, how often; less than 0.1 is seldom dropped
SAME = 1e-3  # of the outputs' deviation: below it two modes are one
# of a layer that training left out: one that is left out half of the time stays away from all in one of 512
RETRIES = 8


def check_train_eval(fn_train: Callable[[Any], Any], fn_eval: Callable[[Any], Any], batch: Any) -> Finding | None:
    """Is a mechanism missing in one mode? Both functions map a batch to the same kind of output, say logits.

    Modules with parameters that compute in one mode only are named. Else outputs that are further apart than 5 times what two calls of
    `fn_train` differ by (dropout) are an `info`; and where these differ, or evaluation is heard to drop something, two of `fn_eval` are
    compared: a dropout that still drops is a warning, other noise an `info`. Random state is put back.
    """
    return train_eval(fn_train, fn_eval, batch)


@torch.no_grad()
def train_eval(
    fn_train: Callable, fn_eval: Callable, batch: Any, more: Callable[[], bool] = lambda: True
) -> Finding | None:
    """`more()`: whether layers that training left out may be waited for in another pass."""
    with RandomState([]):
        trained, in_training = heard(fn_train, batch)
        # under a mode torch's own transformer layers do not compute all of theirs in one kernel, as they would in evaluation alone
        with Dropping() as dropping:
            evaluated, in_evaluation = heard(fn_eval, batch)
        for _ in range(RETRIES):  # layers may be left out at random
            if in_evaluation.keys() <= in_training.keys() or not more():
                break
            _, ran = heard(fn_train, batch)
            in_training |= {key: ran[key] for key in ran.keys() & in_evaluation.keys()}
        experts = experts_of(in_training, in_evaluation)
        both = {"training": (in_training, in_evaluation), "evaluation": (in_evaluation, in_training)}
        for word, (ran, missing) in both.items():
            if only := [name for key, (name, _) in ran.items() if key not in missing and name not in experts]:
                message = f"{len(only)} modules with parameters compute in {word} only: {several(only)}"
                advice = "let both modes take the same way; a head that is meant for training alone may be ignored here"
                return Finding("mode_mismatch", "warning", only[0], message, advice, len(only), 0)
        apart, least = distance(trained, evaluated)
        if apart <= least:
            return None
        noise, _ = distance(trained, heard(fn_train, batch)[0])
        if (noise > least or dropping.heard) and (finding := noise_in_evaluation(fn_eval, batch)):
            return finding
        if any("BatchNorm" in name for name, _ in in_training.values()):  # the modes are apart by design
            return None
    limit = max(SIGMAS * noise, least)
    if apart <= limit:
        return None
    message = f"outputs of the two modes are {apart:.3g} apart (RMS), those of two trainings {noise:.3g}"
    advice = "top-k choices differ so by design; else look for what one mode leaves out"
    return Finding("mode_mismatch", "info", "outputs", message, advice, round(apart, 6), round(limit, 6))


def distance(a: Any, b: Any) -> tuple[float, float]:
    """RMS between two outputs, and what is none: both 0 for what cannot be compared."""
    if not all(isinstance(x, Tensor) and x.shape == a.shape for x in (a, b)):
        return 0.0, 0.0
    return float((a - b).float().square().mean().sqrt()), SAME * float(b.float().std(correction=0))


@torch.no_grad()
def unscaled_dropout(model: nn.Module) -> Finding | None:
    """Dropouts that are not torch's, by their class's name, without parameters: what becomes of ones in either mode, on the average?"""
    device = next((p.device for p in model.parameters()), None)
    for name, module in model.named_modules():
        is_own = "drop" in type(module).__name__.lower() and not isinstance(module, nn.modules.dropout._DropoutNd)
        if is_own and next(module.parameters(), None) is None:
            with suppress(Exception):  # it may want other arguments
                ones = torch.ones(*ONES, device=device)
                kept = torch.stack([module.train()(ones).mean() for _ in range(DRAWS)])
                error, whole = float(kept.std()) / math.sqrt(DRAWS), float(module.eval()(ones).mean())
                times = float(kept.mean()) / whole
                if abs(times - 1) > max(AWAY, SIGMAS * error / whole):
                    message = f"{name} gives {times:.2g} times as much in training as in evaluation, on the average"
                    return Finding("mode_mismatch", "warning", name, message, DIVIDE, round(times, 3), 1 - AWAY)
    return None


class Dropping(TorchFunctionMode):
    """Hears which of torch's functions drop something."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = kwargs or {}
        if function is torch.dropout:  # (input, p, train)
            given = dict(zip(("input", "p", "training"), args, strict=False)) | given
        if given.get("dropout_p") or (given.get("training") is True and given.get("p")):
            self.heard.add(function.__name__)
        return function(*args, **kwargs or {})


def noise_in_evaluation(fn: Callable, batch: Any) -> Finding | None:
    """Two evaluations, with no training between them that moves statistics: do they differ, and is it a dropout, or other random numbers?"""
    with Dropping() as dropping:
        before, again = (getattr(answer, "logits", answer) for answer in (fn(batch), fn(batch)))
    apart, least = distance(again, before)
    if apart <= least:
        return None
    told = round(apart, 6), round(least, 6)
    message, names = f"two evaluations of one batch are {apart:.3g} apart (RMS)", sorted(dropping.heard)
    if not names:
        advice = "random numbers that are drawn by design, as samples or noise; a dropout of one's own would look alike"
        return Finding("mode_mismatch", "info", "evaluation", message, advice, *told)
    advice = "give F.dropout training=self.training, and attention's dropout_p 0 in evaluation; a few models are meant to drop there"
    return Finding("mode_mismatch", "warning", names[0], f"{message}: {several(names)} still drops", advice, *told)


def experts_of(trained: dict[int, tuple[str, int]], evaluated: dict[int, tuple[str, int]]) -> set[str]:
    """Kinds of modules that share as many rows in both modes, in training not evenly: which of them are given any is a choice."""
    first, second = (grouped(ran.values(), lambda pair: pair[0]) for ran in (trained, evaluated))
    n_rows = {name: [sum(n for _, n in of.get(name, ())) for of in (first, second)] for name in first}
    return {name for name, pairs in first.items() if len(set(pairs)) > 1 and len(set(n_rows[name])) == 1}


def heard(fn: Callable, batch: Any) -> tuple[Any, dict[int, tuple[str, int]]]:
    """The output, and the modules with parameters whose forward pass ran, id → class and shape, and the number of rows given, but for
    those that it made itself."""
    called: WeakKeyDictionary[nn.Module, tuple[str, int]] = WeakKeyDictionary()

    def note(module: nn.Module, args: tuple) -> None:
        if (first := next(module.parameters(), None)) is not None:
            n_rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].ndim else 0
            called.setdefault(module, (f"{type(module).__name__}{tuple(first.shape)}", n_rows))

    handle = register_module_forward_pre_hook(note)
    try:
        output = fn(batch)
    finally:
        handle.remove()
    return getattr(output, "logits", output), {id(module): ran for module, ran in called.items()}
