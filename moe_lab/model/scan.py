"""The selective scan of Mamba, and its gradient, in about 2·sqrt(T) Python iterations.

h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t,   y_t = C_t h_t      (Gu & Dao 2023, alg. 2, https://arxiv.org/abs/2312.00752)

Time is cut into chunks of L = sqrt(T) positions. One loop runs over the L positions, for all chunks at once, as if each
chunk started from zero; a second loop carries the state from chunk to chunk; what the carried state adds inside a
chunk has a closed form, since exp(Δ_1 A) · … · exp(Δ_i A) = exp((Δ_1 + … + Δ_i) A), whose exponent is never positive.
The paper's kernel scans in parallel and recomputes the states in the backward pass; here they are kept.
"""

# Shapes: B batch, T time, N d_state, D d_inner, L positions a chunk, K chunks. N before D: D is long, so inner loops are.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from moe_lab.model.layers import no_autocast


def selective_scan(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """The scan from a zero state: delta ≥ 0 and x (B, T, D), A ≤ 0 (N, D), B and C (B, T, N) → y (B, T, D). float32 or float64."""
    length = x.shape[1]
    chunk = max(1, math.isqrt(length))
    padding = -length % chunk  # a position with delta = 0 neither decays the state nor adds to it
    if padding:
        delta, B, C, x = (F.pad(t, (0, 0, 0, padding)) for t in (delta, B, C, x))
    with no_autocast(x):  # the state is summed over hundreds of positions: not in 16 bits
        return SelectiveScan.apply(delta, A, B, C, x, chunk)[:, :length]


class SelectiveScan(Function):
    """`selective_scan` for a T that is a multiple of the chunk."""

    @staticmethod
    def forward(ctx, delta, A, B, C, x, chunk):
        in_chunks = (-1, chunk)  # of T: (B, T, …) → (B, K, L, …)
        decay = (delta.unsqueeze(2) * A).exp_()  # (B, T, N, D)
        states = B.unsqueeze(3) * (delta * x).unsqueeze(2)
        local, step = states.unflatten(1, in_chunks), decay.unflatten(1, in_chunks)  # views: loops write into `states`
        for i in range(1, chunk):
            local[:, :, i].addcmul_(step[:, :, i], local[:, :, i - 1])
        elapsed = delta.unflatten(1, in_chunks).cumsum(2)  # (B, K, L, D): sum of Δ since the chunk began
        whole = (elapsed[:, :, -1].unsqueeze(2) * A).exp_()  # (B, K, N, D)
        carried = torch.zeros_like(whole)  # the state with which each chunk starts
        for k in range(1, carried.shape[1]):
            torch.addcmul(local[:, k - 1, -1], whole[:, k - 1], carried[:, k - 1], out=carried[:, k])
        local.addcmul_((elapsed.unsqueeze(3) * A).exp_(), carried.unsqueeze(2))
        ctx.save_for_backward(delta, A, B, C, x, decay, states, elapsed)
        ctx.chunk = chunk
        return (C.unsqueeze(2) @ states).squeeze(2)

    @staticmethod
    def backward(ctx, grad_y):
        """The adjoint g_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1} is the same scan run backwards."""
        delta, A, B, C, x, decay, states, elapsed = ctx.saved_tensors
        adjoint = C.unsqueeze(3) * grad_y.unsqueeze(2)  # (B, T, N, D)
        local, step = adjoint.unflatten(1, (-1, ctx.chunk)), decay.unflatten(1, (-1, ctx.chunk))
        for i in range(ctx.chunk - 2, -1, -1):
            local[:, :, i].addcmul_(step[:, :, i + 1], local[:, :, i + 1])
        reach = ((elapsed[:, :, -1:] - elapsed).unsqueeze(3) * A).exp_()  # (B, K, L, N, D): decay to the chunk's end
        carried = torch.zeros_like(local[:, :, 0])  # what the next chunk's adjoint adds at a chunk's last position
        for k in range(carried.shape[1] - 2, -1, -1):
            following = torch.addcmul(local[:, k + 1, 0], reach[:, k + 1, 0], carried[:, k + 1])
            torch.mul(step[:, k + 1, 0], following, out=carried[:, k])
        local.addcmul_(reach, carried.unsqueeze(2))
        grad_C = (states @ grad_y.unsqueeze(3)).squeeze(3)
        grad_B = (adjoint @ (delta * x).unsqueeze(3)).squeeze(3)
        grad_input = (B.unsqueeze(2) @ adjoint).squeeze(2)  # by Δx
        grad_log_decay = adjoint.mul_(decay)  # by ΔA: adjoint · decay · the state before
        grad_log_decay[:, 0] = 0
        grad_log_decay[:, 1:].mul_(states[:, :-1])
        grad_A = torch.mul(grad_log_decay, delta.unsqueeze(2), out=reach.flatten(1, 2)).flatten(0, 1).sum(0)
        grad_delta = grad_input * x + grad_log_decay.mul_(A).sum(2)
        return grad_delta, grad_A, grad_B, grad_C, grad_input * delta, None
