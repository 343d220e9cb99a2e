"""All that can be looked at before the first update, in one call: data, set-up, flow of information, gradients, first loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..during.forward import disturbed, unwrapped
from ..during.tracking import all_innermost
from ..during.watch import Watch
from ..findings import Finding, grouped, several
from ..random_state import RandomState
from ..sampling import tensor_kind
from ..tokens import IGNORED, SHIFTED, Tokens, agreement
from .copying import copied
from .data import check_data, tokens_of
from .flow import check_causality, check_train_eval
from .listening import Listening
from .preflight import plan_of, preflight
from .schedule import first_update
from .structure import broken_tie, cannot_move, not_linear, outside_of_parameters, stale, without_effect

# share by which a loss may differ from the next-token loss and still be one, auxiliary terms included
NEXT_TOKEN = 0.05
SAME_LOSS = 1e-4  # share of the loss, by which two ways to sum it may differ
FIRST_LOSS = 0.2  # nats; auxiliary terms and tied embeddings move a first loss by less
SPARE = 4  # of ten forward passes, when loss, modes and causality have theirs: for tensors without a gradient, then arguments
TOKENS, SHORTEST = 32, 8  # lengths at which causality is tried
CUT_OFF = (
    "learning is cut off: look for detach, no_grad, an integer index, or a backward or checkpointing that returns None"
)
IDLE = "an expert without a token, a head of another task, or a part that nobody calls: only the last is a fault"


@dataclass
class Examination:
    """What was found, and what could not be looked at."""

    findings: list[Finding] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)  # check → why

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["no findings"]
        return "\n".join([*lines, *(f"not checked: {what}: {why}" for what, why in self.not_checked.items())])

    def ask(self, what: str, check: Callable[[], Any]) -> None:
        """Keep what a check finds; one that cannot be made says why. The training is never ended by a check."""
        try:
            answer = check()
            for finding in [answer] if isinstance(answer, Finding) else answer or ():
                self.findings += [finding] if finding not in self.findings else []
        except Exception as error:
            self.not_checked[what] = str(error).splitlines()[0] if str(error) else type(error).__name__


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
    findings, and which checks did not run and why. Works on a copy of the model; costs one backward pass and at most ten forward
    passes of the batch, and says what it did not try for that. The random state is put back. Raises what copying the model raises.
    """
    examination = Examination()
    ask = examination.ask
    if config is None:
        examination.not_checked["config"] = "none was given"
    else:
        ask("config", lambda: preflight(config))
    ask("ties", lambda: broken_tie(model, plan_of(model, config)))
    if optimizer is None:
        examination.not_checked["optimizers"] = "none was given"
    else:
        optimizers = all_innermost(optimizer)
        ask("optimizers", lambda: setup(model, optimizers))
        ask("16-bit tensors that cannot move", lambda: cannot_move(model, optimizers))
        ask("the first update's LR", lambda: first_update(plan_of(model, config), optimizers))
    loss_fn = loss_fn or (lambda model, batch: forward(model, batch).loss)
    state = RandomState([*model.parameters(), *model.buffers()])
    try:
        trial = Trial(model, batch, loss_fn, state)
        ask("data", lambda: check_data([batch]))
        ask("gradients", lambda: silent_parts(trial))
        if optimizer is not None:
            ask("layers in lists", lambda: outside_of_parameters(trial, unwrapped(model), optimizers))
            names = {id(p): name for name, p in unwrapped(model).named_parameters()}
            ask("orthogonal steps", lambda: trial.heard and not_linear(trial.model, trial.value, names, optimizers))
        ask("residual stream", lambda: trial.heard.scaled_copies())
        ask("positions", lambda: trial.heard.positions())
        ask("memory", lambda: trial.heard.memories())
        ask("arguments without effect", lambda: without_effect(batch, trial.loss, trial.told, trial.spare))
        ask("training against evaluation", lambda: check_train_eval(trial.trained, trial.evaluated, batch))
        ask("first loss", lambda: first_loss(trial))
        ask("causality", lambda: causality(trial))
    finally:
        state.put_back()
    return examination


class Trial:
    """The copy that is examined, and the passes that several checks share."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: Callable, state: RandomState):
        self.model, self.batch, self.loss_fn, self.state = copied(unwrapped(model)), batch, loss_fn, state
        self.model.zero_grad(set_to_none=True)
        self.spare = SPARE

    def training(self) -> nn.Module:
        """In training mode, without dropout."""
        for module in self.model.train().modules():
            module.train("drop" not in type(module).__name__.lower())
        return self.model

    @torch.enable_grad()  # kernels may differ without, in their last bits
    def loss(self, batch: Any) -> Tensor:
        """In training, with the same random numbers each time."""
        self.state.put_back()
        return self.loss_fn(self.training(), batch)

    @cached_property
    def heard(self) -> Listening:
        with Listening(self.model) as heard:
            self.value = self.loss(self.batch)
        self.value.backward()
        return heard

    @property
    def told(self) -> Tensor:
        """The batch's loss, of which there was a backward pass."""
        return self.heard and self.value.detach()

    @cached_property
    def scores(self) -> Tensor:
        """The logits that `told` was made of."""
        self.state.put_back()
        return self.trained(self.batch)

    @torch.no_grad()
    def trained(self, batch: Any) -> Tensor:
        return logits(self.training(), batch)

    @torch.no_grad()
    def evaluated(self, batch: Any) -> Tensor:
        return logits(self.model.eval(), batch)


