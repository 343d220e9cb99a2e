"""The branch probe: it finds a starved group on a problem with a known answer, and leaves everything as it was."""

import copy
import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from moe_lab.health import Watch
from moe_lab.health.during.branch import Branch, branch_findings, branch_probe, paired


def problem():
    """A linear map to be learned; two groups, of which `b` has a learning rate a hundred times too low."""
    torch.manual_seed(0)
    truth = torch.randn(8, 4)
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})

    def batch():
        x = torch.randn(64, 8)
        return x, x @ truth + 0.1 * torch.randn(64, 4)

    def loss_fn(model, batch):
        x, y = batch
        return ((model["a"](x[:, :4]) + model["b"](x[:, 4:]) - y) ** 2).mean()

    groups = [
        {"params": model["a"].parameters(), "name": "a", "lr": 0.05},
        {"params": model["b"].parameters(), "name": "b"},
    ]
    return model, SGD(groups, lr=0.0005, momentum=0.5), loss_fn, [batch() for _ in range(45)]


def test_it_names_the_starved_group_by_what_training_so_would_do() -> None:
    model, optimizer, loss_fn, batches = problem()
    probed = {b.name: b for b in branch_probe(model, optimizer, loss_fn, batches, max_grad_norm=None)}
    assert set(probed) == {"a × 3", "b × 3", "all × 3"}
    assert probed["b × 3"].is_proof and probed["b × 3"].gain > 3 * abs(probed["a × 3"].gain)
    (finding,) = branch_findings(list(probed.values()))
    assert (finding.rule, finding.severity) == ("lr_too_low", "error") and finding.where in ("b × 3", "all × 3")

    optimizer.param_groups[1]["lr"] *= 3
    for batch in batches[:30]:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        loss = torch.stack([loss_fn(model, batch) for batch in batches[30:]]).mean().item()
    assert probed["b × 3"].loss == pytest.approx(loss, rel=1e-6)


def test_a_loader_is_read_once_and_no_further_than_it_must() -> None:
    model, optimizer, loss_fn, batches = problem()
    endless = itertools.cycle(batches)
    probed = branch_probe(model, optimizer, loss_fn, endless, n_updates=20)
    assert probed == branch_probe(model, optimizer, loss_fn, batches[:40], n_updates=20)
    assert next(endless) is batches[40]


def test_a_good_rate_is_not_blamed() -> None:
    model, _, loss_fn, batches = problem()
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.5)
    assert branch_findings(branch_probe(model, optimizer, loss_fn, batches, max_grad_norm=None)) == []


def dropping(device: torch.device | str = "cpu") -> tuple[nn.Module, AdamW, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).to(device)
    return model, AdamW(model.parameters(), lr=1e-2), [torch.randn(16, 4, device=device) for _ in range(8)]


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def no_change(optimizers: list) -> None:
    pass


def fails(optimizers: list) -> None:
    raise RuntimeError("no such setting")


@pytest.mark.parametrize("change", [no_change, fails])
def test_everything_is_put_back(change) -> None:
    """In the middle of an accumulation, with a parameter that no optimizer has; also after an error."""
    model, _, batches = dropping()
    optimizer = AdamW(model[0].parameters(), lr=1e-2)
    squares(model, batches[0]).backward()
    optimizer.step()
    model[3].bias.grad = None
    watch = Watch(model, optimizer)

    def state() -> list:
        values = [model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]]
        return copy.deepcopy([*values, torch.get_rng_state()])

    before, gradients = state(), [p.grad for p in model.parameters()]
    with nullcontext() if change is no_change else pytest.raises(RuntimeError, match="no such setting"):
        branch_probe(model, optimizer, squares, batches, {"one": change}, n_updates=3)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert watch.step == 0
    optimizer.step()
    assert watch.step == 1  # and it is attached again


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_branches_drop_the_same_units(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, optimizer, batches = dropping(device)
    (branch,) = branch_probe(model, optimizer, squares, batches, {"same": no_change}, n_updates=3)
    assert branch.gain == 0.0 and branch.error == 0.0 and not branch.is_proof


class FakeGenerator:
    """A device's default generator: torch.cuda's functions take the device, torch.mps's nothing."""

    def __init__(self, takes_device: bool):
        self.drawn, self.takes_device = 100, takes_device

    def get_rng_state(self, *device: torch.device) -> torch.Tensor:
        assert len(device) == self.takes_device
        return torch.tensor(self.drawn)

    def set_rng_state(self, state: torch.Tensor, *device: torch.device) -> None:
        assert len(device) == self.takes_device
        self.drawn = int(state)


def test_branches_draw_the_same_numbers_on_every_device(monkeypatch) -> None:
    """Of a model on two CUDA devices or on an Apple GPU: the CPU's generator alone says nothing of theirs."""
    fakes = {"cuda": FakeGenerator(True), "mps": FakeGenerator(False)}
    monkeypatch.setattr(torch, "get_device_module", lambda device: fakes[device.type])

    def noisy(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        for fake in fakes.values():
            fake.drawn += 1
        return squares(model, batch + 0.01 * sum(fake.drawn for fake in fakes.values()))

    model, optimizer, batches = dropping()
    elsewhere = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:1", "mps", "meta")]
    monkeypatch.setattr(model, "buffers", lambda: elsewhere)
    (branch,) = branch_probe(model, optimizer, noisy, batches, {"same": no_change}, n_updates=3)
    assert branch.gain == 0.0
    assert [fake.drawn for fake in fakes.values()] == [100, 100]


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by class, which holds the real one and was never constructed as one."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer


def test_a_wrapped_optimizer_is_probed_and_its_watch_counts_nothing() -> None:
    model, optimizer, batches = dropping()
    watch = Watch(model, optimizer)
    (wrapped,) = branch_probe(model, Wrapper(optimizer), squares, batches, n_updates=3)
    (plain,) = branch_probe(model, optimizer, squares, batches, n_updates=3)
    assert wrapped == plain and wrapped.gain != 0.0 and plain.name == "group 0 × 3"
    assert watch.step == 0


def test_gradients_that_no_optimizer_clears_do_not_add_up() -> None:
    model, _, batches = dropping()
    seen = []

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(model[3].weight.grad)
        return squares(model, batch)

    branch_probe(model, AdamW(model[0].parameters(), lr=1e-2), loss_fn, batches, {}, n_updates=3)
    assert seen[:3] == [None, None, None]


def test_too_few_batches_is_one_line() -> None:
    with pytest.raises(ValueError, match="batches has 34; 30 updates and at least 5"):
        branch_probe(*problem()[:3], [None] * 34)


def test_the_error_is_of_the_paired_differences() -> None:
    assert paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]) == (0.5, 0.0)
    mean, error = paired([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 2.0, 4.0])
    assert mean == 0.5 and error == pytest.approx(torch.tensor([1.0, 0, 1, 0]).std().item() / 2, rel=1e-6)
    assert paired([1.0, 2.0], [1.0, math.inf]) == (-math.inf, math.inf)
    assert not Branch("x", 1.0, 0.04, 0.001).is_proof and not Branch("x", 1.0, 0.2, 0.1).is_proof
