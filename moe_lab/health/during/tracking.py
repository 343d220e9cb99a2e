"""Which tensors a watch follows, under which names and in which groups, and what it refuses to watch."""

from collections import deque
from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import grouped
from ..sampling import Waiting, elements, plain, sample_positions, tensor_kind
from ..torch_private import has_step_hooks

HISTORY = 1000  # learning rates and losses kept one by one: a long training costs no more than a short one
SPENT = 0.01  # share of the peak LR from which on it is near zero
LR_STEADY = 10  # updates without a rise before an LR is called the peak
LR_LATE = 0.2  # share of the peak LR below which it is late in a decay, or early in a warm-up
LR_ACTED = 30.0  # updates' worth of peak LR before the loss must have fallen
SAME_LR = 1e-3  # relative distance up to which two learning rates are one
FAR = 0.01  # share of an LR; a warm-up by epochs, of which usual ones take 5 to 20, is above it after its first rise
JUMP = 3.0  # factor between the LRs of two updates beyond which no schedule's slope makes it


def asked(optimizer: Optimizer, group: dict) -> float | None:
    """The LR that a group was made with: a scheduler's note, or what the optimizer was called with if that was for this group
    alone and not left at its default; else what stands there."""
    default = signature(type(optimizer)).parameters.get("lr")
    given = optimizer.defaults.get("lr") if len(optimizer.param_groups) == 1 else None
    if "initial_lr" in group or given is None or (default and given == default.default):
        given = group.get("initial_lr", group.get("lr"))
    return None if given is None else float(given)


def lr_of(group: dict) -> Tensor | float:
    """1 where an optimizer makes its learning rate by itself: then its steps are what they are."""
    return 1.0 if group.get("lr") is None else group["lr"]


class GroupState:
    """A group of an optimizer's parameters, and its learning rate over time."""

    def __init__(self, optimizer: Optimizer, number: int):
        self.optimizer, self.number = optimizer, number
        self.name = self.group.get("name") or f"{type(optimizer).__name__.lower()}[{number}]"
        self.asked = asked(optimizer, self.group)  # the LR that it was made with
        self.loaded = bool(optimizer.state)  # a state was loaded before the first update, or the training goes on
        # what steps on made-up gradients show, see steps.py
        self.law = self.decays = self.divides = self.is_linear = "untried"
        self.lrs: list[float] = []  # of the first HISTORY updates
        self.recent: deque[float] = deque(maxlen=LR_STEADY)  # of the last ones
        self.n, self.total, self.last, self.peak = 0, 0.0, 0.0, 0.0  # of all of them
        # the last: update, LR before and from it on, peak before
        self.jump: tuple[int, float, float, float] | None = None
        self.loaded_at = -1  # update after which a state was loaded
        self.risen_at = self.spent_at = 0  # updates: of the last rise; of the first one near zero after it, 0 for none

    @property
    def group(self) -> dict:
        """The optimizer's own group: looked up, since load_state_dict puts others in their place."""
        return self.optimizer.param_groups[self.number]

    def note_lr(self, lr: float) -> None:
        """Of the next update."""
        if self.n >= LR_STEADY and self.last and lr and not 1 / JUMP < lr / self.last < JUMP:
            self.jump = self.n + 1, self.last, lr, self.peak
        self.n, self.total, self.last = self.n + 1, self.total + lr, lr
        self.recent.append(lr)
        if self.n <= HISTORY:
            self.lrs.append(lr)
        if lr > self.peak * (1 + 1e-6):
            self.risen_at = self.n
        self.peak = max(self.peak, lr)
        if not self.spent_at and lr < SPENT * self.peak:
            self.spent_at = self.n

    @property
    def is_steady(self) -> bool:
        return self.n - self.risen_at >= LR_STEADY

    @property
    def planned(self) -> float:
        """The LR that it goes up to, as far as is known: what a scheduler notes at its start, unless the LR has been on its way and
        came to rest orders of magnitude below. A warm-up by epochs that rose once is no longer that far away."""
        noted = float(self.group.get("initial_lr") or 0.0)
        came_to_rest = not self.loaded and self.is_steady and min(self.lrs) < self.peak * (1 - SAME_LR)
        return self.peak if came_to_rest and self.peak < FAR * noted else max(self.peak, noted)


