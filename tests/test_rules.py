"""Rules about updates: a training in which each must speak, and ones in which it must not; and when a rule speaks again."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from toy import adamw, finding, said, spoken, toy, train, watched

from moe_lab.health import Watch
from moe_lab.health.during.rule import Rule
from moe_lab.health.during.rules_updates import direction_bias

# ---- updates ---------------------------------------------------------------------------------------------------------


def test_an_unknown_optimizer_that_moves_nothing_gets_a_warning() -> None:
    class Signs(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad.sign(), alpha=-group["lr"])

    def run(dtype, lr, is_open=False):
        model = toy(dtype=dtype)
        optimizer = Signs(model.parameters(), {"lr": lr})
        optimizer.helper = None if is_open else nn.Identity()  # an object of its own: its step is not replayed
        return watched(model, [optimizer], 60)

    assert said(run(torch.bfloat16, 1e-4), "warning") == ["bf16_parameters"]
    assert said(run(torch.bfloat16, 1e-4, is_open=True), "error") == ["lost_updates"]
    assert said(run(torch.float32, 2e-4)) == []  # as far as AdamW at 1e-3
    assert said(run(torch.bfloat16, 0.02)) == []


HOPELESS = "no step that Adam can make"


def never_moving(
    lr: float, kept: bool = True, rising: bool = False, dtype=torch.bfloat16, push: float = 0.0
) -> list[tuple[str, int]]:
    """Where, and at which update, a toy's 16-bit tensors are called beyond reach; `kept`: by a scheduler, the peak is known."""
    model = toy(dtype=dtype)
    optimizers = adamw(model, lr=lr, weight_decay=0.0)
    group = optimizers[0].param_groups[0]
    if kept:
        group["initial_lr"] = lr

    def warm_up(step: int) -> None:
        group["lr"] = lr * (step + 1) / 30 if rising else lr
        model.norm.weight.data.add_(push)

    watch = watched(model, optimizers, 30, before_step=warm_up)
    return [(f.where, f.step) for f in watch.findings if HOPELESS in f.message]


def test_16_bit_weights_that_no_step_can_move_are_named_at_the_first_look() -> None:
    assert never_moving(2e-4) == [("norm.weight", 10)]
    assert never_moving(2e-4, rising=True) == [("norm.weight", 10)]
    assert never_moving(2e-4, kept=False) == [("norm.weight", 20)]  # constant so far: once it is known for the peak
    assert never_moving(2e-4, dtype=torch.float32) == []


def test_16_bit_weights_that_a_later_rate_may_move_are_left_to_the_window() -> None:
    assert never_moving(0.01) == []
    assert never_moving(7e-4, kept=False, rising=True) == []  # a warm-up by hand that passes through small rates
    assert never_moving(2e-4, push=0.05) == []  # something else moves them
    assert never_moving(5e-4) == []  # most steps are lost, and the largest that Adam can make would not be


def test_a_tensor_that_is_put_back_is_frozen() -> None:
    model = toy()
    kept = model.up.weight.detach().clone()

    def put_back(step):
        model.up.weight.data.copy_(kept)

    optimizers = adamw(model)
    handle = optimizers[0].register_step_post_hook(lambda *args: put_back(0))
    watch = watched(model, optimizers, 60)
    handle.remove()
    assert finding(watch, "frozen_tensor").where == "up.weight"
    assert {r.name: r.gradient for r in watch.readings}["up.weight"] == "lost"


class Relative(torch.optim.Optimizer):
    """A layer's step is a share of its norm, as LAMB's and LARS's; `guard`: where that is 0, it is the rate itself."""

    def __init__(self, parameters, guard: bool):
        super().__init__(parameters, {"lr": 0.05})
        self.guard = guard

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                size = p.norm()
                size = torch.ones_like(size) if self.guard and not size else size
                p.sub_(group["lr"] * size * p.grad / p.grad.norm().clamp(min=1e-12))


