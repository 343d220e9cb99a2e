"""Optimizers that are not on PyPI, written for the tests from their papers' and repositories' formulas, in as few words as
show their step, and Adam under names of its own. A matrix is (A, B): A outputs, B inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Jordan 2024's quintic Newton–Schulz iteration, in float32: (…, A, B)."""
    x = matrix.float() / (matrix.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def momentum_of(state: dict, grad: Tensor, momentum: float) -> Tensor:
    """Nesterov's, of an exponential mean."""
    buffer = state.setdefault("momentum_buffer", torch.zeros_like(grad))
    buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(buffer, momentum)


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

    def __init__(self, params: Iterable, lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def factor(self, p: Tensor, group: dict) -> float:
        return original_factor(p)

    def direction(self, p: Tensor, group: dict) -> Tensor:
        return orthogonalise(momentum_of(self.state[p], p.grad, group["momentum"]))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = self.direction(p, group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * self.factor(p, group))


class MuonWithAuxAdam(Optimizer):
    """KellerJordan/Muon, both in one: groups say `use_muon`; the others are under Adam."""

    def __init__(self, groups: list[dict]):
        defaults = {"weight_decay": 0.0, "momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-10}
        super().__init__([{**defaults, **group} for group in groups], {})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if group["use_muon"]:
                    update = orthogonalise(momentum_of(self.state[p], p.grad, group["momentum"])) * original_factor(p)
                else:
                    update = adam_update(self.state[p], p.grad, group["betas"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


class MoonlightMuon(Optimizer):
    """MoonshotAI/Moonlight: called Muon there. One group, one LR like AdamW's; state says which tensors are Muon's, whose
    update is scaled by 0.2 · sqrt(max(A, B)) (Liu et al. 2025, eq. 4)."""

    def __init__(self, lr: float, wd: float, muon_params: list[Tensor], adamw_params: list[Tensor]):
        super().__init__([*muon_params, *adamw_params], {"lr": lr, "wd": wd})
        for p in (*muon_params, *adamw_params):
            self.state[p]["use_muon"] = any(p is q for q in muon_params)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if state["use_muon"]:
                    update = orthogonalise(momentum_of(state, p.grad, 0.95)) * 0.2 * math.sqrt(max(p.shape))
                else:
                    update = adam_update(state, p.grad, (0.9, 0.95), 1e-8)
                p.mul_(1 - group["lr"] * group["wd"]).add_(update, alpha=-group["lr"])


MoonlightMuon.__name__ = "Muon"


class DionMuon(JordanMuon):
    """microsoft/dion's Muon: `adjust_lr` is "spectral_norm", sqrt(A / B); "rms_norm", 0.2 · sqrt(max(A, B)); or None."""

    def __init__(self, params: Iterable, lr: float = 0.01, adjust_lr: str | None = "spectral_norm", **options):
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            group["adjust_lr"] = adjust_lr

    def factor(self, p: Tensor, group: dict) -> float:
        rows, columns = p.shape[-2:]
        by_name = {"spectral_norm": math.sqrt(rows / columns), "rms_norm": 0.2 * math.sqrt(max(rows, columns))}
        return by_name.get(group["adjust_lr"], 1.0)


class NorMuon(JordanMuon):
    """NorMuon (Li et al. 2025, arXiv:2510.05491): each row is divided by a running RMS of its own, then all is scaled so that
    an element moves by 0.2 · lr."""

    def direction(self, p: Tensor, group: dict) -> Tensor:
        update = super().direction(p, group)
        state = self.state[p]
        squares = update.square().mean(dim=-1, keepdim=True)
        second = state.setdefault("second_moment", torch.zeros_like(squares))
        second.lerp_(squares, 0.05)
        update = update / (second.sqrt() + 1e-8)
        return update * 0.2 * math.sqrt(update.numel()) / update.norm()

    def factor(self, p: Tensor, group: dict) -> float:
        return 1.0


class MyOpt(Optimizer):
    """Adam as somebody writes it for himself: other names, the count in the group."""

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95)):
        super().__init__(params, {"lr": lr, "betas": betas, "t": 0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
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


class MyAdamW(torch.optim.AdamW):
    """A subclass with a step of its own, which calls its base's."""

    def step(self, closure=None):
        return super().step(closure)


def free_step(self: Optimizer, closure=None) -> None:
    with torch.no_grad():
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.add_(adam_update(self.state[p], p.grad, group["betas"], 1e-8), alpha=-group["lr"])


class FreeStep(Optimizer):
    """Its `step` is a function of a module: its qualified name has no class in it."""

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95)):
        super().__init__(params, {"lr": lr, "betas": betas})

    step = free_step
