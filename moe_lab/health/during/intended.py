"""What an optimizer is about to do, in exact arithmetic: its own step, replayed in float32 on copies.

A replay hands the optimizer's own `step` float32 copies of weight, gradient and state, so it needs no formula per optimizer
and no class's name. Where a step treats each element by itself, sampled elements suffice; that is tried, and compared with
whole tensors.

It runs on another object, with copies of options and state and without hooks, and the random state is put back. Refused, with
an info: optimizers that keep tensors or objects outside of `state` (masters, an inner optimizer), and all but torch's own where
several processes train, since a step may talk to the others. A step that writes to a global would go unseen.
"""

import copy
import enum
import re
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..findings import grouped
from ..random_state import RandomState
from ..sampling import Waiting
from ..torch_private import unhooked_step
from .tracking import GroupState, Tracked, is_master

# What keeps lost bits for later: then a weight's own format says nothing about what is lost.
KEEPS_BITS = re.compile(r"kahan|compensat|master|residual|shift", re.IGNORECASE)
N_MATRICES = 4  # of those that need their whole tensor, how many are replayed: a step costs as much as the real one
VERIFY_EVERY, VERIFY_FIRST, N_VERIFIED = 5, 3, 2  # updates, the first ones, and small tensors of a group
DISAGREE = 0.01  # relative distance from which on elements need their tensor
PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type, types.FunctionType)
SCALER = ("grad_scale", "found_inf", "defaults")  # attributes that torch itself may give tensors to


def keeps_lost_bits(optimizer: Optimizer) -> bool:
    """Whether it has fp32 masters, Kahan compensation, or rounds stochastically; look after its first step."""
    named = keeps_bits(optimizer.state.values(), [vars(optimizer), *optimizer.param_groups])
    return named or holds_masters(optimizer)


def keeps_bits(states: Iterable[Mapping], options: Iterable[Mapping]) -> bool:
    """The same of what an optimizer keeps for its tensors, and of its options, live or from a file: told by their names."""
    if any(KEEPS_BITS.search(str(key)) or "fp32" in str(key) for state in states for key in state):
        return True
    named = ((f"{key} {value}" if isinstance(value, str) else key, value) for o in options for key, value in o.items())
    return any("stochastic" in str(name).lower() and bool(value) for name, value in named)


def duplicate(value: Any, tensors: bool = True) -> Any:
    """A copy down to the tensors, those of 16 bits in float32. Raises ValueError for what may lead to the real thing."""
    if isinstance(value, Tensor) and tensors:
        value = value.detach()
        if not hasattr(value, "__tensor_flatten__") or hasattr(value, "to_local"):
            return value.to(duplicate(value.dtype), copy=True)
        names, context = value.__tensor_flatten__()  # quantised: stays what it is
        parts = {name: getattr(value, name).detach().clone() for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, duplicate(inner, tensors)) for key, inner in value.items())
        return copied
    if type(value) in (list, tuple, set, frozenset, deque):
        return type(value)(duplicate(inner, tensors) for inner in value)
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize < 4:
        return torch.float32  # of moments that are cast
    if isinstance(value, PLAIN):
        return value
    raise ValueError(f"it keeps a {type(value).__name__} outside of its state")


def shadow_of(optimizer: Optimizer, group: dict, weight: Tensor, state: dict) -> Optimizer:
    """Another optimizer of the same class and options, which holds `weight` alone. `state` becomes its own.

    A fused step stays fused: it alone knows what to do with a loss scaler's gradients, and keeps its counts on the device.
    Raises ValueError for an optimizer that cannot be copied.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and not type(optimizer).step.__module__.startswith("torch.optim."):
        raise ValueError("several processes train, and its step might talk to the others")
    options = {key: duplicate(value) for key, value in group.items() if key != "params"}
    options |= dict.fromkeys(options.keys() & {"foreach", "differentiable"}, False)
    shadow = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            shadow.__dict__[name] = OrderedDict()
        elif name not in ("param_groups", "state", "step"):  # step: a scheduler's wrapper would step the real optimizer
            shadow.__dict__[name] = duplicate(value, tensors=name in SCALER)
    shadow.param_groups = [{"params": [weight.requires_grad_()], **options}]
    shadow.state = defaultdict(dict, {weight: state} if state else {})
    return shadow


def advance(optimizer: Optimizer, grad: Tensor) -> Tensor:
    """One step of an optimizer of one tensor: how far that moved. May write into `grad`."""
    (weight,) = optimizer.param_groups[0]["params"]
    before, weight.grad = weight.detach().clone(), grad
    unhooked_step(type(optimizer))(optimizer)
    return weight.detach() - before


def replay(tensors: Sequence[Tracked], whole: bool = False) -> Tensor:
    """What the next step is meant to do, float32: to one whole tensor, in its shape, or to the samples of several, in a row.

    Several tensors have a dimension, are in one group, and have seen as many updates; their elements' steps must be their own.
    Gradients are dense. Raises whatever the optimizer's step raises on such copies.
    """
    first, states = tensors[0], [t.state for t in tensors]

    def pick(values: Sequence[Tensor]) -> Tensor:
        if whole:
            return duplicate(values[0])
        return torch.cat([t.sample(value).float() for t, value in zip(tensors, values, strict=True)])

    weight, grad = pick([t.param for t in tensors]), pick([t.param.grad for t in tensors])
    state = {}
    for key, value in states[0].items():
        is_elements = isinstance(value, Tensor) and value.shape == first.param.shape
        value = pick([s[key] for s in states]) if is_elements else duplicate(value)
        if isinstance(value, Tensor) and KEEPS_BITS.search(str(key)):  # carried from earlier: not this step's intent
            value = weight.clone() if "master" in str(key).lower() else torch.zeros_like(value)
        state[key] = value
    return advance(shadow_of(first.optimizer, first.group, weight, state), grad)


def held_tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in lists and mappings, so deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from held_tensors(inner, depth - 1)


def holds_masters(optimizer: Optimizer) -> bool:
    """Whether wider copies of its 16-bit weights, of the smallest few, lie in an attribute of its own."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.dtype.itemsize < 4]
    own = {key: value for key, value in vars(optimizer).items() if key not in ("param_groups", "state")}
    held = [t for t in held_tensors(own) if t.dtype.itemsize >= 4]
    smallest = sorted(weights, key=Tensor.numel)[:3]
    return bool(smallest and held) and all(any(is_master(t, p) for t in held) for p in smallest)