def setup(model: nn.Module, optimizers: list[Optimizer]) -> list[Finding]:
    """What a watch says before the first update; of an optimizer of other tensors, which no watch takes, that it is one."""
    if (finding := stale(model, optimizers)) is not None:
        return [finding]
    watch = Watch(model, optimizers, quiet=True)
    watch.close()
    return watch.findings


def forward(model: nn.Module, batch: Any) -> Any:
    """The forward pass on what of the batch is its input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def logits(model: nn.Module, batch: Any) -> Tensor:
    output = forward(model, batch)
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return output
    raise ValueError(f"the forward pass gives {type(output).__name__}, neither logits nor something that has them")


@torch.no_grad()
def silent_parts(trial: Trial) -> Iterator[Finding]:
    """Trainable tensors that get no gradient, and whether the training loss changes when they do: all of them at once, then kind
    by kind. Raises ValueError where the loss changes by itself."""
    told = trial.told
    silent = {n: p for n, p in trial.model.named_parameters() if p.requires_grad and p.grad is None}
    if not silent:
        return
    trial.spare -= 1
    if not torch.equal(trial.loss(trial.batch), told):
        raise ValueError("two passes with torch's random numbers held give two losses")

    def matters(names: list[str]) -> bool:
        trial.spare -= 1
        kept = {name: silent[name].clone() for name in names}
        for name in names:
            silent[name].copy_(disturbed(kept[name]))
        changed = not torch.equal(trial.loss(trial.batch), told)
        for name in names:
            silent[name].copy_(kept[name])
        return changed

    kinds = list(grouped(silent, tensor_kind).values())
    some = len(kinds) <= trial.spare or matters(list(silent))
    answers = [some and matters(names) for names in kinds[: trial.spare if some else None]]
    for answer, severity, what, advice in (
        (True, "error", "change the training loss and get no gradient", CUT_OFF),
        (False, "info", "are trained and do not take part in this batch's loss", IDLE),
    ):
        if names := [name for mine, names in zip(answers, kinds, strict=False) if mine is answer for name in names]:
            message = f"{len(names)} tensors {what}: {several(names)}"
            yield Finding("no_gradient", severity, names[0], message, advice, len(names), 0)
    if rest := sum(kinds[len(answers) :], []):
        raise ValueError(
            f"{len(rest)} more tensors without one were not tried, to save forward passes: {several(rest)}"
        )


def first_loss(trial: Trial) -> Finding | None:
    """The loss that is minimised beside the cross-entropy of the same logits: divided, summed, or of other labels?"""
    told, own = told_and_own(trial)
    if math.isclose(told, own, abs_tol=max(FIRST_LOSS, NEXT_TOKEN * own)):
        return None
    message = f"the loss is {told:.4g}, {told / own:.3g} times the cross-entropy of the same logits ({own:.4g})"
    advice = "it may be summed, divided by the accumulation, or of shifted or padded labels; auxiliary terms add to it"
    return Finding("initial_loss", "warning", "loss", message, advice, round(told, 4), round(own, 4))


def told_and_own(trial: Trial) -> tuple[float, float]:
    """The loss that is minimised, and the cross-entropy of the labels, or else of the next ids, in training mode.
    Raises ValueError where these are no ids and logits (B, T, V)."""
    ids, labels = tokens_of(trial.batch)
    told, scores = float(trial.told), trial.scores.float().cpu()
    if scores.ndim != 3 or scores.shape[:2] != ids.shape:
        raise ValueError("the batch and the logits are not those of a language model")
    if shifts_itself(ids, labels):
        scores, labels = scores[:, :-1], (ids if labels is None else labels)[:, 1:]
    return told, float(F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED))


def shifts_itself(ids: Tensor, labels: Tensor | None) -> bool:
    """Whether the model is left to find the next token: by its ids alone, or by labels at the same places."""
    return labels is None or bool(((labels == ids) | (labels == IGNORED)).all())


def causality(trial: Trial) -> Finding | None:
    """Only a model that is trained on the next token must be causal, by its labels or by its very loss: a masked language
    model may look ahead. In float32, since grouped kernels and 16 bits are not exact."""
    told, own = told_and_own(trial)
    ids, labels = tokens_of(trial.batch)
    by_labels = labels is not None and agreement([Tokens(ids, labels)], 1) > SHIFTED
    if not by_labels and not (shifts_itself(ids, labels) and math.isclose(told, own, rel_tol=SAME_LOSS)):
        raise ValueError("it cannot be told whether looking ahead is meant; call check_causality")
    model, vocab_size = trial.model.float().eval(), trial.scores.shape[-1]
    device = next(model.parameters()).device
    length = min(TOKENS, ids.shape[1], max(SHORTEST, math.isqrt(ids.numel())))  # its square is no more than a batch
    return check_causality(model, vocab_size, length, device)