class Tracked:
    """One watched tensor: who it is, who updates it, its gradients, and its `Bank.sums` when last read."""

    def __init__(self, name: str, param: Tensor, owner: GroupState | None = None, kind: str | None = None):
        self.name, self.param, self.owner = name, param, owner
        self.kind = kind or tensor_kind(name)
        values = plain(param)
        self.index = sample_positions(values.shape).to(values.device)
        self.n_elements, self.n_touched = len(self.index), 0.0  # sampled; … that had a gradient
        self.bank: Any = None  # a weak reference to the Bank where its sample is
        self.is_narrow = param.dtype.itemsize < 4  # 16 bits or less
        self.is_late = False  # it began to train under the watch
        self.is_master = False  # a wider copy, whose gradient is made by whoever copies
        # gradients that were read
        self.grad_norm = 0.0  # the largest, whole tensor
        self.with_gradient = self.zero_gradient = self.no_gradient = 0
        self.finite = True
        self.last_gradient = 0  # the update, of those looked at, that had one last
        self.alike: bool | None = None  # whether its units are one after some updates
        self.dark = 0.0  # share of a vector's elements without a gradient for a while
        self.intended_known = False
        self.steps: list = []  # what its measured steps were like: `Step`s
        self.age = int(self.state.get("step", 0))  # updates with gradient

    @property
    def optimizer(self) -> Optimizer | None:
        return self.owner and self.owner.optimizer

    @property
    def group(self) -> dict:
        return self.owner.group if self.owner else {}

    @property
    def state(self) -> dict:
        return self.optimizer.state.get(self.param, {}) if self.owner else {}

    @property
    def state_dtypes(self) -> tuple[torch.dtype, ...]:
        """Number formats of what the optimizer keeps for each element: moments, masters, compensation."""
        kept = [v for v in self.state.values() if isinstance(v, Tensor) and v.ndim and v.shape == self.param.shape]
        return tuple(dict.fromkeys(v.dtype for v in kept))

    def note_gradient(self, waiting: Waiting, n: int) -> None:
        """Whether it has one at update n."""
        grad = self.param.grad
        some = True if grad.is_sparse else plain(grad).any()
        waiting.add(some, lambda has: setattr(self, "last_gradient", n if has else self.last_gradient))

    def sample(self, tensor: Tensor) -> Tensor:
        """The sampled elements of the parameter, its gradient, or a state of its shape."""
        return elements(plain(tensor), self.index)

    @property
    def constant(self) -> bool:
        """Whether all sampled elements were one value when the watch began, as in a fresh norm."""
        return self.n_varied == 0

    @property
    def is_still(self) -> bool:
        """Whether no sampled element with a gradient has moved, and there are some."""
        return self.unchanged == self.n_touched > 0

    @property
    def gradient(self) -> str:
        """`none`, `zero`, `yes`, or `lost`: it arrives, and nothing moves; `-` before the first look."""
        if not self.with_gradient:
            return "zero" if self.zero_gradient else "none" if self.no_gradient else "-"
        return "lost" if self.is_still else "yes"


