"""Which tensors a watch follows, under which names, and what it refuses to watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import grouped
from ..sampling import plain
from ..torch_private import has_step_hooks
from .bank import Tracked


def refusals(model: nn.Module, optimizers: list[Any], expect_frozen: Sequence[str]) -> Iterator[str]:
    """Why these cannot be watched, and what to do; only the first is sure."""
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer) or not has_step_hooks(optimizer):
            yield f"optimizer={kind} is not a torch.optim.Optimizer; pass one, or a list of them"
        if not any(group["params"] for group in optimizer.param_groups):
            yield f"optimizer {kind} has no parameters; pass the one that trains the model"
    if not optimizers:
        yield "optimizer=[] is empty; pass the optimizer that trains the model"
    if isinstance(expect_frozen, str):
        yield f"expect_frozen={expect_frozen!r} must be a list of names, such as [{expect_frozen!r}]"
    named = dict(model.named_parameters())
    if not named:
        yield f"model={type(model).__name__} has no parameters"
    for name in (name for name, p in named.items() if p.device.type == "meta"):
        yield f"{name} is on the meta device and holds no values; materialise the model before watching it"
    for prefix in expect_frozen:
        if not any(name.startswith(prefix) for name in named):
            yield f"expect_frozen: no parameter's name starts with {prefix!r}; the first one is {next(iter(named))!r}"


def innermost(optimizer: Any) -> Any:
    """The optimizer inside of wrappers that hold it as `.optimizer` and take no step hooks themselves, as accelerate's."""
    while not has_step_hooks(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def named_groups(optimizers: list[Optimizer]) -> list[tuple[Optimizer, int, str]]:
    """Every group: its optimizer, its number there, and a name to show: its own, or the class and the number."""
    return [
        (o, number, group.get("name") or f"{type(o).__name__.lower()}[{number}]")
        for o in optimizers
        for number, group in enumerate(o.param_groups)
    ]


def storage(p: Tensor) -> tuple:
    """What tied weights share, whatever objects they are."""
    values = plain(p)
    return values.untyped_storage().data_ptr(), values.storage_offset(), tuple(values.shape), values.stride()


def is_master(p: Tensor, of: Tensor) -> bool:
    """Whether `p` is a wider copy of a 16-bit parameter; an update or two may lie between them."""
    if of.dtype.itemsize >= 4 or p.dtype.itemsize < 4 or p.shape != of.shape or p.device != of.device:
        return False
    return torch.allclose(plain(p).float(), plain(of).float(), rtol=0.05, atol=5e-3)


def track(model: nn.Module, optimizers: list[Optimizer]) -> tuple[list[Tracked], list[str]]:
    """Every tensor that trains or should, and the names of trainable parameters that no optimizer has.

    Tied weights are one tensor, under the first of their names. A tensor of an optimizer that is not the model's, but agrees
    with a 16-bit one that no optimizer holds, is taken for its master copy: it is watched under that name.
    """
    owners = {}
    for optimizer, number, group_name in named_groups(optimizers):
        for p in optimizer.param_groups[number]["params"]:
            owners.setdefault(storage(p), (p, optimizer, number, group_name))
    named: dict[tuple, tuple[str, Tensor]] = {}
    for name, p in model.named_parameters():
        if plain(p).numel():
            named.setdefault(storage(p), (name, p))
    masters = {key: owners.pop(key) for key in list(owners) if key not in named}
    tracked, outside = [], []
    for key, (name, p) in named.items():
        copy = None if key in owners else next((k for k, (q, *_) in masters.items() if is_master(q, p)), None)
        if key in owners:
            tracked.append(Tracked(name, *owners[key]))
        elif copy is not None:
            tracked.append(Tracked(name, *masters.pop(copy)))
            tracked[-1].is_outside_model = True
        elif p.requires_grad:
            outside.append(name)
            tracked.append(Tracked(name, p, None, 0, ""))
    if len(outside) == len(tracked):
        raise ValueError("no parameter of the model is in the optimizer; build it from this model's parameters")
    for alike in grouped(tracked, attrgetter("kind")).values():
        if len({t.param.ndim for t in alike}) > 1:  # an nn.Sequential calls its norms and its matrices alike
            for t in alike:
                t.kind += f" ({t.param.ndim}-d)"
    return tracked, outside
