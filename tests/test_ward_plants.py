"""What is planted in the ward's runs (benchmarks/ward.py): a fault is what its name says, and a sound model has none."""

from contextlib import ExitStack

import pytest
import torch
from checks import ward, ward_readers

from benchmarks import ward as maker
from benchmarks.ward_measures import heard, in_each_mode, plain_copy, skipped_tokens
from moe_lab import build_model
from moe_lab.failures import bugs


@pytest.fixture
def planted():
    """Makes a fresh model with a fault, its weights a way off their start; an edit of the source stays for the whole test."""
    with ExitStack() as code:

        def make(*fault: str):
            plant = maker.PLANTS[fault]
            code.enter_context(bugs.planted(*plant.bugs))
            torch.manual_seed(0)
            model = build_model(maker.BASE.model)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05 * torch.randn_like(p))
            if plant.model:
                plant.model(model)
            return plain_copy(model)

        yield make


IDS = torch.randint(512, (4, 65), generator=torch.Generator().manual_seed(1))


def leaks(model) -> tuple[bool, bool]:
    """In evaluation; in training, with every choice held."""
    with torch.no_grad():
        found = [heard(model, IDS[:, :64], 512, training=mode, hold=mode) for mode in (False, True)]
    return found[0] > 1e-4, found[1] > 1e-4


@pytest.mark.parametrize("kind", ["convolution", "attention", "unsorted"])
def test_a_leak_leaks_where_it_is_said_to(planted, kind: str) -> None:
    assert leaks(planted("sees the future", kind)) == (kind != "unsorted", True)


def test_a_sound_model_does_not_leak_although_its_choice_looks_ahead(planted) -> None:
    model = planted("healthy", "as configured")
    assert leaks(model) == (False, False)
    with torch.no_grad():
        assert heard(model, IDS[:, :64], 512, training=True, hold=False) > 1e-4
        losses, one_sided = in_each_mode(model, IDS)
        changed: list[int] = []
        with skipped_tokens(changed):
            model.train()(IDS[:, :64])
    assert one_sided == [] and set(losses) == {"training", "evaluation"}
    assert changed == [0] * 6


@pytest.mark.parametrize(("kind", "name"), [("depth off", "router"), ("mixer off", "in_proj")])
def test_what_runs_in_one_mode_only_is_named(planted, kind: str, name: str) -> None:
    with torch.no_grad():
        _, one_sided = in_each_mode(planted("training and evaluation differ", kind), IDS)
    assert any(name in module for module in one_sided)


def test_a_bias_of_the_wrong_sign_collapses_the_experts(planted) -> None:
    model = planted("experts collapsed", "wrong sign").train()
    with torch.no_grad():
        for _ in range(200):
            routing = model(IDS[:, :64]).routing
    assert all((layer.load() * 8 < 0.1).sum() >= 4 for layer in routing)


def test_an_unused_score_leaves_the_depth_routers_without_gradient(planted) -> None:
    model = planted("cut off from the gradient", "depth router").train()
    sum(model.losses(IDS).values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name, _ in model.named_parameters() if "_depth.router" in name}


def test_a_run_is_made_and_measured(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    short = maker.BASE.with_(training={"steps": 25, "eval_interval": 25, "save_interval": 25})
    monkeypatch.setattr(maker, "BASE", short)
    plan = ward.Plan((("random tokens", "uniform"), ("updates rounded away", "by the config")), 3)
    maker.run_to(tmp_path / "run_1.json", plan)
    patient = ward.Patient("run 1", tmp_path / "run_1.json")
    assert ward.shows(patient.results["tokens"], "random tokens")
    assert ward.shows(patient.results["preflight"], "updates rounded away")
    assert abs(patient.results["tokens"].readings["collisions"] - 1) < 0.1
    assert not ward.shows(patient.results["tokens"], "padding in the loss")
    told = patient.results["watch"].lines
    assert any(line.startswith("tensor ") for line in told) and len({*told}) == len(told)  # its table, no finding twice
    opened = ward.Ward({"run 1": plan}, {"run 1": patient})
    assert ward_readers.by_checklist(opened, "run 1") == plan.causes
