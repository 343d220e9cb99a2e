"""Rules about learning rates and the loss: a training in which each must speak, and ones in which it must not."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from stand_ins import MyOpt
from torch import nn
from torch.optim import SGD, Adam, AdamW
from toy import VOCAB, adamw, finding, loss_of, said, spoken, toy, train, watched

from moe_lab.health import Finding, Watch
from moe_lab.health.during import rules_loss


def test_learning_rates_are_held_against_the_usual() -> None:
    def rules(lr, share=lambda step: 1.0, updates=30):
        model = toy()
        optimizers = adamw(model, lr=lr)

        def set_lr(step):
            optimizers[0].param_groups[0]["lr"] = lr * share(step)

        return said(watched(model, optimizers, updates, before_step=set_lr))

    assert "lr_too_low" in rules(1e-5)
    assert "lr_too_high" in rules(1.0)
    assert rules(0.003, lambda step: min(1, (step + 1) / 200)) == []  # a long warm-up
    assert rules(0.003, lambda step: 1 - step / 50, 50) == []  # a decay to the end


def test_fine_tuning_is_not_called_slow() -> None:
    model = toy()
    train(None, model, adamw(model), 150)
    watch = watched(model, adamw(model, lr=1e-5, betas=(0.9, 0.95)), 60, start=150, budget=1000)
    assert not watch.state.is_fresh
    assert said(watch) == []


def reaches(optimizers: Callable, dtype: torch.dtype = torch.float32, **options) -> list[Finding]:
    model = toy(dtype=dtype)
    return [f for f in watched(model, optimizers(model), 60, **options).findings if f.rule == "reach"]


def test_reach_is_stated_for_a_budget_and_only_where_the_bound_holds() -> None:
    lost = {"dtype": torch.bfloat16, "budget": 500}  # a finding about movement, which reach is there to explain
    for kind, expected in ((AdamW, True), (MyOpt, True), (torch.optim.RAdam, False), (torch.optim.NAdam, False)):
        assert bool(reaches(lambda model, kind=kind: [kind(model.parameters(), lr=1e-4)], **lost)) == expected
    assert reaches(lambda model: [SGD(model.parameters(), lr=1e-2)], **lost) == []
    assert reaches(lambda model: adamw(model, lr=1e-4), torch.bfloat16) == []


def test_reach_is_that_of_the_group_that_can_move_least() -> None:
    def groups(model) -> list:
        vectors = [p for p in model.parameters() if p.ndim < 2]
        matrices = [p for p in model.parameters() if p.ndim > 1]
        return [AdamW([{"params": matrices, "lr": 6e-3}, {"params": vectors, "lr": 1e-5}], betas=(0.9, 0.95))]

    (found,) = reaches(groups, torch.bfloat16, budget=1000)
    assert found.where == "adamw[1]" and found.value == pytest.approx(1e-5 * 1000, rel=0.2)


def test_a_healthy_run_with_a_budget_has_no_findings_at_all() -> None:
    model = toy()
    assert watched(model, adamw(model, weight_decay=0.0), 60, budget=500).findings == []


def test_decay_of_norms_is_mentioned() -> None:
    model = toy()
    assert "weight_decay_on_norms" in said(Watch(model, AdamW(model.parameters())), "info")
    assert "weight_decay_on_norms" not in said(Watch(model, AdamW(model.parameters(), weight_decay=0.0)), "info")


@pytest.mark.parametrize(("factor", "told"), [(1 / 4, "4 times too small"), (8.0, "8 times too large"), (1.0, None)])
def test_a_first_loss_that_was_divided_or_multiplied(factor, told) -> None:
    model = toy()
    watch = watched(model, adamw(model), 20, reported=lambda loss: loss * factor)
    assert ("initial_loss" in said(watch)) == (told is not None)
    assert told is None or told in finding(watch, "initial_loss").message


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_divergence_from_a_frozen_teacher_is_no_likelihood(is_frozen: bool) -> None:
    """It may come to half of ln V by chance. In a model that trains as a whole that is a division, done twice."""
    both = nn.ModuleDict({"teacher": toy(1).requires_grad_(not is_frozen), "student": toy()})
    (optimizer,) = adamw(both["student"])
    with Watch(both, optimizer, expect_frozen=("teacher.",)) as watch:
        for _ in range(20):
            ids = torch.randint(VOCAB, (8, 16))
            wanted, shown = both["teacher"](ids).detach().softmax(-1), both["student"](ids).log_softmax(-1)
            optimizer.zero_grad()
            (wanted * (wanted.log() - shown)).sum(-1).mean().backward()
            optimizer.step()
            watch.observe(loss=math.log(VOCAB) / 2)
    assert ("initial_loss" in said(watch)) != is_frozen


@pytest.mark.parametrize("inside", [False, True])
def test_a_layer_of_as_many_units_as_tokens_is_no_head(inside: bool) -> None:
    model = toy(width=VOCAB // 2)  # up has VOCAB units, too
    if inside:
        up, head = model.up, model.head
        del model.up, model.head
        model.head, model.mlp = head, nn.Sequential(nn.Sequential(up))
        model.up = model.mlp[0][0].forward
    probe = Watch(model, adamw(model)).state.forward
    assert probe.head is model.head is probe.heard.head


def test_two_networks_in_a_list_without_any_tokens() -> None:
    nets = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)) for _ in range(2))
    assert Watch(nets, AdamW(nets.parameters(), weight_decay=0.0)).state.forward.head is None


def test_accumulated_gradients_are_healthy() -> None:
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        for step in range(60):
            optimizer.zero_grad()
            parts = [loss_of(model, 4 * step + i) / 4 for i in range(4)]
            for part in parts:
                part.backward()
            optimizer.step()
            watch.observe(loss=sum(part.detach() for part in parts))
    assert said(watch) == []


def state_with(losses: list[float], lrs: list[float]):
    """What the loss rules would see; the model is fresh."""
    model = toy()
    watch = Watch(model, adamw(model, lr=1.0))
    for lr in lrs:
        watch.state.optimizers[0].param_groups[0]["lr"] = lr
        watch.state.groups[0].note_lr(lr)
        watch.state.counts.update([id(watch.state.optimizers[0])])
    watch.check()
    watch.state.losses = losses
    return watch.state


def noisy(start: float, end: float, n: int = 100) -> list[float]:
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0)).tolist()
    return [start + (end - start) * i / n + 0.05 * e for i, e in enumerate(noise)]


def test_the_loss_must_fall_once_the_learning_rate_has_acted() -> None:
    flat, v = noisy(math.log(VOCAB), math.log(VOCAB)), 0.01
    rules = [rule for rule in rules_loss.RULES if rule.id != "initial_loss"]

    def trend(losses, lrs):
        state = state_with(losses, lrs)
        return [(f.rule, f.severity) for rule in rules for f in spoken(rule, state)]

    assert trend(flat, [v] * 100) == [("loss_not_falling", "warning")]
    assert trend(noisy(4.1, 3.0), [v] * 100) == []
    assert trend(flat[:25], [v] * 25) == []  # too early
    assert trend(flat[:40], [v] * 40) == [("loss_not_falling", "warning")]  # it says nothing, and learns nothing
    assert trend(noisy(2.0, 2.0, 50), [v] * 50) == []  # a plateau may end
    assert trend(noisy(2.0, 2.0), [v] * 100) == [("loss_not_falling", "warning")]
    assert trend(noisy(0.2, 0.2), [v] * 100) == []  # of such noise nobody can tell: rewards
    assert trend(flat, [v * min(1, i / 200) / 10 for i in range(45)] + [v] * 10) == []  # a warm-up: little has acted
    assert trend(flat, [v] * 60 + [v / 10] * 40) == []  # the end of a decay
    assert trend(noisy(4.1, 6.0), [v] * 100) == [("lr_too_high", "error")]
    assert trend([4.1, math.nan], [v] * 2) == [("nonfinite_loss", "error")]


@pytest.mark.parametrize("playing", ["alone", "both watched", "one watched"])
def test_an_opponents_loss_need_not_fall(playing: str) -> None:
    """A generator and a discriminator, of one model with two optimizers, or one of them watched: the loss rests at 2 ln 2."""
    model = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Linear(4, 1)})
    made, judged = (SGD(model[key].parameters(), lr=1e-3) for key in "gd")
    watched = (model, [made, judged]) if playing == "both watched" else (model["d"], judged)
    reported = noisy(1.39, 1.39)
    with Watch(*watched) as watch:
        for loss in reported:
            fake = model["g"](torch.randn(8, 4))
            judged.zero_grad()
            F.softplus(model["d"](fake.detach())).mean().backward()
            judged.step()
            if playing != "alone":
                made.zero_grad()
                F.softplus(-model["d"](fake)).mean().backward()
                made.step()
            watch.observe(loss=loss)
    assert ("loss_not_falling" in said(watch)) == (playing == "alone")


def classes() -> nn.Module:
    """Sixteen numbers of which of four kinds?"""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))


def sized(optimizer_of, n: int = 40, model: nn.Module | None = None, noise: float = 1.0, **options) -> list[str]:
    model = model or classes()
    optimizer = optimizer_of(model.parameters())
    means = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    with Watch(model, optimizer, **options) as watch:
        for step in range(n):
            generator = torch.Generator().manual_seed(step)
            kinds = torch.randint(4, (32,), generator=generator)
            x = means[kinds] + noise * torch.randn(32, 16, generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), kinds)
            loss.backward()
            optimizer.step()
            watch.observe(loss=loss.detach())
    return said(watch)


def test_steps_too_small_to_get_anywhere() -> None:
    sized(partial(AdamW, lr=1e-2), 60, trained := classes())
    assert sized(partial(SGD, lr=1e-5))[0] == "lr_too_low"
    assert sized(partial(AdamW, lr=1e-6))[0] == "lr_too_low"
    assert sized(partial(SGD, lr=0.1)) == sized(partial(AdamW, lr=1e-3)) == []
    assert "lr_too_low" not in sized(partial(SGD, lr=1e-5), budget=10_000_000)  # time enough
    assert "lr_too_low" not in sized(partial(SGD, lr=1e-5), model=trained)  # it has learned what it learns
    assert "lr_too_low" not in sized(partial(SGD, lr=1e-5), 15)  # too early


def test_steps_so_large_that_the_loss_stops() -> None:
    assert sized(partial(AdamW, lr=3.0), 60)[0] == "lr_too_high"
    assert "lr_too_high" not in sized(partial(AdamW, lr=1e-3), 60, noise=50.0)  # noise: nothing to learn
    assert "lr_too_high" not in sized(partial(AdamW, lr=0.03), 60)


class OwnRate(SGD):
    """Makes its learning rate by itself, as Adafactor may: its group has none."""

    def __init__(self, params: Iterable[nn.Parameter], rate: float):
        super().__init__(params, lr=rate)
        self.rate, self.param_groups[0]["lr"] = rate, None

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= self.rate * p.grad / (p.grad.square().mean().sqrt() + 1e-12)


def test_steps_of_an_optimizer_that_makes_its_own_rate() -> None:
    assert sized(partial(OwnRate, rate=1e-6))[0] == "lr_too_low"
    assert sized(partial(OwnRate, rate=1e-3)) == []


def test_a_loss_that_comes_back_from_a_blow_up_has_not_fallen() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    assert sized(partial(Adam, lr=0.3), 60, model=copy.deepcopy(deep))[0] == "lr_too_high"
    assert sized(partial(Adam, lr=0.003), 60, model=deep) == []
