"""Muon: momentum, orthogonalised. For matrices and for stacks of matrices, each orthogonalised by itself."""

# Shapes: M matrices of a stack or of a batch, A rows, B columns, S the smaller of A and B.

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_lab.optim.products import fast_dtype
from moe_lab.optim.sharded import is_sharded, local, on_whole

# The quintic's coefficients, and its epsilon: Jordan 2024, https://kellerjordan.github.io/posts/muon/
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
CONVENTIONS = ("original", "match_rms_adamw")
WIDE, AT_ONCE = 1.5, 5  # from which B / A on it takes fewer products to compose steps before they are applied; so many
BLOCK = 64  # rows of a symmetric product that are computed together
# What is updated together, of momentum in float32: on a CPU what its caches hold, elsewhere what is worth a launch.
BATCH_BYTES, LARGE_BATCH_BYTES = 1 << 21, 1 << 28


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """Move the singular values of matrices towards 1 (they end between about 0.7 and 1.2): (…, A, B), any scale.

    Newton–Schulz iteration of Jordan 2024, of all matrices at once, in the dtype in which their device multiplies fast, which
    the result has: bfloat16 as in torch.optim.Muon, or float32, and then nothing is rounded to bfloat16 on the way.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.reshape(-1, rows, columns)
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x * norms.clamp(min=EPSILON).reciprocal()).to(fast_dtype(x.device))  # a copy: momentum is not to be divided
    tall = rows > columns
    if x.dtype == torch.float32 and max(rows, columns) >= WIDE * min(rows, columns):
        for done in range(0, steps, AT_ONCE):
            polynomial = composed(gram_of(x), min(AT_ONCE, steps - done))
            x = x @ polynomial if tall else polynomial @ x
    else:
        for _ in range(steps):
            polynomial = quadratic(gram_of(x))
            x = torch.baddbmm(x, *((x, polynomial) if tall else (polynomial, x)), beta=COEFFICIENTS[0])
    return x.view(matrices.shape)


def gram_of(x: Tensor) -> Tensor:
    """X Xᵀ of wide matrices, Xᵀ X of tall ones: (M, A, B) → (M, S, S)."""
    return symmetric(x.mT, x) if x.shape[1] > x.shape[2] else symmetric(x, x.mT)


def quadratic(gram: Tensor) -> Tensor:
    """b · G + c · G²."""
    _, b, c = COEFFICIENTS
    if gram.dtype == torch.bfloat16:  # it has no digits for the small numbers beside b on a diagonal
        return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    inner = c * gram
    inner.diagonal(dim1=1, dim2=2).add_(b)
    return symmetric(gram, inner)


def composed(gram: Tensor, steps: int) -> Tensor:
    """What so many steps together multiply X with, if X Xᵀ is `gram`, float32. An error of a small eigenvalue grows
    twelvefold a step: too much for bfloat16, and in float32 for more than a few steps."""
    one = quadratic(gram)
    one.diagonal(dim1=1, dim2=2).add_(COEFFICIENTS[0])
    if steps == 1:
        return one
    return symmetric(composed(symmetric(symmetric(one, gram), one), steps - 1), one)  # polynomials of G: they commute


def symmetric(left: Tensor, right: Tensor) -> Tensor:
    """left @ right where that is symmetric: (M, S, …), (M, …, S) → (M, S, S). In float32 what mirrors is copied; units for
    bfloat16 are too fast for that to pay."""
    if left.dtype != torch.float32:
        return left @ right
    size = left.shape[1]
    product = left.new_empty(len(left), size, size)
    for start in range(0, size, BLOCK):
        block, rest = slice(start, start + BLOCK), slice(start + BLOCK, size)
        torch.bmm(left[:, block], right[:, :, start:], out=product[:, block, start:])
        product[:, rest, block] = product[:, block, rest].mT
    return product


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
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for pieces in self.batches(params):
                update(*map(list, zip(*pieces, strict=True)), group)
        return loss

    def batches(self, params: list[Tensor]) -> Iterable[list[tuple]]:
        """Weights, gradients and momenta, (M, A, B) each, together where matrices have one shape, in batches of bounded size;
        of stacks, apart from matrices, which slices have a gradient: (M, 1, 1) bool; and the parameter. Of what is spread over
        ranks, what is here: whole matrices of a stack, which need no other rank, and rows of a matrix."""
        found: list[list[tuple]] = []
        latest: dict[tuple, list[tuple]] = defaultdict(list)  # the batch of a shape that is being filled
        for p in params:
            here = [local(t) for t in (p, p.grad, self.state[p]["momentum_buffer"])]
            stacks = here if p.ndim == 3 else [t.unsqueeze(0) for t in here]
            if not len(stacks[0]):
                continue
            n, (rows, columns) = len(stacks[0]), p.shape[-2:]
            most = max(1, (BATCH_BYTES if p.device.type == "cpu" else LARGE_BATCH_BYTES) // (4 * rows * columns))
            kind = (p.ndim, rows, columns, p.dtype, p.device, is_sharded(p) and (p.device_mesh, p.placements))
            for weight, grad, buffer in zip(*(t.chunk(math.ceil(n / most)) for t in stacks), strict=True):
                if not latest[kind] or sum(len(piece[0]) for piece in latest[kind]) + len(weight) > most:
                    latest[kind] = []
                    found.append(latest[kind])
                alive = (grad.amax((1, 2), True) != 0) | (grad.amin((1, 2), True) != 0) if p.ndim == 3 else None
                latest[kind].append((weight, grad, buffer, alive, p))
        return found


def update(weights: list, grads: list, buffers: list, alive: list, params: list, group: dict) -> None:
    """Move matrices of one shape, in place; the arguments are a batch's columns."""
    lr, dtype, p = group["lr"], weights[0].dtype, params[0]
    of_grad = 1 - group["momentum"]
    of_buffer = group["momentum"] if group["nesterov"] else 1.0
    kept = 1 - lr * group["weight_decay"]
    if alive[0] is not None:  # other slices keep everything, and their direction is their gradient: zero
        of_grad, of_buffer = ([share * a.to(dtype) for a in alive] for share in (of_grad, of_buffer))
        kept = [torch.where(a, kept, 1.0) for a in alive]
    torch._foreach_lerp_(buffers, grads, of_grad)
    directions = torch._foreach_lerp(grads, buffers, of_buffer)
    batch = torch.cat(directions) if len(directions) > 1 else directions[0]
    compute = partial(orthogonalise, steps=group["ns_steps"])
    moves = (on_whole(compute, batch, p) if p.ndim == 2 and is_sharded(p) else compute(batch)).to(dtype)
    torch._foreach_mul_(weights, kept)
    alpha = -lr * lr_factor(p.shape, group["adjust_lr"])
    torch._foreach_add_(weights, moves.split([len(w) for w in weights]), alpha=alpha)
