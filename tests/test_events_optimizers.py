"""Whose steps are watched: several optimizers, one inside of another, new ones all the time, and none at all."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_events import (
    EVENTS,
    found,
    gone,
    halves,
    loss_of,
    seeded,  # noqa: F401, a fixture of each test
    sound,
    watched,
)
from torch import nn
from toy import adamw, said, toy

from moe_lab.health import Watch


@pytest.mark.parametrize("both", [True, False])
def test_the_parts_of_a_gan_clear_what_the_other_one_left(both: bool) -> None:
    """The generator's pass fills the discriminator's gradients, and is not for them."""
    generator, discriminator = pair = nn.ModuleList([toy(seed=1), toy(seed=2)])
    (a,), (b,) = adamw(generator), adamw(discriminator)

    def step(i: int) -> None:
        a.zero_grad()
        (loss_of(generator) + loss_of(discriminator)).backward()
        if not both:
            a.step()
        b.zero_grad()
        loss_of(discriminator).backward()
        if both:
            a.step()
        b.step()

    assert not EVENTS & watched(pair if both else discriminator, [a, b] if both else [b], step, 30)


def test_optimizers_that_take_turns_clear_each_other_s_gradients() -> None:
    model = toy()
    optimizers = halves(model)

    def step(i: int) -> None:
        model.zero_grad()
        loss_of(model).backward()
        optimizers[i % 2].step()

    assert not EVENTS & watched(model, optimizers, step)


def test_one_of_two_optimizers_never_steps() -> None:
    model = toy()
    optimizers = halves(model)

    def step(i: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model).backward()
        optimizers[0].step()

    assert "no_updates" in watched(model, optimizers, step)


def test_the_missing_gradient_is_not_blamed_on_the_model() -> None:
    model = toy()
    (optimizer,) = adamw(model)
    assert "no_gradient" not in watched(model, optimizer, partial(gone, model, optimizer), 40)


def test_losses_without_an_update() -> None:
    def skipped(model, optimizer, i):
        return loss_of(model)

    assert found(skipped, n=49) == set()
    assert found(skipped, n=50) == {"no_updates"}


def test_an_optimizer_that_steps_inside_of_the_watched_one() -> None:
    """As sharpness-aware ones do, in steps of other names."""
    model = toy()
    outer, inner = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    assert "no_updates" not in watched(model, outer, partial(sound, model, inner))


def test_an_inner_loop_whose_optimizer_is_new_for_each_task() -> None:
    """As in Reptile: the watched one steps as well."""
    model = toy()
    (outer,) = adamw(model)

    def step(i: int) -> torch.Tensor:
        sound(model, adamw(model)[0], i)
        return sound(model, outer, i)

    assert "no_updates" not in watched(model, outer, step)


def test_losses_that_come_in_bunches_after_their_updates() -> None:
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        losses = [sound(model, optimizer, i) for i in range(60)]
        for loss in losses:
            watch.observe(loss=loss)
    assert "no_updates" not in said(watch)


def test_a_report_after_no_update_is_no_all_clear(capsys) -> None:
    model = toy()
    watch = Watch(model, adamw(model))
    watch.findings.clear()
    watch.report()
    assert "no update was seen" in capsys.readouterr().out


@pytest.mark.parametrize("clears", [True, False])
def test_a_closure_that_is_called_again_at_other_weights(clears: bool) -> None:
    model = toy()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    ids = torch.randint(model.embedding.num_embeddings, (4, 8))

    def closure() -> torch.Tensor:
        if clears:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        return loss

    def step(i: int) -> torch.Tensor:
        optimizer.zero_grad()
        return optimizer.step(closure)

    assert EVENTS & watched(model, [optimizer], step, 20) == (set() if clears else {"stale_gradients"})


def test_a_closure_may_take_a_batch_in_parts() -> None:
    model = toy()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    parts = torch.randint(model.embedding.num_embeddings, (2, 4, 8))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = [F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()) / 2 for ids in parts]
        for loss in losses:
            loss.backward()
        return sum(losses)

    assert not EVENTS & watched(model, [optimizer], lambda i: optimizer.step(closure), 20)


@pytest.mark.parametrize("is_game", [True, False])
def test_a_loss_that_rises_as_its_opponent_learns(is_game: bool) -> None:
    model, judge = toy(), nn.Parameter(torch.zeros(()))
    (optimizer,) = adamw(model)
    rival = torch.optim.SGD([judge], lr=0.1)  # that nobody watches

    def step(i: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        (loss + judge).backward()
        optimizer.step()
        if is_game:
            rival.step()
        return loss.detach() + 0.2 * i

    assert ("lr_too_high" in watched(model, [optimizer], step, 60)) != is_game


ACTS = {"agent": True, "by its parts": True, "evaluated": False, "seldom": False, "on a copy": False}


@pytest.mark.parametrize("kind", ACTS)
def test_a_loss_whose_targets_the_model_makes_itself(kind: str) -> None:
    model, ids = toy(), torch.arange(8).view(2, 4)
    parts, other = nn.ModuleDict({"actor": model}), toy(seed=1)
    (optimizer,) = adamw(model)

    @torch.no_grad()
    def act(i: int) -> None:
        if kind != "seldom" or i % 3 == 0:
            model.train(kind != "evaluated")
            (other if kind == "on a copy" else model)(ids)
            model.train()

    def step(i: int) -> torch.Tensor:
        act(i)
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach() + 0.2 * i

    watched_one = parts if kind == "by its parts" else model
    assert ("lr_too_high" in watched(watched_one, [optimizer], step, 60)) != ACTS[kind]


@pytest.mark.parametrize("last, told", [(19.8, None), (22.0, "warning"), (40.0, "error")])
def test_a_loss_of_another_unit_rises_by_shares(last: float, told: str | None) -> None:
    model = nn.Linear(4, 1)
    (optimizer,) = adamw(model)

    def step(i: int) -> torch.Tensor:
        model.zero_grad()
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
        return torch.tensor(18.3 if i < 10 else last)

    with Watch(model, optimizer) as watch:
        for i in range(60):
            watch.observe(loss=step(i))
    assert [f.severity for f in watch.findings if f.rule == "lr_too_high" and f.where == "loss"] == [told] * bool(told)
