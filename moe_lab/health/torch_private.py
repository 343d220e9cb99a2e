"""Every private interface of torch that the checks lean on: `make health-wheel` runs them under the oldest and newest torch."""

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEP_WRAPPER = Optimizer.profile_hook_step(lambda optimizer: None).__code__  # what torch puts around every step


def is_nested_step(optimizer: Optimizer) -> bool:
    """Whether a hook was called from a base's step that a subclass's step calls: torch wraps both, and hooks run twice.

    Asked of the call stack, since a count would be wrong after a step that ended in an exception.
    """
    frame, n = sys._getframe(1), 0
    while frame is not None and n < 2:
        if frame.f_code is STEP_WRAPPER and frame.f_locals["args"][0] is optimizer:
            n += 1
        frame = frame.f_back
    return n > 1


def is_step_under_way() -> bool:
    """Whether some optimizer's hooks before a step are called now, or its step is made: those afterwards know its result."""
    frame = sys._getframe(1)
    while frame is not None and (frame.f_code is not STEP_WRAPPER or "out" in frame.f_locals):
        frame = frame.f_back
    return frame is not None


def has_step_hooks(optimizer: object) -> bool:
    """Whether step hooks can be registered: not on accelerate's wrapper, which is an Optimizer without its constructor."""
    return "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", {})


def unhooked_step(kind: type[Optimizer]) -> Callable:
    """The class's `step` without torch's wrapper, which would call hooks that users registered for all optimizers."""
    return kind.step.__wrapped__ if getattr(kind.step, "hooked", False) else kind.step


@contextmanager
def without_step_hooks(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Steps in here call none of the hooks that were registered on these optimizers."""
    kept = [(o, o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks) for o in optimizers]
    for o, *_ in kept:
        o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for o, before, after in kept:
            o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks = before, after


@contextmanager
def backward_heard(hear: Callable[[Tensor], None]) -> Iterator[None]:
    """`hear(root)` before each backward pass of one number, with its graph, without what a GradScaler multiplied it with. Torch knows no hook for
    all of them: `Tensor.backward` looks these functions up. What checkpoints recompute begins at activations."""
    inner, multiply, scales = torch.autograd.backward, torch.amp.GradScaler.scale, []

    @wraps(multiply)
    def scale(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        scaled = multiply(scaler, outputs)
        scales[:] = [] if scaler._scale is None else [scaler._scale]  # `get_scale` would wait for the device
        return scaled

    @wraps(inner)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if len(roots) == 1 and roots[0].numel() == 1:
            hear(roots[0] / scales[0] if scales else roots[0])
            scales.clear()
        return inner(roots, grad_tensors, *args, **kwargs)

    torch.autograd.backward, torch.amp.GradScaler.scale = backward, scale
    try:
        yield
    finally:
        torch.autograd.backward, torch.amp.GradScaler.scale = inner, multiply


def norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The 2-norm of each tensor of one device, (M,), taken in `dtype`, in a few operations for all of them."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype))


PRODUCTS = {"MmBackward0": (0, 1), "BmmBackward0": (0, 1), "AddmmBackward0": (1, 2), "BaddbmmBackward0": (1, 2)}
REARRANGED = re.compile(
    "(T|Permute|Transpose|Unsqueeze|Select|Expand|Clone|ToCopy|(UnsafeView|View|ReshapeAlias))Backward0"
)


def behind(node: Any) -> Any:
    """The operation itself, or the one whose result it does nothing but rearrange or cast; None behind the last."""
    while node and REARRANGED.fullmatch(node.name()):
        node = node.next_functions[0][0]
    return node


def made_shape(node: Any, place: int = 0) -> tuple[int, ...]:
    """The shape of what an operation made."""
    return tuple(node._input_metadata[place].shape)


def uses(output: Tensor) -> Iterator[tuple[Tensor, Any, int, list[Any]]]:
    """Of the output's graph each leaf, who takes it, as which argument, and the nodes that rearrange it on the way there, the
    nearest to the leaf first. Nothing is read from the device."""
    waiting: list[tuple[Any, tuple]] = [(output.grad_fn, (None, 0, []))]
    seen = set()
    while waiting:
        node, way = waiting.pop()
        if node is None or (node, *way[:2]) in seen:
            continue
        seen.add((node, *way[:2]))
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf, *way
        passes_on = REARRANGED.fullmatch(node.name())
        for i, (inner, _) in enumerate(node.next_functions):
            waiting.append((inner, (*way[:2], [node, *way[2]]) if passes_on else (node, i, [])))


def nearest_leaves(output: Tensor) -> set[int]:
    """Ids of those that the operations nearest to an output take, whatever the way."""
    found, waiting, seen = set(), [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inner = [behind(n) for n, _ in node.next_functions]
        taken = [id(n.variable) for n in inner if hasattr(n, "variable")]
        found |= set(taken)
        waiting += [] if taken else inner
    return found


def fan_ins(output: Tensor) -> dict[int, int]:
    """Of each leaf that a product of the output's graph takes, possibly rearranged: which of its last two dimensions, -2 or -1,
    the product sums over, by the leaf's id. x @ W sums over -2 of W, a linear layer over -1."""
    found: dict[int, int] = {}
    for leaf, node, place, nodes in uses(output):
        places = PRODUCTS.get(node.name(), ()) if node else ()
        if place in places and leaf.ndim > 1:
            found[id(leaf)] = summed_over(leaf.ndim, places.index(place), nodes)
    return found


def takers(output: Tensor) -> dict[int, set[str]]:
    """Of each leaf of the output's graph the nodes that take it, possibly rearranged, by the leaf's id: a convolution of several
    groups is called `grouped`."""
    found: dict[int, set[str]] = {}
    for leaf, node, *_ in uses(output):
        is_grouped = getattr(node, "_saved_groups", 1) > 1
        found.setdefault(id(leaf), set()).add("grouped" if is_grouped else node.name() if node else "")
    return found


def summed_over(ndim: int, is_right: int, nodes: Sequence[Any]) -> int:
    """The one of the last two dimensions that comes first in a right factor, or last in a left one."""
    order: list[int | None] = list(range(-ndim, 0))
    for node in nodes:
        saved = {key: getattr(node, key) for key in dir(node) if key.startswith("_saved_dim")}
        dims = [d - 2**64 if d >= 2**63 else d for v in saved.values() for d in (v if isinstance(v, tuple) else [v])]
        kind = node.name().removesuffix("Backward0")
        if kind == "Permute":
            order = [order[d] for d in dims]
        elif kind in ("T", "Transpose"):
            a, b = dims or (0, 1)
            order[a], order[b] = order[b], order[a]
        elif kind == "Unsqueeze":
            order.insert(dims[0] % (len(order) + 1), None)
        elif kind == "Select":
            order.pop(dims[0])
    mine = [d for d in order if d in (-2, -1)]
    return mine[0] if is_right else mine[-1]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given; any other module is returned as it is."""
    return getattr(model, "_orig_mod", model)


def is_elsewhere(module: nn.Module) -> bool:
    """Whether a forward pass runs compiled, or in threads of its own, where nobody can listen to it."""
    return uncompiled(module) is not module or bool(module._compiled_call_impl) or isinstance(module, nn.DataParallel)


def is_in_backward() -> bool:
    """Whether a backward pass is running: a forward pass in there recomputes another."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether code runs inside of a transform of torch.func: its tensors may not be kept."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def meeting_store() -> "torch.distributed.Store":
    """The store at which the processes of the default group met."""
    return torch.distributed.distributed_c10d._get_default_store()
