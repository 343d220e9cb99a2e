"""Replayed steps against the optimizers' real ones."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

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
