"""Remedies for bf16 parameters: what each casts, keeps in float32, and moves."""

import copy

import pytest
import torch
from checks.remedies import KEPT, PARTLY, REMEDIES
from helpers import seeded
from test_rounding import EVERYTHING, MAX_LR, remedied
from torch import nn

from moe_lab import build_model
from moe_lab.config import OptimizerConfig
from moe_lab.optim import build_optimizers, groups_of

CONFIG = OptimizerConfig(type="muon")


def names_of_groups(model: nn.Module, optimizers: list) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups_of(optimizers)}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_casts_the_model_and_keeps_the_groups(name: str, kind: str) -> None:
    reference = build_model(EVERYTHING)
    config = OptimizerConfig(type=kind)
    expected = build_optimizers(reference, config, MAX_LR)
    model, optimizers = remedied(name, kind)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    groups, plain = names_of_groups(model, optimizers), names_of_groups(reference, expected)
    norms = groups.pop("norms", set())
    assert groups == {group: names - norms for group, names in plain.items()}
    lrs = {group["name"]: (group["lr"], group["initial_lr"], group["weight_decay"]) for group in groups_of(optimizers)}
    for group in groups_of(expected):
        assert lrs[group["name"]] == (group["lr"], group["lr"], group["weight_decay"])


@pytest.mark.parametrize("name", PARTLY)
def test_one_kind_stays_in_float32_with_its_bits_and_moves_as_it_would_there(name: str) -> None:
    exact, model = build_model(EVERYTHING), build_model(EVERYTHING)
    assert all(p.equal(q) for p, q in zip(exact.parameters(), model.parameters(), strict=True))
    for optimizers in (build_optimizers(exact, CONFIG, MAX_LR), PARTLY[name](model, CONFIG, MAX_LR)):
        for p in (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    kept = {key for key, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {key for key, _ in exact.named_parameters() if any(part in key for part in KEPT[name[:-11]])}
    assert {p.dtype for key, p in model.named_parameters() if key not in kept} == {torch.bfloat16}
    for key, p in exact.named_parameters():
        if key in kept:
            torch.testing.assert_close(model.get_parameter(key), p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["masters", "kahan", "stochastic"])
def test_what_no_optimizer_holds_is_cast_too(name: str) -> None:
    model = nn.ModuleDict({"batch_norm": nn.BatchNorm1d(3), "frozen": nn.Linear(3, 3).requires_grad_(False)})
    REMEDIES[name](model, CONFIG, MAX_LR)
    assert model["batch_norm"].running_mean.dtype == model["frozen"].weight.dtype == torch.bfloat16


def moved(name: str | None, lr: float) -> tuple[nn.Module, dict[str, bool]]:
    """A model after five updates of one direction, and which of its parameters moved at all."""
    model = seeded(build_model, EVERYTHING)
    config = OptimizerConfig(type="adamw", weight_decay=0.0)
    optimizers = REMEDIES[name](model, config, lr) if name else build_optimizers(model.bfloat16(), config, lr)
    start = copy.deepcopy(model.state_dict())
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
    return model, {key: not torch.equal(p, start[key]) for key, p in model.named_parameters()}


def test_the_poor_remedies_move_norms_and_nothing_else_that_stood_still() -> None:
    plain, moved_plain = moved(None, 1e-3)  # below 2^-9: from 1.0, a decrease is lost
    norms = {name for name, _ in plain.named_parameters() if name.endswith("norm.weight")}
    assert norms and not any(moved_plain[name] for name in norms)
    frozen = {name for name, has_moved in moved_plain.items() if not has_moved}
    assert frozen > norms  # Mamba's A_log and D are among what these remedies forget
    for name in ("norm_lr_x10", "norms_at_0.1"):
        model, moved_now = moved(name, 1e-3)
        assert {key for key, has_moved in moved_now.items() if not has_moved} == frozen - norms
        rest = zip(model.named_parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(p, q) for (key, p), q in rest if key not in norms)


def test_norms_learn_at_ten_times_the_lr_or_start_at_a_tenth() -> None:
    model, optimizers = remedied("norm_lr_x10")
    norms = {name for name, _ in model.named_parameters() if name.endswith("norm.weight")}
    assert names_of_groups(model, optimizers)["norms"] == norms
    groups = {group["name"]: group for group in groups_of(optimizers)}
    for key in ("lr", "initial_lr"):
        assert groups["norms"][key] == pytest.approx(10 * CONFIG.adamw_lr_ratio * MAX_LR)
    model, _ = remedied("norms_at_0.1")
    for (name, p), q in zip(model.named_parameters(), build_model(EVERYTHING).parameters(), strict=True):
        assert torch.equal(p, torch.full_like(p, 0.1) if name in norms else q.bfloat16()), name
