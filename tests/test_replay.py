"""Replayed steps against the optimizers' real ones."""

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moe_lab.health.during import intended
from moe_lab.health.sampling import sample_positions
from moe_lab.optim import Muon

ELEMENTWISE = {
    "adamw, foreach": (torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
    "adamw, fused": (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    "adamw, one by one": (torch.optim.AdamW, {"lr": 1e-3, "foreach": False, "amsgrad": True}),
    "adam, coupled decay": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd, nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "sgd, maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "centered": True}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-3}),
    "radam": (torch.optim.RAdam, {"lr": 1e-3}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-3}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
}
MATRICES = {
    "moe_lab": (Muon, {"lr": 0.02, "weight_decay": 0.1}, [(24, 16), (3, 8, 12)]),
    "moe_lab, match": (Muon, {"lr": 1e-3, "adjust_lr": "match_rms_adamw", "nesterov": False}, [(8, 24), (2, 6, 6)]),
    "torch": (torch.optim.Muon, {"lr": 0.02, "weight_decay": 0.1}, [(24, 16), (16, 24)]),
}


def parameters(shapes: list[tuple], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def give_gradients(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def twin_of(optimizer, params: list[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """The same optimizer in float32, with weights, gradients and state as they are."""
    copies = [p.detach().float().requires_grad_() for p in params]
    known = optimizer.defaults.keys() - {"decoupled_weight_decay"}
    twin = type(optimizer)(copies, **{k: v for k, v in optimizer.param_groups[0].items() if k in known})
    for p, copy in zip(params, copies, strict=True):
        copy.grad = p.grad.float()
        for key, value in optimizer.state.get(p, {}).items():
            value = value.clone() if isinstance(value, Tensor) else value
            twin.state[copy][key] = value.float() if isinstance(value, Tensor) else value
    return twin, copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_replayed_elements_are_a_float32_twins_step(name, dtype) -> None:
    kind, options = ELEMENTWISE[name]
    params = parameters([(7,), (40, 30), (3, 4, 5)], dtype)
    indices = [sample_positions(p.shape) for p in params]
    optimizer = kind(params, **options)
    for step in range(4):
        give_gradients(params, step)
        state = {id(p): {k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for p in params}
        found = intended.replay_elements(optimizer, optimizer.param_groups[0], params, indices)
        for p in params:  # a look does not touch
            assert all(torch.equal(v, optimizer.state[p][k]) for k, v in state[id(p)].items())
        twin, copies = twin_of(optimizer, params)
        before = [copy.detach().clone() for copy in copies]
        twin.step()
        real = torch.cat([(c.detach() - b).flatten()[i] for c, b, i in zip(copies, before, indices, strict=True)])
        assert torch.equal(found, real)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MATRICES)
def test_replayed_matrices_are_a_float32_twins_step(name, dtype) -> None:
    kind, options, shapes = MATRICES[name]
    params = parameters(shapes, dtype)
    optimizer = kind(params, **options)
    for step in range(3):
        give_gradients(params, step)
        found = [intended.replay_whole(optimizer, optimizer.param_groups[0], p) for p in params]
        twin, copies = twin_of(optimizer, params)
        before = [copy.detach().clone() for copy in copies]
        twin.step()
        for f, c, b in zip(found, copies, before, strict=True):
            assert torch.equal(f, c.detach() - b)
        optimizer.step()


def test_a_scheduler_a_hook_for_all_optimizers_and_a_subclass_do_not_disturb() -> None:
    class Mine(torch.optim.AdamW):
        pass

    params = parameters([(30, 20)], torch.bfloat16)
    optimizer = Mine(params, lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # replaces optimizer.step
    seen = []
    handle = register_optimizer_step_pre_hook(lambda *args: seen.append(args))
    give_gradients(params, 0)
    moved = intended.replay_whole(optimizer, optimizer.param_groups[0], params[0])
    handle.remove()
    assert seen == []
    assert moved.abs().max() == pytest.approx(1e-3, rel=0.05)
    assert not optimizer.state  # the real one has not stepped
