"""Mixture-of-Depths: a sublayer computes only the tokens that its router chooses; the others pass by unchanged."""

# Shapes: B batch, T time, D d_model, C = ceil(capacity * T) chosen tokens of a sequence.

import math
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


class Chosen(NamedTuple):
    """The rows of a sequence that one sublayer computes, in order of time."""

    x: Tensor  # (B, C, D)
    positions: Tensor  # (B, C) int64, places in the sequence
    keep: Tensor | None  # (B, C) bool, false for rows that do not count and stand last; None: all count
    weight: Tensor | None  # (B, C, 1) float32, the router's sigmoid, which multiplies the sublayer's output; None: 1
    report: DepthReport | None


class EveryToken(nn.Module):
    """A sublayer without MoD: all tokens, each with weight 1."""

    def choose(self, x: Tensor, causal: bool) -> Chosen:
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return Chosen(x, positions, None, None, None)

    def put_back(self, x: Tensor, y: Tensor, rows: Chosen) -> Tensor:
        return x + y


class Depth(nn.Module):
    """The router of one sublayer and its causal predictor.

    In training the C tokens with the highest router scores are computed, and sigmoid(score) multiplies the sublayer's
    output, which is how the router learns. That choice leaks a little of the future. In evaluation and generation a
    predictor, trained to tell from a token alone whether it will be among the C, decides instead.

    Source: Raposo et al. 2024, sec. 3.3–3.5, https://arxiv.org/abs/2404.02258, whose router weight is not squashed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = RouterMLP(config.d_model, config.mod_router_hidden, 1)
        self.predictor = RouterMLP(config.d_model, config.mod_router_hidden, 1)
        self.capacity = config.mod_capacity_factor

    def choose(self, x: Tensor, causal: bool) -> Chosen:
        """The rows of x (B, T, D) that the sublayer gets: the C with the highest scores, or, `causal`, the predictor's.

        Causally it gets all T rows, those that do not count last and `keep` (B, T) false there: fixed shapes, so that
        nothing a token gets depends on how many tokens follow.
        """
        scores = self.router(x).squeeze(-1)  # (B, T)
        predicted = self.predictor(x.detach()).squeeze(-1)  # (B, T); its loss must not shape the stream
        n_chosen = math.ceil(round(self.capacity * x.shape[1], 6))  # 0.28 · 25 is 7, not 7.000000000000001
        best = scores.topk(n_chosen, dim=1).indices  # (B, C)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        if causal:
            # stable: kept tokens first and in order of time; a lone token needs no order
            skip = predicted <= 0
            index = skip.to(torch.uint8).argsort(dim=1, stable=True) if x.shape[1] > 1 else skip.long() * 0
            keep = predicted.gather(1, index) > 0
        else:
            index, keep = best.sort(dim=1).values, None
        weight = scores.gather(1, index).sigmoid().unsqueeze(-1)
        rows = x.flatten(0, 1).index_select(0, flat(index, x)).view(*index.shape, -1)
        return Chosen(rows, index, keep, weight, DepthReport(chosen, predicted))

    def put_back(self, x: Tensor, y: Tensor, rows: Chosen) -> Tensor:
        """x (B, T, D) with the sublayer's outputs y (B, C, D) of the chosen rows added, weighed by the router."""
        update = y * rows.weight
        if rows.keep is not None:
            update = update.masked_fill(~rows.keep.unsqueeze(-1), 0)
        places = flat(rows.positions, x)
        return x.flatten(0, 1).index_add(0, places, update.type_as(x).flatten(0, 1)).view_as(x)


def flat(positions: Tensor, x: Tensor) -> Tensor:
    """Places (B, C) in the sequences of x (B, T, D) → rows (B·C,) of x.flatten(0, 1): whole rows are copied much faster."""
    batch, length = x.shape[:2]
    return (positions + length * torch.arange(batch, device=x.device).unsqueeze(1)).flatten()


def predictor_loss(report: DepthReport) -> Tensor:
    """Mean binary cross-entropy of the causal predictor against the router's choice, nats. Raposo et al., sec. 3.5."""
    return F.binary_cross_entropy_with_logits(report.predicted, report.chosen.float())


def agreement(report: DepthReport) -> Tensor:
    """Share of tokens, 0 to 1, about which the causal rule and the training-time choice agree."""
    return ((report.predicted > 0) == report.chosen).float().mean()
