"""Checks of notebook 02's exercises. Solutions: notebooks/solutions/02.md."""

# Shapes: T time, D d_model, C chosen tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moe_lab.config import ModelConfig
from moe_lab.course.lessons import exercise

# head_dim is not d_model / n_heads, so that an answer that computes it is found out
WIDTHS = {"d_model": 48, "n_layers": 5, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10}
SIZES = ModelConfig(**WIDTHS, mamba_enabled=True, mamba_layers=(1, 3), n_pred_tokens=1, aux_loss_weights=(1.0,))
X = torch.arange(16.0).view(8, 2) + 1  # (T, D)
SCORES = torch.tensor([0.3, 2.0, -1.0, 0.9, 1.5, -0.2, 0.1, 1.1])
CAPACITY = 0.45  # of 8 tokens: 3.6, so 4
PLACES = [1, 3, 4, 7]  # of the 4 highest scores, in order of time
IDS, VOCAB = torch.tensor([[3, 0, 4, 1, 0, 2, 1, 0]]), 5


@exercise
def check_kv_numbers(numbers: Callable) -> None:
    """`numbers(config, n_tokens)` in the key/value caches of a whole model."""
    found, one_layer = numbers(SIZES, 100), 2 * SIZES.n_kv_heads * SIZES.width_of_head * 100
    assert found * 2 != 3 * one_layer, "keys and values are both kept: twice as many"
    assert found != one_layer, "this is one layer's cache; every attention layer has its own"
    shared = found * SIZES.n_kv_heads != 3 * one_layer * SIZES.n_heads
    assert shared, "query heads share: only n_kv_heads are kept"
    assert found != 5 * one_layer, "Mamba layers keep no keys and values"
    assert found == 3 * one_layer, "attention layers × 2 × n_kv_heads × width_of_head × n_tokens"
    assert numbers(SIZES, 200) == 6 * one_layer, "twice the tokens take twice the numbers"
    assert numbers(replace(SIZES, mamba_enabled=False), 100) == 5 * one_layer, (
        "with mamba_enabled false the list mamba_layers means nothing; config.is_mamba(layer) knows"
    )


@exercise
def check_depth_layer(layer: Callable) -> None:
    """`layer(x, scores, capacity, sublayer)` → (T, D), for x (T, D), scores (T,), `sublayer(rows, positions)`."""
    handed: list[tuple[Tensor, list[int]]] = []

    def sublayer(rows: Tensor, positions) -> Tensor:
        handed.append((rows.detach().clone(), torch.as_tensor(positions).tolist()))
        return rows * 10

    x, scores = X.clone(), SCORES.clone().requires_grad_()
    y = layer(x, scores, CAPACITY, sublayer)
    rows, positions = handed[0]
    assert len(rows) == len(PLACES), "ceil(capacity · T) tokens are chosen: of 8 at 0.45 these are 4"
    best = sorted(rows[:, 0].tolist()) == X[PLACES][:, 0].tolist()
    assert best, "the chosen tokens are those with the highest scores"
    assert torch.equal(rows, X[PLACES]), (
        "the rows reach the sublayer out of order: a causal mask then lets a token see its future (B04)"
    )
    assert positions == PLACES, "positions are places in the text, not ranks in the selection (B17)"
    assert y.shape == X.shape, "all T tokens come back, the skipped ones too"
    skipped = [t for t in range(len(X)) if t not in PLACES]
    assert torch.equal(y[skipped], X[skipped]), "a skipped token must leave exactly as it came (B03)"
    assert not torch.allclose(y[PLACES], X[PLACES] * 11), (
        "the score chooses but does not multiply: the router would never learn (B05)"
    )
    weighted = X[PLACES] * (1 + 10 * SCORES[PLACES].sigmoid()[:, None])
    assert torch.allclose(y[PLACES], weighted), "a chosen token becomes x + sigmoid(score) · sublayer(rows, positions)"
    if y.requires_grad:
        y.sum().backward()
    learns = scores.grad is not None and scores.grad[PLACES].all()
    assert learns, "the scores of the chosen tokens get no gradient: no detach, no item (B05)"
    assert torch.equal(x, X), "your code writes into x; work on a copy"


def counted(ids: Tensor) -> Tensor:
    """A causal fn: how often each token occurred so far, (1, T, V)."""
    assert ids.min() >= 0 and ids.max() < VOCAB, "tokens must stay between 0 and vocab_size - 1"
    return one_hot(ids, VOCAB).float().cumsum(dim=1)


def sees_next(ids: Tensor) -> Tensor:
    return counted(ids) + counted(ids.roll(-1, dims=1))


def sees_last(ids: Tensor) -> Tensor:
    """Only the last token leaks."""
    return counted(ids) + 0.01 * one_hot(ids[:, -1:], VOCAB)


def chooses(ids: Tensor) -> Tensor:
    """A top-1 over time: only the place with the highest score gets logits. That is place 6 as long as it holds its
    original token, else place 2."""
    scores = torch.full(ids.shape, -1.0)
    scores[:, 2] = 0.5
    scores[:, 6] = (ids[:, 6] == IDS[:, 6]).float()
    return counted(ids) * one_hot(scores.argmax(dim=1), ids.shape[1]).unsqueeze(-1)


def falls_by_five(ids: Tensor) -> Tensor:
    """One logit of the first place falls by 5 as soon as the last token is another one."""
    logits = counted(ids)
    logits[:, 0, 0] -= 5.0 * (ids[:, -1] != IDS[:, -1])
    return logits


@exercise
def check_leak(leak: Callable) -> None:
    """`leak(fn, ids, cut, vocab_size)`: largest change of fn's logits before `cut` when later tokens change."""

    def found(fn: Callable, cut: int = 4) -> float:
        return float(leak(fn, IDS.clone(), cut, VOCAB))

    assert found(counted) == 0, "a causal fn has no leak; only places before cut count, not cut itself"
    assert found(sees_next) > 0, "place cut - 1 sees token cut here, and you did not find it"
    assert all(found(sees_last, cut) > 0 for cut in [*range(1, 8)] * 5), (
        "only the last token leaks here: change every token from cut on, each to another one"
    )
    assert found(chooses) > 0, "this fn chooses places by comparing scores over time, and you did not find it"
    assert abs(found(falls_by_five) - 5) < 1e-5, "one logit falls by 5 here: the largest change is 5, whatever its sign"
    given = IDS.clone()
    leak(counted, given, 4, VOCAB)
    assert torch.equal(given, IDS), "your code writes into ids; work on a copy"
