"""Mixture-of-Depths: a sublayer computes only the tokens that its router chooses; the others pass by unchanged."""

# Shapes: B batch, T time, D d_model, C = ceil(capacity * T) chosen tokens of a sequence.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.config import ModelConfig
from moe_lab.model.layers import RouterMLP


class DepthReport(NamedTuple):
    """What one MoD router saw and chose."""

    chosen: Tensor  # (B, T) bool: the C tokens of each sequence with the highest scores, as in training
    predicted: Tensor  # (B, T) float32: the causal predictor's logit that a token is among them


class Depth(nn.Module):
    """The router of one sublayer and its causal predictor.

    In training the C tokens with the highest router scores are computed, in their order and at their positions, and
    sigmoid(score) multiplies the sublayer's output, which is how the router learns. Choosing the top C looks at the
    whole sequence, so training leaks a little of the future through the choice. In evaluation and generation a
    predictor, trained to tell from a token alone whether it will be among the C, decides instead: causal.

    Source: Raposo et al. 2024, sec. 3.3–3.5, https://arxiv.org/abs/2404.02258; their router weight is not squashed,
    ours is, so that a sublayer cannot change sign; every sublayer has its own router, as the case has it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = RouterMLP(config.d_model, config.mod_router_hidden, 1)
        self.predictor = RouterMLP(config.d_model, config.mod_router_hidden, 1)
        self.capacity = config.mod_capacity_factor

    def forward(self, x: Tensor, compute: Callable) -> tuple[Tensor, object, DepthReport]:
        """x (B, T, D) → (x with the chosen tokens' outputs added, what `compute` says beside, the report).

        `compute(x, positions, keep)` takes rows in order of time with their positions in the sequence (B, C) and
        returns their outputs and a second value. In evaluation it gets all T rows, those that do not count last and
        `keep` (B, T) false there: fixed shapes, so that nothing a token gets depends on how many tokens follow.
        """
        scores = self.router(x).squeeze(-1)  # (B, T)
        predicted = self.predictor(x.detach()).squeeze(-1)  # (B, T); its loss must not shape the stream
        n_chosen = math.ceil(round(self.capacity * x.shape[1], 6))  # 0.28 · 25 is 7, not 7.000000000000001
        best = scores.topk(n_chosen, dim=1).indices  # (B, C)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        if self.training:
            index, keep = best.sort(dim=1).values, None
        else:
            # stable: kept tokens first and in order of time
            index = (predicted <= 0).to(torch.uint8).argsort(dim=1, stable=True)
            keep = predicted.gather(1, index) > 0
        rows = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        y, extra = compute(x.gather(1, rows), index, keep)
        update = y * scores.gather(1, index).sigmoid().unsqueeze(-1)
        if keep is not None:
            update = update.masked_fill(~keep.unsqueeze(-1), 0)
        return x.scatter_add(1, rows, update.type_as(x)), extra, DepthReport(chosen, predicted)

    def step(self, x: Tensor, compute: Callable) -> Tensor:
        """One token a row, x (B, 1, D): the evaluation's rule. `compute(x, keep)`, with keep (B,) bool, → (B, 1, D)."""
        keep = self.predictor(x).flatten() > 0
        update = compute(x, keep) * self.router(x).sigmoid()
        return x + update.masked_fill(~keep[:, None, None], 0).type_as(x)


def predictor_loss(report: DepthReport) -> Tensor:
    """Mean binary cross-entropy of the causal predictor against the router's choice, nats. Raposo et al., sec. 3.5."""
    return F.binary_cross_entropy_with_logits(report.predicted, report.chosen.float())


def agreement(report: DepthReport) -> Tensor:
    """Share of tokens, 0 to 1, about which the causal rule and the training-time choice agree."""
    return ((report.predicted > 0) == report.chosen).float().mean()
