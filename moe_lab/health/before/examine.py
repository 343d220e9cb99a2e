"""All that can be looked at before the first update, in one call: data, set-up, flow of information, gradients, first loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..during.forward import disturbed, unwrapped
from ..during.tracking import innermost
from ..during.watch import Watch
from ..findings import Finding, several
from ..random_state import RandomState
from ..tokens import IGNORED, SHIFTED, Tokens, agreement
from .data import check_data, tokens_of
from .flow import check_causality, check_train_eval, logits_of, scaled_copies
from .plan import Plan
from .preflight import entries_of, preflight
from .schedule import first_update
from .structure import broken_tie, cannot_move, stale, without_effect

NEXT_TOKEN = (
    0.05  # share by which a loss may differ from the next-token loss and still be one, auxiliary terms included
)
SAME_LOSS = 1e-4  # share of the loss, by which two ways to sum it may differ
FIRST_LOSS = 0.2  # nats; auxiliary terms and tied embeddings move a first loss by less
TOKENS = 32  # length at which causality is tried
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
            found = [answer] if isinstance(answer, Finding) else list(answer or [])
        except Exception as error:
            self.not_checked[what] = str(error).splitlines()[0] if str(error) else type(error).__name__
            return
        self.findings += [finding for finding in found if finding not in self.findings]


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
    findings, and which checks did not run and why. Works on a copy of the model; costs one backward pass and some 40 forward
    passes, most of one short sequence. The random state is put back. Raises what copying the model raises.
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
        given = optimizer if isinstance(optimizer, Iterable) else [optimizer]
        optimizers = [inner for o in given for inner in innermost(o)]
        ask("optimizers", lambda: setup(model, optimizers))
        ask("16-bit tensors that cannot move", lambda: cannot_move(model, optimizers))
        ask("the first update's LR", lambda: first_update(plan_of(model, config), groups_of(optimizers)))
    loss_fn = loss_fn or (lambda model, batch: forward(model, batch).loss)
    state = RandomState([*model.parameters(), *model.buffers()])
    try:
        one = copy.deepcopy(unwrapped(model))
        one.zero_grad(set_to_none=True)
        ask("data", lambda: check_data([batch]))
        ask("gradients", lambda: silent_parts(one, batch, loss_fn))
        modes = (lambda b: logits(one.train(), b)), (lambda b: logits(one.eval(), b))
        ask("arguments without effect", lambda: without_effect(one, batch, loss_fn))
        ask("training against evaluation", partial(check_train_eval, *modes, batch))
        ask("residual stream", lambda: scaled_copies(one.eval(), lambda: forward(one, batch)))
        ask("first loss", lambda: first_loss(one, batch, loss_fn))
        ask("causality", lambda: causality(one.float(), batch, loss_fn))  # grouped kernels and 16 bits are not exact
    finally:
        state.put_back()
    return examination


def plan_of(model: nn.Module, config: str | Path | Mapping[str, Any] | None) -> Plan:
    """What is planned: by the config that was given, else by the one that the model carries, if any."""
    own = getattr(model, "config", None)
    carried = own if isinstance(own, Mapping) else getattr(own, "__dict__", {})
    return Plan(entries_of({str(k): v for k, v in carried.items()} if config is None else config))


def groups_of(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def setup(model: nn.Module, optimizers: list[Optimizer]) -> list[Finding]:
    """What a watch says before the first update; of an optimizer of other tensors, which no watch takes, that it is one."""
    if (finding := stale(model, groups_of(optimizers))) is not None:
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


def silent_parts(model: nn.Module, batch: Any, loss_fn: Callable) -> list[Finding]:
    """Trainable tensors without a gradient, and whether the training loss changes when they do."""
    model.train()
    state = RandomState(model.parameters())

    def loss() -> Tensor:
        state.put_back()
        return loss_fn(model, batch)

    value = loss()
    value.backward()
    silent = {n: p for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    matters, idle = [], []
    with torch.no_grad():
        for name, parameter in silent.items():
            kept = parameter.clone()
            parameter.copy_(disturbed(kept))
            (matters if not torch.equal(loss(), value) else idle).append(name)
            parameter.copy_(kept)
    answers = {
        "error": (matters, "change the training loss and get no gradient", CUT_OFF),
        "info": (idle, "are trained and do not take part in this batch's loss", IDLE),
    }
    found = []
    for severity, (names, what, advice) in answers.items():
        if names := [name for name in names if silent[name].grad is None]:
            message = f"{len(names)} tensors {what}: {several(names)}"
            found.append(Finding("no_gradient", severity, names[0], message, advice, len(names), 0))
    return found


def first_loss(model: nn.Module, batch: Any, loss_fn: Callable) -> Finding | None:
    """The loss that is minimised beside the cross-entropy of the same logits: divided, summed, or of other labels?"""
    told, own = told_and_own(model, batch, loss_fn)
    if math.isclose(told, own, abs_tol=max(FIRST_LOSS, NEXT_TOKEN * own)):
        return None
    message = f"the loss is {told:.4g}, {told / own:.3g} times the cross-entropy of the same logits ({own:.4g})"
    advice = "it may be summed, divided by the accumulation, or of shifted or padded labels; auxiliary terms add to it"
    return Finding("initial_loss", "warning", "loss", message, advice, round(told, 4), round(own, 4))


@torch.no_grad()
def told_and_own(model: nn.Module, batch: Any, loss_fn: Callable) -> tuple[float, float]:
    """The loss that is minimised, and the cross-entropy of the labels, or else of the next ids, in evaluation mode.
    Raises ValueError where these are no ids and logits (B, T, V)."""
    ids, labels = tokens_of(batch)
    told, scores = float(loss_fn(model.eval(), batch)), logits(model, batch).float().cpu()
    if scores.ndim != 3 or scores.shape[:2] != ids.shape:
        raise ValueError("the batch and the logits are not those of a language model")
    if shifts_itself(ids, labels):
        scores, labels = scores[:, :-1], (ids if labels is None else labels)[:, 1:]
    return told, float(F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED))


def shifts_itself(ids: Tensor, labels: Tensor | None) -> bool:
    """Whether the model is left to find the next token: by its ids alone, or by labels at the same places."""
    return labels is None or bool(((labels == ids) | (labels == IGNORED)).all())


def causality(model: nn.Module, batch: Any, loss_fn: Callable) -> Finding | None:
    """Only a model that is trained on the next token must be causal, by its labels or by its very loss: a masked language
    model may look ahead."""
    told, own = told_and_own(model, batch, loss_fn)
    ids, labels = tokens_of(batch)
    by_labels = labels is not None and agreement([Tokens(ids, labels)], 1) > SHIFTED
    if not by_labels and not (shifts_itself(ids, labels) and math.isclose(told, own, rel_tol=SAME_LOSS)):
        raise ValueError("it cannot be told whether looking ahead is meant; call check_causality")
    device = next(model.parameters()).device
    vocab_size = logits_of(model, ids[:1, :2].to(device)).shape[-1]
    return check_causality(model, vocab_size, min(TOKENS, ids.shape[1]), device)
