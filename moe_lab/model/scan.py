"""The selective scan of Mamba, and its gradient, block by block of time.

h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t,   y_t = C_t h_t      (Gu & Dao 2023, alg. 2, https://arxiv.org/abs/2312.00752)

A block is K chunks of L positions, as many as the device works on best at once: what a CPU's cache holds, what fills a GPU.
Of each block only the state at its start is kept; the backward pass computes the states again, as the paper's kernel does.
One loop over the L positions runs for all K chunks at once. Where K > 1 it runs twice: first from zero, which tells what
leaves each chunk, then from what the chunks before let in. Over a whole chunk the decay is exp(A ΣΔ) ≤ 1: nothing overflows.
"""

# Shapes: B batch, T time, N d_state, D d_inner, K chunks of L positions in a block. N before D: D is long, so inner loops are.

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from moe_lab.model.layers import no_autocast

CHUNK = 16
ELEMENTS = {"cpu": 2**18}  # of a block's states: they stay in cache
ON_GPUS = 2**25  # few launches


def selective_scan(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The scan from a zero state: delta ≥ 0 and x (B, T, D), A ≤ 0 (N, D), B and C (B, T, N), float32 or float64.
    Returns y (B, T, D) and the state after the last position (B, N, D), which has no gradient."""
    length = x.shape[1]
    padding = -length % CHUNK  # a position with delta = 0 neither decays the state nor adds to it
    if padding:
        delta, B, C, x = (F.pad(t, (0, 0, 0, padding)) for t in (delta, B, C, x))
    with no_autocast(x):  # the state is summed over hundreds of positions: not in 16 bits
        y, state = SelectiveScan.apply(delta, A, B, C, x)
    return y[:, :length], state


class SelectiveScan(Function):
    """`selective_scan` for a T that is a multiple of the chunk."""

    @staticmethod
    def forward(ctx, delta, A, B, C, x):
        y, state, starts = torch.empty_like(x), x.new_zeros(len(x), *A.shape), []
        for block, room in blocks(x, A, 2):
            starts.append(state)
            state = scan(A, state, room, *(t[:, block] for t in (delta, B, C, x, y)))
        ctx.save_for_backward(delta, A, B, C, x, *starts)
        ctx.mark_non_differentiable(state)
        return y, state

    @staticmethod
    def backward(ctx, grad_y, _):
        """The adjoint g_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1} is the same recurrence, run backwards."""
        delta, A, B, C, x, *starts = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (delta, B, C, x)]
        grad_A, carried = torch.zeros_like(A), torch.zeros_like(starts[0])
        for block, room in reversed([*blocks(x, A, 3)]):
            whole = (delta, B, C, x, grad_y, *grads)
            carried = adjoint(A, grad_A, starts.pop(), carried, room, *(t[:, block] for t in whole))
        grad_delta, *others = grads
        return grad_delta, grad_A, *others


def scan(A: Tensor, start: Tensor, room: Tensor, delta: Tensor, B: Tensor, C: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Fill y of the block that follows the state `start`. Returns the state after it."""
    decay, states = room
    recur(delta, A, B, x, start, decay, states)
    y.copy_((C.unsqueeze(2) @ states.flatten(1, 2)).squeeze(2))
    return states[:, -1, -1].clone()


