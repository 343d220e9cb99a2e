"""The rarer kinds of model that detection_rows.py makes sick: generative, with experts, with adapters, graphs, sounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.detection_bodies import Batch, Body, Convolved, body, of_pairs, pair_loss, picture_loss
from benchmarks.healthy_families import small
from benchmarks.healthy_kinds import Factors, Recurrent, mlp
from benchmarks.healthy_senses import HEARING, sounds
from benchmarks.programs import Pictures, Program, glyphs


def generative(seed: int, cut: bool = False, twice: bool = False, kept: bool = False) -> Program:
    """A GAN on glyphs whose discriminator's training begins anew with each program. `kept`: its gradients are cleared after
    its own step, and not before its backward pass."""
    pictures, noise = Pictures(seed, size=12), torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"g": mlp(16, 128, 144), "d": mlp(144, 128, 1, act=nn.LeakyReLU)})
    made = [*model["g"].parameters(), *(model["d"].parameters() if twice else ())]
    og, od = (Adam(p, lr=5e-4, betas=(0.5, 0.999)) for p in (made, model["d"].parameters()))

    def update(i: int) -> Tensor:
        real = pictures()[0].flatten(1)
        fake = model["g"](torch.randn(len(real), 16, generator=noise))
        loss = F.softplus(-model["d"](real)).mean() + F.softplus(model["d"](fake.detach())).mean()
        if not kept:
            od.zero_grad()
        loss.backward()
        od.step()
        if kept:
            od.zero_grad()
        og.zero_grad()
        F.softplus(-model["d"](fake.detach() if cut else fake)).mean().backward()
        og.step()
        return loss.detach()

    def held_out() -> float:
        """How far the mean and the spread of what is generated are from the pictures'."""
        with torch.no_grad():
            fake = model["g"](torch.randn(1024, 16, generator=torch.Generator().manual_seed(7)))
        real = Pictures(12345, batch=1024, size=12)()[0].flatten(1)
        return float((fake.mean(0) - real.mean(0)).square().mean() + (fake.std(0) - real.std(0)).square().mean())

    return Program(model, [og, od], update, held_out=held_out)


