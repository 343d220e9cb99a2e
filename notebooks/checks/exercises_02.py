"""Checks of notebook 02's exercises. Solutions: notebooks/solutions/02.md."""

# Shapes: T time, D d_model, C chosen tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_lab.config import ModelConfig
from moe_lab.course.lessons import check_exercise

# head_dim is not d_model / n_heads, so that an answer that computes it is found out
WIDTHS = {"d_model": 48, "n_layers": 5, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10}
SIZES = ModelConfig(**WIDTHS, mamba_enabled=True, mamba_layers=(1, 3), n_pred_tokens=1, aux_loss_weights=(1.0,))
X = torch.arange(16.0).view(8, 2) + 1  # (T, D)
SCORES = torch.tensor([0.3, 2.0, -1.0, 0.9, 1.5, -0.2, 0.1, 1.1])
CAPACITY = 0.45  # of 8 tokens: 3.6, so 4
PLACES = [1, 3, 4, 7]  # of the 4 highest scores, in order of time
VOCAB = 5


def check_kv_numbers(answer: Callable | None) -> bool:
    """`answer(config, n_tokens)` → numbers in the key/value caches of a whole model."""
    attention_only = replace(SIZES, mamba_enabled=False)
    one_layer = 2 * SIZES.n_kv_heads * SIZES.width_of_head * 100
    tests = [
        (lambda f: f(SIZES, 100) * 2 != 3 * one_layer, "keys and values are both kept: twice as many"),
        (lambda f: f(SIZES, 100) != one_layer, "this is one layer's cache; every attention layer has its own"),
        (
            lambda f: f(SIZES, 100) * SIZES.n_kv_heads != 3 * one_layer * SIZES.n_heads,
            "query heads share: only n_kv_heads are kept",
        ),
        (lambda f: f(SIZES, 100) != 5 * one_layer, "Mamba layers keep no keys and values"),
        (lambda f: f(SIZES, 100) == 3 * one_layer, "attention layers × 2 × n_kv_heads × width_of_head × n_tokens"),
        (lambda f: f(SIZES, 200) == 6 * one_layer, "twice the tokens take twice the numbers"),
        (
            lambda f: f(attention_only, 100) == 5 * one_layer,
            "with mamba_enabled false the list mamba_layers means nothing; config.is_mamba(layer) knows",
        ),
    ]
    return check_exercise(answer, tests)


def ten_times(rows: Tensor, positions: object) -> Tensor:
    return rows * 10


def handed(f: Callable) -> tuple[Tensor, list[int]]:
    """What the sublayer gets from the answer: rows and positions."""
    seen: list[tuple[Tensor, list[int]]] = []

    def sublayer(rows: Tensor, positions) -> Tensor:
        seen.append((rows.detach().clone(), torch.as_tensor(positions).tolist()))
        return rows * 10

    f(X.clone(), SCORES.clone(), CAPACITY, sublayer)
    return seen[0]


def has_gradient(f: Callable) -> bool:
    scores = SCORES.clone().requires_grad_()
    y = f(X.clone(), scores, CAPACITY, ten_times)
    if not y.requires_grad:
        return False
    y.sum().backward()
    return bool(scores.grad[PLACES].all())


def leaves_x_alone(f: Callable) -> bool:
    x = X.clone()
    f(x, SCORES.clone(), CAPACITY, ten_times)
    return torch.equal(x, X)


