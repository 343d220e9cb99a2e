"""Mixture of experts: a router, a stack of SwiGLU experts, and the two losses that keep the router healthy."""

# Shapes: B batch, T time, D d_model, F d_ff_expert, N = B*T tokens, E experts, K experts a token, S = N*K slots.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from moe_lab.config import ModelConfig
from moe_lab.model.layers import RouterMLP, autocast_dtype

# Each expert's rows are padded to a multiple of this. Grouped kernels want it, and a token's result then does not
# depend, to the last bit, on how many other tokens chose the same expert (matrix products of few rows round differently).
ROWS = 16


class Routing(NamedTuple):
    """What a router decided about the tokens that reached it; with MoD these are the tokens not skipped."""

    weights: Tensor  # (N, K), each row sums to 1
    expert_ids: Tensor  # (N, K) int64
    logits: Tensor  # (N, E) float32

    def load(self) -> Tensor:
        """(E,) float32: share of the slots that the router sent to each expert; sums to 1."""
        n_experts = self.logits.shape[-1]
        return F.one_hot(self.expert_ids, n_experts).float().mean(dim=(0, 1))

    def of(self, rows: Tensor) -> "Routing":
        """The routing of the tokens where `rows` (N,) bool is true."""
        return Routing(*(values[rows] for values in self))


