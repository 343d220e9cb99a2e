"""Prediction heads: their losses against a loop and against all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agreement, model_with, normal, random_ids, tiny
from torch import Tensor, nn

from moe_lab import build_model
from moe_lab.failures.bugs import detach_output
from moe_lab.model import heads


def naive_head_losses(model, ids: Tensor, mask: Tensor) -> list[float]:
    """Every head, row and position by itself: head k at position t has the target ids[t + k + 1]."""
    output = model(ids[:, :-1])
    probs = torch.cat([output.logits.unsqueeze(0), output.future_logits]).double().softmax(-1)
    means = []
    for k in range(len(probs)):
        nats = [
            -math.log(probs[k, row, t, ids[row, t + k + 1]])
            for row in range(len(ids))
            for t in range(ids.shape[1] - 1)
            if t + k + 1 < ids.shape[1] and mask[row, t + k + 1]
        ]
        means.append(sum(nats) / len(nats) if nats else 0.0)
    return means


WEIGHTS = (2.0, 0.5, 0.3, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("masked", ["nothing", "some", "a_row", "everything"])
def test_head_losses_follow_a_loop(masked: str) -> None:
    model, ids = model_with("all", n_pred_tokens=4, aux_loss_weights=WEIGHTS).eval(), random_ids(3, 11)
    mask = torch.full((3, 11), masked != "everything")
    if masked == "some":
        mask = normal(3, 11) > 0
    if masked == "a_row":
        mask[1] = False
    terms = list(model.losses(ids, None if masked == "nothing" else mask).values())
    for term, mean, weight in zip(terms[:4], naive_head_losses(model, ids, mask), WEIGHTS, strict=True):
        assert term.item() == pytest.approx(weight / sum(WEIGHTS) * mean, rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [4, 100])  # of 3 · 13 at a time
def test_a_loss_in_pieces_is_the_cross_entropy_of_all_logits(monkeypatch, dtype, tolerance, rows: int) -> None:
    monkeypatch.setattr(heads, "LOGITS", rows * 257)
    monkeypatch.setattr(heads, "CACHED", 3 * 257)
    head, hidden, targets = nn.Linear(16, 257, bias=False), normal(3, 13, 16).requires_grad_(), random_ids(3, 13)
    targets[normal(3, 13) > 0.5] = -100
    with torch.no_grad():
        head.weight.copy_(normal(257, 16, seed=1) * 4)  # some probabilities underflow
    seen, results = [], []
    head.register_forward_hook(lambda module, args, logits: seen.append(logits))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = heads.token_loss(head, hidden, targets)
    assert max(map(len, seen)) == min(rows, 39) and seen[0].dtype == dtype
    logits = F.linear(hidden.double(), head.weight.double())
    for loss in (ours, F.cross_entropy(logits.flatten(0, 1), targets.flatten())):
        grads = torch.autograd.grad(loss * 3, (hidden, head.weight))
        results.append({"loss": loss.detach().double(), "hidden": grads[0].double(), "weight": grads[1].double()})
    assert_agreement(*results, tolerance)
    assert not results[0]["hidden"][targets == -100].any()


def test_a_head_that_is_cut_off_or_frozen_leaves_the_others_their_gradients() -> None:
    model, ids = build_model(tiny()), random_ids(2, 12)
    detach_output(model, "lm_heads.0")
    model.lm_heads[1].requires_grad_(False)
    sum(model.losses(ids).values()).backward()
    assert all(head.weight.grad is None for head in model.lm_heads)
    assert model.embedding.weight.grad.any()
