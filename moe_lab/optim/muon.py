"""Muon: momentum, orthogonalised. For matrices and for stacks of matrices, each orthogonalised by itself."""

# Shapes: M matrices of a stack, A rows, B columns.

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_lab.optim.products import multipliable, rounded

# The quintic's coefficients, and its epsilon: Jordan 2024, https://kellerjordan.github.io/posts/muon/
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
CONVENTIONS = ("original", "match_rms_adamw")


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """Move the singular values of a matrix towards 1 (they end between about 0.7 and 1.2): (A, B) → bfloat16.

    Newton–Schulz iteration of Jordan 2024. The order of operations is that of torch.optim.Muon, whose results are met
    bit for bit on a CPU. That is why a stack is not done in one batched product: in bfloat16 it rounds differently for
    some sizes, and the iteration amplifies that to half a percent. How products are made: `products.py`.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = multipliable(x / x.norm().clamp(min=EPSILON))  # a copy: a bfloat16 momentum must not be divided in place
    for _ in range(steps):
        gram = rounded(x @ x.T)
        polynomial = rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.addmm(x, polynomial, x, beta=a))
    return (x.T if tall else x).bfloat16()


def lr_factor(shape: torch.Size, convention: str) -> float:
    """What a Muon LR is multiplied with for a matrix (…, A, B).

    `original`: sqrt(max(1, A / B)), Jordan 2024: an element then moves by about lr / sqrt(B) a step.
    `match_rms_adamw`: 0.2 · sqrt(max(A, B)), Liu et al. 2025, eq. 4, https://arxiv.org/abs/2502.16982: by about 0.2 · lr.
    """
    rows, columns = shape[-2:]
    if convention == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


class Muon(Optimizer):
    """torch.optim.Muon, which takes single matrices only, for stacks (M, A, B) as well.

    A slice whose gradient is exactly zero (an expert that received no token) is left alone: no update from stale
    momentum, no decay. Momentum is kept as an exponential mean, as in torch: buf ← lerp(buf, grad, 1 - momentum).
    `lr` is a number in the convention `adjust_lr`; weight decay is decoupled and multiplies with the plain `lr`.
    Raises ValueError for a parameter that is neither a matrix nor a stack of matrices.
    """

    def __init__(
        self,
        params: Iterable,
        lr=0.02,
        *,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        weight_decay=0.0,
        adjust_lr="original",
    ):
        if adjust_lr not in CONVENTIONS:
            raise ValueError(f"adjust_lr={adjust_lr!r} is not one of {', '.join(CONVENTIONS)}")
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        defaults |= {"weight_decay": weight_decay, "adjust_lr": adjust_lr}
        super().__init__(params, defaults)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices and stacks of matrices, got the shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Returns the closure's loss, or None."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p: Tensor, group: dict) -> None:
        """Move one parameter. What a slice without gradient would get is masked out, on the device."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        stacked = p.ndim == 3
        weight, grad, buffer = (t if stacked else t.unsqueeze(0) for t in (p, p.grad, state["momentum_buffer"]))
        momentum, lr = group["momentum"], group["lr"]
        mean = buffer.lerp(grad, 1 - momentum)
        direction = grad.lerp(mean, momentum) if group["nesterov"] else mean
        direction = torch.stack([orthogonalise(matrix, group["ns_steps"]) for matrix in direction])
        decayed = weight * (1 - lr * group["weight_decay"])
        moved = decayed.add_(direction, alpha=-lr * lr_factor(p.shape, group["adjust_lr"]))
        if stacked:
            alive = (grad != 0).flatten(1).any(dim=1)[:, None, None]  # (M, 1, 1)
            mean, moved = torch.where(alive, mean, buffer), torch.where(alive, moved, weight)
        buffer.copy_(mean)
        weight.copy_(moved)
