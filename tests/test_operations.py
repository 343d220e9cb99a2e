"""Terms of a loss that nothing learns by, and rows that others overwrite: each beside what looks like it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.health import examine
from moe_lab.health.before.operations import untaught_terms
from moe_lab.health.before.trial import Trial


def given() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :3] @ torch.tensor([[1.0, 0, 2], [0, 2, 1], [1, 1, 0]])).argmax(1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))


def found(term: Callable[[Tensor, Tensor], Tensor | float]) -> list[str]:
    """What is said where `term(logits, labels)` is added to the cross-entropy."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + term(logits, batch[1])

    return [f.message for f in examine(net(), given(), loss_fn).findings if f.where == "loss"]


def wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) != labels).float().mean()


@pytest.mark.parametrize(
    "term",
    [
        wrong,
        lambda o, y: 0.1 * o.square().mean().item(),
        lambda o, y: o.softmax(1).detach().max(),
        lambda o, y: -wrong(o, y),
    ],
)
def test_a_term_that_follows_the_model_and_teaches_nothing(term: Callable) -> None:
    (message,) = found(term)
    assert "follows the model's weights and has no gradient" in message


@pytest.mark.parametrize(
    "term",
    [
        lambda o, y: 0.0,
        lambda o, y: 0.37,
        lambda o, y: torch.tensor(0.37),
        lambda o, y: (y == 0).float().mean(),  # of the data alone, as a teacher's entropy is
        lambda o, y: 0.1 * o.square().mean(),
        lambda o, y: sum([o.square().mean(), o.abs().mean()]),
    ],
)
def test_terms_that_teach_or_are_none_of_the_model_s(term: Callable) -> None:
    assert found(term) == []


def test_the_weights_are_what_they_were() -> None:
    seen: list[list[Tensor]] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append([p.detach().clone() for p in model.parameters()])
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + wrong(logits, batch[1])

    examine(net(), given(), loss_fn)
    others = [weights for weights in seen if not all(map(torch.equal, weights, seen[0]))]
    assert len(others) == 1 and all(torch.equal(a, -b) for a, b in zip(others[0], seen[0], strict=True))


class Scattered(nn.Module):
    """Each row is worked on by two experts, and put back by its place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.experts, self.head = how, nn.ModuleList([nn.Linear(8, 8) for _ in range(2)]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        whole, places = torch.zeros_like(x), torch.arange(len(x))
        twice, both = torch.cat([places, places]), torch.cat([expert(x) for expert in self.experts])
        if self.how == "assigned":
            whole[twice] += both
        elif self.how == "added":
            whole = whole.index_add(0, twice, both)
        elif self.how == "one by one":
            for expert in self.experts:
                whole[places] += expert(x)
        elif self.how == "one number":
            whole[twice, :] = self.experts[0].bias.sum()
            whole = whole + both[: len(x)]
        elif self.how == "by a mask":
            whole[x[:, 0] > 0] += self.experts[0](x[x[:, 0] > 0])
        return self.head(whole)


@pytest.mark.parametrize("how", ["assigned", "added", "one by one", "one number", "by a mask"])
def test_rows_that_are_put_where_others_are_put(how: str) -> None:
    torch.manual_seed(0)
    loss_fn = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    told = [f for f in examine(Scattered(how), given(), loss_fn).findings if f.where == "places"]
    assert [(f.rule, f.severity, f.value) for f in told] == [("no_effect", "warning", 64)] * (how == "assigned")


def test_where_no_pass_is_left_it_says_so() -> None:
    model, loss_fn = net(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + 0.1
    trial, before = Trial(model, given(), loss_fn, []), [p.clone() for p in model.parameters()]
    list(trial.hear(lambda *args: None))
    trial.spend(trial.left)
    with pytest.raises(ValueError, match="to save forward passes"):
        list(untaught_terms(trial))
    assert all(map(torch.equal, trial.model.parameters(), before))
