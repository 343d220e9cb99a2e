"""Healthy trainings whose models or losses are of other kinds: recurrent, generative, reinforced, physical, sparse."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.healthy_language import next_token
from benchmarks.programs import Make, Pictures, Program, Rows, plain, update


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]):
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(256, 64), cell(64, 96, batch_first=True), nn.Linear(96, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(ids))[0])


def recurrent(cell: type[nn.Module], seed: int) -> Program:
    model, rows = Recurrent(cell), Rows(seed, length=65)
    return plain(model, Adam(model.parameters(), lr=4e-3), rows, next_token)


def mlp(*widths: int, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    return nn.Sequential(*[m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), act())][:-1])


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def diffusion(seed: int) -> Program:
    """Noise prediction on glyphs (Ho et al. 2020), with an average of the weights."""
    pictures, noise = Pictures(seed, size=12), torch.Generator().manual_seed(seed)
    model = mlp(145, 256, 256, 144)

    def batches() -> tuple[Tensor, Tensor]:
        x = pictures()[0].flatten(1)
        t, e = torch.rand(len(x), 1, generator=noise), torch.randn(x.shape, generator=noise)
        noisy = (t * math.pi / 2).cos() * x + (t * math.pi / 2).sin() * e
        return torch.cat([noisy, t], 1), e

    return plain(model, Adam(model.parameters(), lr=1e-3), batches, squares)


def adversarial(seed: int, wasserstein: bool = False) -> Program:
    """A GAN on glyphs (Radford et al. 2016's Adam), or Wasserstein with a gradient penalty (Gulrajani et al. 2017)."""
    pictures, noise = Pictures(seed, size=12), torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"g": mlp(16, 128, 144), "d": mlp(144, 128, 1, act=nn.LeakyReLU)})
    og, od = (Adam(model[k].parameters(), lr=2e-4, betas=(0.5, 0.999)) for k in "gd")

    def step(i: int) -> Tensor:
        real = pictures()[0].flatten(1)
        fake = model["g"](torch.randn(len(real), 16, generator=noise))
        if wasserstein:
            mixed = (0.5 * real + 0.5 * fake.detach()).requires_grad_()
            slope = torch.autograd.grad(model["d"](mixed).sum(), mixed, create_graph=True)[0].norm(dim=1)
            loss = model["d"](fake.detach()).mean() - model["d"](real).mean() + 10 * ((slope - 1) ** 2).mean()
        else:
            loss = F.softplus(-model["d"](real)).mean() + F.softplus(model["d"](fake.detach())).mean()
        update(od, loss, None)
        update(og, -model["d"](fake).mean() if wasserstein else F.softplus(-model["d"](fake)).mean(), None)
        return loss.detach()

    return Program(model, [og, od], step)


def variational(seed: int) -> Program:
    pictures, noise = Pictures(seed, size=12), torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"encode": mlp(144, 128, 16), "decode": mlp(8, 128, 144)})

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        mean, log_var = model["encode"](x).chunk(2, 1)
        z = mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=noise)
        prior = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
        return F.mse_loss(model["decode"](z), x, reduction="sum") / len(x) + prior

    return plain(model, Adam(model.parameters(), lr=1e-3), lambda: pictures()[0].flatten(1), loss)


def policy_gradient(seed: int) -> Program:
    """REINFORCE with a baseline; the loss is no likelihood."""
    noise, model = torch.Generator().manual_seed(seed), mlp(8, 64, 4, act=nn.Tanh)
    rewards = torch.randn(8, 4, generator=noise)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        chosen = torch.distributions.Categorical(logits=model(x))
        action = chosen.sample()
        gained = (x @ rewards).gather(1, action[:, None]).squeeze(1)
        advantage = (gained - gained.mean()) / gained.std()
        return -(chosen.log_prob(action) * advantage).mean() - 0.01 * chosen.entropy().mean()

    return plain(model, Adam(model.parameters(), lr=3e-3), lambda: torch.randn(64, 8, generator=noise), loss, 0.5)


def q_learning(seed: int) -> Program:
    """A ring of states, a target network that is copied every 20 updates, a buffer."""
    noise, model = torch.Generator().manual_seed(seed), mlp(16, 64, 2, act=nn.ReLU)
    target, optimizer = copy.deepcopy(model), Adam(model.parameters(), lr=1e-3)

    batches = lambda: (torch.randint(16, (64,), generator=noise), torch.randint(2, (64,), generator=noise))  # noqa: E731

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        state, action = batch
        after = (state + 2 * action - 1) % 16
        with torch.no_grad():
            worth = (after == 0).float() + 0.9 * target(F.one_hot(after, 16).float()).max(1).values
        told = model(F.one_hot(state, 16).float()).gather(1, action[:, None]).squeeze(1)
        return F.smooth_l1_loss(told, worth)

    def step(i: int) -> Tensor:
        if i % 20 == 0:
            target.load_state_dict(model.state_dict())
        return update(optimizer, loss(model, batches()), 10.0)

    return Program(model, [optimizer], step, (batches(), loss))


