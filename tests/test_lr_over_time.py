"""Learning rates over time: groups that became one, an old LR that a resume brings back, LRs that are spent, and look-alikes."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LambdaLR, OneCycleLR
from toy import Toy, adamw, finding, said, toy, train, watched

from moe_lab.health import Watch

LRS = {"lr_overwritten", "lr_spent"}


def two_groups(model: Toy, first: float = 0.02, second: float = 0.004) -> AdamW:
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "lr": first}, {"params": vectors, "lr": second}]
    return AdamW(groups, weight_decay=0.0)


def set_lrs(optimizer, *lrs: float) -> None:
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr


def with_lrs(lrs: Callable[[int], tuple], first: float = 0.02, second: float = 0.004, n: int = 30, **options) -> Watch:
    model = toy()
    optimizer = two_groups(model, first, second)
    return watched(model, [optimizer], n, before_step=lambda step: set_lrs(optimizer, *lrs(step)), **options)


def test_groups_that_were_apart_and_are_one() -> None:
    watch = with_lrs(lambda step: (min(1, (step + 1) / 10) * 1e-3,) * 2)
    found = finding(watch, "lr_overwritten")
    assert (found.severity, found.step, found.where) == ("warning", 10, "adamw[0], adamw[1]")
    assert "0.02 and 0.004" in found.message
    assert not {"lr_too_low", "muon_convention"} & set(said(watch))  # a verdict is not hidden by a weaker one


@pytest.mark.parametrize(
    "lrs",
    [
        lambda step: (0.02 * min(1, (step + 1) / 20), 0.004 * min(1, (step + 1) / 20)),  # a warm-up of each group's own
        lambda step: (1e-4, 1e-4) if step >= 10 else (0.02, 0.004),  # both at the floor of a decay
        lambda step: (0.02, 0.0),  # one waits
    ],
)
def test_groups_that_keep_their_own(lrs) -> None:
    assert not LRS & set(said(with_lrs(lrs)))


def test_groups_that_were_never_apart() -> None:
    assert not LRS & set(said(with_lrs(lambda step: (0.004, 0.004), 0.01, 0.01)))


def both_at(step: int, n: int = 30) -> tuple:
    return (0.0002, 0.0002) if step >= n else (0.02, 0.0002)


def test_a_rate_that_takes_another_group_s_mid_run() -> None:
    found = finding(with_lrs(both_at, second=0.0002, n=60), "lr_overwritten")
    assert (found.step, found.where) == (40, "adamw[0], adamw[1]")
    decayed = with_lrs(lambda step: (max(0.0002, 0.02 * 0.85**step), 0.0002), second=0.0002, n=60)
    assert not LRS & set(said(decayed))  # it arrives by a decay of its own


def one_group(lrs: Callable[[int], float], n: int = 60, **options) -> Watch:
    return with_lrs(lambda step: (lrs(step), lrs(step)), 0.004, 0.004, n, **options)


def warm(step: int, n: int = 20) -> float:
    return 0.004 * min(1, (step + 1) / n)


@pytest.mark.parametrize(
    ("lrs", "told"),
    [
        (lambda step: 0.004 if step < 30 else 0.4, 40),  # a hundred times as much
        (lambda step: warm(step) if step < 35 else warm(0), 50),  # back at the warm-up's first, for good
        (lambda step: warm(step) if step < 35 else warm(step - 35), None),  # a warm restart
        (lambda step: 0.0004 if step < 30 else 0.004, None),  # a first phase at a tenth (He et al. 2016)
        (lambda step: 0.004 * 0.1 ** (step // 20), None),  # steps down
        (lambda step: 0.0004 if 30 <= step < 33 else 0.004, None),  # a few updates lower
        (lambda step: max(1e-5, 0.004 * (1 - step % 30 / 30)), None),  # restarts
    ],
)
def test_rates_that_jump(lrs, told) -> None:
    found = [f.step for f in one_group(lrs).findings if f.rule == "lr_overwritten"]
    assert found == ([] if told is None else [told])


@pytest.mark.parametrize(
    ("asked", "lrs", "told"),
    [
        (0.004, lambda step: warm(step, 10) / 100, True),  # a scheduler's own peak
        (0.004, lambda step: warm(step, 10), False),
        (0.004, lambda step: warm(step, 10) / 4, False),  # of another size, and not of another world
        (0.004, lambda step: warm(step, 100), False),  # it still rises
        (0.004, lambda step: 4e-5, False),  # no warm-up: somebody set it
        (1.0, lambda step: warm(step, 10), False),  # a base, and factors
    ],
)
def test_a_warm_up_that_ends_far_below_the_rate_that_was_asked_for(asked: float, lrs: Callable, told: bool) -> None:
    watch = with_lrs(lambda step: (lrs(step),) * 2, asked, asked, 39, budget=100)
    assert ("lr_overwritten" in said(watch)) == told and not (told and "lr_spent" in said(watch))
    assert not told or "ended at update 10" in finding(watch, "lr_overwritten").message


@pytest.mark.parametrize(("factor", "is_told"), [(5.0, True), (0.1, False)])
def test_a_state_that_is_loaded_mid_run_and_raises_the_rate(factor: float, is_told: bool) -> None:
    """Lowering it is what one does after a loss has spiked."""
    model = toy()
    (optimizer,) = adamw(model, lr=0.004)
    with Watch(model, optimizer) as watch:
        train(watch, model, [optimizer], 15)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["lr"] *= factor
        optimizer.load_state_dict(state)
        train(watch, model, [optimizer], 15, start=15)
    assert ("lr_overwritten" in said(watch)) == is_told


@pytest.mark.parametrize(
    ("n_warm", "n", "budget", "told"),
    [(20_000, 30, 100, True), (20_000, 60, None, True), (60, 30, 100, False), (2000, 60, None, False)],
)
def test_a_warm_up_beyond_the_budget(n_warm: int, n: int, budget: int | None, told: bool) -> None:
    assert ("lr_spent" in said(one_group(partial(warm, n=n_warm), n, budget=budget))) == told


BY_EPOCHS = {
    "built for updates": (lambda o: LambdaLR(o, lambda i: min(1.0, (i + 1) / 10)), 40, True),
    "its first epoch is most of the run": (lambda o: LambdaLR(o, lambda i: min(1.0, (i + 1) / 10)), 100, True),
    "of one cycle": (lambda o: OneCycleLR(o, 0.004, 100), 40, True),
    "of some epochs": (lambda o: LambdaLR(o, lambda i: min(1.0, (i + 1) / 4)), 10, False),
    "that begins very low": (lambda o: LambdaLR(o, lambda i: min(1.0, i / 4 + 1e-3)), 24, False),
    "one that never rises": (lambda o: LambdaLR(o, lambda i: 1.0), 100, False),
}


@pytest.mark.parametrize("kind", BY_EPOCHS)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_warm_up_that_is_stepped_by_epochs(kind: str, resumed: bool) -> None:
    """After a resume the LR may be low since its decay is at its end."""
    make, length, told = BY_EPOCHS[kind]
    optimizer = AdamW((model := toy()).parameters(), lr=0.004)
    scheduler = make(optimizer)
    train(None, model, [optimizer], 2 if resumed else 0)

    def each(step: int) -> None:
        if step and step % length == 0:
            scheduler.step()

    watch = watched(model, [optimizer], 60, before_step=each, budget=100)
    found = [f.message for f in watch.findings if f.rule == "lr_spent"]
    assert len(found) == (told and not resumed) and all("at this pace" in message for message in found)


def scheduled(make: Callable, lr: float = 0.004, n: int = 60, **options) -> Watch:
    """Under a scheduler that `make` builds, stepped after each update."""
    model = toy()
    optimizer = AdamW(model.parameters(), lr=lr)
    scheduler = make(optimizer)
    return watched(model, [optimizer], n, before_step=lambda step: step and scheduler.step(), **options)


@pytest.mark.parametrize(
    ("n_warm", "period", "told"),
    [(80, 8, True), (200, 2, True), (80, 100, False), (4, 8, False), (8, 8, False)],  # the last two arrive each time
)
def test_a_warm_up_that_begins_anew_again_and_again(n_warm: int, period: int, told: bool) -> None:
    watch = scheduled(lambda o: LambdaLR(o, lambda i: min(1.0, (i % period + 1) / n_warm)), budget=400)
    assert any("began anew" in f.message for f in watch.findings) == told


@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineAnnealingWarmRestarts(o, 8),
        lambda o: CyclicLR(o, 0.0005, 0.004, 4, cycle_momentum=False),
        lambda o: OneCycleLR(o, 0.004, 60),
    ],
)
def test_schedules_that_come_back_on_purpose(make) -> None:
    assert not LRS & set(said(scheduled(make, budget=60)))


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        (lambda i: 0.004 * min(1.0, (i + 1) / 10), True),  # the function gives the rate, and not a factor
        (lambda i: 0.004 * 0.97**i, True),
        (lambda i: min(1.0, (i + 1) / 10), False),
        (lambda i: min(1.0, (1 + i // 15) / 10), False),  # a warm-up by epochs, of which four are seen
        (lambda i: 0.001 if i < 30 else 0.1, False),  # … and one that begins very low
        (lambda i: 0.001, False),  # it may be the first epoch
    ],
)
def test_a_rate_that_is_multiplied_by_itself(factor, told: bool) -> None:
    assert ("lr_too_low" in said(scheduled(lambda o: LambdaLR(o, factor)))) == told


def test_a_scheduler_that_is_given_the_rates_themselves() -> None:
    """An optimizer of LR 1, as in the annotated transformer: nobody steps at 1."""
    watch = scheduled(lambda o: LambdaLR(o, lambda i: 0.004 * min((i + 1) / 10, (10 / (i + 1)) ** 0.5)), lr=1.0)
    assert said(watch) == []


def test_a_slow_start_that_bends_upwards_is_none() -> None:
    def cosine(step: int) -> float:
        return 0.002 * (1 - math.cos(math.pi * min(1, step / 80)))

    assert not LRS & set(said(one_group(cosine, 60, budget=100)))


def resumed(
    new: float, after: Callable = lambda optimizer, step: None, early: bool = False, old: float = 2e-5
) -> Watch:
    """The old run had `old`; the new one is built with `new`, loads the old state, and goes on. `early`: the watch is there
    before the state."""
    model = toy()
    first = AdamW(model.parameters(), lr=old)
    train(None, model, [first], 5)
    optimizer = AdamW(model.parameters(), lr=new)
    watch = Watch(model, optimizer) if early else None
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    watch = watch or Watch(model, optimizer)
    train(watch, model, [optimizer], 30, before_step=lambda step: after(optimizer, step))
    return watch


@pytest.mark.parametrize("early", [False, True])
def test_a_resume_that_brings_an_old_rate_back(early: bool) -> None:
    found = finding(resumed(2e-3, early=early), "lr_overwritten")
    assert (found.severity, found.step, found.value, found.limit) == ("warning", 10, 2e-5, 2e-3)


@pytest.mark.parametrize("early", [False, True])
def test_resumes_that_do_not(early: bool) -> None:
    def again(optimizer, step):
        set_lrs(optimizer, 2e-3)

    def cosine(optimizer, step):  # a schedule that has long decayed: each update has its own
        set_lrs(optimizer, 2e-3 * (0.3 - step / 1000))

    assert not LRS & set(said(resumed(2e-3, again, early)))
    assert not LRS & set(said(resumed(2e-3, cosine, early)))
    assert not LRS & set(said(resumed(2e-5, early=early)))


def test_a_rate_that_is_set_by_hand_without_a_state_is_meant() -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=0.02)
    set_lrs(optimizer, 0.01)
    assert not LRS & set(said(watched(model, [optimizer], 30)))


def linear(n_steps: int) -> Callable:
    return lambda step: (0.02 * max(0.0, 1 - step / n_steps), 0.004 * max(0.0, 1 - step / n_steps))


@pytest.mark.parametrize(
    ("n_steps", "budget", "told"), [(25, 100, True), (57, 100, False), (100, 100, False), (25, None, True)]
)
def test_rates_that_are_spent_too_early(n_steps, budget, told) -> None:
    """A scheduler that is stepped four times an update; without a budget, zero for good is told alone."""
    assert ("lr_spent" in said(with_lrs(linear(n_steps), n=60, budget=budget))) == told


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ({0: 1.0, 10: 1e-3}, True),  # factors of a warm-up that were multiplied, and stay
        ({0: 1.0, 10: 0.02}, False),
        ({0: 1.0, 24: 1e-3}, False),  # the last third of a run, or nearly
        ({0: 1.0, 40: 1e-3}, False),
        ({0: 1.0, 10: 1e-3, 30: 1.0}, False),  # a phase
        ({0: 1.0, 5: 1e-3, 28: 1.1e-3, 38: 1.2e-3, 48: 1.3e-3, 58: 1.4e-3}, False),  # it does not rest
    ],
)
def test_a_rate_that_is_spent_early_and_rests_there_whatever_the_budget(rates: dict[int, float], told: bool) -> None:
    def of(step: int) -> tuple[float, float]:
        factor = rates[max(n for n in rates if n <= step)]
        return 0.02 * factor, 0.004 * factor

    watch = with_lrs(of, n=60)
    assert ("lr_spent" in said(watch)) == told
    if told:
        assert finding(watch, "lr_spent").step == 40 and "by update 11 of 40" in finding(watch, "lr_spent").message


def test_a_rate_that_never_rises_and_one_that_rests() -> None:
    model = toy()
    assert (
        "0 in the last 10 updates" in finding(watched(model, [SGD(model.parameters(), lr=0.0)], 20), "lr_spent").message
    )
    assert not LRS & set(said(with_lrs(lambda step: (0.0 if step > 10 else 0.02, 0.004), n=40, budget=100)))


@pytest.mark.parametrize(("compounds", "told"), [(True, True), (False, False)])
def test_a_factor_of_the_whole_run_that_is_multiplied_again_and_again(compounds, told) -> None:
    """lr *= 0.5 ** (step // 10) at each step, and what was meant by it."""
    factor = [
        math.prod(0.5 ** (s // 10) for s in range(step + 1)) if compounds else 0.5 ** (step // 10) for step in range(60)
    ]
    assert ("lr_spent" in said(with_lrs(lambda step: (0.02 * factor[step], 0.004 * factor[step]), n=60))) == told


def test_a_wrapped_rate_on_its_device_is_read_as_well() -> None:
    model = toy()
    watch = watched(model, [AdamW(model.parameters(), lr=torch.tensor(0.01))], 20)
    assert watch.state.groups[0].asked == pytest.approx(0.01) and not LRS & set(said(watch))


def test_a_rate_that_brought_the_loss_down_is_not_called_low() -> None:
    model = toy(width=512)  # wide: it learns at a rate that the table has for ten times the size
    watch = watched(model, adamw(model, lr=6e-4), 40)
    assert watch.state.losses[-1] < 0.5 * watch.state.losses[0] and said(watch) == []


def test_a_new_head_on_a_frozen_base_is_not_held_against_a_table_of_whole_models() -> None:
    model = toy()
    model.embedding.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert said(watched(model, [AdamW(trained, lr=1e-4)], 40, expect_frozen=["embedding."])) == []
    model = toy()
    assert "lr_too_low" in said(watched(model, adamw(model, lr=1e-4), 40))


def test_fresh_is_a_matter_of_the_loss() -> None:
    """A trained model whose norms never moved, and a new one whose norms are not constant."""
    model = toy()
    train(None, model, [AdamW([p for p in model.parameters() if p is not model.norm.weight], lr=0.01)], 150)
    watch = watched(model, adamw(model, lr=1e-5), 40, start=150)
    assert watch.state.has_new_norms and not watch.state.is_fresh and said(watch) == []
    model = toy()
    with torch.no_grad():
        model.norm.weight += 0.01 * torch.randn(16)
    watch = watched(model, adamw(model, lr=1e-5), 40)
    assert watch.state.is_fresh and "lr_too_low" in said(watch)