class Router(nn.Module):
    """Top-k gating of Shazeer et al. 2017, sec. 2.1, without the noise, with an MLP as the case has it.
    https://arxiv.org/abs/1701.06538. The softmax over the kept logits is the full softmax renormalised (Mixtral)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mlp = RouterMLP(config.d_model, config.moe_router_hidden, config.n_experts)
        self.top_k = config.moe_top_k

    def forward(self, tokens: Tensor) -> Routing:
        """(N, D) → Routing; weights are float32."""
        logits = self.mlp(tokens)  # (N, E)
        kept, expert_ids = logits.topk(self.top_k, dim=-1)  # (N, K), (N, K)
        return Routing(kept.softmax(dim=-1), expert_ids, logits)


class MoE(nn.Module):
    """Every token goes to its K best experts, however many have chosen the same; their outputs are summed with the
    router's weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_model = config.d_model
        d_ff = config.d_ff_expert
        self.n_experts = config.n_experts
        self.router = Router(config)
        self.gate_proj = nn.Parameter(torch.empty(self.n_experts, d_ff, d_model))
        self.up_proj = nn.Parameter(torch.empty(self.n_experts, d_ff, d_model))
        self.down_proj = nn.Parameter(torch.empty(self.n_experts, d_model, d_ff))

    def forward(self, x: Tensor, positions=None, keep: Tensor | None = None, cache=None) -> tuple[Tensor, Routing]:
        """x (B, T, D) → (B, T, D) and the routing. Rows where `keep` (B, T) is false are not routed and give 0."""
        tokens = x.flatten(0, 1)  # (N, D)
        routing = self.router(tokens)
        expert_ids = routing.expert_ids  # where a slot goes nowhere, its id becomes E
        if keep is not None:
            expert_ids = expert_ids.masked_fill(~keep.flatten().unsqueeze(1), self.n_experts)
        y = self.experts(tokens, expert_ids, routing.weights)
        if keep is not None:
            routing = routing.of(keep.flatten())
        return y.unflatten(0, x.shape[:2]), routing

    def experts(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over K of weight · SwiGLU_expert(token): (N, D), (N, K) with id E for nowhere, (N, K) → (N, D)."""
        weights = weights.masked_fill(expert_ids == self.n_experts, 0)
        if len(tokens) == 1 and tokens.is_cpu and not torch.is_grad_enabled():
            # generation: nothing is grouped, and to read ids back costs nothing here
            y = [self.expert(tokens, index) for index in expert_ids[0].clamp(max=self.n_experts - 1).tolist()]
            return (torch.cat(y) * weights.T).sum(0, keepdim=True).type_as(tokens)
        rows, copied, ends = self.arrange(expert_ids)
        grouped = Spread.apply(tokens, autocast_dtype(tokens), rows, copied)  # (n_rows, D)
        return Collect.apply(self.swiglu(grouped, ends), weights, rows, copied).type_as(tokens)

    def expert(self, token: Tensor, index: int) -> Tensor:
        """One expert's output for one token, (1, D) → (1, D): as products of matrices, which in bfloat16 have the faster kernel."""
        gate, up, down = (stack[index] for stack in (self.gate_proj, self.up_proj, self.down_proj))
        return F.linear(F.silu(F.linear(token, gate)) * F.linear(token, up), down)

    @torch.compiler.disable  # torch 2.13 knows grouped_mm's shapes for bfloat16 alone when it compiles
    def swiglu(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Each expert's SwiGLU of its rows (n, D), which end before `ends` (E,) int32 → (n, D)."""

        def product(x: Tensor, stack: Tensor) -> Tensor:
            return F.grouped_mm(x, stack.to(rows.dtype).transpose(1, 2), offs=ends)

        return product(F.silu(product(rows, self.gate_proj)) * product(rows, self.up_proj), self.down_proj)

    def arrange(self, expert_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of expert_ids (N, K), E for nowhere: where slots stand in a buffer of n_rows rows, grouped by expert.

        rows (N, K), each slot's row; copied (n_rows,), whose token a row holds, any where no slot stands; ends (E,) int32,
        where each expert's rows end. Slots that go nowhere share a row of padding: rows past the last group are never
        written. No count is read back from the device (torch's float32 grouped_mm on CUDA does read `ends`).
        """
        slot_experts, top_k = expert_ids.flatten(), expert_ids.shape[1]  # (S,)
        order = slot_experts.argsort(stable=True)
        sorted_experts = slot_experts[order]
        counts = slot_experts.new_zeros(self.n_experts + 1).scatter_add_(0, slot_experts, torch.ones_like(slot_experts))
        spare = counts[:1].clone()  # the row after expert 0's: its group always has padding
        padded = (counts + ROWS - 1) // ROWS * ROWS
        padded[:1] = (spare + ROWS) // ROWS * ROWS
        ends = padded.cumsum(0)
        first_row, first_slot = ends - padded, counts.cumsum(0) - counts
        rank = torch.arange(len(order), device=order.device) - first_slot[sorted_experts]
        in_order = torch.where(sorted_experts < self.n_experts, first_row[sorted_experts] + rank, spare)
        rows = torch.empty_like(order).index_copy_(0, order, in_order)
        n_rows = len(order) + self.n_experts * ROWS  # enough however the tokens fall: no look at the counts
        copied = order.new_zeros(n_rows).index_copy_(0, in_order, order // top_k)
        return rows.view_as(expert_ids), copied, ends[: self.n_experts].int()


class Spread(Function):
    """Tokens (N, D) → a copy of each in the rows of its experts, (n_rows, D) in `dtype`. Places as of `MoE.arrange`."""

    @staticmethod
    def forward(ctx, tokens, dtype, rows, copied):
        ctx.save_for_backward(rows)
        ctx.dtype = tokens.dtype
        return tokens.to(dtype).index_select(0, copied)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        first, *others = (grad.index_select(0, row) for row in rows.unbind(1))
        return sum(others, first.to(ctx.dtype)), None, None, None


class Collect(Function):
    """Rows (n_rows, D) and weights (N, K) → the weighted sum of each token's rows, (N, D) in the weights' dtype."""

    @staticmethod
    def forward(ctx, y, weights, rows, copied):
        ctx.save_for_backward(y, weights, rows, copied)
        total = weights.new_zeros(len(rows), y.shape[1])
        for row, weight in zip(rows.unbind(1), weights.unsqueeze(2).unbind(1), strict=True):
            total.addcmul_(y.index_select(0, row), weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        y, weights, rows, copied = ctx.saved_tensors
        by_weight = [(y.index_select(0, row) * grad).sum(dim=1) for row in rows.unbind(1)]
        # padding has weight 0, so that no expert learns from it
        weight = weights.new_zeros(len(copied)).index_copy_(0, rows.flatten(), weights.flatten())
        grad_y = (grad.index_select(0, copied) * weight.unsqueeze(1)).type_as(y)
        return grad_y, torch.stack(by_weight, dim=1), None, None


def load_balancing_loss(routing: Routing) -> Tensor:
    """Auxiliary loss that is least when the experts share the tokens evenly.

    `E * sum_e load_e * prob_e`: `load_e` is the share of routed slots that went to expert e (a count, no gradient),
    `prob_e` its mean router probability. A scalar, dimensionless, not weighted: 1 when the load is uniform, E / K when
    the same K experts take every token. Raises ValueError if no token was routed. Source: Fedus et al. 2021, eq. 4-6,
    https://arxiv.org/abs/2101.03961, with their top-1 count taken over K slots.
    """
    n_tokens, n_experts = routing.logits.shape
    if n_tokens == 0:
        raise ValueError("no token was routed")
    return n_experts * (routing.load() * routing.logits.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean square of the logits' log-sum-exp: keeps router logits small. Scalar, dimensionless, not weighted. Source:
    Zoph et al. 2022, eq. 5, https://arxiv.org/abs/2202.08906."""
    return routing.logits.logsumexp(dim=-1).square().mean()
