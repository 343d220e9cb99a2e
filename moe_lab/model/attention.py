"""Causal grouped-query attention with rotary positions."""

# Shapes: B batch, T time, D d_model, H query heads, G key/value heads, R = H / G, C head_dim, S cached positions.

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from moe_lab.config import ModelConfig
from moe_lab.model.layers import autocast_dtype, no_autocast

BLOCK = 64  # queries whose scores are made at once on a CPU: they fit its cache
SHORT = 512  # tokens up to which all probabilities are kept for the backward pass


@dataclass
class KeyValueCache:
    """What attention remembers of a sequence in generation. Filled in place; the rows that MoD skipped are no keys."""

    keys: Tensor  # (B, G, S, C), rotated
    values: Tensor  # (B, G, S, C)
    kept: Tensor  # (B, S) bool, with MoD; of the prompt, kept rows come first, then those skipped
    table: tuple[Tensor, Tensor]  # of `rotary`, all positions
    n: int = 0  # positions that are filled


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each (B, 1, T, C / 2) float32, for positions (B, T) int64 in the sequence. Source: Su et
    al. 2021, sec. 3.4.2, https://arxiv.org/abs/2104.09864; a head's halves are paired, as in Llama."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = (positions.float().unsqueeze(-1) * (1.0 / theta**exponents)).unsqueeze(1)
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of x (B, H, T, C) by its position's angle; computed in float32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries (B, H, T, C) to keys and values (B, G, T, C) → (B, H, T, C)."""
    (batch, n_heads, length, width), n_kv = q.shape, k.shape[1]
    if q.device.type != "cpu" or length > SHORT:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    q = q.unflatten(1, (n_kv, -1)).transpose(2, 3).reshape(batch * n_kv, -1, width)  # (B·G, T·R, C)
    with no_autocast(q):
        y = BlockAttention.apply(q, k.flatten(0, 1), v.flatten(0, 1))
    return y.view(batch, n_kv, length, -1, width).transpose(2, 3).reshape(batch, n_heads, length, width)


class BlockAttention(Function):
    """Causal attention on a CPU, BLOCK queries at a time: q (N, T·R, C), R queries a position, k and v (N, T, C). As in
    torch's own kernel, which in bfloat16 is slow backward, scores and their softmax are float32."""

    @staticmethod
    def forward(ctx, q, k, v):
        n_queries = q.shape[1] // k.shape[1]
        queries, keys = q.float() * q.shape[-1] ** -0.5, k.float().transpose(1, 2)
        # added, which is several times as fast as filled in
        later = torch.full((BLOCK, BLOCK), -math.inf).triu(1).repeat_interleave(n_queries, 0)  # (BLOCK·R, BLOCK)
        y, probs = torch.empty_like(q), []
        for start in range(0, k.shape[1], BLOCK):
            rows = slice(start * n_queries, (start + BLOCK) * n_queries)
            seen = slice(start + BLOCK)
            scores = queries[:, rows] @ keys[:, :, seen]
            own = scores[..., start:]  # (N, BLOCK·R, BLOCK): the block's own keys
            own += later[: own.shape[1], : own.shape[2]]
            probs.append(scores.softmax(dim=-1).type_as(v))
            y[:, rows] = probs[-1] @ v[:, seen]
        ctx.save_for_backward(q, k, v, *probs)
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *probs = ctx.saved_tensors
        n_queries, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))  # sums over blocks
        for index, p in enumerate(probs):
            start = index * BLOCK
            rows = slice(start * n_queries, (start + BLOCK) * n_queries)
            seen = slice(start + BLOCK)
            grad_v[:, seen] += p.transpose(1, 2) @ grad[:, rows]
            grad_p = grad[:, rows] @ v[:, seen].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, rows] = grad_scores @ k[:, seen]
            grad_k[:, seen] += grad_scores.transpose(1, 2) @ q[:, rows]
        return grad_q.mul_(scale), grad_k.mul_(scale).type_as(k), grad_v.type_as(v)


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
        x = x.to(autocast_dtype(x))  # once for all three
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return turned(q, *table), turned(k, *table), v

    def forward(self, x: Tensor, positions: Tensor, keep: Tensor | None = None, cache=None) -> tuple[Tensor, None]:
        """x (B, T, D) in order of time, positions (B, T) int64 → (B, T, D), and no routing. A row sees itself and the
        rows before it, whatever their positions; `keep` is not needed, since rows that do not count come last."""
        y = attend(*self.project(x, positions)) if cache is None else self.recall(x, positions, keep, cache)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None

    def new_cache(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        shape = (batch, self.k_proj.out_features // self.head_dim, max_len, self.head_dim)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        table = rotary(torch.arange(max_len, device=device).unsqueeze(0), self.head_dim, self.theta)
        return KeyValueCache(empty, empty.clone(), torch.zeros(batch, max_len, device=device, dtype=torch.bool), table)

    def recall(self, x: Tensor, positions: Tensor, keep: Tensor | None, cache: KeyValueCache) -> Tensor:
        """What the heads give (B, H, T, C) of a prompt, x (B, T, D), which fills the empty cache, or of the next token, x
        (B, 1, D), which sees what is there. Undefined in rows that are not kept."""
        start, is_token = cache.n, x.shape[1] == 1
        end = cache.n = start + x.shape[1]
        batch, n_kv, _, width = cache.keys.shape
        if is_token:
            table = [t[:, :, start:end] for t in cache.table]
            heads = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1).view(batch, -1, 1, width)  # turned as one
            q, k = turned(heads, *table).split([heads.shape[1] - n_kv, n_kv], dim=1)
            v = self.v_proj(x).view(batch, n_kv, 1, width)
        else:
            q, k, v = self.project(x, positions)
        cache.keys[:, :, start:end], cache.values[:, :, start:end] = k, v
        if keep is not None:
            cache.kept[:, start:end] = keep
        if is_token:
            mask = None if keep is None else cache.kept[:, None, None, :end]  # (B, 1, 1, S)
            keys, values = cache.keys[:, :, :end], cache.values[:, :, :end]
            rows = q.reshape(batch, n_kv, -1, width)  # (B, G, R, C): who shares a key head sees the same keys
            return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask).reshape(q.shape)
        return attend(q, k, v)  # what is skipped comes last: no kept row sees it
