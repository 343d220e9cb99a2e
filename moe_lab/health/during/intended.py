"""What an optimizer is about to do, in exact arithmetic: its own step, replayed in float32 on copies.

The real step works on the real tensors, whose number format may round its work away. A replay hands the optimizer's own
`step` float32 copies of weight, gradient and state, so it needs no formula per optimizer. It is done only for classes
whose step is known to touch nothing but these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sampling import plain
from ..torch_private import unhooked_step

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
    if any(KEEPS_BITS.search(str(key)) for state in optimizer.state.values() for key in state):
        return True
    options = {**vars(optimizer), **{k: v for group in optimizer.param_groups for k, v in group.items()}}
    return any("stochastic" in str(key).lower() and bool(value) for key, value in options.items())


def replay_elements(optimizer: Optimizer, group: dict, params: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Intended step of sampled elements: (sum of the indices' lengths,) float32, before the real step is taken.

    Every parameter has at least one dimension and a dense gradient, and all have seen as many updates; `indices` are flat
    positions. Raises whatever the optimizer's step raises on such copies.
    """

    def pick(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([plain(t).take(i).float() for t, i in zip(tensors, indices, strict=True)])

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
