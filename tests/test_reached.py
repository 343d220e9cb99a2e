"""Leaves of the loss that no optimizer holds: what is told of them, and of what looks alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from toy import said

from moe_lab.health import Watch

BESIDE = "beside", "judge", "on purpose", "together", "rare", "each", "by hand"  # kinds with a layer after the network


class Net(nn.Module):
    """(B, 8) → (B, 4); what it has beside the parameters that it knows of depends on `kind`."""

    def __init__(self, kind: str = ""):
        super().__init__()
        self.inner, self.kind = nn.Linear(8, 8), kind
        self.layers = [nn.Linear(8, 8, bias=False)]
        self.known = self.layers[0] if kind != "list" else None
        self.factors = nn.Parameter(torch.randn(8, 4) * 0.3)
        if kind == "moved":
            del self.factors
            self.factors = nn.Parameter(torch.randn(8, 4).double()).to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layers[0]
        x = checkpoint(layer, x, use_reentrant=False) if self.kind == "recomputed" else layer(x)
        return self.inner(x).tanh() @ self.factors


def trained(kind: str, n: int = 30) -> Watch:
    """`kind`: what is beside the network in the loss, and who moves it."""
    torch.manual_seed(0)
    model, beside = Net(kind), nn.Linear(4, 4, bias=False)
    temperature = torch.zeros((), requires_grad=True) if kind == "temperature" else torch.zeros(())
    if kind == "judge":
        beside.eval()
    elif kind == "on purpose":
        beside.requires_grad_(False)
    given = [*model.parameters(), *(beside.parameters() if kind == "together" else ())]
    rare = SGD(beside.parameters(), lr=0.1) if kind in ("rare", "each") else None  # that nobody watches
    optimizer = AdamW(given, lr=0.01)
    points = torch.randn(32, 8, requires_grad=kind == "points")  # the same in each update, as of an equation
    with Watch(model, optimizer, quiet=True) as watch:
        for i in range(n):
            x = torch.randn(32, 8, requires_grad=kind == "attack")
            x = points if kind == "points" else x
            scores = (beside(model(x)) if kind in BESIDE else model(x)) * temperature.exp()
            loss = F.cross_entropy(scores, x.detach()[:, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if rare and (kind == "each" or i % 25 == 24):
                rare.step()
            if kind == "by hand":
                beside.weight.data -= 0.1 * beside.weight.grad
            watch.observe(loss=loss)
    return watch


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("list", "Linear.weight (8, 8)"),
        ("moved", "a tensor (8, 4)"),
        ("beside", "Linear.weight (4, 4)"),
        ("temperature", "a tensor ()"),
    ],
)
def test_what_gets_gradients_and_has_no_optimizer(kind: str, name: str) -> None:
    (found,) = [f for f in trained(kind).findings if f.rule == "not_in_optimizer"]
    assert found.severity == "error" and name in found.message and found.step == 10


@pytest.mark.parametrize("kind", ["", "recomputed", "attack", "points", *BESIDE[1:]])
def test_what_somebody_moves_or_nobody_need_move(kind: str) -> None:
    """A network that judges is an info; the others are not mentioned."""
    watch = trained(kind)
    assert said(watch) == []
    assert [f.severity for f in watch.findings if f.rule == "not_in_optimizer"] == ["info"] * (kind == "judge")
