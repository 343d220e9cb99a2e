"""Replayed steps against the optimizers' real ones."""

from __future__ import annotations

import copy

import pytest
import torch
from stand_ins import MyAdamW, MyOpt
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy import said, toy, train

from moe_lab.health import Watch
from moe_lab.health.during.bank import Tracked
from moe_lab.health.during.intended import replay
from moe_lab.optim import Muon

ELEMENTWISE = {
    "adamw, foreach": (AdamW, {"lr": 1e-3, "foreach": True}),
    "adamw, fused": (AdamW, {"lr": 1e-3, "fused": True}),
    "adamw, one by one": (AdamW, {"lr": 1e-3, "foreach": False, "amsgrad": True}),
    "adam, coupled decay": (Adam, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (SGD, {"lr": 0.1}),
    "sgd, nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "sgd, maximize": (SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "rmsprop": (RMSprop, {"lr": 1e-3, "momentum": 0.9, "centered": True}),
    "nadam": (NAdam, {"lr": 1e-3}),
    "radam": (RAdam, {"lr": 1e-3}),
    "adagrad": (Adagrad, {"lr": 1e-2}),
    "adamax": (Adamax, {"lr": 1e-3}),
    "adadelta": (Adadelta, {"lr": 1.0}),
}
MATRICES = {
    "moe_lab": (Muon, {"lr": 0.02, "weight_decay": 0.1}, [(24, 16), (3, 8, 12)]),
    "moe_lab, match": (Muon, {"lr": 1e-3, "adjust_lr": "match_rms_adamw", "nesterov": False}, [(8, 24), (2, 6, 6)]),
    "torch": (torch.optim.Muon, {"lr": 0.02, "weight_decay": 0.1}, [(24, 16), (16, 24)]),
}


def parameters(shapes: list[tuple], dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def tracked(params: list[nn.Parameter], optimizer: Optimizer) -> list[Tracked]:
    watch = Watch(nn.ParameterList(params), optimizer)
    watch.close()
    return watch.state.tracked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", {**ELEMENTWISE, **MATRICES})
def test_a_replay_is_a_float32_twins_step(name: str, dtype: torch.dtype) -> None:
    whole = name in MATRICES
    kind, options, shapes = MATRICES[name] if whole else (*ELEMENTWISE[name], [(7,), (40, 30), (3, 4, 5)])
    params = parameters(shapes, dtype)
    optimizer = kind(params, **options)
    tensors = tracked(params, optimizer)
    for step in range(4):
        give_gradients(params, step)
        copies = [p.detach().float().requires_grad_() for p in params]
        twin = kind(copies, **options)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, twin_of_p in zip(params, copies, strict=True):
            twin_of_p.grad = p.grad.float()
        before, state = copy.deepcopy((copies, optimizer.state_dict()["state"]))
        found = [replay([t], whole=True).flatten() for t in tensors] if whole else [replay(tensors)]
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)  # a look does not touch
        twin.step()
        moved = [(c - b).detach() for c, b in zip(copies, before, strict=True)]
        real = [m.flatten() if whole else t.sample(m) for t, m in zip(tensors, moved, strict=True)]
        assert torch.equal(torch.cat(found), torch.cat(real))
        optimizer.step()


def test_a_scheduler_a_hook_for_all_optimizers_and_a_subclass_do_not_disturb() -> None:
    class Mine(AdamW):
        pass

    params = parameters([(30, 20)], torch.bfloat16)
    optimizer = Mine(params, lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # replaces optimizer.step
    seen = []
    handle = register_optimizer_step_pre_hook(lambda *args: seen.append(args))
    give_gradients(params, 0)
    moved = replay(tracked(params, optimizer), whole=True)
    handle.remove()
    assert seen == []
    assert moved.abs().max() == pytest.approx(1e-3, rel=0.05)
    assert not optimizer.state  # the real one has not stepped


class HidesMasters(SGD):
    """As apex's FusedAdam in NVIDIA/apex#1728: float32 masters in an attribute, paired with the groups by their order."""

    def __init__(self, params, lr: float):
        super().__init__(params, lr=lr)
        self.masters = [p.detach().float() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p, master in zip(self.param_groups[0]["params"], self.masters, strict=False):
            master.sub_(p.grad.float(), alpha=self.param_groups[0]["lr"])
            p.copy_(master)


class Stochastic(MyOpt):
    """Rounds up or down by chance, with torch's default generator, and says so nowhere."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p) * p.grad.abs().mean(), alpha=-self.param_groups[0]["lr"])


class Counted(SGD):
    """Keeps an object of its own, which a copy would share."""

    def __init__(self, params, lr: float):
        super().__init__(params, lr=lr)
        self.history = [nn.Identity()]

    def step(self, closure=None):
        self.history.append(None)
        return super().step(closure)


def trained(kind: type, is_watched: bool) -> tuple[list[Tensor], Optimizer, Watch | None]:
    torch.manual_seed(0)
    model = toy(dtype=torch.bfloat16)
    optimizer = kind(model.parameters(), lr=0.01)
    watch = Watch(model, optimizer) if is_watched else None
    train(watch, model, [optimizer], 25)
    if watch:
        watch.close()
    return [p.detach() for p in model.parameters()], optimizer, watch


@pytest.mark.parametrize(("kind", "reason"), [(HidesMasters, None), (Counted, "Identity"), (Stochastic, None)])
def test_a_replay_leaves_no_trace(kind: type, reason: str | None) -> None:
    alone, first, _ = trained(kind, is_watched=False)
    beside, second, watch = trained(kind, is_watched=True)
    assert all(torch.equal(p, q) for p, q in zip(alone, beside, strict=True))
    for key in ("masters", "history"):
        assert len(getattr(first, key, ())) == len(getattr(second, key, ()))
    told = [(f.severity, reason in f.message) for f in watch.findings if f.rule == "not_measured"]
    assert told == ([("info", True)] if reason else [])


def test_where_several_processes_train_a_foreign_step_is_not_replayed(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for kind, is_foreign in ((MyOpt, True), (AdamW, False), (MyAdamW, True)):
        _, _, watch = trained(kind, is_watched=True)
        assert ("not_measured" in said(watch, "info")) == is_foreign
        assert any(r.intended_square for r in watch.readings) != is_foreign


def test_a_step_that_comes_to_depend_on_its_tensor_is_noticed_later() -> None:
    """From update 8 on all of a tensor's elements move by the mean of their steps."""

    class Turns(MyOpt):
        @torch.no_grad()
        def step(self, closure=None) -> None:
            before = [p.clone() for p in self.param_groups[0]["params"]]
            super().step()
            for p, old in zip(self.param_groups[0]["params"], before, strict=True):
                if self.param_groups[0]["t"] > 7:
                    p.copy_((old.float() + (p.float() - old.float()).mean()).to(p.dtype))

    _, _, watch = trained(Turns, is_watched=True)
    known = {r.name for r in watch.readings if r.intended_square}
    assert watch.state.window_start == 10 and watch.state.replays.whole
    assert {"up.weight", "head.weight"} <= known and watch.findings == []
