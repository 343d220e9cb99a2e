"""What a loss's graph tells: leaves that the model's `parameters()` do not hold, and how the outputs are held against targets."""

import gc
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import Finding, several
from ..sampling import WHOLE, Waiting, plain
from ..torch_private import behind, made_shape
from .forward import is_sharded, memory
from .heard import tensors_of
from .tracking import held_by

MOST = 100_000  # nodes of a graph that are walked
ROWS, GOLDEN = 64, 0.618  # of a batch's answers, and the share of them that lies between two that are taken
LEAST = 5  # updates in which somebody might have moved them
OUTSIDE = "tensors outside of the model's parameters() get gradients, and no optimizer holds them: {names}"
ADVICE = (
    "keep layers in an nn.ModuleList, make a parameter of what to() gives and not before it, hand a loss's own weights to the"
    " optimizer; a network that only judges needs requires_grad_(False)"
)


# what squashes, and which losses do so themselves
SQUASHES = {"SoftmaxBackward0": "a softmax", "SigmoidBackward0": "a sigmoid"}
SQUASHING = {"LogSoftmaxBackward0", "BinaryCrossEntropyWithLogitsBackward0"}
DIFFERENCES = {f"{name}Backward0" for name in ("Sub", "MseLoss", "SmoothL1Loss", "HuberLoss")}
LIKELIHOODS = {f"NllLoss{kind}Backward0" for kind in ("", "2D", "Nd")}
# what a function gives at all, and losses of differences that keep their targets
GIVES = dict.fromkeys(("Sigmoid", "Softmax"), (0.0, 1.0)) | {"Tanh": (-1.0, 1.0)}
GIVES |= dict.fromkeys(("Relu", "Softplus", "Exp"), (0.0, math.inf))
APART, SHARE = 0.1, 0.05  # |log| of a sum that ought to be 1; of the targets, that no output can meet
OF_DIFFERENCES, KEEPS_NO_RESULT = {f"{name}Backward0" for name in ("Pow", "Abs", "Mul")}, {"Softplus"}
ELEMENTWISE = {f"{name}Backward0" for name in ("Add", "Sub", "Mul", "Neg")}
SLACK = 1e-3  # by which a target may lie outside
ALIGNED = "CtcLossBackward0"
STEPS_OUT = (
    "input_lengths count the steps that come out of the model, strides and all; a target needs one for each letter, and one more "
    "between equal ones"
)
NORMALISED = "give nll_loss the output of log_softmax, or the logits to cross_entropy"
IN_RANGE = (
    "scale the targets (labels to 0 and 1, pictures to what the last layer gives), or leave that last function out"
)
ALWAYS_ONE = "Softmax", "LogSoftmax", "NativeLayerNorm"
LINEAR = {"AddmmBackward0", "MmBackward0"}
ONE_NUMBER = "{what} over one number gives the same whatever it is given: nothing before it learns through it"
OVER_ONE = "name the dimension that holds the choices or features; of one output take a sigmoid (binary cross-entropy with logits)"
FEWEST = 8  # outputs that meet as many targets by more than accident
LOGITS = "give cross-entropy and BCE-with-logits the logits themselves; keep softmax and sigmoid for predictions"
SHAPES = "compare the shapes in the loss: (B,) beside (B, 1) makes (B, B), each output beside every target"


def nodes(root: Tensor, without: Sequence[Any] = ()) -> list[Any]:
    """Of a number's graph, the nearest first; `without` some, and what is reached through them alone."""
    apart = {None: None, **dict.fromkeys(without)}
    waiting, seen = [root.grad_fn], dict(apart)
    while waiting and len(seen) < MOST:
        if (node := waiting.pop()) not in seen:
            seen[node] = None
            waiting += (inner for inner, _ in node.next_functions)
    return list(seen)[len(apart) :]


def leaves(graph: Sequence[Any]) -> Iterator[Tensor]:
    """What could be trained by it: a single number without a module, too, but no batch that gradients are asked of."""
    for leaf in filter(torch.is_tensor, (getattr(node, "variable", None) for node in graph)):
        if isinstance(leaf, nn.Parameter) or leaf.numel() == 1:
            yield leaf


def asked(graph: Sequence[Any]) -> Iterator[Finding]:
    """Of outputs: a softmax or sigmoid that the loss makes again, and one target for all of them."""
    if squashes := next(filter(None, map(squashed, graph)), ""):
        message = f"{squashes} comes before a loss that makes another one: it cannot come near zero, and hardly teaches"
        yield Finding("squashed_twice", "warning", "loss", message, LOGITS)
    if n := next(filter(None, map(n_crossed, graph)), 0):
        message = f"each of {n} outputs is held against all of {n} targets: the loss can teach their mean alone"
        yield Finding("shared_target", "warning", "loss", message, SHAPES, n, 1)
    if what := next(filter(None, map(over_one, graph)), ""):
        yield Finding("no_effect", "warning", what, ONE_NUMBER.format(what=what), OVER_ONE, 1, 2)
    yield from islice(filter(None, map(out_of_range, graph)), 1)