def family(t: Tracked) -> tuple[GroupState | None, int]:
    """What tensors with steps alike share: the group, and whether they are scalars, vectors, or of more dimensions."""
    return t.owner, min(t.param.ndim, 2)


class Replays:
    """The intended steps of 16-bit tensors, added up in their banks: of samples, until their step fails or differs from that of
    whole tensors; then of a few whole tensors of the group."""

    def __init__(self, n_matrices: int, waiting: Waiting) -> None:
        self.n_matrices, self.waiting = n_matrices, waiting
        self.was_wrong = False  # what was added up so far
        self.tensors: list[Tracked] = []
        self.few: set[int] = set()  # ids of the tensors that are replayed where whole ones are needed
        self.whole: set[tuple] = set()  # families that need them
        self.failed: set[int] = set()  # ids of optimizers that could not be replayed
        self.last: dict[int, Tensor] = {}  # the steps just replayed, by the tensor's id: whole, or of the sample

    def choose(self, tracked: Sequence[Tracked]) -> None:
        self.tensors = [t for t in tracked if t.optimizer is not None and t.is_narrow]
        self.whole |= {family(t) for t in self.tensors if not t.param.ndim}
        self.few = set()
        for alike in grouped(self.tensors, lambda t: (id(t.optimizer), t.param.ndim > 1)).values():
            stride = -(-len(alike) // self.n_matrices)
            self.few |= {id(t) for t in alike[stride // 2 :: stride]}

    def add(self, optimizer: Optimizer) -> Exception | None:
        """Add the step that is about to be taken. If it cannot be replayed, the optimizer is given up and the error returned,
        unless it keeps what rounding loses."""
        self.last = {}
        mine = [t for t in self.tensors if t.optimizer is optimizer]
        if not mine or id(optimizer) in self.failed:
            return None
        try:
            with RandomState([t.index for t in mine]):  # a replayed step may round stochastically
                self.add_steps([t for t in mine if t.param.grad is not None and not t.param.grad.is_sparse])
        except Exception as error:  # it may be anything that a foreign step raises on such copies
            self.failed.add(id(optimizer))
            self.last = {}
            for t in mine:
                t.intended_known = False
            return None if keeps_lost_bits(optimizer) else error
        return None

    def add_steps(self, tensors: Sequence[Tracked]) -> None:
        for t in tensors:
            t.age += 1
        for alike in grouped(tensors, lambda t: (family(t), t.bank, t.age, bool(t.state))).values():
            kin = family(alike[0])
            if kin not in self.whole:
                try:
                    self.add_samples(alike)
                except Exception:  # loose elements are no matrix; what else is wrong, whole tensors will raise again
                    self.need_whole(kin)
                else:
                    self.compare(alike)
            for t in alike if kin in self.whole else ():
                if id(t) in self.few:
                    self.last[id(t)] = replay([t], whole=True)
                    t.bank().intend(t, t.sample(self.last[id(t)]))

    def add_samples(self, tensors: Sequence[Tracked]) -> None:
        moved = replay(tensors).split([t.n_elements for t in tensors])
        for t, part in zip(tensors, moved, strict=True):
            self.last[id(t)] = part
            t.bank().intend(t, part)

    def compare(self, tensors: Sequence[Tracked]) -> None:
        age = tensors[0].age
        if age <= VERIFY_FIRST or age % VERIFY_EVERY == 0:
            for t in sorted(tensors, key=lambda t: t.param.numel())[:N_VERIFIED]:
                wanted = t.sample(replay([t], whole=True))
                self.waiting.add((self.last[id(t)] - wanted).norm() / wanted.norm(), partial(self.doubt, family(t)))

    def doubt(self, kin: tuple, distance: float) -> None:
        """How far samples were from whole tensors."""
        if distance > DISAGREE and kin not in self.whole:
            self.need_whole(kin)
            self.was_wrong = True

    def need_whole(self, kin: tuple) -> None:
        self.whole.add(kin)
        for t in self.tensors:
            t.intended_known &= family(t) != kin
