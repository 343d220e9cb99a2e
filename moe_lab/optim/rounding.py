"""bfloat16 parameters that keep their small updates: fp32 masters, Kahan summation, stochastic rounding.

The cure is fp32 parameters and autocast (`precision.parameters: float32`); here is what helps while they stay in bf16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.config import OptimizerConfig
from moe_lab.optim.groups import build_optimizers, pass_options

# What each mode keeps of a parameter beside the inner optimizer's own state.
MODES = {"masters": "master", "kahan": "compensation", "stochastic": None}


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 values, to the nearer one more often: unbiased.

    bfloat16 is the upper half of float32, so noise added to the lower 16 bits carries into it with just the probability
    lower / 2^16. For weight updates: Zamirai et al. 2020, https://arxiv.org/abs/2010.06192. The noise is drawn on the
    tensor's device.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    # a NaN whose bits are all ones, as CUDA makes them, would overflow to -0
    return torch.where(x.isfinite(), rounded, x).bfloat16()


class Rounded(Optimizer):
    """Any torch optimizer, made to work in float32 for a model whose parameters are bfloat16.

    `inner` is an optimizer built on the model's parameters, float32 or bfloat16, that has not stepped yet. It is taken
    over: it now updates float32 working copies, and the model's parameters are cast to bfloat16 in place. Modes:

    - `masters`: the working copies are kept, from the float32 values before the cast, and are the truth; a parameter is
      their rounded image (Micikevicius et al. 2018, sec. 3.1, https://arxiv.org/abs/1710.03740). 4 more bytes each.
    - `kahan`: a parameter and a bfloat16 compensation hold the working copy as their sum (Zamirai et al. 2020,
      https://arxiv.org/abs/2010.06192). About 16 bits: an update below 2^-17 of the weight may still vanish. 2 more bytes.
    - `stochastic`: the working copy is the parameter itself, and rounded at random. Nothing more is kept.

    Except in `masters`, float32 copies exist during a step only. `state[p]` holds the inner optimizer's moments,
    float32, and `master` or `compensation`; each group's `rounding` names the mode. Options that change in
    `param_groups`, such as the LR, reach the inner optimizer. A closure is called once, before the update. Weights are
    to be loaded before wrapping, or together with this optimizer's state: a step overwrites them from the masters.
    Raises ValueError for an unknown mode, an optimizer that has stepped, or parameters of another dtype.
    """

    def __init__(self, inner: Optimizer, mode: str):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
        if inner.state:
            raise ValueError("the optimizer has stepped already; wrap it in Rounded before its first step")
        self.inner, self.mode = inner, mode
        self.work: dict[Tensor, nn.Parameter] = {}  # the model's parameter → what the inner optimizer updates
        groups = [dict(group) for group in inner.param_groups]
        inner.param_groups.clear()
        super().__init__(groups, inner.defaults)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take over one more group; its parameters are cast to bfloat16 in place."""
        super().add_param_group({**param_group, "rounding": self.mode})
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"Rounded takes float32 and bfloat16 parameters, got {p.dtype}")
            start = p.detach().to(torch.float32, copy=True)
            p.data = start.bfloat16()
            if p.grad is not None:
                p.grad.data = p.grad.bfloat16()
            self.work[p] = nn.Parameter(start.new_empty(0))
            if self.mode == "masters":
                self.state[p]["master"] = start
            elif self.mode == "kahan":
                self.state[p]["compensation"] = (start - p.float()).bfloat16()
        self.inner.add_param_group({**group, "params": [self.work[p] for p in group["params"]]})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """One update. Returns the closure's loss, or None. Parameters without gradient are left alone."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        moving = [(p, work) for p, work in self.work.items() if p.grad is not None]
        for p, work in moving:
            work.data = self.exact(p)
            work.grad = p.grad.float()
        pass_options(self.param_groups, self.inner.param_groups)
        self.inner.step()
        pass_options(self.inner.param_groups, self.param_groups)  # some optimizers keep a step count there
        for p, work in moving:
            self.write_back(p, work.detach())
            work.data, work.grad = work.new_empty(0), None
            self.state[p].update(self.inner.state[work])
        return loss

    def exact(self, p: Tensor) -> Tensor:
        """What a parameter stands for, float32: its master itself, or a copy."""
        if self.mode == "masters":
            return self.state[p]["master"]
        value = p.detach().float()
        return value + self.state[p]["compensation"].float() if self.mode == "kahan" else value

    def write_back(self, p: Tensor, work: Tensor) -> None:
        """Round an updated working copy into the parameter, and keep what the mode keeps."""
        if self.mode == "masters":
            self.state[p]["master"] = work
            p.copy_(work)
        elif self.mode == "stochastic":
            p.copy_(stochastic_round(work))
        else:
            compensation = self.state[p]["compensation"]
            # a remainder of half a ULP is a tie, which rounding might turn over: what did not move keeps its bits
            still = work == self.exact(p)
            rounded = work.bfloat16()
            rest = (work - rounded.float()).bfloat16()
            p.copy_(torch.where(still, p, rounded))
            compensation.copy_(torch.where(still, compensation, rest))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the state is of another mode."""
        modes = {group.get("rounding") for group in state_dict["param_groups"]}
        if modes != {self.mode}:
            raise ValueError(f"the state has rounding={', '.join(map(str, modes))}, this optimizer {self.mode!r}")
        # the base class would cast the float32 state to the parameters' bfloat16, so it gets the groups alone
        super().load_state_dict({**state_dict, "state": {}})
        own, saved = MODES[self.mode], state_dict["state"]
        inner = {i: {key: value for key, value in kept.items() if key != own} for i, kept in saved.items()}
        self.inner.load_state_dict({**state_dict, "state": {i: kept for i, kept in inner.items() if kept}})
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (p, work) in zip(indices, self.work.items(), strict=True):
            if own:
                self.state[p][own] = saved[i][own].to(p.device, copy=True)
            if work in self.inner.state:
                self.state[p].update(self.inner.state[work])

    def __getstate__(self) -> dict[str, Any]:  # for copy.deepcopy; torch's own keeps groups and state alone
        own = {name: getattr(self, name) for name in ("inner", "mode", "work")}
        return super().__getstate__() | own


def wrapped(mode: str, model: nn.Module, config: OptimizerConfig, max_lr: float) -> list[Optimizer]:
    """The package's optimizers, each wrapped in `Rounded`."""
    optimizers: list[Optimizer] = [Rounded(inner, mode) for inner in build_optimizers(model, config, max_lr)]
    model.to(torch.bfloat16)  # buffers, and parameters that no optimizer holds
    return optimizers


# Each takes a float32 model, casts it to bfloat16 in place, and returns its optimizers, ready for a Trainer.
Remedy = Callable[[nn.Module, OptimizerConfig, float], list[Optimizer]]
REMEDIES: dict[str, Remedy] = {mode: partial(wrapped, mode) for mode in MODES}