@pytest.mark.parametrize("guard", [True, False])
def test_steps_that_are_a_share_of_a_weight_of_zero_never_begin(guard: bool) -> None:
    model = toy()
    nn.init.zeros_(model.up.weight)
    watch = watched(model, [Relative(model.parameters(), guard)], 60)
    assert ("frozen_tensor" in said(watch)) != guard
    if not guard:
        assert "up.weight" in finding(watch, "frozen_tensor").message


def test_a_learning_rate_of_zero_freezes_nothing() -> None:
    model = toy()
    assert "frozen_tensor" not in said(watched(model, adamw(model, lr=0.0), 40))


def test_rows_whose_tokens_never_occur_are_not_frozen() -> None:
    model = toy()
    watch = watched(model, adamw(model), 60, n_ids=4)
    assert said(watch) == []
    reading = {r.name: r for r in watch.readings}["embedding.weight"]
    assert reading.n_elements > reading.n_touched > 0 and reading.unchanged == 0


def one_way(lr: float) -> list:
    """Norm weights at 1, half of them meant to go up, up, down, the other half the opposite."""
    model = nn.RMSNorm(400).bfloat16()
    optimizer = SGD(model.parameters(), lr=lr)
    watch = Watch(model, optimizer)
    half = torch.ones(400).bfloat16()
    half[::2] = -1
    for sign in (1, 1, -1):
        model.weight.grad = sign * half
        optimizer.step()
    watch.check()
    return spoken(direction_bias, watch.state)


def test_updates_that_survive_downwards_only() -> None:
    (found,) = one_way(0.003)  # between 2^-9 and 2^-8
    assert "down" in found.message and found.value > 0.3
    assert one_way(0.02) == []


# ---- who has spoken before -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        (["error ab", "error a", "error acb", "error ", "error c"], ["a and 1 more", "c"]),
        (["warning a", "error ab", "warning abc", "info abc"], ["a", "a and 1 more", "c"]),
    ],
)
def test_a_rule_names_each_kind_once_and_a_later_one_when_it_falls_ill(checks, told) -> None:
    """At a severity, and not at a lower one afterwards. A check: of which severity the rule is, and what is ill."""
    model = toy()
    watch = Watch(model, adamw(model, weight_decay=0.0))
    for severity, ill in (check.split(" ") for check in checks):
        watch.apply([Rule("frozen_tensor", severity, lambda state, ill=ill: dict.fromkeys(ill, {}), "ill", "cure it")])
    assert [f.where for f in watch.findings] == told


def test_a_second_group_whose_updates_are_lost_later_is_named() -> None:
    model = toy(dtype=torch.bfloat16)
    norms = [model.norm.weight, model.up.bias, model.down.bias]
    others = [p for p in model.parameters() if all(p is not n for n in norms)]
    optimizer = AdamW([{"params": others, "lr": 0.02}, {"params": norms, "lr": 3e-4}], weight_decay=0.0)

    def slower(step: int) -> None:
        if step == 40:  # from here on these lose theirs too
            optimizer.param_groups[0]["lr"] = 1e-5

    watch = Watch(model, optimizer)
    train(watch, model, [optimizer], 60, before_step=slower)
    watch.state.restart_window()
    train(watch, model, [optimizer], 120, start=60)
    lost = [f for f in watch.findings if f.rule == "lost_updates" and f.severity == "error"]
    assert lost[0].where.startswith("norm.weight") and lost[0].step <= 60
    assert any(f.step > 60 and "norm" not in f.where for f in lost[1:])
    named = [f.where.split(" and ")[0] for f in lost]
    assert len(set(named)) == len(named)  # and none twice


def test_a_loss_that_rose_and_then_is_nan_is_told_twice() -> None:
    model = toy()
    (optimizer,) = adamw(model)
    watch = Watch(model, optimizer)
    losses = [4.2] * 20 + [9.0] * 20 + [float("nan")] * 20
    train(None, model, [optimizer], 60, before_step=lambda step: watch.observe(loss=losses[step]))
    told = [(f.rule, f.where, f.step) for f in watch.findings if f.severity == "error"]
    assert told == [("lr_too_high", "loss", 30), ("nonfinite_loss", "loss", 50)]
