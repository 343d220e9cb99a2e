"""The order of zero_grad, backward, clip and step: each mistake beside loops that only look like it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import adamw, said, toy

from moe_lab.health import Watch

EVENTS = {"no_updates", "stale_gradients", "cleared_gradients"}


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(model.embedding.num_embeddings, (2, 8))
    return F.cross_entropy(model(ids).float().flatten(0, -2), ids.flatten())


def found(loop, n: int = 20) -> set[str]:
    """The rules about events that speak while `loop(model, optimizer, i)` is called n times."""
    torch.manual_seed(0)
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        for i in range(n):
            watch.observe(loss=loop(model, optimizer, i))
    return EVENTS & set(said(watch))


def sound(model, optimizer, i, set_to_none: bool = True):
    optimizer.zero_grad(set_to_none=set_to_none)
    loss = loss_of(model)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def accumulated(model, optimizer, i):
    loss = loss_of(model)
    (loss / 4).backward()
    if i % 4 == 3:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def as_a_discriminator(model, optimizer, i):
    """The generator's backward pass fills its gradients as well; they go before its own."""
    loss_of(model).backward()
    return sound(model, optimizer, i)


def zeros(model, optimizer, i):
    return sound(model, optimizer, i, set_to_none=False)


def closure(model, optimizer, i):
    def again():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return optimizer.step(again)


@pytest.mark.parametrize("loop", [sound, zeros, accumulated, as_a_discriminator, closure])
def test_sound_orders_are_silent(loop) -> None:
    assert found(loop, n=64) == set()


class ReturnsNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("kind", ["sparse", "none"])
def test_gradients_that_tell_nothing_disturb_nothing(kind: str) -> None:
    table = nn.Embedding(8, 2, sparse=kind == "sparse")
    gain = nn.Parameter(torch.ones(2))
    model = nn.ParameterList([*table.parameters(), *([gain] if kind == "none" else [])])
    optimizer = (torch.optim.SparseAdam if kind == "sparse" else torch.optim.AdamW)(model.parameters(), lr=0.1)
    with Watch(model, optimizer) as watch:
        for _ in range(30):
            optimizer.zero_grad()
            rows = table(torch.arange(4))
            (ReturnsNone.apply(rows, gain) if kind == "none" else rows).square().sum().backward()
            optimizer.step()
    assert not (EVENTS | {"not_measured"}) & set(said(watch))


def never_cleared(model, optimizer, i):
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_go_before_the_step(set_to_none: bool) -> None:
    def loop(model, optimizer, i):
        loss = loss_of(model)
        loss.backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        return loss

    assert found(loop) == {"cleared_gradients"}


def test_gradients_that_pile_up() -> None:
    assert found(never_cleared) == {"stale_gradients"}


def test_the_missing_gradient_is_not_blamed_on_the_model() -> None:
    torch.manual_seed(0)
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        for _ in range(40):
            loss_of(model).backward()
            optimizer.zero_grad()
            optimizer.step()
    assert "no_gradient" not in said(watch)


def test_losses_without_an_update() -> None:
    def skipped(model, optimizer, i):
        return loss_of(model)

    assert found(skipped, n=49) == set()
    assert found(skipped, n=50) == {"no_updates"}


def test_losses_that_come_in_bunches_after_their_updates() -> None:
    torch.manual_seed(0)
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


def test_nothing_stays_behind() -> None:
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer):
        for i in range(30):
            sound(model, optimizer, i)
            if i == 25:  # it listens for 20 updates
                assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