def left_out(graph: Sequence[Any]) -> Iterator[tuple[Tensor, int]]:
    """Targets of a likelihood that ignores one of its classes, and that class."""
    for node in graph:
        if node.name() in LIKELIHOODS and 0 <= node._saved_ignore_index < 2**63:  # kept without a sign
            yield node._saved_target.detach(), node._saved_ignore_index


def squashed(node: Any) -> str:
    """What squashes the input of a loss that does so itself, but for rearrangements and casts."""
    if node.name() not in SQUASHING:
        return ""
    return SQUASHES.get(source(node), "")


def n_averaged(node: Any) -> int:
    """Classes over which a mean of targets times log-probabilities runs, too; 0 where they are summed first."""
    inner, is_weighed = (node.next_functions[0][0] if node.name() == "MeanBackward0" else None), False
    while inner is not None and inner.name() in ELEMENTWISE:
        is_weighed |= inner.name() == "MulBackward0"
        inner = next(filter(None, (made for made, _ in inner.next_functions)), None)
    is_of_classes = is_weighed and inner is not None and inner.name() == "LogSoftmaxBackward0"
    return size_along(inner, made_shape(inner)) if is_of_classes else 0


def size_along(node: Any, shape: Sequence[int]) -> int:
    dim = node._saved_dim  # kept without a sign
    return shape[dim - 2**64 if dim >= 2**63 else dim]


def source(node: Any) -> str:
    """The name of what made its first input, but for rearrangements and casts; empty of none."""
    inner = behind(node.next_functions[0][0])
    return inner.name() if inner else ""


def over_one(node: Any) -> str:
    """A layer norm over one number; a softmax over one, right behind a linear layer: attention to one key alone is not meant."""
    kind = node.name().removesuffix("Backward0")
    if kind not in ALWAYS_ONE:
        return ""
    if kind == "NativeLayerNorm":
        return "a layer norm" if math.prod(node._saved_normalized_shape) == 1 else ""
    shape = made_shape(node)
    is_one = shape and size_along(node, shape) == 1
    return "a softmax" if is_one and math.prod(shape) > 1 and source(node) in LINEAR else ""


def out_of_range(node: Any) -> Finding | None:
    """Of a loss that keeps its inputs until the backward pass, which are read from the device: does it take them for what they are?"""
    name = node.name()
    by_logits = name == "BinaryCrossEntropyWithLogitsBackward0"
    try:
        if name in LIKELIHOODS and source(node) != "LogSoftmaxBackward0":
            apart = float(node._saved_self.detach().float().logsumexp(1).abs().median())
            message = f"nll_loss is given scores whose exponentials sum to {math.exp(min(apart, 99)):.3g} (or 1 over it): no log-probabilities"
            told = ("scores", message, NORMALISED, apart, APART)
        elif name.endswith(ALIGNED):  # torch's own, or cuDNN's
            share = float(node._saved_result0.detach().isinf().float().mean())
            message = f"{share:.0%} of the examples have an infinite CTC loss, which zero_infinity hides: more letters than steps"
            told = ("lengths", message, STEPS_OUT, share, SHARE)
        elif by_logits or (known := subtracted(node)):
            made_by, target = ("", node._saved_target) if by_logits else known
            low, high = GIVES[made_by] if made_by else (0.0, 1.0)
            share = float(((target < low - SLACK) | (target > high + SLACK)).float().mean())
            what = f"{made_by.lower()} can give" if made_by else "binary cross-entropy is made for"
            message = f"{share:.0%} of the targets lie outside of {low:g} to {high:g}, which is all that {what}"
            told = ("targets", message, IN_RANGE, share, SHARE)
        else:
            return None
    except (AttributeError, RuntimeError):  # after the backward pass nobody keeps any
        return None
    return Finding("out_of_range", "warning", *told) if told[3] > told[4] else None


def subtracted(node: Any) -> tuple[str, Tensor] | None:
    """What made the outputs that a loss takes the differences of, if it is known what that gives, and their targets: a subtraction
    keeps neither, but what squares it or takes it without its sign does, and what made the outputs."""
    name, inner = node.name(), node.next_functions[0][0] if node.next_functions else None
    if name in DIFFERENCES and (made_by := source(node).removesuffix("Backward0")) in GIVES:
        return made_by, node._saved_target.detach()
    if name not in OF_DIFFERENCES or inner is None or inner.name() != "SubBackward0":
        return None
    outputs = [(sign, behind(side)) for sign, (side, _) in zip((-1, 1), inner.next_functions, strict=True) if side]
    made = outputs[0][1] if len(outputs) == 1 else None
    if made is None or (made_by := made.name().removesuffix("Backward0")) not in GIVES or made_by in KEEPS_NO_RESULT:
        return None
    return made_by, made._saved_result.reshape(node._saved_self.shape) + outputs[0][0] * node._saved_self


