"""All that can be looked at before the first update, in one call: one pass under the Watch's own ears, and a few beside it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..during.causal import BESIDE, FUTURE_LEAK, ROWS_MIX, check_causality, future_leak, rows_mix
from ..during.forward import disturbed
from ..during.heard import tensors_of
from ..during.rules_units import input_scale
from ..during.tracking import all_innermost
from ..during.watch import Watch
from ..findings import Finding, grouped, several
from ..sampling import tensor_kind
from . import structure
from .backward import scaled_back, untaught_by_answer
from .data import check_data
from .flow import train_eval, unscaled_dropout
from .operations import overwritten, untaught_terms
from .preflight import plan_of, preflight
from .schedule import first_update
from .structure import TO_SAVE
from .trial import CUT_OFF, Trial, forward

SCALED = "warning", "it may be summed, or divided by the accumulation"
NEXT_TOKEN = 0.05  # share by which auxiliary terms may move a loss
FIRST_LOSS = 0.2  # nats; auxiliary terms and tied embeddings move a first loss by less
TOKENS, SHORTEST = 32, 8  # lengths at which causality is tried
IDLE = "an expert without a token, a head of another task, or a part that nobody calls: only the last is a fault"


@dataclass
class Examination:
    """What was found, and what could not be looked at."""

    findings: list[Finding] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)  # check → why

    def __str__(self) -> str:
        ordered = sorted(self.findings, key=lambda finding: finding.severity == "info")
        lines = [str(finding) for finding in ordered] or ["no findings"]
        return "\n".join([*lines, *(f"not checked: {what}: {why}" for what, why in self.not_checked.items())])

    def ask(self, what: str, check: Callable[[], Iterable[Finding] | Finding | None]) -> None:
        """Keep what a check finds; one that cannot be made says why. The training is never ended by a check."""
        try:
            answer = check()
            for finding in [answer] if isinstance(answer, Finding) else answer or ():
                is_known = any((f.rule, f.message) == (finding.rule, finding.message) for f in self.findings)
                self.findings += [] if is_known else [finding]
        except Exception as error:
            self.fail(error, what)

    def fail(self, error: Exception, where: str, what: str = "", stop: Callable[[], None] = lambda: None) -> None:
        self.not_checked[where] = str(error).splitlines()[0] if str(error) else type(error).__name__
        stop()


def examine(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> Examination:
    """Examine a model before its first update, or one that was loaded from a checkpoint. Nothing is changed.

    `batch` is what the model is trained on: ids (B, T), (ids, labels), or keyword arguments of its forward pass;
    `loss_fn(model, batch)` the scalar that is minimised, by default what the forward pass returns as `loss`. Returns the
    findings, and which checks did not run and why. Works on a copy of the model; costs one backward pass (two more where the loss has
    terms beside the answer's, or a backward of one's own) and at most ten forward
    passes of the batch, and says what it did not try for that. The random state is put back. Raises what copying the model raises.
    """
    examination = Examination()
    ask = examination.ask
    optimizers = [] if optimizer is None else all_innermost(optimizer)
    given = {"config": config, "optimizers": optimizer}
    examination.not_checked |= {what: "none was given" for what, it in given.items() if it is None}
    if config is not None:
        ask("config", lambda: preflight(config))
    ask("ties", lambda: structure.broken_tie(model, plan_of(model, config)))
    ask("names of modules", lambda: structure.named_in_vain(model, plan_of(model, config)))
    if optimizer is not None:
        ask("optimizers", lambda: setup(model, optimizers))
        ask("16-bit tensors that cannot move", lambda: structure.cannot_move(model, optimizers))
        ask("the first update's LR", lambda: first_update(plan_of(model, config), optimizers))
    trial = Trial(model, batch, loss_fn or (lambda model, batch: forward(model, batch).loss), optimizers)
    with trial.state:
        ask("the loss", lambda: trial.hear(examination.fail))
        missing = examination.not_checked.pop("the loss", "")
        for what, check in CHECKS.items():
            if missing and check not in (data, modes):
                examination.not_checked[what] = missing
            else:
                ask(what, partial(check, trial))
    return examination


def setup(model: nn.Module, optimizers: list[Optimizer]) -> list[Finding]:
    """What a watch says before the first update; of an optimizer of other tensors, which no watch takes, that it is one."""
    if (finding := structure.stale(model, optimizers)) is not None:
        return [finding]
    watch = Watch(model, optimizers, quiet=True)
    watch.close()
    return watch.findings


def data(trial: Trial) -> list[Finding]:
    """Of the batch; and where targets were heard elsewhere than they belong: one batch is too few for the other answers."""
    return [*check_data([trial.batch]), *(f for f in trial.heard.found if f.rule == "label_shift")]


@torch.no_grad()
def silent_parts(trial: Trial) -> Iterator[Finding]:
    """Trainable tensors that get no gradient, and whether the training loss changes when they do: all of them at once, then kind
    by kind. Raises ValueError where the loss changes by itself."""
    silent = {n: p for n, p in trial.model.named_parameters() if p.requires_grad and p.grad is None}

    def matters(names: Iterable[str]) -> bool:
        kept = {name: silent[name].clone() for name in names}
        for name in kept:
            silent[name].copy_(disturbed(kept[name]))
        changed = not torch.equal(trial.loss_of(trial.batch), trial.loss)
        for name in kept:
            silent[name].copy_(kept[name])
        return changed

    if silent:
        trial.again()
    kinds = list(grouped(silent, tensor_kind).values())
    some = len(kinds) <= trial.spare or matters(silent)
    answers = [some and matters(names) for names in kinds[: trial.spare if some else None]]
    for answer, severity, what, advice in (
        (True, "error", "change the training loss and get no gradient", CUT_OFF),
        (False, "info", "are trained and do not take part in this batch's loss", IDLE),
    ):
        if names := [name for mine, names in zip(answers, kinds, strict=False) if mine is answer for name in names]:
            message = f"{len(names)} tensors {what}: {several(names)}"
            yield Finding("no_gradient", severity, names[0], message, advice, len(names), 0)
    if rest := sum(kinds[len(answers) :], []):
        more = f"{len(rest)} more tensors without one"
        raise ValueError(f"{more} were {TO_SAVE}: {several(rest)}")


def sizes(trial: Trial) -> Finding | None:
    """Of what layers are given, as a Watch says it of their first call."""
    seen = SimpleNamespace(
        forward=trial.probe, modules=dict(trial.model.named_modules()), n_parameters=1, n_seen=0, step=None
    )
    ill = input_scale.when(seen)
    return input_scale.finding(seen, ill) if ill else None


def modes(trial: Trial) -> Finding | None:
    own = unscaled_dropout(trial.model)
    trained, evaluated = partial(trial.answer, True), partial(trial.answer, False)
    trial.apart = train_eval(trained, evaluated, trial.batch, lambda: trial.left > 1)
    return own or trial.apart


def first_loss(trial: Trial) -> Finding | None:
    """The loss that is minimised beside the cross-entropy of its own logits and targets: divided, or summed? It is, where these
    logits' gradient makes up all of it; with other terms and heads in it, it may be any number."""
    told, own = float(trial.loss.detach()), trial.heard.first_loss
    if own is None:
        raise ValueError("no cross-entropy over tokens was heard in it")
    if math.isclose(told, own, abs_tol=max(FIRST_LOSS, NEXT_TOKEN * own)):
        return None
    is_all = math.isclose(told, own * sum(p.weight * p.n_targets for p in trial.heard.once), rel_tol=NEXT_TOKEN)
    message = f"the loss is {told:.4g}, {told / own:.3g} times the cross-entropy of the same logits ({own:.4g})"
    severity, advice = SCALED if is_all else ("info", "other terms or heads add to it")
    return Finding("initial_loss", severity, "loss", message, advice, round(told, 4), round(own, 4))


