"""Causal grouped-query attention with rotary positions."""

# Shapes: B batch, T time, D d_model, H query heads, G key/value heads, C head_dim, S cached positions.

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.config import ModelConfig


class KeyValueCache(NamedTuple):
    """What attention remembers of a sequence in generation. Filled in place, one position a step."""

    keys: Tensor  # (B, G, S, C), rotated
    values: Tensor  # (B, G, S, C)
    kept: Tensor  # (B, S) bool; false where MoD skipped the token: then it is no key


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each (B, 1, T, C) float32, for positions (B, T) int64 in the sequence.

    Source: Su et al. 2021, sec. 3.4.2, https://arxiv.org/abs/2104.09864, with the halves of a head as the pairs
    (GPT-NeoX order, as in Llama) where the paper pairs neighbours.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / theta**exponents)  # (B, T, C / 2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of x (B, H, T, C) by its position's angle; computed in float32, returned in x's dtype."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads.

    Source: Ainslie et al. 2023, sec. 2.2, https://arxiv.org/abs/2305.13245.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.theta = config.width_of_head, config.rope_theta
        n_kv = config.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, n_kv, bias=False)
        self.v_proj = nn.Linear(config.d_model, n_kv, bias=False)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, config.d_model, bias=False)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, C), rotated keys and values (B, G, T, C)."""
        table = rotary(positions, self.head_dim, self.theta)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, table), rotate(k, table), v

    def forward(self, x: Tensor, positions: Tensor, keep: Tensor | None = None) -> tuple[Tensor, None]:
        """x (B, T, D) in order of time, positions (B, T) int64 → (B, T, D), and no routing.

        A row sees itself and the rows before it, whatever their positions; `keep` is not needed here, since
        MoD puts the rows that do not count last.
        """
        q, k, v = self.project(x, positions)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None

    def new_cache(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        shape = (batch, self.k_proj.out_features // self.head_dim, max_len, self.head_dim)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        return KeyValueCache(empty, empty.clone(), torch.zeros(batch, max_len, device=device, dtype=torch.bool))

    def step(self, x: Tensor, position: int, cache: KeyValueCache, keep: Tensor) -> Tensor:
        """One token a row: x (B, 1, D) at `position`; `keep` (B,) bool says whose token is computed and remembered.

        Returns (B, 1, D), undefined in rows that are not kept.
        """
        positions = torch.full((len(x), 1), position, device=x.device)
        q, k, v = self.project(x, positions)
        cache.keys[:, :, position], cache.values[:, :, position] = k[:, :, 0], v[:, :, 0]
        cache.kept[:, position] = keep
        seen = slice(0, position + 1)
        mask = cache.kept[:, None, None, seen]  # (B, 1, 1, S)
        keys, values = cache.keys[:, :, seen], cache.values[:, :, seen]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))
