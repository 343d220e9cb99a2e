"""A language model of a few thousand parameters that learns within 100 updates, and a loop to watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from moe_lab.health import Finding, Watch
from moe_lab.health.during.rule import Rule
from moe_lab.health.during.state import State

VOCAB = 64


class Toy(nn.Module):
    """Says the next token from this one: a bijection, so the loss falls from ln V towards 0."""

    def __init__(self, width: int = 16, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))
        return self.head(x)


def toy(seed: int = 0, dtype: torch.dtype = torch.float32, kind: type[Toy] = Toy, **options) -> Toy:
    """Start values that do not depend on which tests ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**options)
        nn.init.normal_(model.head.weight, std=0.02)
        return model.to(dtype)


def loss_of(model: Callable, seed: int, n_ids: int = VOCAB) -> Tensor:
    ids = torch.randint(n_ids, (8, 16), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(ids).float().flatten(0, 1), ((7 * ids + 3) % VOCAB).flatten())


def train(watch: Watch | None, model: nn.Module, optimizers: Iterable[Optimizer], n: int, **options) -> list[float]:
    """`n` updates; options: `start` of the seeds, `n_ids` that occur, `before_step`, `reported` (of a loss)."""
    start, before_step = options.get("start", 0), options.get("before_step", lambda step: None)
    losses = []
    for step in range(start, start + n):
        loss = loss_of(model, step, options.get("n_ids", VOCAB))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        before_step(step)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if watch:
            watch.observe(loss=options.get("reported", lambda x: x)(loss.detach()))
    return losses


def watched(model: nn.Module, optimizers: list[Optimizer], n: int = 60, **options) -> Watch:
    """Train under a watch; what `Watch` takes goes to it, the rest to `train`."""
    given = {key: options.pop(key) for key in ("budget", "expect_frozen", "log") if key in options}
    with Watch(model, optimizers, **given) as watch:
        train(watch, model, optimizers, n, **options)
    return watch


def said(watch: Watch, severity: str | None = None) -> list[str]:
    """Rules of the findings, infos left out unless asked for."""
    return [f.rule for f in watch.findings if (f.severity == severity if severity else f.severity != "info")]


def adamw(model: nn.Module, lr: float = 0.01, **options) -> list[AdamW]:
    """At the usual LR of a tiny model."""
    return [AdamW(model.parameters(), lr=lr, **options)]


def finding(watch: Watch, rule: str):
    return next(f for f in watch.findings if f.rule == rule)


def spoken(rule: Rule, state: State) -> list[Finding]:
    """What one rule says of a state, as if it had not spoken before."""
    ill = rule.when(state)
    return [rule.finding(state, ill)] if ill else []


class Mixture(nn.Module):
    """Two of eight experts a token, which are counted; `auxiliary` is kept on the module."""

    def __init__(self, width: int, auxiliary: str = "", towards: int = 0):
        super().__init__()
        self.router, self.auxiliary = nn.Linear(width, 8, bias=False), auxiliary
        self.up = nn.Parameter(torch.randn(8, width, width) * 0.1)
        self.register_buffer("counts", torch.zeros(8))
        self.register_buffer("bias", 100.0 * (torch.arange(8) < towards))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        chosen = (scores + self.bias).topk(2, -1).indices
        with torch.no_grad():
            self.counts += torch.bincount(chosen.flatten(), minlength=8)
        gate = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        if self.auxiliary:
            load = (gate > 0).float().mean((0, 1)) / 2
            normal = gate / gate.sum(-1, keepdim=True)
            self.term = {
                "balance": 8 * (load * scores.mean((0, 1))).sum(),
                "constant": 8 * (load[:, None] * normal.mean((0, 1))).sum(),
                "detached": 8 * (load * scores.mean((0, 1))).sum().detach(),
            }[self.auxiliary]
        return torch.einsum("bsd,edh,bse->bsh", x, self.up, gate)


class Sparse(Toy):
    def __init__(self, around=None, **options):
        super().__init__()
        self.mixture, self.around = Mixture(16, **options), around

    def forward(self, ids):
        x = self.embedding(ids)
        mix = self.mixture if self.around is None else lambda y: checkpoint(self.mixture, y, use_reentrant=self.around)
        return self.head(x + mix(self.down(F.gelu(self.up(self.norm(x))))))
