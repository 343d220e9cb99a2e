"""A watch is made of wrappers that nobody knows, too: what they hold is watched."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW
from toy import loss_of, said, toy, train

from moe_lab.health import Watch


class Accelerated(torch.optim.Optimizer):
    """As accelerate wraps one: an Optimizer whose constructor was never called."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.state, self.param_groups = optimizer.state, optimizer.param_groups
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


def lightning(optimizer) -> SimpleNamespace:
    """As Lightning wraps one: no Optimizer at all."""
    return SimpleNamespace(optimizer=optimizer, zero_grad=optimizer.zero_grad, step=optimizer.step)


class Unknown:
    """As nobody has seen one: it holds what it wraps under a name of its own, perhaps beside others."""

    def __init__(self, *inner):
        self._engine, self.settings = list(inner), {"clip": 1.0}

    def step(self):
        for inner in self._engine:
            inner.step()

    def zero_grad(self):
        for inner in self._engine:
            inner.zero_grad()


def test_a_wrapper_that_nobody_knows_gives_one_info_and_is_watched() -> None:
    model = toy()
    first, *rest = model.parameters()
    wrapped = Unknown(AdamW([first], lr=0.01), Unknown(SGD(rest, lr=0.01)))
    holder = type("Engine", (), {})()
    holder.inner = model
    with Watch(holder, wrapped, quiet=True) as watch:
        assert [(f.severity, f.where) for f in watch.findings if f.rule == "not_measured"] == [
            ("info", "Unknown"),
            ("info", "Engine"),
        ]
        loss_of(model, seed=0).backward()
        wrapped.step()
    assert watch.step == 1 and not [f for f in watch.findings if f.severity != "info"]


def test_what_holds_no_module_is_refused_in_one_line() -> None:
    model = toy()
    with pytest.raises(
        ValueError, match="^model=dict is no torch.nn.Module, and holds 0 of them; pass the module itself$"
    ):
        Watch({}, AdamW(model.parameters()))


@pytest.mark.parametrize("wrap", [Accelerated, lightning, lambda optimizer: lightning(Accelerated(optimizer))])
def test_wrappers_that_hold_the_optimizer_are_watched(wrap) -> None:
    for in_a_list in (True, False):
        model = toy()
        wrapped = wrap(AdamW(model.parameters(), lr=0.01))
        watch = Watch(model, [wrapped] if in_a_list else wrapped)
        train(watch, model, [wrapped], 12)
        assert (watch.step, watch.state.last_read, said(watch)) == (12, 10, [])