def check_depth_layer(answer: Callable | None) -> bool:
    """`answer(x, scores, capacity, sublayer)` → (T, D), for x (T, D), scores (T,), `sublayer(rows, positions)`."""

    def run(f: Callable) -> Tensor:
        return f(X.clone(), SCORES.clone(), CAPACITY, ten_times)

    skipped = [t for t in range(len(X)) if t not in PLACES]
    weighted = X[PLACES] * (1 + 10 * SCORES[PLACES].sigmoid()[:, None])
    tests = [
        (lambda f: len(handed(f)[0]) == len(PLACES), "ceil(capacity · T) tokens are chosen: of 8 at 0.45 these are 4"),
        (
            lambda f: sorted(handed(f)[0][:, 0].tolist()) == X[PLACES][:, 0].tolist(),
            "the chosen tokens are those with the highest scores",
        ),
        (
            lambda f: torch.equal(handed(f)[0], X[PLACES]),
            "the rows reach the sublayer out of order: a causal mask then lets a token see its future (B04)",
        ),
        (lambda f: handed(f)[1] == PLACES, "positions are places in the text, not ranks in the selection (B17)"),
        (lambda f: run(f).shape == X.shape, "all T tokens come back, the skipped ones too"),
        (lambda f: torch.equal(run(f)[skipped], X[skipped]), "a skipped token must leave exactly as it came (B03)"),
        (
            lambda f: not torch.allclose(run(f)[PLACES], X[PLACES] * 11),
            "the score chooses but does not multiply: the router would never learn (B05)",
        ),
        (
            lambda f: torch.allclose(run(f)[PLACES], weighted),
            "a chosen token becomes x + sigmoid(score) · sublayer(rows, positions)",
        ),
        (has_gradient, "the scores of the chosen tokens get no gradient: no detach, no item (B05)"),
        (leaves_x_alone, "your code writes into x; work on a copy"),
    ]
    return check_exercise(answer, tests)


def counted(ids: Tensor) -> Tensor:
    """A causal fn: how often each token occurred so far, (1, T, V)."""
    assert ids.min() >= 0 and ids.max() < VOCAB, "tokens must stay between 0 and vocab_size - 1"
    return torch.nn.functional.one_hot(ids, VOCAB).float().cumsum(dim=1)


def sees_next(ids: Tensor) -> Tensor:
    return counted(ids) + counted(ids.roll(-1, dims=1))


def sees_last(ids: Tensor) -> Tensor:
    """Only the last token leaks."""
    return counted(ids) + 0.01 * torch.nn.functional.one_hot(ids[:, -1:], VOCAB)


def chooses(ids: Tensor, original: Tensor) -> Tensor:
    """A top-1 over time: only the place with the highest score gets logits. That is place 6 as long as it holds its
    original token, else place 2."""
    scores = torch.full(ids.shape, -1.0)
    scores[:, 2] = 0.5
    scores[:, 6] = (ids[:, 6] == original[:, 6]).float()
    return counted(ids) * torch.nn.functional.one_hot(scores.argmax(dim=1), ids.shape[1]).unsqueeze(-1)


def falls_by_five(ids: Tensor, original: Tensor) -> Tensor:
    """One logit of the first place falls by 5 as soon as the last token is another one."""
    logits = counted(ids)
    logits[:, 0, 0] -= 5.0 * (ids[:, -1] != original[:, -1])
    return logits


def check_leak(answer: Callable | None) -> bool:
    """`answer(fn, ids, cut, vocab_size)` → largest change of fn's logits before `cut` when later tokens change."""
    ids = torch.tensor([[3, 0, 4, 1, 0, 2, 1, 0]])

    def run(f: Callable, fn: Callable, cut: int = 4) -> float:
        return float(f(fn, ids.clone(), cut, VOCAB))

    def leaves_ids_alone(f: Callable) -> bool:
        given = ids.clone()
        f(counted, given, 4, VOCAB)
        return torch.equal(given, ids)

    tests = [
        (lambda f: run(f, counted) == 0, "a causal fn has no leak; only places before cut count, not cut itself"),
        (lambda f: run(f, sees_next) > 0, "place cut - 1 sees token cut here, and you did not find it"),
        (
            lambda f: all(run(f, sees_last, cut) > 0 for cut in [*range(1, 8)] * 5),
            "only the last token leaks here: change every token from cut on, each to another one",
        ),
        (
            lambda f: run(f, lambda changed: chooses(changed, ids)) > 0,
            "this fn chooses places by comparing scores over time, and you did not find it",
        ),
        (
            lambda f: abs(run(f, lambda changed: falls_by_five(changed, ids)) - 5) < 1e-5,
            "one logit falls by 5 here: the largest change is 5, whatever its sign",
        ),
        (leaves_ids_alone, "your code writes into ids; work on a copy"),
    ]
    return check_exercise(answer, tests)