def self_supervised(seed: int) -> Program:
    """BYOL (Grill et al. 2020): a predictor chases a slow copy of the network, on two noisy views."""
    pictures, noise = Pictures(seed, size=12), torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"online": mlp(144, 128, 32), "predict": mlp(32, 64, 32)})
    slow, optimizer = copy.deepcopy(model["online"]).requires_grad_(False), Adam(model.parameters(), lr=1e-3)

    batches = lambda: pictures()[0].flatten(1)  # noqa: E731

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        one, two = (x + 0.3 * torch.randn(x.shape, generator=noise) for _ in range(2))
        told = F.normalize(model["predict"](model["online"](one)), dim=1)
        return 2 - 2 * (told * F.normalize(slow(two), dim=1)).sum(1).mean()

    def step(i: int) -> Tensor:
        value = update(optimizer, loss(model, batches()))
        for p, q in zip(slow.parameters(), model["online"].parameters(), strict=True):
            p.data.lerp_(q.data, 0.01)
        return value

    return Program(model, [optimizer], step, (batches(), loss))


def physics(seed: int) -> Program:
    """A network whose second derivative obeys u'' = -u (Raissi et al. 2019)."""
    noise, model = torch.Generator().manual_seed(seed), mlp(1, 64, 64, 1, act=nn.Tanh)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        u = model(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        start = model(torch.zeros(1, 1)) ** 2 + (model(torch.ones(1, 1)) - math.sin(1.0)) ** 2
        return ((second + u) ** 2).mean() + start.sum()

    return plain(model, Adam(model.parameters(), lr=2e-3), lambda: 3 * torch.rand(64, 1, generator=noise), loss)


def by_lbfgs(seed: int) -> Program:
    noise, model = torch.Generator().manual_seed(seed), mlp(4, 16, 1, act=nn.Tanh)
    x = torch.randn(128, 4, generator=noise)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x[:, :1] * x[:, 1:2])
        loss.backward()
        return loss

    return Program(model, [optimizer], lambda i: optimizer.step(closure).detach(), ((x, x[:, :1] * x[:, 1:2]), squares))


class Factors(nn.Module):
    def __init__(self, sparse: bool):
        super().__init__()
        self.users, self.items = nn.Embedding(500, 16, sparse=sparse), nn.Embedding(300, 16, sparse=sparse)

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        return (self.users(u) * self.items(i)).sum(1)


def factorised(seed: int, sparse: bool = True) -> Program:
    """Recommendations: two tables, of which a batch touches a few rows."""
    noise, model = torch.Generator().manual_seed(seed), Factors(sparse)
    kind = torch.optim.SparseAdam if sparse else Adam
    true = [torch.randn(n, 4, generator=noise) for n in (500, 300)]

    batches = lambda: (torch.randint(500, (256,), generator=noise), torch.randint(300, (256,), generator=noise))  # noqa: E731

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        u, v = batch
        return F.mse_loss(model(u, v), (true[0][u] * true[1][v]).sum(1))

    return plain(model, kind(list(model.parameters()), lr=1e-2), batches, loss, None)


def graph(seed: int) -> Program:
    """A graph convolution over two communities (Kipf & Welling 2017)."""
    noise = torch.Generator().manual_seed(seed)
    sides = torch.arange(80) % 2
    linked = torch.rand(80, 80, generator=noise) < torch.where(sides[:, None] == sides, 0.2, 0.03)
    near = (linked | linked.T | torch.eye(80).bool()).float()
    near = near / near.sum(1, keepdim=True)
    given, model = (
        torch.randn(80, 16, generator=noise) + sides[:, None],
        nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 2)]),
    )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = F.dropout(model[0](near @ batch[0]).relu(), 0.5)
        return F.cross_entropy(model[1](near @ hidden), batch[1])

    return plain(model, Adam(model.parameters(), lr=1e-2, weight_decay=5e-4), lambda: (given, sides), loss)


OTHERS: dict[str, Make] = {
    **{f"recurrent {cell.__name__}": partial(recurrent, cell) for cell in (nn.LSTM, nn.GRU, nn.RNN)},
    "diffusion": diffusion,
    "gan": adversarial,
    "wasserstein gan": partial(adversarial, wasserstein=True),
    "variational autoencoder": variational,
    "policy gradient": policy_gradient,
    "q-learning": q_learning,
    "self-supervised": self_supervised,
    "physics": physics,
    "lbfgs": by_lbfgs,
    "factorised, sparse": factorised,
    "factorised, dense": partial(factorised, sparse=False),
    "graph": graph,
}


def programs() -> Iterator[tuple[str, Make]]:
    yield from OTHERS.items()
