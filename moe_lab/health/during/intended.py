"""What an optimizer is about to do, in exact arithmetic: its own step, replayed in float32 on copies.

The real step works on 16-bit tensors, whose number format may round its work away. A replay hands the optimizer's own `step`
float32 copies of weight, gradient and state, so it needs no formula per optimizer and no class's name. Where a step treats
each element by itself, sampled elements suffice; that is tried, and compared with whole tensors.

Safe for a class that nobody knows: the step runs on another object, with copies of options and state and without hooks, and
the random state is put back. Refused, with an info: optimizers that keep tensors or objects outside of `state` (masters, an
inner optimizer), and where several processes train, since a step may talk to the others, all but torch's own. A step that
writes to a global would go unseen.
"""

from __future__ import annotations

import copy
import enum
import re
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..findings import grouped
from ..random_state import RandomState
from ..sampling import elements, plain
from ..torch_private import unhooked_step
from .bank import Bank, Tracked

# What keeps lost bits for later: then a weight's own format says nothing about what is lost.
KEEPS_BITS = re.compile(r"kahan|compensat|master|residual|shift", re.IGNORECASE)
N_MATRICES = 4  # of those that need their whole tensor, how many are replayed: a step costs as much as the real one
VERIFY_EVERY, VERIFY_FIRST, N_VERIFIED = 5, 3, 2  # updates, the first ones, and small tensors of a group
DISAGREE = 0.01  # relative distance from which on elements need their tensor
PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type, types.FunctionType)
SCALER = ("grad_scale", "found_inf", "defaults")  # attributes that torch itself may give tensors to


def keeps_lost_bits(optimizer: Optimizer) -> bool:
    """Whether it has fp32 masters, Kahan compensation, or rounds stochastically; look after its first step."""
    return keeps_bits(optimizer.state.values(), [vars(optimizer), *optimizer.param_groups])


def keeps_bits(states: Iterable[Mapping], options: Iterable[Mapping]) -> bool:
    """The same of what an optimizer keeps for its tensors, and of its options, live or from a file: told by their names."""
    if any(KEEPS_BITS.search(str(key)) or "fp32" in str(key) for state in states for key in state):
        return True
    named = ((f"{key} {value}" if isinstance(value, str) else key, value) for o in options for key, value in o.items())
    return any("stochastic" in str(name).lower() and bool(value) for name, value in named)


def duplicate(value: Any, tensors: bool = True) -> Any:
    """A copy down to the tensors, those of 16 bits in float32. Raises ValueError for what may lead to the real thing."""
    if isinstance(value, Tensor) and tensors:
        if hasattr(value, "__tensor_flatten__") and not hasattr(value, "to_local"):  # quantised: stays what it is
            names, context = value.__tensor_flatten__()
            parts = {name: getattr(value, name).detach().clone() for name in names}
            return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
        value = value.detach().clone()
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, duplicate(inner, tensors)) for key, inner in value.items())
        return copied
    if type(value) in (list, tuple, set, frozenset, deque):
        return type(value)(duplicate(inner, tensors) for inner in value)
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
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    if not (alone or type(optimizer).step.__module__.startswith("torch.optim.")):
        raise ValueError("several processes train, and its step might talk to the others")
    options = {key: duplicate(value) for key, value in group.items() if key != "params"}
    options |= {key: False for key in ("foreach", "differentiable") if key in options}
    shadow = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            shadow.__dict__[name] = OrderedDict()
        elif name not in ("param_groups", "state", "step"):  # step: a scheduler's wrapper would step the real optimizer
            shadow.__dict__[name] = duplicate(value, tensors=name in SCALER)
    shadow.param_groups = [{"params": [weight.requires_grad_()], **options}]
    shadow.state = defaultdict(dict, {weight: state} if state else {})
    return shadow


def advance(shadow: Optimizer, grad: Tensor) -> Tensor:
    """One step of a shadow: how far its weight moved. May write into `grad`."""
    (weight,) = shadow.param_groups[0]["params"]
    before, weight.grad = weight.detach().clone(), grad
    unhooked_step(type(shadow))(shadow)
    return weight.detach() - before


