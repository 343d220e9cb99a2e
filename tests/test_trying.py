"""Keys that nothing reads and loops that count the wrong thing, each beside what looks like it and is well."""

import pytest
import torch
from helpers import MECHANISMS, model_with, random_ids, tiny
from test_examine import Tiny, batch, loss_of
from torch import nn

from moe_lab import build_model, optim
from moe_lab.config import OptimizerConfig
from moe_lab.failures import bugs
from moe_lab.failures.bugs import planted
from moe_lab.health import dry_run, examine, unread_keys

CONFIG = {
    "model": {"width": 4, "bias": True},
    "training": {
        "lr": 0.1,
        "clip": 100.0,
        "momentum": 0.9,
        "warmup_steps": 5,
        "log_interval": 10,
        "depths": [{"gain": 2.0}],
    },
}


def run(config: dict, reads: bool = True, clip: bool = True) -> tuple:
    torch.manual_seed(0)
    model, training = nn.Linear(3, config["model"]["width"], bias=config["model"]["bias"]), config["training"]
    momentum = training["momentum"] if reads else 0.9
    optimizer = torch.optim.SGD(model.parameters(), training["lr"], momentum=momentum)
    for _ in range(2):
        optimizer.zero_grad()
        (training["depths"][0]["gain"] * model(torch.ones(2, 3))).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), training["clip"])
        optimizer.step()
    return model.state_dict(), [min(1, step / training["warmup_steps"]) for step in range(20)]


def test_keys_that_nothing_reads() -> None:
    """The clip never binds at its value; the interval shows in no two updates; a width that is refused was read."""
    before = str(CONFIG)
    assert unread_keys(CONFIG, run) == []
    (finding,) = unread_keys(CONFIG, lambda config: run(config, reads=False))
    assert (finding.rule, finding.where) == ("unread_key", "training.momentum")
    (finding,) = unread_keys(CONFIG, lambda config: run(config, clip=False))
    assert finding.where == "training.clip" and str(CONFIG) == before

    def refuses(config: dict) -> tuple:
        if config["training"]["momentum"] != 0.9:
            raise ValueError("momentum is 0.9 here")
        return run(config)

    assert unread_keys(CONFIG, refuses) == []


@pytest.mark.parametrize("bug", [None, "B07"])
def test_a_loop_that_never_logs(bug: str | None) -> None:
    with planted(*([bug] if bug else [])):
        found = dry_run(lambda on: bugs.loop(754, 4, 10, on))
    assert [f.message for f in found] == (
        ["of 754 backward passes, 188 updates: no log and no evaluation and no save ever comes"] if bug else []
    )
    (finding,) = dry_run(lambda on: bugs.loop(754, 4, 10, on), steps=754)
    assert finding.message == "754 steps are planned and the loop makes 754 backward passes, 188 updates"


@pytest.mark.parametrize("shares", [[1.0, 0.1, 0.2], [0.1, 0.2, 0.3], [1.0, 0.9, 0.8], [1.0, 0.1, 0.1]])
def test_what_torch_is_heard_of_by_itself(shares: list[float], tmp_path) -> None:
    def loop(on) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for share in shares:
            optimizer.param_groups[0]["lr"] = 0.1 * share
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            model.eval().train()
            torch.save(model.state_dict(), tmp_path / "model.pt")

    found = dry_run(loop, steps=3, expected=("evaluation", "save"))
    assert [f.rule for f in found] == (["schedule"] if shares == [1.0, 0.1, 0.2] else [])
    assert not list(tmp_path.iterdir())
    torch.save(1, tmp_path / "it")
    assert (tmp_path / "it").exists() and nn.Linear(1, 1).eval().training is False


@pytest.mark.parametrize("jumps", [False, True])
def test_an_update_may_be_that_of_two_optimizers(jumps: bool) -> None:
    def loop(on) -> None:
        model = nn.Linear(1, 1)
        two = [torch.optim.SGD([model.weight], 0.1), torch.optim.SGD([model.bias], 0.01)]
        for step in range(5):
            model(torch.ones(1, 1)).sum().backward()
            for optimizer in two:
                optimizer.param_groups[0]["lr"] = (10.0 if jumps and not step else step + 1) * optimizer.defaults["lr"]
                optimizer.step()
            on("log")

    found = dry_run(loop, steps=5, expected=("log",))
    assert [f.limit for f in found] == ([pytest.approx(0.2)] if jumps else [])


def places(model: nn.Module, given, loss_fn, optimizers) -> list[str]:
    return [f.where for f in examine(model, given, loss_fn, optimizers).findings if f.rule == "not_linear"]


def losses_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return sum(model.losses(ids).values())


@pytest.mark.parametrize("bug", [None, "B19"])
def test_decay_rates_that_are_orthogonalised(bug: str | None) -> None:
    with planted(*([bug] if bug else [])):
        model = build_model(tiny(**MECHANISMS["mamba"]), 0)
        optimizers = optim.build_optimizers(model, OptimizerConfig(type="muon"), 0.01)
        found = places(model, random_ids(2, 33), losses_of, optimizers)
    assert found == (["layers.0.seq_layer.A_log"] if bug else [])


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.AdamW])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_orthogonalised(tied: bool, kind) -> None:
    """A tied one is a matrix, too; a head is one."""
    model = Tiny()
    if tied:
        model.head.weight = model.embedding.weight
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [kind(matrices, lr=1e-3), torch.optim.AdamW(others)]
    is_wrong = kind is torch.optim.Muon and not tied
    assert places(model, batch(), loss_of, optimizers) == (["embedding.weight"] if is_wrong else [])


def test_experts_and_routers_are_matrices() -> None:
    model = model_with("all")
    optimizers = optim.build_optimizers(model, OptimizerConfig(type="muon"), 0.01)
    assert places(model, random_ids(2, 33), losses_of, optimizers) == []
