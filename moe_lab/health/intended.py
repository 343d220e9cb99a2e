"""What an optimizer is about to do, in exact arithmetic: its own step, replayed in float32 on copies.

The real step works on the real tensors, whose number format may round its work away. A replay hands the optimizer's own
`step` float32 copies of weight, gradient and state, so it needs no formula per optimizer. It is done only for classes
whose step is known to touch nothing but these.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

# Each element's step depends on that element alone: sampled elements can be replayed by themselves. By class name, so that
# other libraries' versions of the same optimizer (optimi, torchao) count too.
ELEMENTWISE = {"SGD", "Adam", "AdamW", "_Adam", "_AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta"}
ADAM_LIKE = {"Adam", "AdamW", "_Adam", "_AdamW", "NAdam", "RAdam"}
MATRIX_WISE = {"Muon"}  # a step needs its whole matrix
# What keeps lost bits for later: then a weight's own format says nothing about what is lost.
KEEPS_BITS = re.compile(r"kahan|compensat|master|residual|shift", re.IGNORECASE)


def kind_of(optimizer: Optimizer) -> str:
    """`adam`, `elementwise`, `muon` or `unknown`."""
    name = type(optimizer).__name__
    if name in ADAM_LIKE:
        return "adam"
    if name in MATRIX_WISE:
        return "muon"
    return "elementwise" if name in ELEMENTWISE else "unknown"


def keeps_lost_bits(optimizer: Optimizer) -> bool:
    """Whether it has fp32 masters, Kahan compensation, or rounds stochastically; look after its first step."""
    if any(KEEPS_BITS.search(str(key)) for state in optimizer.state.values() for key in state):
        return True
    options = {**vars(optimizer), **{k: v for group in optimizer.param_groups for k, v in group.items()}}
    return any("stochastic" in str(key).lower() and bool(value) for key, value in options.items())


def replay_elements(optimizer: Optimizer, group: dict, params: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Intended step of sampled elements: (sum of the indices' lengths,) float32, before the real step is taken.

    Every parameter has a dense gradient, and all of them have state, or none has; `indices` are flat positions. Raises
    whatever the optimizer's step raises on such copies.
    """
    pick = lambda tensors: torch.cat(  # noqa: E731
        [t.detach().flatten()[i].float() for t, i in zip(tensors, indices, strict=True)]
    )
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


def replay_matrix(optimizer: Optimizer, group: dict, param: Tensor) -> Tensor:
    """Intended step of a whole matrix or stack, float32, in its shape."""
    state = {
        key: (value.detach().float().clone() if value.is_floating_point() else value.clone())
        if isinstance(value, Tensor)
        else value
        for key, value in optimizer.state.get(param, {}).items()
    }
    return run(optimizer, group, param.detach().float(), param.grad.detach().float(), state)


def run(optimizer: Optimizer, group: dict, weight: Tensor, grad: Tensor, state: dict) -> Tensor:
    """One step of the optimizer's class on one float32 tensor; returns how far it moved."""
    before = weight.clone()
    weight.requires_grad_().grad = grad
    options = {key: value for key, value in group.items() if key != "params"}
    options |= {key: False for key in ("foreach", "fused") if key in options}  # the plain loop; the result is the same
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(vars(optimizer))
    shadow.__dict__.pop("step", None)  # a scheduler's wrapper would step the real optimizer
    shadow.param_groups = [{"params": [weight], **options}]
    shadow.state = defaultdict(dict, {weight: state} if state else {})
    shadow._optimizer_step_pre_hooks, shadow._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    type(optimizer).step(shadow)
    return weight.detach() - before
