"""Optimizers that are not on PyPI, written for the tests from their papers' and repositories' formulas, in as few words as
show their step, and Adam under names of its own. A matrix is (A, B): A outputs, B inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_lab.optim.muon import orthogonalise


def orthogonal(state: dict, grad: Tensor, momentum: float = 0.95) -> Tensor:
    """Of Nesterov's momentum, of an exponential mean."""
    buffer = state.setdefault("momentum_buffer", torch.zeros_like(grad))
    buffer.lerp_(grad, 1 - momentum)
    return orthogonalise(grad.lerp(buffer, momentum), steps=5).to(grad.dtype)


def adam_update(state: dict, grad: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    if "exp_avg" not in state:
        state.update(step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad))
    state["step"] += 1
    state["exp_avg"].lerp_(grad, 1 - betas[0])
    state["exp_avg_sq"].lerp_(grad.square(), 1 - betas[1])
    mean = state["exp_avg"] / (1 - betas[0] ** state["step"])
    return mean / ((state["exp_avg_sq"] / (1 - betas[1] ** state["step"])).sqrt() + eps)


def original_factor(p: Tensor) -> float:
    return max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5


class JordanMuon(Optimizer):
    """KellerJordan/Muon, plain: `lr` · sqrt(max(1, A / B)) · an orthogonal matrix."""

    decay = "weight_decay"

    def __init__(self, params: Iterable, lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def update(self, p: Tensor, group: dict) -> Tensor:
        return orthogonal(self.state[p], p.grad, group["momentum"]) * original_factor(p)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = self.update(p, group)
                p.mul_(1 - group["lr"] * group[self.decay]).add_(update, alpha=-group["lr"])


class MuonWithAuxAdam(JordanMuon):
    """KellerJordan/Muon, both in one: groups say `use_muon`; the others are under Adam."""

    def __init__(self, groups: list[dict]):
        Optimizer.__init__(self, groups, {"weight_decay": 0.0, "momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-10})

    def update(self, p: Tensor, group: dict) -> Tensor:
        if group["use_muon"]:
            return super().update(p, group)
        return adam_update(self.state[p], p.grad, group["betas"], group["eps"])


class MoonlightMuon(JordanMuon):
    """MoonshotAI/Moonlight: called Muon there. One group, one LR like AdamW's; state says which tensors are Muon's, whose
    update is scaled by 0.2 · sqrt(max(A, B)) (Liu et al. 2025, eq. 4)."""

    decay = "wd"

    def __init__(self, lr: float, wd: float, muon_params: list[Tensor], adamw_params: list[Tensor]):
        Optimizer.__init__(self, [*muon_params, *adamw_params], {"lr": lr, "wd": wd})
        for p in (*muon_params, *adamw_params):
            self.state[p]["use_muon"] = any(p is q for q in muon_params)

    def update(self, p: Tensor, group: dict) -> Tensor:
        if self.state[p]["use_muon"]:
            return orthogonal(self.state[p], p.grad) * 0.2 * math.sqrt(max(p.shape))
        return adam_update(self.state[p], p.grad, (0.9, 0.95), 1e-8)


MoonlightMuon.__name__ = "Muon"


class DionMuon(JordanMuon):
    """microsoft/dion's Muon: `adjust_lr` is "spectral_norm", sqrt(A / B); "rms_norm", 0.2 · sqrt(max(A, B)); or None."""

    def __init__(self, params: Iterable, lr: float = 0.01, adjust_lr: str | None = "spectral_norm", **options):
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            group["adjust_lr"] = adjust_lr

    def update(self, p: Tensor, group: dict) -> Tensor:
        rows, columns = p.shape[-2:]
        by_name = {"spectral_norm": math.sqrt(rows / columns), "rms_norm": 0.2 * math.sqrt(max(rows, columns))}
        return orthogonal(self.state[p], p.grad) * by_name.get(group["adjust_lr"], 1.0)


class NorMuon(JordanMuon):
    """NorMuon (Li et al. 2025, arXiv:2510.05491): each row is divided by a running RMS of its own, then all is scaled so that
    an element moves by 0.2 · lr."""

    def update(self, p: Tensor, group: dict) -> Tensor:
        update = orthogonal(self.state[p], p.grad)
        squares = update.square().mean(dim=-1, keepdim=True)
        second = self.state[p].setdefault("second_moment", torch.zeros_like(squares))
        second.lerp_(squares, 0.05)
        update = update / (second.sqrt() + 1e-8)
        return update * 0.2 * math.sqrt(update.numel()) / update.norm()


@torch.no_grad()
def my_step(self: Optimizer, closure=None) -> None:
    for group in self.param_groups:
        group["t"] += 1
        (b1, b2), t = group["betas"], group["t"]
        for p in (p for p in group["params"] if p.grad is not None):
            state = self.state[p]
            m, v = (state.get(key, torch.zeros_like(p, dtype=torch.float32)) for key in "mv")
            grad = p.grad.float()
            state["m"], state["v"] = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
            update = state["m"] / (1 - b1**t) / ((state["v"] / (1 - b2**t)).sqrt() + 1e-8)
            p.copy_(p.float() - group["lr"] * update)


class MyOpt(Optimizer):
    """Adam as somebody writes it for himself: other names, the count in the group, `step` a function of the module, whose
    qualified name has no class in it."""

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95)):
        super().__init__(params, {"lr": lr, "betas": betas, "t": 0})

    step = my_step


class MyAdamW(torch.optim.AdamW):
    """A subclass with a step of its own, which calls its base's."""

    def step(self, closure=None):
        return super().step(closure)