def n_crossed(node: Any) -> int:
    """N of outputs (N,) or (N, 1) that become (N, N) beside numbers without a graph, and nobody put a dimension there."""
    given = [(inner, place) for inner, place in node.next_functions if inner]
    if node.name() not in DIFFERENCES or len(given) != 1 or len(node.next_functions) != 2:
        return 0
    inner, place = given[0]
    wide = made_shape(node)
    if inner.name() == "ExpandBackward0":
        wide, (inner, place) = made_shape(inner), inner.next_functions[0]
    n = wide[0] if len(wide) == 2 and wide[0] == wide[1] else 0
    is_meant = inner.name() == "UnsqueezeBackward0" or hasattr(inner, "variable")
    return n if n >= FEWEST and math.prod(made_shape(inner, place)) == n and not is_meant else 0


def alive(kind: type | tuple[type, ...]) -> list:
    """All objects of a class, or of several. An object that a proxy stands for is asked for its own class alone."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def untaught(tensors: Sequence[Tensor], copies: Mapping[int, Any] = MappingProxyType({})) -> list[Finding]:
    """Those that no optimizer of the process holds, nor what they are `copies` of, by the module that has them: an info where all
    of these modules are in evaluation mode, as a network is that judges and is not trained."""
    held = held_by(alive(Optimizer)) if tensors else []
    held = {id(copies.get(id(p), p)) for p in held}
    names, trains = {id(t): "a tensor" for t in tensors if id(t) not in held}, False
    for module in alive(nn.Module) if names else ():
        for key, value in (*vars(module).get("_parameters", {}).items(), *vars(module).items()):
            if id(value) in names:
                names[id(value)] = f"{type(module).__name__}.{key}"
                trains |= module.training
    severity = "error" if trains or "a tensor" in names.values() else "info"
    told = list(dict.fromkeys(f"{names[id(t)]} {tuple(t.shape)}" for t in tensors if id(t) in names))
    message = OUTSIDE.format(names=several(told)) if told else ""
    return [Finding("not_in_optimizer", severity, several(told), message, ADVICE, len(told), 0)] if told else []


class Reached:
    """Looks at the first answer of a model, and at the first, the tenth, the hundredth … loss."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting = model, waiting
        self.n, self.next, self.has_heard, self.has_loss = 0, 1, False, False
        self.seen: dict[int, tuple[weakref.ref, Tensor, int]] = {}  # leaf, what it was, and before which update
        self.found: list[Finding] = []
        self.once: list[Finding] = []  # at least
        self.spreads: list[float] = []  # by look, the deviation between answers

    def answered(self, module: nn.Module, args: tuple, output: Any) -> None:
        is_look = module.training and self.waiting.is_look
        given = [] if self.has_heard and not is_look else tensors_of(output)
        for tensor in () if self.has_heard else given:
            self.look(tensor)
            self.has_heard |= tensor.requires_grad
        wide = (t for t in given if memory(t) and t.is_floating_point() and t.ndim > 1 and t.shape[-1] >= FEWEST)
        if is_look:
            for rows in (t.detach().flatten(0, -2) for t in islice(wide, 1)):
                if (
                    len(rows) >= FEWEST
                ):  # of all places, whatever the lengths: by a step that has nothing to do with them
                    at = torch.arange(ROWS, device=rows.device) * (int(GOLDEN * len(rows)) | 1) % len(rows)
                    self.waiting.add(rows[at].float().std(0).mean(), self.spreads.append)

    def observe(self, loss: Tensor | float) -> None:
        """A loss with its graph; of others nothing can be told."""
        self.n += (has_graph := isinstance(loss, Tensor) and loss.requires_grad)
        if has_graph and self.n == self.next:
            self.next *= 10
            self.look(loss)

    def look(self, root: Tensor) -> None:
        graph = nodes(root) if root.requires_grad else []
        self.has_loss |= bool(graph) and root.numel() == 1
        for finding in (
            asked(graph) if graph else ()
        ):  # a first batch may be of one: what is so by its shape is so again
            if finding.rule != "no_effect" or finding in self.once:
                self.found.append(finding)
            self.once.append(finding)
        known = {id(p) for p in self.model.parameters()} | self.seen.keys()
        for leaf in leaves(graph) if not is_sharded(self.model) else ():
            if id(leaf) not in known:
                sample = plain(leaf.detach()).flatten()[:WHOLE].clone()
                self.seen[id(leaf)] = weakref.ref(leaf), sample, self.waiting.update

    def judge(self) -> None:
        """Those that were seen some updates ago: what gets a gradient, and is what it was."""
        due = [key for key, (_, _, update) in self.seen.items() if self.waiting.update - update >= LEAST]
        still = []
        for leaf, then in [(reference(), then) for reference, then, _ in map(self.seen.pop, due)]:
            is_taught = leaf is not None and leaf.grad is not None
            still += [leaf] if is_taught and torch.equal(plain(leaf.detach()).flatten()[:WHOLE], then) else []
        self.found += untaught(still)