def without_carry(key: str, value: Any, weight: Tensor) -> Any:
    """Bits that were carried from earlier steps are not this step's intent: a master is what the weight is, a rest is 0."""
    if not isinstance(value, Tensor) or not KEEPS_BITS.search(str(key)):
        return value
    return weight.clone() if "master" in str(key).lower() else torch.zeros_like(value)


def replay_elements(optimizer: Optimizer, group: dict, params: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Intended step of sampled elements: (sum of the indices' lengths,) float32, before the real step is taken.

    Every parameter has at least one dimension and a dense gradient, and all have seen as many updates; `indices` are flat
    positions. Right only where each element's step is its own. Raises whatever the optimizer's step raises on such copies.
    """

    def pick(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([elements(plain(t), i).float() for t, i in zip(tensors, indices, strict=True)])

    weight, grad = pick(params), pick([p.grad for p in params])
    states = [optimizer.state.get(p, {}) for p in params]
    state = {}
    for key, value in states[0].items():
        is_elements = isinstance(value, Tensor) and value.shape == params[0].shape
        value = pick([s[key] for s in states]) if is_elements else duplicate(value)
        state[key] = without_carry(key, value, weight)
    return advance(shadow_of(optimizer, group, weight, state), grad)


def replay_whole(optimizer: Optimizer, group: dict, param: Tensor) -> Tensor:
    """Intended step of a whole tensor, float32, in its shape: a matrix, a stack, or a scalar."""
    weight, grad = (t.detach().to(torch.float32, copy=True) for t in (param, param.grad))
    state = {k: without_carry(k, duplicate(v), weight) for k, v in optimizer.state.get(param, {}).items()}
    return advance(shadow_of(optimizer, group, weight, state), grad)


def is_adam(optimizer: Optimizer, group: dict) -> bool:
    """Whether a group's steps are Adam's, m̂ / sqrt(v̂) (Kingma & Ba 2015, alg. 1), found by trying it on made-up gradients."""
    try:
        b1, b2 = group["betas"]
        weight = torch.zeros(16, device=group["params"][0].device)
        lr = torch.ones_like(group["lr"]) if isinstance(group["lr"], Tensor) else 1.0
        first = optimizer.defaults  # whole numbers may be counts: of a group that has not stepped yet
        fresh = {k: first[k] if type(v) is int else v for k, v in group.items() if type(v) is not int or k in first}
        shadow = shadow_of(optimizer, {**fresh, "lr": lr, "weight_decay": 0.0}, weight, {})
        m = v = torch.zeros_like(weight)
        for t in range(1, 9):
            g = torch.sin(t * torch.arange(1.0, 17.0)).to(weight.device)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            expected = m / (1 - b1**t) / (v / (1 - b2**t)).sqrt()
            if (advance(shadow, g).abs() - expected.abs()).abs().max() > DISAGREE:
                return False
    except Exception:  # whatever a foreign step raises: then nothing is claimed of it
        return False
    return True


class Replays:
    """The intended steps of 16-bit tensors, added up in their banks.

    Elements are replayed by themselves until they turn out to depend on their tensor: their step fails, or differs from
    that of whole tensors. Then a few whole tensors of the group are replayed.
    """

    def __init__(self, n_matrices: int) -> None:
        self.n_matrices = n_matrices
        self.of: dict[int, list[tuple[Bank, Tracked]]] = {}  # by the optimizer's id
        self.few: set[int] = set()  # ids of the tensors that are replayed where whole ones are needed
        self.whole: set[tuple] = set()  # (optimizer's id, group's number, whether matrices) that need them
        self.doubts: list[tuple[tuple, Tensor]] = []  # not fetched yet: how far elements were from whole tensors
        self.failed: set[int] = set()  # optimizers that could not be replayed
        self.last: dict[
            int, Tensor
        ] = {}  # the intended steps just replayed, by the tensor's id: whole, or of the sample

    def choose(self, tracked: Sequence[Tracked], banks: Sequence[Bank]) -> None:
        bank_of = {id(t): bank for bank in banks for t in bank.tensors}
        live = [t for t in tracked if t.optimizer is not None and id(t.optimizer) not in self.failed]
        replayed = [t for t in live if t.is_narrow]
        self.of = grouped(((bank_of[id(t)], t) for t in replayed), lambda pair: id(pair[1].optimizer))
        self.few = set()
        for alike in grouped(replayed, lambda t: (id(t.optimizer), t.param.ndim > 1)).values():
            stride = -(-len(alike) // self.n_matrices)
            self.few |= {id(t) for t in alike[stride // 2 :: stride]}

    def add(self, optimizer: Optimizer) -> Exception | None:
        """Add the step that is about to be taken. An optimizer whose step cannot be replayed is given up: the error is returned,
        unless it keeps what rounding loses."""
        self.last = {}
        mine = self.of.get(id(optimizer))
        if not mine:
            return None
        random_state = RandomState({bank.device for bank, _ in mine})  # a replayed step may round stochastically
        try:
            self.replay(optimizer)
        except Exception as error:  # it may be anything that a foreign step raises on such copies
            self.failed.add(id(optimizer))
            self.last = {}
            for _, t in self.of.pop(id(optimizer)):
                t.intended_known = False
            return None if keeps_lost_bits(optimizer) else error
        finally:
            random_state.put_back()
        return None

    def replay(self, optimizer: Optimizer) -> None:
        batches: dict[tuple, list[tuple[Bank, Tracked]]] = {}  # one replay for a group's tensors of the same age
        for bank, t in self.of[id(optimizer)]:
            if t.param.grad is not None and not t.param.grad.is_sparse:
                key = (id(optimizer), t.group_number, t.param.ndim > 1)
                alone = id(t) if t.param.ndim == 0 else 0
                alike = (key, id(bank), t.age, bool(optimizer.state.get(t.param)), alone)
                batches.setdefault(alike, []).append((bank, t))
                t.age += 1
        for (key, *_, alone), batch in batches.items():
            if not alone and key not in self.whole:
                self.replay_batch(optimizer, key, batch)
            if alone or key in self.whole:
                for bank, t in batch:
                    if id(t) in self.few:
                        self.last[id(t)] = replay_whole(optimizer, t.group, t.param)
                        bank.intend(t, t.sample(self.last[id(t)]))

    def replay_batch(self, optimizer: Optimizer, key: tuple, batch: list[tuple[Bank, Tracked]]) -> None:
        tensors = [t for _, t in batch]
        params, indices = [t.param for t in tensors], [t.index for t in tensors]
        try:
            moved = replay_elements(optimizer, tensors[0].group, params, indices).split([len(i) for i in indices])
        except Exception:  # loose elements are no matrix; what else is wrong, whole tensors will raise again
            self.need_whole(key)
            return
        for (bank, t), part in zip(batch, moved, strict=True):
            self.last[id(t)] = part
            bank.intend(t, part)
        age = tensors[0].age
        if age <= VERIFY_FIRST or age % VERIFY_EVERY == 0:
            for t in sorted(tensors, key=lambda t: t.param.numel())[:N_VERIFIED]:
                wanted = t.sample(replay_whole(optimizer, t.group, t.param))
                self.doubts.append((key, (self.last[id(t)] - wanted).norm() / wanted.norm()))

    def need_whole(self, key: tuple) -> None:
        self.whole.add(key)
        for _, t in self.of.get(key[0], ()):
            if (t.group_number, t.param.ndim > 1) == key[1:]:
                t.intended_known = False

    def fetch(self) -> bool:
        """Compare elements with whole tensors; True if what was added up so far was wrong: begin a new window."""
        wrong = {key for key, distance in self.doubts if distance.item() > DISAGREE} - self.whole
        self.doubts = []
        for key in wrong:
            self.need_whole(key)
        return bool(wrong)
