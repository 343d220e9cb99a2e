"""A watch beside a training: it changes nothing, keeps up with what the loop does, and never ends it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from toy import VOCAB, Toy, loss_of, said, toy, train

from moe_lab.health import Watch
from moe_lab.health.during import state, tracking
from moe_lab.optim import Muon


def matrices(model: Toy) -> list[nn.Parameter]:
    return [model.up.weight, model.down.weight]


def rest(model: Toy) -> list[nn.Parameter]:
    return [p for p in model.parameters() if all(p is not m for m in matrices(model))]


OPTIMIZERS = {
    "adamw": lambda model: [AdamW(model.parameters(), lr=1e-3)],
    "fused": lambda model: [AdamW(model.parameters(), lr=1e-3, fused=True)],
    "sgd": lambda model: [SGD(model.parameters(), lr=0.1, momentum=0.9)],
    "muon": lambda model: [Muon(matrices(model)), AdamW(rest(model))],
    "torch muon": lambda model: [torch.optim.Muon(matrices(model), lr=0.02), AdamW(rest(model))],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_watching_changes_no_bit(name, dtype) -> None:
    ends = []
    for watching in (False, True):
        model = toy(dtype=dtype, dropout=0.2)
        optimizers = OPTIMIZERS[name](model)
        watch = Watch(model, optimizers, budget=1000) if watching else None
        torch.manual_seed(1)
        train(watch, model, optimizers, 32)
        ends.append([torch.get_rng_state(), *model.parameters(), *optimizers[0].state[matrices(model)[0]].values()])
        assert watch is None or (watch.step == 32 and watch.check() is not None)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_closed_watch_reports_as_an_open_one(capsys) -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, quiet=True) as watch:
        train(watch, model, [optimizer], 20)
        watch.report()
    while_open = capsys.readouterr().out
    watch.report()
    assert capsys.readouterr().out == while_open and "not checked" in while_open


def test_a_forward_pass_that_tests_a_tensor_leaves_no_trace() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(3)
    ).train()
    model(torch.randn(2, 1, 8, 8))
    model[0].spare = nn.Parameter(torch.ones(2))
    watch = Watch(model, AdamW(model.parameters()))
    model(torch.randn(2, 1, 8, 8))
    loss = model(torch.randn(2, 1, 8, 8)).sum()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert watch.state.forward.matters(model[0].weight) is True
    assert watch.state.forward.matters(model[4].bias) is True
    assert watch.state.forward.matters(model[0].spare) is False  # dropout draws the same numbers
    assert watch.state.forward.matters(torch.zeros(1)) is None
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    loss.backward()  # the graph saved the weights, and finds them unmodified


def test_nothing_is_read_from_the_device_between_checks(monkeypatch) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    watch = Watch(model, optimizer)
    train(watch, model, [optimizer], 1)

    def forbidden(self, *args):
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    for _ in range(8):
        watch.before_step(optimizer, (optimizer,), {})
        watch.after_step(optimizer, (optimizer,), {})
        watch.observe(loss=torch.tensor(1.0))
    monkeypatch.undo()
    assert watch.findings == [] or "not_measured" not in said(watch)
    watch.check()
    assert watch.state.groups[0].lrs == pytest.approx([0.1] * 9)
    assert watch.readings[0].with_gradient == 2  # updates 1 and 6


def test_a_closed_watch_gives_its_memory_back_without_garbage_collection() -> None:
    model = toy(dtype=torch.bfloat16)
    model.spare = nn.Parameter(torch.ones(3))  # a missing gradient, which a repeated forward pass is asked about
    optimizers = [Muon(matrices(model)), AdamW(rest(model), lr=0.01)]
    with Watch(model, optimizers, budget=100) as watch:
        train(watch, model, optimizers, 32)
    assert (model.spare,) in watch.state.forward.answers
    kept = [weakref.ref(thing) for thing in (watch, watch.state, watch.state.forward, watch.state.banks[0].intended)]
    gc.disable()
    try:
        del watch
        assert [reference() for reference in kept] == [None] * 4
    finally:
        gc.enable()


def test_a_resumed_optimizers_learning_rates_are_its_own() -> None:
    """load_state_dict puts other dicts in the place of the groups."""
    model = toy()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    watch = Watch(model, optimizer)
    train(watch, model, [optimizer], 12)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 5e-3
    train(watch, model, [optimizer], 10)
    watch.check()
    assert watch.state.groups[0].lrs == [1e-3] * 12 + [5e-3] * 10
    assert watch.state.tracked[0].group["lr"] == 5e-3


def test_steps_that_a_loss_scaler_skips_are_not_counted() -> None:
    for options in ({}, {"fused": True}):
        model = toy()
        optimizer = AdamW(model.parameters(), lr=1e-3, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        with Watch(model, optimizer) as watch:
            for step in range(30):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, step) * (float("inf") if step in (5, 20) else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
        if not options:
            assert watch.step == 28
        assert said(watch) == []
        assert 0 < max(r.grad_norm for r in watch.readings) < 10  # not 2^16 times that


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, SGD])
def test_closures(kind) -> None:
    model = toy()
    optimizer = kind(model.parameters(), lr=0.05)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, watch.step)
        loss.backward()
        return loss

    with Watch(model, optimizer) as watch:
        for _ in range(20):
            watch.observe(loss=optimizer.step(closure))
    assert watch.step == 20 and said(watch) == []
    assert {r.gradient for r in watch.readings} == {"yes"}


def test_a_step_within_a_step_counts_once_even_after_an_error() -> None:
    class Mine(AdamW):
        broken = False

        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().step(closure)

    AdamW(toy().parameters())  # torch wraps a class's step when the class is first used
    model = toy()
    optimizer = Mine(model.parameters(), lr=1e-3)
    watch = Watch(model, optimizer)
    train(watch, model, [optimizer], 4)
    assert watch.step == 4
    optimizer.broken = True
    with pytest.raises(RuntimeError, match="memory"):
        train(watch, model, [optimizer], 1)
    optimizer.broken = False
    train(watch, model, [optimizer], 10)
    assert watch.step == 15  # the attempt was one
    assert watch.state.last_read >= 10


def test_an_optimizer_that_has_stopped_is_not_waited_for() -> None:
    model = toy()
    first, second = AdamW(rest(model), lr=1e-3), AdamW(matrices(model), lr=1e-3)
    watch = Watch(model, [first, second])
    train(watch, model, [first, second], 3)
    train(watch, model, [first], 30)
    assert watch.state.last_read > 20


def test_weights_loaded_before_the_first_update_are_where_it_counts_from() -> None:
    model = toy(dtype=torch.float32)
    optimizer = AdamW(model.parameters(), lr=0.0)
    watch = Watch(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # as load_state_dict does on resuming
    train(watch, model, [optimizer], 12)
    assert all(r.unchanged == r.n_touched and r.moved_square == 0 for r in watch.readings)
    assert sum(r.n_touched for r in watch.readings)


def test_a_long_training_is_watched_in_bounded_memory(monkeypatch) -> None:
    """What is kept one by one is bounded; sums, peak and findings are those of the whole training."""
    found = {}
    for history in (20, 10**6):
        for module in (state, tracking):
            monkeypatch.setattr(module, "HISTORY", history)
        model = toy()
        optimizer = AdamW(model.parameters(), lr=3e-4)
        with Watch(model, optimizer, budget=300) as watch:
            train(watch, model, [optimizer], 40)
            optimizer.param_groups[0]["lr"] = 1e-4
            train(watch, model, [optimizer], 60, start=40)
            watch.check()
        (group,) = watch.state.groups
        assert (group.n, group.last, group.peak) == (100, 1e-4, 3e-4)
        assert group.total == pytest.approx(40 * 3e-4 + 60 * 1e-4)
        assert len(group.lrs) == min(history, 100)
        assert len(watch.state.losses) <= 3 * history and (len(watch.state.losses) == 100) == (history > 100)
        found[history] = [f.to_dict() for f in watch.findings]
    assert found[20] == found[10**6] and [f["rule"] for f in found[20]].count("reach") == 1


@pytest.mark.parametrize("start_step", [0, 130])
def test_rules_are_asked_often_at_first_and_a_resumed_run_keeps_step(start_step: int) -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    watch = Watch(model, optimizer, start_step=start_step)
    read = set()
    for step in range(start_step, 190):
        train(watch, model, [optimizer], 1, start=step)
        read |= {watch.state.last_read} - {start_step}
    assert sorted(read) == [n for n in (*range(10, 101, 10), *range(120, 181, 20)) if n > start_step]


def test_a_layer_that_is_unfrozen_is_read_at_the_next_check_even_between_two_readings() -> None:
    """Gradual unfreezing: the check takes the layer in, under its group, and every rule sees a reading of it."""
    model = toy()
    model.up.requires_grad_(False)
    model.head.requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p is not model.head.weight], lr=1e-3)
    watch = Watch(model, optimizer, expect_frozen=["up.", "head."])
    train(watch, model, [optimizer], 40)
    assert "head.weight" not in {r.name for r in watch.readings}
    assert {r.name: r.gradient for r in watch.readings}["up.weight"] == "-"
    model.up.requires_grad_(True)
    model.head.requires_grad_(True)
    optimizer.add_param_group({"params": [model.head.weight], "lr": 2e-3})
    watch.check()
    assert {r.name for r in watch.readings} == {name for name, _ in model.named_parameters()}
    train(watch, model, [optimizer], 30)
    watch.check()
    readings = {r.name: r for r in watch.readings}
    assert readings["head.weight"].gradient == readings["up.weight"].gradient == "yes"
    assert readings["head.weight"].owner.name == "adamw[1]" and watch.state.groups[1].lrs[0] == 2e-3
    assert len(readings) == len(watch.state.tracked) and said(watch) == []


def test_the_variance_of_the_logits_is_taken_from_some_rows() -> None:
    """All logits of a long batch in float32 may be gigabytes: B · T · V · 4."""
    model = toy().bfloat16()
    watch = Watch(model, AdamW(model.parameters()))
    logits = model(torch.randint(VOCAB, (40, 100), generator=torch.Generator().manual_seed(0))).flatten(0, 1)
    variance = watch.state.forward.logit_variance
    assert torch.equal(variance, logits[::15][:256].float().var(dim=-1).mean())
    assert variance.item() == pytest.approx(logits.float().var(dim=-1).mean().item(), rel=0.1)
