"""Clipping that finds no gradient, beside clipping that does; and torch's own function, which stays what it is."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from toy import said

from moe_lab.health import Watch
from moe_lab.health.during import clips

OWN = torch.nn.utils.clip_grad.clip_grad_norm_  # which nobody replaces there


@pytest.fixture(autouse=True)
def nobody_listens() -> None:
    """No watch that another test has left open."""
    clips.LISTENING.clear()
    clips.attend()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def step(order: str, model: nn.Module, optimizer: torch.optim.Optimizer, parameters) -> torch.Tensor:
    """One update, in which B is the backward pass, C clipping, Z zero_grad, O those to zeros, and S the step."""
    x = torch.randn(32, 6)
    loss = (model(x) - x[:, :1]).square().mean()
    acts = {
        "B": loss.backward,
        "C": lambda: nn.utils.clip_grad_norm_(parameters(), 0.1),
        "Z": optimizer.zero_grad,
        "O": lambda: optimizer.zero_grad(set_to_none=False),
        "S": optimizer.step,
    }
    for letter in order:
        acts[letter]()
    return loss.detach()


def told(order: str, n: int = 25) -> list[str]:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(n):
            watch.observe(loss=step(order, model, optimizer, model.parameters))
    return said(watch)


@pytest.mark.parametrize("order", ["ZCBS", "OCBS", "ZBSZC"])
def test_clipping_where_no_gradient_is(order: str) -> None:
    assert told(order) == ["empty_clip"]


@pytest.mark.parametrize("order", ["ZBCS", "OBCS", "ZCBCS", "ZBS"])
def test_clipping_what_there_is(order: str) -> None:
    """Once in vain, and once not, may be a habit; and nobody need clip."""
    assert "empty_clip" not in told(order)


def test_gradients_that_are_zero_throughout_are_another_matter() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(25):
            optimizer.zero_grad()
            loss = 0.0 * model(torch.randn(8, 6)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watch.observe(loss=loss)
    assert "empty_clip" not in said(watch) and "no_gradient" in said(watch)


@pytest.mark.filterwarnings("ignore:.*empty generator")  # torch says it, too, once
def test_a_generator_that_is_used_up_holds_nothing() -> None:
    model = net()
    optimizer, once = SGD(model.parameters(), lr=0.01), model.parameters()
    list(once)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(25):
            watch.observe(loss=step("ZBCS", model, optimizer, lambda: once))
    assert said(watch) == ["empty_clip"]


def test_clipping_of_another_model_is_none_of_ours() -> None:
    model, other = net(), net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(25):
            watch.observe(loss=step("ZBCS", model, optimizer, other.parameters))
    assert said(watch) == []


def test_what_is_heard_changes_nothing() -> None:
    """The same weights, to the bit, of a list, a generator and one tensor."""
    ends = []
    for is_watched in (False, True):
        model = net()
        optimizer = Adam(model.parameters(), lr=0.01)
        watch = Watch(model, optimizer, quiet=True) if is_watched else None
        ways = [model.parameters, lambda model=model: list(model.parameters()), lambda model=model: model[0].weight]
        for i in range(9):
            step("ZBCS", model, optimizer, ways[i % 3])
        if watch:
            watch.close()
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_torchs_own_function_is_back_afterwards() -> None:
    a, b = net(), net()
    first = Watch(a, SGD(a.parameters(), lr=0.1), quiet=True)
    assert nn.utils.clip_grad_norm_ is not OWN
    second = Watch(b, SGD(b.parameters(), lr=0.1), quiet=True)
    first.close()
    assert nn.utils.clip_grad_norm_.__wrapped__ is OWN
    second.close()
    assert nn.utils.clip_grad_norm_ is OWN


def test_after_some_calls_nobody_listens() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, quiet=True):
        for _ in range(clips.HEARD):
            assert nn.utils.clip_grad_norm_ is not OWN
            step("ZBCS", model, optimizer, model.parameters)
        assert nn.utils.clip_grad_norm_ is OWN


def test_what_somebody_else_has_put_there_stays() -> None:
    model = net()
    watch = Watch(model, SGD(model.parameters(), lr=0.1), quiet=True)
    theirs = lambda *args, **kwargs: None  # noqa: E731
    nn.utils.clip_grad_norm_ = theirs
    try:
        watch.close()
        assert nn.utils.clip_grad_norm_ is theirs
    finally:
        nn.utils.clip_grad_norm_ = OWN


def test_what_wraps_it_and_stays_calls_itself_once() -> None:
    model, calls = net(), []
    with Watch(model, SGD(model.parameters(), lr=0.1), quiet=True):
        mine = nn.utils.clip_grad_norm_
        nn.utils.clip_grad_norm_ = lambda *args: calls.append(1) or mine(*args)
    try:
        optimizer = SGD(model.parameters(), lr=0.1)
        with Watch(model, optimizer, quiet=True):
            step("ZBCS", model, optimizer, model.parameters)
        assert calls == [1]
    finally:
        nn.utils.clip_grad_norm_ = OWN