def with_auxiliary(loss: Callable[[nn.Module, Batch], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """In training with what the model adds to its loss."""
    return lambda model, batch: loss(model, batch) + (model.auxiliary if model.training else 0.0)


class Switch(nn.Module):
    """A feed-forward layer of 8 experts, the best one a token (Fedus et al. 2021), between an embedding and a head."""

    def __init__(self, weighed: bool = True, biased: bool = False, balance: float = 0.01):
        super().__init__()
        self.embed, self.head, self.cell = nn.Embedding(256, 64), nn.Linear(64, 256), nn.GRU(64, 64, batch_first=True)
        self.router, self.experts = nn.Linear(64, 8, bias=biased), nn.ModuleList(mlp(64, 64, 64) for _ in range(8))
        self.weighed, self.balance, self.auxiliary = weighed, balance, 0.0
        if biased:
            nn.init.constant_(self.router.bias[:1].data, 8.0)

    def chosen(self, shares: Tensor) -> Tensor:
        """(B, T, 8) of bool: which experts take which token."""
        return F.one_hot(shares.argmax(-1), 8).bool()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.cell(self.embed(ids))[0]
        shares = self.router(x).softmax(-1)  # (B, T, 8)
        chosen = self.chosen(shares)
        self.auxiliary = self.balance * 8 * (chosen.float().mean((0, 1)) * shares.mean((0, 1))).sum()
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen[..., e]
            y[mine] += expert(x[mine]) * (shares[..., e][mine][:, None] if self.weighed else 1.0)
        return self.head(x + y)


class ExpertChoice(Switch):
    """Each expert takes its best eighth of a text's tokens (Zhou et al. 2022)."""

    def chosen(self, shares: Tensor) -> Tensor:
        best = shares.topk(max(1, shares.shape[1] // 8), dim=1).indices
        return torch.zeros_like(shares, dtype=torch.bool).scatter(1, best, True)


class Levelled(Switch):
    """A level for each expert, in the choice alone, rises while the expert is underloaded (Wang et al. 2024); the first expert has
    a head start. `rate`: of the levels."""

    def __init__(self, rate: float):
        super().__init__(biased=True, balance=0.0)
        nn.init.constant_(self.router.bias[:1].data, 1.0)
        self.register_buffer("level", torch.zeros(8))
        self.rate = rate

    def chosen(self, shares: Tensor) -> Tensor:
        chosen = super().chosen(shares + self.level)
        if self.training:
            load = chosen.float().mean((0, 1))
            self.level += self.rate * (load.mean() - load).sign()
        return chosen


def switched(seed: int, kind: type[Switch] = Switch, **model) -> Body:
    return of_pairs(kind(**model), seed)._replace(loss=with_auxiliary(pair_loss))


def gru(seed: int) -> Body:
    return of_pairs(Recurrent(nn.GRU), seed, 4e-3)


class Quantised(nn.Module):
    """Glyphs (B, 144) through 8 entries of a book of 32 (van den Oord et al. 2017). `late`: the book's loss is taken from what the
    straight-through trick returns."""

    def __init__(self, late: bool = False):
        super().__init__()
        self.encode, self.decode, self.book = mlp(144, 128, 32), mlp(32, 128, 144), nn.Embedding(32, 4)
        nn.init.normal_(self.book.weight, std=0.1)
        self.late, self.auxiliary = late, 0.0

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).view(-1, 8, 4)
        entry = self.book(torch.cdist(z.detach(), self.book.weight.detach()[None]).argmin(-1))
        passed = z + (entry - z).detach()
        self.auxiliary = F.mse_loss(passed if self.late else entry, z.detach()) + 0.25 * F.mse_loss(z, entry.detach())
        return self.decode(passed.flatten(1))


def quantised(seed: int, **model) -> Body:
    def batches(seed: int) -> Callable[[], Batch]:
        pictures = Pictures(seed, size=12)
        return lambda: pictures()[0].flatten(1)

    loss = with_auxiliary(lambda model, x: F.mse_loss(model(x), x))
    return body(Quantised(**model), batches, seed, loss)


def triplets(seed: int, eps: float) -> Body:
    """Embeddings of noisy glyphs by a margin; from batch 20 on the first pair of a batch is one picture twice."""

    def batches(seed: int) -> Callable[[], Batch]:
        noise, pictures = torch.Generator().manual_seed(seed), F.interpolate(glyphs()[0], 12).flatten(1)
        n, made = len(pictures) // 36, iter(range(10**6))

        def batch() -> Batch:
            fonts, classes = torch.randint(n, (3, 32), generator=noise), torch.randint(36, (2, 32), generator=noise)
            shown = pictures[36 * fonts + classes[[0, 0, 1]]]
            shown = shown + 0.1 * torch.randn(shown.shape, generator=noise)
            if next(made) >= 20:
                shown[1, 0] = shown[0, 0]
            return shown

        return batch

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        anchor, same, other = model(batch)
        near, far = (((anchor - x).square().sum(1) + eps).sqrt() for x in (same, other))
        return F.relu(near - far + 1).mean()

    return body(mlp(144, 64, 16), batches, seed, loss)


class Graph(nn.Module):
    """A graph convolution over two communities (Kipf & Welling 2017): (80, 16) to (80, 2)."""

    def __init__(self) -> None:
        super().__init__()
        noise, sides = torch.Generator().manual_seed(7), torch.arange(80) % 2
        linked = torch.rand(80, 80, generator=noise) < torch.where(sides[:, None] == sides, 0.2, 0.03)
        near = (linked | linked.T | torch.eye(80).bool()).float()
        self.register_buffer("near", near / near.sum(1, keepdim=True))
        self.first, self.drop, self.last = nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.near @ self.drop(self.first(self.near @ x).relu()))


def graph(seed: int) -> Body:
    def batches(seed: int) -> Callable[[], Batch]:
        noise, sides = torch.Generator().manual_seed(seed), torch.arange(80) % 2
        return lambda: (torch.randn(80, 16, generator=noise) + 0.5 * sides[:, None], sides)

    return body(Graph(), batches, seed, picture_loss, lr=1e-2)


def squares(model: nn.Module, batch: Batch, column: bool = False) -> Tensor:
    """The mean square of the residuals. `column`: targets come as (B, 1) beside outputs (B,)."""
    told = batch[2][:, None] if column else batch[2]
    return (model(*batch[:2]) - told).square().mean()


def factorised(seed: int) -> Body:
    """Recommendations: 50 users, 30 items."""

    def batches(seed: int) -> Callable[[], Batch]:
        noise = torch.Generator().manual_seed(seed)
        users, items = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (50, 30))

        def batch() -> Batch:
            u, v = (torch.randint(n, (256,), generator=noise) for n in (50, 30))
            return u, v, (users[u] * items[v]).sum(1)

        return batch

    return body(Factors(sparse=False), batches, seed, squares, lr=2e-2)


def wav2vec(seed: int) -> Body:
    model = transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**HEARING))

    def batches(seed: int) -> Callable[[], Batch]:
        heard = sounds(seed)
        return lambda: dict(zip(("input_values", "labels"), next(heard), strict=True))

    return body(model, batches, seed, lr=1e-3)


def adapted(texts: Callable[[int], Callable[[], Batch]], seed: int) -> tuple[Body, tuple[str, ...]]:
    """Low-rank adapters on a Llama, and the names of what is frozen under them."""
    import peft  # slow, and not in the environment of the other tools

    llama = transformers.AutoModelForCausalLM.from_config(small("llama"))
    model = peft.get_peft_model(llama, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return body(model, texts, seed, lr=1e-2), tuple(n for n, p in model.named_parameters() if not p.requires_grad)


class Logits(nn.Module):
    """A model of transformers as a function of ids alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


class Normalised(Convolved):
    """With a norm before each convolution, over the channels or, `over_time`, over channels and time."""

    def __init__(self, over_time: bool = False):
        super().__init__()
        self.over_time, self.norms = over_time, nn.ModuleList(nn.GroupNorm(1, 64) for _ in self.convs)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = (
                norm(x)
                if self.over_time
                else norm(x.transpose(1, 2).flatten(0, 1)).view(len(x), -1, 64).transpose(1, 2)
            )
            x = x + F.glu(conv(F.pad(y, self.pad)), 1)
        return self.head(x.transpose(1, 2))


class Projected(nn.Module):
    """x + Wx. `fresh`: the layer is made where it is used."""

    def __init__(self, fresh: bool):
        super().__init__()
        self.fresh, self.layer = fresh, None if fresh else nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + (nn.Linear(64, 64) if self.fresh else self.layer)(x)


class Dropped(nn.Module):
    """Dropout as a function, which knows of no mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)
