"""Multi-token prediction: head k predicts the token k + 1 places ahead, from the same hidden state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def targets_of(ids: Tensor, mask: Tensor | None, ahead: int) -> Tensor:
    """Targets `ahead` ≥ 1 places on: (B, T + 1) → (B, T + 1 - ahead) int64, -100 where `mask` says: never a target."""
    targets = ids[:, ahead:]
    return targets if mask is None else targets.masked_fill(~mask[:, ahead:], -100)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not -100; 0 if there is none. Logits in any float dtype."""
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def head_losses(
    heads: Iterable[nn.Module], hidden: Tensor, ids: Tensor, mask: Tensor | None, weights: Sequence[float]
) -> dict[str, Tensor]:
    """`next_token`, `future_2` …: each head's weighted loss, nats per token; hidden (B, T, D), ids (B, T + 1).

    Source: Gloeckle et al. 2024, sec. 2, https://arxiv.org/abs/2404.19737, with linear heads on one trunk where
    theirs are transformer layers, and with weights, as the case has it.
    """
    terms = {}
    for index, (head, weight) in enumerate(zip(heads, weights, strict=True)):
        targets = targets_of(ids, mask, index + 1)  # (B, T - index)
        name = "next_token" if index == 0 else f"future_{index + 1}"
        terms[name] = weight / sum(weights) * token_loss(head(hidden[:, : targets.shape[1]]), targets)
    return terms
