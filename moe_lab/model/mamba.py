"""Mamba, a selective state space in place of attention, and Routing Mamba, a mixture of such blocks."""

# Shapes: B batch, T time, D d_model, I d_inner = expand * D, N d_state, R dt_rank, W d_conv, E experts.
# Paper's symbols: Δ step size (delta), A decay rates, B input and C output projections, D skip.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.config import ModelConfig
from moe_lab.model.moe import Router, Routing
from moe_lab.model.scan import selective_scan


class MambaState(NamedTuple):
    """What Mamba remembers in generation: constant in size, updated in place."""

    window: Tensor  # (B, W - 1, I), the convolution's last inputs
    state: Tensor  # (B, N, I) float32


class Mamba(nn.Module):
    """The block of Gu & Dao 2023, sec. 3.4 and fig. 3, https://arxiv.org/abs/2312.00752: projections, causal depthwise
    convolution, selective scan in float32, gate. Parameters are named as in the authors' code and in transformers."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_inner = config.mamba_expand * config.d_model
        self.dt_rank = config.dt_rank
        self.d_state = config.ssm_state_dim
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.mamba_d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, self.d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)

    @torch.no_grad()
    def reset_state_space(self) -> None:
        """The start of Gu & Dao, sec. 3.6: A = -1 … -N (S4D-real), D = 1, Δ log-uniform in 0.001 to 0.1.

        A blanket init that zeroes dt_proj.bias would make Δ about 0.7: the block would forget at once.
        """
        n_inner, d_state = self.A_log.shape
        self.A_log.copy_(torch.arange(1, d_state + 1).log().expand(n_inner, -1))
        self.D.fill_(1.0)
        self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        delta = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
        self.conv1d.reset_parameters()

    def forward(self, x: Tensor, positions=None, keep: Tensor | None = None, cache=None) -> tuple[Tensor, None]:
        """x (B, T, D) in order of time → (B, T, D), and no routing. Positions are not needed; rows that do not count come last."""
        if cache is not None:
            return self.recall(x, keep, cache), None
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, T, I) each
        u = F.silu(self.convolve(F.pad(u, (0, 0, self.conv1d.kernel_size[0] - 1, 0))))
        delta, B, C = self.select(u)
        return self.finish(selective_scan(delta, self.rates(), B, C, u.float())[0], u, gate), None

    def convolve(self, u: Tensor) -> Tensor:
        """(B, W - 1 + T, I) → (B, T, I). As an image of height 1 whose channels come last: nothing is transposed."""
        image = u.transpose(1, 2).unsqueeze(2)  # (B, I, 1, T)
        weight, bias = self.conv1d.weight.unsqueeze(2), self.conv1d.bias
        return F.conv2d(image, weight, bias, groups=len(bias)).squeeze(2).transpose(1, 2)

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (B, T, I), input and output projections (B, T, N), float32: what makes the scan selective."""
        low_rank, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.softplus(F.linear(low_rank, self.dt_proj.weight).float() + self.dt_proj.bias.float())
        return delta, B.float(), C.float()

    def rates(self) -> Tensor:
        """A, transposed: (N, I) float32, negative."""
        return -self.A_log.float().exp().t()

    def finish(self, y: Tensor, u: Tensor, gate: Tensor) -> Tensor:
        y = (y + self.D.float() * u.float()).type_as(u)
        return self.out_proj(y * F.silu(gate))

    def new_cache(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> MambaState:
        n_inner, taps = self.conv1d.out_channels, self.conv1d.kernel_size[0]
        window = torch.zeros(batch, taps - 1, n_inner, device=device, dtype=dtype)
        return MambaState(window, torch.zeros(batch, self.d_state, n_inner, device=device))

    def recall(self, x: Tensor, keep: Tensor | None, cache: MambaState) -> Tensor:
        """`forward` that fills the empty cache with a prompt, x (B, T, D), or goes on from it by a token, (B, 1, D). Rows
        where `keep` (B, T) is false, which come last, leave the state as it was."""
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, T, I)
        inputs = torch.cat([cache.window, u.type_as(cache.window)], dim=1)  # (B, W - 1 + T, I)
        u = F.silu(self.convolve(inputs)).type_as(x)
        delta, B, C = self.select(u)
        newest = inputs[:, x.shape[1] :]
        if keep is not None:
            delta = delta * keep.unsqueeze(-1)
            index = keep.sum(1, keepdim=True) + torch.arange(newest.shape[1], device=x.device)  # (B, W - 1)
            newest = inputs.gather(1, index.unsqueeze(-1).expand_as(newest))
        if x.shape[1] > 1:
            y, state = selective_scan(delta, self.rates(), B, C, u.float())
        else:
            state = (delta * self.rates()).exp() * cache.state + B.transpose(1, 2) * (delta * u.float())
            y = (C.transpose(1, 2) * state).sum(1, keepdim=True)  # no matrix product: autocast would round the state
        cache.window.copy_(newest)
        cache.state.copy_(state)
        return self.finish(y, u, gate)


class RoutingMamba(nn.Module):
    """A mixture of whole Mamba blocks, where a layer is both Mamba and MoE. Every expert scans all tokens, so that no
    state has gaps, and the router's K weights weigh the outputs: it saves no compute. Source: Zhan et al. 2025,
    https://arxiv.org/abs/2506.18145, whose experts share a scan."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = nn.ModuleList(Mamba(config) for _ in range(config.n_experts))

    def forward(self, x: Tensor, positions=None, keep: Tensor | None = None, cache=None) -> tuple[Tensor, Routing]:
        """x (B, T, D) → (B, T, D) and the routing of the rows where `keep` is true."""
        routing = self.router(x.flatten(0, 1))
        caches = cache or [None] * len(self.experts)
        outputs = [expert(x, positions, keep, c)[0] for expert, c in zip(self.experts, caches, strict=True)]
        share = torch.zeros_like(routing.logits).scatter(1, routing.expert_ids, routing.weights)  # (N, E)
        y = (torch.stack(outputs, dim=-1) * share.view(*x.shape[:2], 1, -1)).sum(-1).type_as(outputs[0])
        if keep is not None:
            routing = routing.of(keep.flatten())
        return y, routing

    def new_cache(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> list[MambaState]:
        return [expert.new_cache(batch, max_len, device, dtype) for expert in self.experts]
