"""Which tensors a watch follows, under which names, and what it refuses to watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.health import intended
from moe_lab.health.sampling import Tracked

N_MATRICES = (
    4  # 16-bit matrices whose whole step is replayed (Muon): a sample, since a step costs as much as the real one
)


def check_input(model: nn.Module, optimizers: list[Any], expect_frozen: Sequence[str]) -> list[str]:
    """Names of the model's parameters. Raises ValueError for what cannot be watched."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"optimizer={type(optimizer).__name__} is not a torch.optim.Optimizer; pass one, or a list of them"
            )
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer {type(optimizer).__name__} has no parameters; pass the one that trains the model"
            )
    if not optimizers:
        raise ValueError("optimizer=[] is empty; pass the optimizer that trains the model")
    if isinstance(expect_frozen, str):
        raise ValueError(f"expect_frozen={expect_frozen!r} must be a list of names, such as [{expect_frozen!r}]")
    names = [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device and holds no values; materialise the model before watching it"
            )
    for prefix in expect_frozen:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(
                f"expect_frozen: no parameter's name starts with {prefix!r}; the first one is {names[0]!r}"
            )
    return names


def named_groups(optimizers: list[Optimizer]) -> list[tuple[Optimizer, dict, str]]:
    """Every group with a name to show: its own, or the optimizer's class and the group's number."""
    return [
        (o, group, group.get("name") or f"{type(o).__name__.lower()}[{i}]")
        for o in optimizers
        for i, group in enumerate(o.param_groups)
    ]


def storage(p: Tensor) -> tuple:
    """What tied weights share, whatever objects they are."""
    return p.untyped_storage().data_ptr(), p.storage_offset(), tuple(p.shape)


def track(model: nn.Module, optimizers: list[Optimizer]) -> tuple[list[Tracked], list[str]]:
    """Every tensor that trains or should, and the names of trainable parameters that no optimizer has.

    A float32 tensor of an optimizer that is not the model's, but has the shape of one that no optimizer holds, is taken for
    its master copy: it is watched under that name.
    """
    owners = {}
    for optimizer, group, name in named_groups(optimizers):
        for p in group["params"]:
            owners.setdefault(storage(p), (p, optimizer, group, name))
    named = [(name, p) for name, p in model.named_parameters() if p.numel()]
    ours = {storage(p) for _, p in named}
    foreign = [key for key in owners if key not in ours]
    tracked, outside = [], []
    for name, p in named:
        if storage(p) in owners:
            _, optimizer, group, group_name = owners[storage(p)]
            tracked.append(Tracked(name, p, optimizer, group, group_name))
            continue
        master = next((key for key in foreign if owners[key][0].shape == p.shape), None)
        if master is not None:
            foreign.remove(master)
            tracked.append(Tracked(name, *owners[master]))
            tracked[-1].is_outside_model = True
        elif p.requires_grad:
            outside.append(name)
            tracked.append(Tracked(name, p, None, {}, ""))
    if not tracked:
        raise ValueError(
            "no parameter of the model is in the optimizer; build the optimizer from this model's parameters"
        )
    return tracked, outside


def choose_replayed(tracked: list[Tracked]) -> list[Tracked]:
    """The 16-bit tensors whose intended steps are replayed: all that go element by element, a few that need a matrix."""
    narrow = [t for t in tracked if t.optimizer is not None and t.param.dtype.itemsize < 4]
    elements = [t for t in narrow if intended.kind_of(t.optimizer) in ("adam", "elementwise")]
    matrices = [t for t in narrow if intended.kind_of(t.optimizer) == "muon"]
    stride = max(1, -(-len(matrices) // N_MATRICES))
    return elements + matrices[stride // 2 :: stride]
