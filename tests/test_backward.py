"""Examine's backward passes beside the loss's own: of the answer alone, and of a multiple of the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.health import Finding, examine

D, CODES = 12, 16


def of(model: nn.Module, x: Tensor, loss_of=None) -> list[Finding]:
    """What examine says of signals."""
    found = examine(model, x, loss_of or (lambda model, x: model.loss(x))).findings
    return [f for f in found if f.rule in ("no_gradient", "starved_steps") and f.severity != "info"]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(32, D)


class Codes(nn.Module):
    """An encoder, the nearest of some codes, a decoder (van den Oord et al. 2017), without the straight-through gradient or with."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.codes = nn.Linear(D, 8), nn.Linear(8, D), nn.Embedding(CODES, 8)
        self.straight = straight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        q = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
        commitment = F.mse_loss(z, q.detach()) + F.mse_loss(q, z.detach())
        return self.decoder(z + (q - z).detach() if self.straight else q), commitment

    def loss(self, x: Tensor) -> Tensor:
        answer, commitment = self(x)
        return F.mse_loss(answer, x) + commitment


def test_codes_through_which_no_gradient_comes_back(x: Tensor) -> None:
    (found,) = of(Codes(straight=False), x)
    assert (found.rule, found.where) == ("no_gradient", "encoder.weight")
    assert of(Codes(straight=True), x) == []


def test_an_answer_that_depends_on_nothing_is_another_matter(x: Tensor) -> None:
    """Inputs that are left out need no gradient."""
    model = Codes(straight=False)
    model.encoder.weight.data.zero_()
    assert not any("comes back there" in f.message for f in of(model, x))


class Experts(nn.Module):
    """The best of some experts, weighed by its probability, or by that over its own sum; with a term that balances them."""

    def __init__(self, normalised: bool, k: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(D, 4, bias=False), nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.normalised, self.k = normalised, k

    def forward(self, x: Tensor) -> Tensor:
        self.scores = self.router(x).softmax(-1)
        weights, chosen = self.scores.topk(self.k)
        weights = weights / weights.sum(-1, keepdim=True) if self.normalised else weights
        all_of_them = torch.stack([expert(x) for expert in self.experts], 1)
        return x + (all_of_them.gather(1, chosen.unsqueeze(-1).expand(-1, -1, D)) * weights.unsqueeze(-1)).sum(1)

    def loss(self, x: Tensor) -> Tensor:
        answer = self(x)
        load = F.one_hot(self.scores.argmax(-1), 4).float().mean(0)
        return F.mse_loss(answer, x.roll(1, 1)) + (load * self.scores.mean(0)).sum()


@pytest.mark.parametrize(("normalised", "k", "told"), [(True, 1, True), (False, 1, False), (True, 2, False)])
def test_a_router_that_the_balance_alone_teaches(x: Tensor, normalised: bool, k: int, told: bool) -> None:
    assert [(f.rule, f.where) for f in of(Experts(normalised, k), x)] == [("no_gradient", "router.weight")] * told


class Ending(Experts):
    """Between two layers, in a branch that ends in zeros."""

    def __init__(self) -> None:
        super().__init__(normalised=False)
        self.first, self.last, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.experts = nn.ModuleList([nn.Linear(D, D)])
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.scores = self.router(x).softmax(-1)
        return self.last(x + self.out(self.experts[0](x) * self.scores.amax(-1, keepdim=True)))


def test_a_branch_that_ends_in_zeros_is_taught_later(x: Tensor) -> None:
    assert of(Ending(), x) == []


class Keys(nn.Module):
    """Attention, whose keys a bias moves alike; and a second head that the answer does not hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.second = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.attention(x.view(4, 8, D), x.view(4, 8, D), x.view(4, 8, D))[0]
        return self.hidden

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean() + (self.second(self.hidden) - 1).square().mean()


def test_other_heads_are_none_of_the_answers(x: Tensor) -> None:
    assert of(Keys(), x) == []


def test_a_loss_of_the_answer_alone_costs_no_second_pass_back(x: Tensor) -> None:
    model, calls = nn.Linear(D, D), []
    model.register_forward_hook(lambda m, a, y: y.requires_grad and y.register_hook(lambda _: calls.append(1)) and None)
    for loss, n in (
        (lambda model, x: F.mse_loss(model(x), x), 1),
        (lambda model, x: F.mse_loss(model(x), x) + model.weight.square().sum(), 2),
    ):
        calls.clear()
        examine(model, x, loss)
        assert len(calls) == n


class Given(torch.autograd.Function):
    """A loss whose gradient comes from elsewhere, times what comes in, or without."""

    @staticmethod
    def forward(ctx, answer: Tensor, gradient: Tensor, is_scaled: bool) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.is_scaled = is_scaled
        return answer.new_ones(())

    @staticmethod
    def backward(ctx, incoming: Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return gradient * incoming if ctx.is_scaled else gradient, None, None


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_backward_that_leaves_out_what_comes_in(x: Tensor, is_scaled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(D, D)

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        answer = model(x)
        return Given.apply(answer, (answer - x).detach() / len(x), is_scaled) + 0.01 * answer.square().mean()

    found = of(model, x, loss_of)
    assert [(f.rule, f.where) for f in found] == [("starved_steps", "weight")] * (not is_scaled)


def test_a_reentrant_checkpoint_leaves_nothing_out(x: Tensor) -> None:
    """It gives no gradient to torch.autograd.grad, and in backward() all of it. Of the answer alone, too."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))

    def answer(given: Tensor) -> Tensor:
        return checkpoint(nn.Sequential.forward, model, given, use_reentrant=True)

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(model(x), x) + 0.01 * sum(p.square().sum() for p in model.parameters())

    model.forward = lambda given: answer(given if given.requires_grad else given.clone().requires_grad_())
    examination = examine(model, x, loss_of)
    assert [f for f in examination.findings if f.rule in ("starved_steps", "no_gradient")] == []
    assert not {"multiples of the loss", "the answer's own gradient"} & examination.not_checked.keys()


def test_noise_of_ones_own_is_left_unsaid(x: Tensor) -> None:
    """Two passes that differ by themselves tell nothing."""
    import random

    model = nn.Linear(D, D)

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        answer = model(x) * random.random()
        return Given.apply(answer, answer.detach(), True) + answer.square().mean()

    examination = examine(model, x, loss_of)
    assert "two losses" in examination.not_checked["multiples of the loss"]