def adjoint(A: Tensor, grad_A: Tensor, start: Tensor, carried: Tensor, room: Tensor, *of_block: Tensor) -> Tensor:
    """Add a block's share to `grad_A` and fill its gradients. `carried` is decayed g of the position after it; returns that
    of its first. `of_block`: delta, B, C, x, ∂y, and the gradients of the first four."""
    delta, B, C, x, grad, grad_delta, grad_B, grad_C, grad_x = of_block
    decay, states, g = room
    whole = recur(delta, A, B, x, start, decay, states)
    torch.mul(in_chunks(C).unsqueeze(4), in_chunks(grad).unsqueeze(3), out=g)
    values, rates = g.unbind(2)[::-1], decay.unbind(2)[:0:-1]
    leaving = decay[:, :, 0] * ends(values, rates)
    values[0].add_(entering(carried, leaving, whole, range(len(whole[0]) - 1, -1, -1)))
    chain(values, rates)
    carried = decay[:, 0, 0] * g[:, 0, 0]
    decay, states, g = (t.flatten(1, 2) for t in (decay, states, g))  # (B, K·L, N, D)
    # a row times a matrix: a matrix times a column takes ten times as long
    grad_C.copy_((grad.unsqueeze(2) @ states.mT).squeeze(2))
    grad_B.copy_(((delta * x).unsqueeze(2) @ g.mT).squeeze(2))
    grad_input = (B.unsqueeze(2) @ g).squeeze(2)  # by Δx
    grad_log_decay = g.mul_(decay)  # by ΔA: g · decay · the state before
    grad_log_decay[:, 0].mul_(start)
    grad_log_decay[:, 1:].mul_(states[:, :-1])
    grad_A += torch.mul(grad_log_decay, delta.unsqueeze(2), out=decay).sum((0, 1))
    grad_delta.copy_(torch.mul(grad_log_decay, A, out=decay).sum(2).addcmul_(grad_input, x))
    torch.mul(grad_input, delta, out=grad_x)
    return carried


def blocks(x: Tensor, A: Tensor, n: int) -> Iterator[tuple[slice, Tensor]]:
    """(the positions of a block, room for n tensors (B, K, L, N, D)), block after block; all share one room."""
    size = len(x) * A.numel()  # of one position
    length = max(1, ELEMENTS.get(x.device.type, ON_GPUS) // (CHUNK * size)) * CHUNK
    room = x.new_empty(n, min(length, x.shape[1]) * size)
    for start in range(0, x.shape[1], length):
        stop = min(start + length, x.shape[1])
        yield slice(start, stop), room[:, : (stop - start) * size].view(n, len(x), -1, CHUNK, *A.shape)


def in_chunks(t: Tensor) -> Tensor:
    """(B, K·L, …) → (B, K, L, …)"""
    return t.unflatten(1, (-1, CHUNK))


def recur(delta: Tensor, A: Tensor, B: Tensor, x: Tensor, start: Tensor, decay: Tensor, states: Tensor) -> Tensor:
    """Fill `decay` and `states` (B, K, L, N, D) of the block that follows the state `start` (B, N, D). Returns what
    each chunk leaves of a state (B, K, N, D)."""
    A = A * math.log2(math.e)  # a CPU computes exp2 four times faster than exp
    delta, added = in_chunks(delta), in_chunks(delta * x)  # (B, K, L, D)
    torch.mul(delta.unsqueeze(3), A, out=decay).exp2_()
    torch.mul(in_chunks(B).unsqueeze(4), added.unsqueeze(3), out=states)
    whole = (delta.sum(2).unsqueeze(2) * A).exp2_()
    values, (first, *rates) = states.unbind(2), decay.unbind(2)
    values[0].addcmul_(first, entering(start, ends(values, rates), whole, range(len(whole[0]))))
    chain(values, rates)
    return whole


def chain(values: Sequence[Tensor], rates: Iterable[Tensor]) -> None:
    """In place and one after the other: value += rate · the value before."""
    for value, rate, before in zip(values[1:], rates, values, strict=False):
        value.addcmul_(rate, before)


def ends(values: Sequence[Tensor], rates: Iterable[Tensor]) -> Tensor:
    """The last value of `chain` (B, K, N, D), without changing any; with K = 1 nobody needs it, and it is not computed."""
    end = values[0]
    for value, rate in zip(values[1:] if end.shape[1] > 1 else (), rates, strict=False):
        end = torch.addcmul(value, rate, end)
    return end


def entering(start: Tensor, leaving: Tensor, whole: Tensor, order: Sequence[int]) -> Tensor:
    """What enters each chunk (B, K, N, D), in their order: `start`, then what the chunk before leaves of it and adds."""
    found = torch.empty_like(whole)
    found[:, order[0]] = start
    for before, k in zip(order, order[1:], strict=False):
        torch.addcmul(leaving[:, before], whole[:, before], found[:, before], out=found[:, k])
    return found