def refuse_bad_input(model: nn.Module, optimizers: list[Any], expect_frozen: Sequence[str]) -> None:
    """Raises ValueError for what cannot be watched, saying what to do."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer) or not has_step_hooks(optimizer):
            kind = type(optimizer).__name__
            raise ValueError(f"optimizer={kind} is not a torch.optim.Optimizer; pass one, or a list of them")
    if isinstance(expect_frozen, str):
        raise ValueError(f"expect_frozen={expect_frozen!r} must be a list of names, such as [{expect_frozen!r}]")
    names = [name for name, _ in model.named_parameters()]
    for prefix in expect_frozen:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"expect_frozen: no parameter's name starts with {prefix!r}; there are {names[:1]} …")
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            raise ValueError(f"{name} is on the meta device, without values; materialise the model before watching it")


def held_by(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def all_innermost(given: Any) -> list[Any]:
    """The optimizers inside of one, or of several."""
    return [inner for one in (given if isinstance(given, Iterable) else [given]) for inner in innermost(one)]


def innermost(optimizer: Any) -> list[Any]:
    """The optimizers inside of a wrapper, whoever wrote it: what its attributes hold, alone or in a list, and can step. One that
    takes step hooks itself is no wrapper; what holds none is given back."""
    if isinstance(optimizer, Optimizer) and has_step_hooks(optimizer):
        return [optimizer]
    held = [v for value in attributes(optimizer) for v in (value if isinstance(value, list | tuple) else [value])]
    steps = [v for v in held if hasattr(v, "step") and hasattr(v, "zero_grad") and v is not optimizer]
    return list({id(inner): inner for v in steps for inner in innermost(v)}.values()) or [optimizer]


def module_of(model: Any) -> nn.Module:
    """The module, or the one that a wrapper which is no module holds. Raises ValueError where there is not one."""
    modules = [model] if isinstance(model, nn.Module) else [v for v in attributes(model) if isinstance(v, nn.Module)]
    if len(modules) != 1:
        kind = type(model).__name__
        told = f"holds {len(modules)} of them; pass the module itself"
        raise ValueError(f"model={kind} is no torch.nn.Module, and {told}")
    return modules[0]


def attributes(thing: Any) -> list[Any]:
    return list(getattr(thing, "__dict__", {}).values())


def storage(p: Tensor) -> tuple:
    """What tied weights share, whatever objects they are."""
    values = plain(p)
    return values.untyped_storage().data_ptr(), values.storage_offset(), tuple(values.shape), values.stride()


def is_master(p: Tensor, of: Tensor) -> bool:
    """Whether `p` is a wider copy of a 16-bit parameter; an update or two may lie between them."""
    if of.dtype.itemsize >= 4 or p.dtype.itemsize < 4 or p.shape != of.shape or p.device != of.device:
        return False
    return torch.allclose(plain(p).float(), plain(of).float(), rtol=0.05, atol=5e-3)


def track(model: nn.Module, groups: Sequence[GroupState], known: Sequence[Tracked]) -> list[Tracked]:
    """Tensors that train or should and are not `known` yet; those that are get their present owner, None for no optimizer.

    Tied weights are one tensor, under the first of their names. A tensor of an optimizer that is not the model's, but agrees
    with a 16-bit one that no optimizer holds, is taken for its master copy: it is watched under that name.
    Raises ValueError if no optimizer has any parameter of the model.
    """
    by_param = {id(t.param): t for t in known}
    for t in known:
        t.owner = None
    owners: dict[tuple, tuple[Tensor, GroupState]] = {}
    for group in groups:
        for p in group.group["params"]:
            owners.setdefault(storage(p), (p, group))
    named: dict[tuple, tuple[str, Tensor]] = {}
    for name, p in model.named_parameters():
        if plain(p).numel():
            named.setdefault(storage(p), (name, p))
    # an nn.Sequential calls its norms and its matrices alike
    alike = grouped(named.values(), lambda pair: tensor_kind(pair[0]))
    masters = {key: owners.pop(key) for key in owners.keys() - named}
    new, n_owned = [], 0
    for key, (name, p) in named.items():
        copy = None if key in owners else next((k for k, (q, _) in masters.items() if is_master(q, p)), None)
        param, owner = owners.get(key) or masters.pop(copy, (p, None))
        n_owned += owner is not None
        if id(param) in by_param:
            by_param[id(param)].owner = owner
        elif owner is not None or p.requires_grad:
            kind = tensor_kind(name)
            several_shapes = len({q.ndim for _, q in alike[kind]}) > 1
            new.append(Tracked(name, param, owner, f"{kind} ({p.ndim}-d)" if several_shapes else kind))
            new[-1].is_master = copy is not None
    if not n_owned and not known:  # mid-run they may have been replaced
        raise ValueError("no parameter of the model is in the optimizer; build it from this model's parameters")
    return new
