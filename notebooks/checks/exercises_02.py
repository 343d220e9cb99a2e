"""Checks of notebook 02's exercises, and the four networks to diagnose. Solutions: notebooks/solutions/02.md."""

# Shapes: B batch, T time, D d_model, C chosen tokens, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from checks.exercise import exercise
from moe_lab import load_config
from moe_lab.config import ROOT, ModelConfig
from moe_lab.model import count_parameters

X = torch.arange(16.0).view(8, 2) + 1  # (T, D)
SCORES = torch.tensor([0.3, 2.0, -1.0, 0.9, 1.5, -0.2, 0.1, 1.1])
CAPACITY = 0.45  # of 8 tokens: 3.6, so 4
PLACES = [1, 3, 4, 7]  # of the 4 highest scores, in order of time
CHUNK = 8  # tokens that share a summary in one of the suspects
KINDS = {"A": "mask", "B": "causal", "C": "choice", "D": "chunk"}


@exercise
def check_edits(edits: Mapping) -> None:
    """Changes of the case's model: fewer than 0.85 billion active parameters of 1.45 to 1.55 billion."""
    case = load_config(ROOT / "configs/training_1.5b.yaml").model
    assert isinstance(edits, Mapping) and edits, "edits is a dict: name of a model key → value"
    unknown = set(edits) - {field.name for field in fields(ModelConfig)}
    assert not unknown, f"no key of the model is called {', '.join(sorted(unknown))}"
    count = count_parameters(replace(case, **edits))  # an impossible model says why
    total, active = count.total / 1e9, count.active / 1e9
    assert 1.45 <= total <= 1.55, f"the whole model now has {total:.2f} billion; keep it between 1.45 and 1.55"
    assert active < 0.85, f"a token is still computed by {active:.2f} billion; which part is used K of E times?"


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


class Suspect(nn.Module):
    """One layer of attention over 32 tokens, and perhaps a view of the future: `network(ids).logits`, ids (B, T)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(32, 16)
        self.query, self.key, self.value, self.head = (nn.Linear(16, n, bias=False) for n in (16, 16, 16, 32))
        self.router = nn.Linear(16, 1, bias=False)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        x = self.embedding(ids)  # (B, T, D)
        length = x.shape[1]
        if self.kind == "chunk":  # the mean of a whole chunk of tokens is added to each of them
            chunks = torch.arange(length, device=ids.device) // CHUNK
            same = (chunks[:, None] == chunks).float()
            x = x + same @ x / same.sum(dim=1, keepdim=True)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(16)
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        scores = scores.masked_fill(future, -1.0 if self.kind == "mask" else -torch.inf)
        if self.kind == "choice":  # the best half of the sequence are computed, each from itself and earlier ones
            chosen = torch.zeros_like(ids, dtype=torch.bool)
            chosen.scatter_(1, self.router(x).squeeze(-1).topk(length // 2, dim=1).indices, True)
            y = (scores.softmax(dim=-1) @ self.value(x)) * chosen[..., None]
        else:
            y = scores.softmax(dim=-1) @ self.value(x)
        return SimpleNamespace(logits=self.head(x + y))


def suspects(device: torch.device | str = "cpu") -> dict[str, Suspect]:
    """Four networks by letter, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return {letter: Suspect(kind).to(device) for letter, kind in KINDS.items()}


@exercise
def check_verdicts(verdicts: Mapping[str, str]) -> None:
    """{"A": …, "B": …, "C": …, "D": …} with one word for each suspect."""
    assert set(verdicts) == set(KINDS), "name all four: A, B, C and D"
    wrong = [word for word in verdicts.values() if word not in KINDS.values()]
    assert not wrong, f"use these words: {', '.join(sorted(KINDS.values()))}; not {wrong[0]!r}"
    for letter, word in verdicts.items():
        right = KINDS[letter]
        if word == right:
            continue
        assert right == "causal" or word != "causal", f"{letter}: change each token in turn; an earlier logit moves"
        assert right != "causal", f"{letter}: no logit before a changed token moves, whichever token you change"
        assert right != "choice", f"{letter}: earlier logits move, but is their gradient by later embeddings zero?"
        assert word != "choice", f"{letter}: a choice leaves no gradient; this one has some"
        raise AssertionError(f"{letter}: how far back does the change reach: to a border of chunks, or to the start?")
