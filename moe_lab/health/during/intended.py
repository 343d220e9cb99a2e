"""What an optimizer is about to do, in exact arithmetic: its own step, replayed in float32 on copies.

The real step works on the real tensors, whose number format may round its work away. A replay hands the optimizer's own
`step` float32 copies of weight, gradient and state, so it needs no formula per optimizer. It is done only for classes
whose step is known to touch nothing but these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sampling import elements, plain
from ..torch_private import unhooked_step
from .bank import Bank, Tracked

# Each element's step depends on that element alone: sampled elements can be replayed by themselves. By class name, so that
# other libraries' versions of the same optimizer (optimi, torchao) count too.
ELEMENTWISE = {"SGD", "Adam", "AdamW", "_Adam", "_AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta"}
ADAM_LIKE = {"Adam", "AdamW", "_Adam", "_AdamW", "NAdam", "RAdam"}
MATRIX_WISE = {"Muon"}  # a step needs its whole matrix
# What keeps lost bits for later: then a weight's own format says nothing about what is lost.
KEEPS_BITS = re.compile(r"kahan|compensat|master|residual|shift", re.IGNORECASE)


def kind_of(optimizer: Optimizer) -> str:
    """`adam`, `elementwise`, `muon` or `unknown`, by the class, or by the one whose `step` it inherits."""
    kind = type(optimizer)
    inherited = kind.step.__qualname__.split(".")[-2]
    for name in (kind.__name__, inherited):
        if name in ADAM_LIKE:
            return "adam"
        if name in MATRIX_WISE:
            return "muon"
        if name in ELEMENTWISE:
            return "elementwise"
    return "unknown"


def keeps_lost_bits(optimizer: Optimizer) -> bool:
    """Whether it has fp32 masters, Kahan compensation, or rounds stochastically; look after its first step."""
    return keeps_bits(optimizer.state.values(), [vars(optimizer), *optimizer.param_groups])


def keeps_bits(states: Iterable[Mapping], options: Iterable[Mapping]) -> bool:
    """The same of what an optimizer keeps for its tensors, and of its options, live or from a file: told by their names."""
    if any(KEEPS_BITS.search(str(key)) or "fp32" in str(key) for state in states for key in state):
        return True
    named = ((f"{key} {value}" if isinstance(value, str) else key, value) for o in options for key, value in o.items())
    return any("stochastic" in str(name).lower() and bool(value) for name, value in named)


def replay_elements(optimizer: Optimizer, group: dict, params: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Intended step of sampled elements: (sum of the indices' lengths,) float32, before the real step is taken.

    Every parameter has at least one dimension and a dense gradient, and all have seen as many updates; `indices` are flat
    positions. Raises whatever the optimizer's step raises on such copies.
    """

    def pick(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([elements(plain(t), i).float() for t, i in zip(tensors, indices, strict=True)])

    weight, grad = pick(params), pick([p.grad for p in params])
    states = [optimizer.state.get(p, {}) for p in params]
    state = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.shape == params[0].shape:
            state[key] = pick([s[key] for s in states])
            if KEEPS_BITS.search(key):
                state[key].zero_()  # bits carried from earlier steps are not this step's intent
        else:
            state[key] = value.detach().clone() if isinstance(value, Tensor) else value
    return run(optimizer, group, weight, grad, state)


def replay_whole(optimizer: Optimizer, group: dict, param: Tensor) -> Tensor:
    """Intended step of a whole tensor, float32, in its shape: a matrix, a stack, or a scalar."""
    state = {}
    for key, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor):
            value = value.detach().clone()
            value = value.float() if value.is_floating_point() else value
        state[key] = torch.zeros_like(value) if KEEPS_BITS.search(key) and isinstance(value, Tensor) else value
    weight, grad = (t.detach().to(torch.float32, copy=True) for t in (param, param.grad))
    return run(optimizer, group, weight, grad, state)


def run(optimizer: Optimizer, group: dict, weight: Tensor, grad: Tensor, state: dict) -> Tensor:
    """One step of the optimizer's class on one float32 tensor; returns how far it moved. May write into what it is given.

    A fused step stays fused: it alone knows what to do with a loss scaler's gradients, and keeps its counts on the device.
    """
    before = weight.clone()
    weight.requires_grad_().grad = grad
    options = {key: value for key, value in group.items() if key != "params"}
    options |= {key: False for key in ("foreach", "differentiable") if key in options}
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(vars(optimizer))
    shadow.__dict__.pop("step", None)  # a scheduler's wrapper would step the real optimizer
    shadow.param_groups = [{"params": [weight], **options}]
    shadow.state = defaultdict(dict, {weight: state} if state else {})
    unhooked_step(type(optimizer))(shadow)
    return weight.detach() - before


def choose_replayed(tracked: list[Tracked], n_matrices: int) -> list[Tracked]:
    """The 16-bit tensors whose intended steps are replayed: all that go element by element, a few that need a matrix."""
    narrow = [t for t in tracked if t.optimizer is not None and t.is_narrow]
    elements = [t for t in narrow if kind_of(t.optimizer) in ("adam", "elementwise")]
    matrices = [t for t in narrow if kind_of(t.optimizer) == "muon"]
    stride = max(1, -(-len(matrices) // n_matrices))
    return elements + matrices[stride // 2 :: stride]


class Replays:
    """The intended steps of 16-bit tensors, added up in their banks."""

    def __init__(self, n_matrices: int) -> None:
        self.n_matrices = n_matrices
        self.of: dict[int, list[tuple[Bank, Tracked]]] = {}  # by the optimizer's id
        self.failed: set[int] = set()  # optimizers that could not be replayed

    def choose(self, tracked: Sequence[Tracked], banks: Sequence[Bank]) -> None:
        bank_of = {id(t): bank for bank in banks for t in bank.tensors}
        self.of = {}
        for t in choose_replayed(tracked, self.n_matrices):
            if id(t.optimizer) not in self.failed:
                self.of.setdefault(id(t.optimizer), []).append((bank_of[id(t)], t))

    def add(self, optimizer: Optimizer, tell: Callable[[Exception], None]) -> None:
        """Add the step that is about to be taken. If it cannot be replayed, it is given up, and `tell` is called."""
        try:
            self.replay(optimizer)
        except Exception as error:  # it goes by a known name, and needs more than one tensor and its state
            self.failed.add(id(optimizer))
            for _, t in self.of.pop(id(optimizer)):
                t.intended_known = False
            tell(error)

    def replay(self, optimizer: Optimizer) -> None:
        batches: dict[tuple, list[tuple[Bank, Tracked]]] = {}
        for bank, t in self.of.get(id(optimizer), ()):
            if t.param.grad is None or t.param.grad.is_sparse:
                continue
            if t.param.ndim == 0 or kind_of(optimizer) == "muon":
                bank.intend(t, t.sample(replay_whole(optimizer, t.group, t.param)))
            else:  # one replay for a group's tensors of the same age
                key = (id(bank), t.group_number, t.age, bool(optimizer.state.get(t.param)))
                batches.setdefault(key, []).append((bank, t))
            t.age += 1
        for batch in batches.values():
            tensors = [t for _, t in batch]
            params, indices = [t.param for t in tensors], [t.index for t in tensors]
            moved = replay_elements(optimizer, tensors[0].group, params, indices)
            for (bank, t), part in zip(batch, moved.split([len(i) for i in indices]), strict=True):
                bank.intend(t, part)