def causality(trial: Trial) -> Finding | None:
    """Only a model that is trained on the next token must be causal: a masked language model may look ahead, and so may an encoder,
    whose tokens are not those that are foretold. In float32, since grouped kernels and 16 bits are not exact. In evaluation;
    in training, too, where that computes something else."""
    heard, (args, kwargs) = trial.heard, trial.probe.inputs or ((), {})
    ids = heard.passes[-1].tokens.ids if heard.is_next_token else torch.empty(0)
    if not any(torch.equal(given, ids.to(given)) for given in tensors_of([args, kwargs])):
        repeats = trial.repeats(False)
        trial.spend(ROWS_MIX - repeats)
        if finding := rows_mix(trial.model.eval(), args, kwargs, repeats):
            return finding
        raise ValueError("it cannot be told whether looking ahead is meant; call check_causality")
    model = trial.model.float().eval()
    # with the sequences beside its square it makes up one pass
    length = min(TOKENS, ids.shape[1], max(SHORTEST, math.isqrt(ids.numel()) - 4))
    trial.spend(min(1, (length + BESIDE) * length / ids.numel()))
    finding = check_causality(model, heard.vocab_size, length, next(model.parameters()).device)
    if finding is not None or trial.apart is None:
        return finding
    repeats = trial.repeats(True)
    if trial.left < FUTURE_LEAK - repeats:
        raise ValueError(f"in training mode, where other is computed, it was {TO_SAVE}")
    trial.training()
    return future_leak(trial.probe, repeats)


# in order of certainty
CHECKS: dict[str, Callable[[Trial], Iterable[Finding] | Finding | None]] = {
    "data": data,
    "gradients": silent_parts,
    "the loss's graph": structure.asked_by_loss,
    "size of the inputs": sizes,
    "padding": lambda trial: [
        *trial.listening.padding_alone(),
        *trial.listening.rows_stay(),
        *structure.ignored(trial),
    ],
    "orthogonal steps": structure.not_linear,
    "residual stream": lambda trial: trial.listening.scaled_copies(),
    "positions": lambda trial: trial.listening.positions(),
    "memory": lambda trial: trial.listening.memories(),
    "rows that are overwritten": overwritten,
    "arguments without effect": structure.without_effect,
    "training against evaluation": modes,
    "first loss": first_loss,
    "causality": causality,
    "terms without a gradient": untaught_terms,
    "multiples of the loss": scaled_back,
    "the answer's own gradient": untaught_by_answer,
}
