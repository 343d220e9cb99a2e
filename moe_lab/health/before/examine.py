"""All that can be looked at before the first update, in one call: one pass under the Watch's own ears, and a few beside it."""

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..during.causal import check_causality, future_leak, rows_mix
from ..during.forward import ForwardProbe, disturbed, unwrapped
from ..during.heard import tensors_of
from ..during.reached import asked, nodes
from ..during.rules_units import input_scale
from ..during.tracking import all_innermost
from ..during.watch import Watch
from ..findings import Finding, grouped, several
from ..random_state import RandomState
from ..sampling import tensor_kind
from . import structure
from .data import check_data
from .flow import check_train_eval, unscaled_dropout
from .listening import Listening
from .preflight import plan_of, preflight
from .schedule import first_update

SCALED = "warning", "it may be summed, or divided by the accumulation"
NEXT_TOKEN = 0.05  # share by which auxiliary terms may move a loss
FIRST_LOSS = 0.2  # nats; auxiliary terms and tied embeddings move a first loss by less
SPARE = 4  # of ten forward passes, when loss, modes and causality have theirs: for tensors without a gradient, then arguments
IN_TRAINING = 2  # of them, for causality where the modes compute something else
TOKENS, SHORTEST = 32, 8  # lengths at which causality is tried
CUT_OFF = (
    "learning is cut off: look for detach, no_grad, an integer index, or a backward or checkpointing that returns None"
)
NO_GRAPH = "the loss has no graph: backward() fails, or reaches none of the model's parameters"
IDLE = "an expert without a token, a head of another task, or a part that nobody calls: only the last is a fault"
HOLDERS = (nn.Module, Tensor, MethodType, partial, list, tuple, dict)  # of modules or tensors


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
                self.findings += [finding] if finding not in self.findings else []
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
    findings, and which checks did not run and why. Works on a copy of the model; costs one backward pass and at most ten forward
    passes of the batch (two more where training alone sees the future), and says what it did not try for that. The random state is
    put back. Raises what copying the model raises.
    """
    examination = Examination()
    ask = examination.ask
    optimizers = [] if optimizer is None else all_innermost(optimizer)
    given = {"config": config, "optimizers": optimizer}
    examination.not_checked |= {what: "none was given" for what, it in given.items() if it is None}
    if config is not None:
        ask("config", lambda: preflight(config))
    ask("ties", lambda: structure.broken_tie(model, plan_of(model, config)))
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


class Trial:
    """The copy that is examined, what was heard of its one pass forward and backward, and the passes that follow."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: Callable, optimizers: list[Optimizer]):
        self.given, self.copies = unwrapped(model), {}
        self.model = twin_of(self.given, self.copies)
        self.model.zero_grad(set_to_none=True)
        self.batch, self.loss_fn, self.optimizers, self.spare = batch, loss_fn, optimizers, SPARE
        self.state = RandomState([*model.parameters(), *model.buffers()])
        self.probe, self.listening = ForwardProbe(self.model, True), Listening(self.model)
        self.heard = self.probe.heard
        self.heard.elements = sys.maxsize  # all logits: the loss is compared
        self.apart: Finding | None = None  # how training and evaluation differ

    def hear(self, fail: Callable) -> Iterator[Finding]:
        """Of a model that could be trained: a loss that cannot train it. Raises ValueError after it."""
        with ExitStack() as stack:
            for ear in (self.probe, self.listening):
                stack.callback(ear.detach)
                ear.listen(fail)
            with self.listening.ranks:
                self.loss = self.loss_of(self.batch)  # of which there is a graph
            if getattr(self.loss, "grad_fn", None) is None and any(p.requires_grad for p in self.model.parameters()):
                yield Finding("no_gradient", "error", "loss", NO_GRAPH, CUT_OFF, 0, 1)
                raise ValueError("the loss has no graph")
            self.graph = nodes(self.loss)
            self.asked = list(asked(self.graph))  # while it holds its numbers
            self.loss.backward()
            self.heard.fetch()

    def training(self) -> nn.Module:
        """In training mode, without dropout."""
        for module in self.model.train().modules():
            module.train("drop" not in type(module).__name__.lower())
        return self.model

    @torch.enable_grad()  # kernels may differ without, in their last bits
    def loss_of(self, batch: Any) -> Tensor:
        """In training, with the same random numbers each time."""
        self.state.put_back()
        return self.loss_fn(self.training(), batch)


def twin_of(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, in which functions that were set on a module, such as the `forward` of a wrapper, hold the copy's modules:
    `copy.deepcopy` leaves functions as they are, and these would compute with the model itself. `memo`, empty, becomes id → copy."""
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        own = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        vars(module).update({name: rebound(function, memo) for name, function in own.items()})
    return twin


def rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with copies in its closure, and in those of the functions that it holds."""
    if not function.__closure__ or id(function) in memo:
        return memo.get(id(function), function)
    cells = tuple(CellType() for _ in function.__closure__)
    twin = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__, memo[id(function)] = function.__kwdefaults__, twin
    for cell, old in zip(cells, function.__closure__, strict=True):
        value = old.cell_contents
        if isinstance(value, FunctionType):
            cell.cell_contents = rebound(value, memo)
        else:  # what is no holder of modules or tensors may be anything, a lock or a file too
            cell.cell_contents = copy.deepcopy(value, memo) if isinstance(value, HOLDERS) else value
    return twin


def setup(model: nn.Module, optimizers: list[Optimizer]) -> list[Finding]:
    """What a watch says before the first update; of an optimizer of other tensors, which no watch takes, that it is one."""
    if (finding := structure.stale(model, optimizers)) is not None:
        return [finding]
    watch = Watch(model, optimizers, quiet=True)
    watch.close()
    return watch.findings


def forward(model: nn.Module, batch: Any) -> Any:
    """The forward pass on what of the batch is its input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@torch.no_grad()
def logits(module: nn.Module, batch: Any) -> Tensor:
    output = forward(module, batch)
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return output
    raise ValueError(f"the forward pass gives {type(output).__name__}, neither logits nor something that has them")


def data(trial: Trial) -> list[Finding]:
    """Of the batch; and where targets were heard elsewhere than they belong: one batch is too few for the other answers."""
    return [*check_data([trial.batch]), *(f for f in trial.heard.found if f.rule == "label_shift")]


@torch.no_grad()
def silent_parts(trial: Trial) -> Iterator[Finding]:
    """Trainable tensors that get no gradient, and whether the training loss changes when they do: all of them at once, then kind
    by kind. Raises ValueError where the loss changes by itself."""
    silent = {n: p for n, p in trial.model.named_parameters() if p.requires_grad and p.grad is None}

    def matters(names: Iterable[str]) -> bool:
        trial.spare -= 1
        kept = {name: silent[name].clone() for name in names}
        for name in kept:
            silent[name].copy_(disturbed(kept[name]))
        changed = not torch.equal(trial.loss_of(trial.batch), trial.loss)
        for name in kept:
            silent[name].copy_(kept[name])
        return changed

    if silent and matters(()):
        raise ValueError("two passes with torch's random numbers held give two losses")
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
        raise ValueError(f"{more} were not tried, to save forward passes: {several(rest)}")


def sizes(trial: Trial) -> Finding | None:
    """Of what layers are given, as a Watch says it of their first call."""
    seen = SimpleNamespace(
        forward=trial.probe, modules=dict(trial.model.named_modules()), n_parameters=1, n_seen=0, step=None
    )
    ill = input_scale.when(seen)
    return input_scale.finding(seen, ill) if ill else None


def modes(trial: Trial) -> Finding | None:
    trained, evaluated = (lambda b: logits(trial.training(), b)), (lambda b: logits(trial.model.eval(), b))
    trial.apart = check_train_eval(trained, evaluated, trial.batch)
    return unscaled_dropout(trial.model) or trial.apart


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
        if finding := rows_mix(trial.model.eval(), args, kwargs):
            return finding
        raise ValueError("it cannot be told whether looking ahead is meant; call check_causality")
    model = trial.model.float().eval()
    length = min(TOKENS, ids.shape[1], max(SHORTEST, math.isqrt(ids.numel())))  # its square is no more than a batch
    finding = check_causality(model, heard.vocab_size, length, next(model.parameters()).device)
    if finding is not None or trial.apart is None:
        return finding
    if trial.spare < IN_TRAINING:
        raise ValueError("in training mode, where other is computed, it was not tried, to save forward passes")
    trial.training()
    return future_leak(trial.probe)


# in order of certainty
CHECKS: dict[str, Callable[[Trial], Iterable[Finding] | Finding | None]] = {
    "data": data,
    "gradients": silent_parts,
    "the loss's graph": structure.asked_by_loss,
    "size of the inputs": sizes,
    "padding": lambda trial: trial.listening.padding_alone(),
    "orthogonal steps": structure.not_linear,
    "residual stream": lambda trial: trial.listening.scaled_copies(),
    "positions": lambda trial: trial.listening.positions(),
    "memory": lambda trial: trial.listening.memories(),
    "arguments without effect": structure.without_effect,
    "training against evaluation": modes,
    "first loss": first_loss,
    "causality": causality,
}
