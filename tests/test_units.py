"""Units and their weights, what first layers are given, and who stops learning mid-run: each fault beside what looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from toy import finding, said

from moe_lab.health import Watch, examine

WAY = torch.randn(12, 1, generator=torch.Generator().manual_seed(7))


def numbers(step: int, rows: int = 64) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(step))


def net(*between: nn.Module, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, width), *between, nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )


def trained(
    model: nn.Module,
    updates: int = 20,
    optimizer: Optimizer | None = None,
    before: Callable[[int], None] = lambda step: None,
    x_of: Callable[[int], Tensor] = numbers,
    **options: object,
) -> Watch:
    """On a regression; `before(step)` each update."""
    optimizer = optimizer or AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    with Watch(model, optimizer, quiet=True, **options) as watch:
        for step in range(updates):
            before(step)
            optimizer.zero_grad()
            loss = F.mse_loss(model(x_of(step)), torch.tanh(numbers(step) @ WAY))
            loss.backward()
            optimizer.step()
            watch.observe(loss=loss)
    return watch


# ---- units that are one -----------------------------------------------------------------------------------------------


def filled(value: float, *places: int) -> nn.Sequential:
    model = net()
    for place in places:
        nn.init.constant_(model[place].weight, value)
        nn.init.zeros_(model[place].bias)
    return model


def test_units_that_begin_alike_stay_one() -> None:
    found = [f for f in trained(filled(0.1, 0, 2, 4)).findings if f.rule == "alike_units"]
    assert [(f.severity, f.step, f.where.split()[0]) for f in found] == [
        ("warning", 0, "0"),
        ("warning", 20, "0.weight"),
    ]


@pytest.mark.parametrize(
    "of", ["zeros in the last layer", "one number in a layer between", "drawn", "dropout", "two outputs"]
)
def test_what_begins_at_one_value_and_does_not_stay_there_is_well(of: str) -> None:
    """Gradients tell units apart where their outputs, or dropout, do; a last layer of one unit has none beside it. That some began
    alike is told before the first update."""
    models = {
        "zeros in the last layer": lambda: filled(0.0, 4),
        "one number in a layer between": lambda: filled(0.1, 2),
        "drawn": net,
        "dropout": lambda: nn.Sequential(*list(filled(0.1, 0, 2))[:2], nn.Dropout(0.5), *list(filled(0.1, 2))[2:]),
        "two outputs": lambda: nn.Sequential(*list(net())[:4], nn.Linear(32, 8), nn.Linear(8, 1)),
    }
    assert not any(f.rule == "alike_units" and f.step for f in trained(models[of]()).findings)


# ---- units that are off -----------------------------------------------------------------------------------------------


def offset(share: float) -> nn.Sequential:
    """That share of the first layer's ReLUs starts below zero everywhere."""
    model = net()
    with torch.no_grad():
        model[0].bias[: int(share * 32)] = -50.0
    return model


def test_a_layer_of_which_next_to_nothing_is_on_is_told() -> None:
    found = finding(trained(offset(0.9), 60), "dead_units")
    assert found.where == "0.bias" and found.value == pytest.approx(28 / 32) and found.step == 40


def test_units_whose_biases_cancel_are_on() -> None:
    """A difference of two means: of a unit that all of both throw to one side the bias has no gradient, and its weights have one."""
    model = nn.Sequential(nn.Linear(12, 32), nn.LeakyReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        model[0].bias[:30] = 64.0
    optimizer = SGD(model.parameters(), lr=1e-4)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(60):
            optimizer.zero_grad()
            (model(numbers(step)) - model(numbers(step + 1000))).mean().backward()
            optimizer.step()
    (bias,) = [t for t in watch.readings if t.name == "0.bias"]
    assert bias.n_touched < 8 and "dead_units" not in said(watch)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_layer_of_which_enough_is_on_is_left_alone(share: float) -> None:
    assert said(trained(offset(share), 60)) == []


def test_units_that_die_mid_run_are_told() -> None:
    model = net()

    @torch.no_grad()
    def die(step: int) -> None:
        if step == 40:
            model[0].bias[:30] = -50.0

    found = finding(trained(model, 110, before=die), "dead_units")
    assert 60 < found.step <= 100


# ---- weights that shrink ----------------------------------------------------------------------------------------------

DECAYS = {  # an optimizer, and whether its decay has the weights
    "AdamW": (lambda ps: AdamW(ps, lr=1e-2, weight_decay=1.5), True),
    "Adam, whose decay is a gradient": (lambda ps: Adam(ps, lr=3e-3, weight_decay=1.0), True),
    "SGD with momentum": (lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.05), True),
    "AdamW's default": (lambda ps: AdamW(ps, lr=1e-2, weight_decay=0.01), False),
    "AdamW, strong": (lambda ps: AdamW(ps, lr=1e-3, weight_decay=1.0), False),
    "SGD's usual": (lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=5e-4), False),
    "none": (lambda ps: AdamW(ps, lr=1e-2, weight_decay=0.0), False),
}


@pytest.mark.parametrize("kind", DECAYS)
def test_a_decay_that_takes_the_weights_is_told(kind: str) -> None:
    make, is_heavy = DECAYS[kind]
    model = net(width=64)
    watch = trained(model, 100, make(model.parameters()))
    assert ("heavy_decay" in said(watch)) == is_heavy


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_weights_that_the_loss_shrinks_are_its_own_affair(decay: float) -> None:
    """They are all too large, and go straight to 0."""
    torch.manual_seed(0)
    model = nn.Linear(12, 16, bias=False)
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=decay)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(100):
            optimizer.zero_grad()
            model(numbers(step)).square().sum(1).mean().backward()
            optimizer.step()
    assert model.weight.norm() < 0.1 and "heavy_decay" not in said(watch)


def test_embeddings_that_learn_to_be_small_are_not_decayed_away() -> None:
    """Their gradients are smaller than decay × weight, which AdamW does not divide."""
    torch.manual_seed(0)
    model = nn.Embedding(4, 64)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(100):
            optimizer.zero_grad()
            (1e-6 * model(torch.arange(4)).square().sum()).backward()
            optimizer.step()
    assert model.weight.norm() < 0.5 * 16 and "heavy_decay" not in said(watch)


# ---- what comes in ----------------------------------------------------------------------------------------------------


def pictures(step: int) -> Tensor:
    return (torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(step)) * 255).round()


class Convolved(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.conv, self.head = scale, nn.Conv2d(3, 8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x * self.scale if self.scale != 1 else x)).mean((2, 3)))


def looked_at(model: nn.Module, x_of: Callable[[int], Tensor]) -> list[str]:
    optimizer = AdamW(model.parameters(), lr=1e-5)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(11):
            optimizer.zero_grad()
            model(x_of(step)).square().mean().backward()
            optimizer.step()
    return said(watch)


def column(factor: float, shift: float = 0.0) -> Callable[[int], Tensor]:
    def columns(step: int) -> Tensor:
        x = numbers(step)
        x[:, 3] = x[:, 3] * factor + shift
        return x

    return columns


def test_numbers_far_from_one_that_come_in_are_told() -> None:
    assert "input_scale" in looked_at(Convolved(), pictures)
    assert "input_scale" in looked_at(net(), column(1.0, shift=1.7e9))  # seconds since 1970
    assert "input_scale" in looked_at(net(), column(1e4))


def test_examine_looks_at_what_comes_in() -> None:
    found = [
        examine(Convolved(), x, lambda m, x: m(x).square().mean()).findings for x in (pictures(0), pictures(0) / 255)
    ]
    assert [[f.rule for f in some if f.severity == "warning"] for some in found] == [["input_scale"], []]


def test_numbers_that_the_model_or_the_data_scale_are_well() -> None:
    normed = nn.Sequential(nn.BatchNorm1d(12), net())
    for model, x_of in (
        (Convolved(1 / 255), pictures),
        (Convolved(), lambda step: pictures(step) / 255),
        (Convolved(100.0), lambda step: pictures(step) / 255),  # by a model that wants it so
        (normed, column(1e4)),
        (net(), numbers),
    ):
        assert "input_scale" not in looked_at(model, x_of)


class Graph(nn.Module):
    """Takes a sparse matrix, and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)

    def forward(self, neighbours: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return neighbours, (neighbours @ self.up(x)).relu()


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs_and_answers_disturb_nothing() -> None:
    model = Graph()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(11):
            optimizer.zero_grad()
            model(torch.eye(64).to_sparse(), 100 * numbers(step))[1].square().mean().backward()
            optimizer.step()
    assert said(watch) == ["input_scale"]


# ---- who stops mid-run ------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """A sum of two networks, of which one is wider: it is no copy of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.is_cut = net(), net(width=48), False

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return (left.detach() if self.is_cut else left) + self.right(x)


def stopped(stop: Callable[[Towers, int], None], updates: int = 80, **options: object) -> Watch:
    model = Towers()
    return trained(model, updates, before=lambda step: stop(model, step), **options)


def test_a_part_that_is_frozen_after_it_was_trained_is_told() -> None:
    found = finding(stopped(lambda m, step: m.left.requires_grad_(step < 12)), "frozen_module")
    assert found.where.startswith("left.") and found.value == 11 and found.step == 70
    at_once = finding(stopped(lambda m, step: m.left.requires_grad_(step < 1)), "frozen_module")
    assert at_once.value == 1 and at_once.step == 60


def test_a_part_that_is_cut_off_after_it_was_trained_is_told() -> None:
    def cut(model: Towers, step: int) -> None:
        model.is_cut = step >= 12

    found = finding(stopped(cut), "no_gradient")
    assert found.severity == "warning" and found.where.startswith("left.") and found.step == 70


TURNS = {  # when a part trains that does not always
    "turns of thirty": lambda step: step // 30 % 2 == 0,
    "every sixteenth": lambda step: step % 16 == 0,
    "now and then": lambda step: step % 4 == 0,
    "thawed": lambda step: step >= 12,
}


@pytest.mark.parametrize("kind", TURNS)
def test_a_part_that_trains_in_turns_is_well(kind: str) -> None:
    assert said(stopped(lambda m, step: m.left.requires_grad_(TURNS[kind](step)), 120)) == []


def test_what_is_frozen_on_purpose_mid_run_can_be_named() -> None:
    assert said(stopped(lambda m, step: m.left.requires_grad_(step < 12), expect_frozen=["left."])) == []


def test_a_loss_that_has_nothing_more_to_teach_stops_nobody() -> None:
    """A hinge's gradients end where all margins are met: nothing else goes on."""
    model = net()
    optimizer = Adam(model.parameters(), lr=1e-2)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(120):
            optimizer.zero_grad()
            sign = (numbers(0) @ WAY).sign()
            loss = F.relu(1 - sign * model(numbers(0))).mean()
            loss.backward()
            optimizer.step()
            watch.observe(loss=loss)
    assert loss == 0 and not {"no_gradient", "frozen_module", "dead_units"} & set(said(watch))


# ---- dropout, and what is normalised over one number --------------------------------------------------------------------


class Pooled(nn.Module):
    """Scores over time, as weights of a mean."""

    def __init__(self, dim: int, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.up, self.score, self.head = dim, nn.Linear(1, width), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x.unsqueeze(-1)))  # (B, T, width)
        return self.head((self.score(h).softmax(self.dim) * h).sum(1))


class Attending(nn.Module):
    """To as many keys as it is told, by products of queries and keys."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keys, self.qkv, self.head = keys, nn.Linear(1, 24), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.unsqueeze(-1)).chunk(3, -1)
        scores = (q @ k[:, : self.keys].mT).softmax(-1)
        return self.head(scores @ v[:, : self.keys]).mean(1)


OVER_ONE = {
    "scores over features in place of time": (lambda: Pooled(-1), True),
    "scores over time": (lambda: Pooled(1), False),
    "a norm of one number": (lambda: nn.Sequential(net(), nn.LayerNorm(1)), True),
    "a norm of many": (lambda: nn.Sequential(nn.LayerNorm(12), net()), False),
    "attention to one key": (lambda: Attending(1), False),
    "attention": (lambda: Attending(12), False),
}


@pytest.mark.parametrize("kind", OVER_ONE)
def test_a_softmax_or_norm_over_one_number_is_told(kind: str) -> None:
    make, is_ill = OVER_ONE[kind]
    watch = trained(make())
    by_examine = examine(make(), numbers(0), lambda m, x: F.mse_loss(m(x), x @ WAY)).findings
    assert ("no_effect" in said(watch)) == is_ill
    assert any(f.rule == "no_effect" and f.severity == "warning" for f in by_examine) == is_ill


def test_cross_entropy_of_one_logit_is_told() -> None:
    model = net()
    labels = torch.zeros(64, dtype=torch.long)
    found = examine(model, numbers(0), lambda m, x: F.cross_entropy(m(x), labels)).findings
    assert "no_effect" in [f.rule for f in found if f.severity == "warning"]


# ---- answers that depend on nothing -------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Ten answers from units that are switched off, or not, before update 15."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.is_off = nn.Linear(12, 64), nn.Linear(64, outputs), False

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x) - 50 * self.is_off))


@pytest.mark.parametrize(("dies", "outputs", "is_told"), [(True, 10, True), (False, 10, False), (True, 4, False)])
def test_answers_that_are_the_same_for_each_example_are_told(dies: bool, outputs: int, is_told: bool) -> None:
    """Four answers are too few to say how much one varies."""
    model = Wide(outputs)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(60):
            model.is_off = dies and step >= 15
            x = numbers(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), (x @ WAY).squeeze(1).gt(0).long()).backward()
            optimizer.step()
    assert ("constant_output" in said(watch)) == is_told


def test_the_optimizer_of_another_object_in_the_same_memory_is_told_for_what_it_is() -> None:
    """A weight norm that was put on after the optimizer was made: nothing is said of tensors without effect."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    nn.utils.parametrizations.weight_norm(model[0])
    watch = trained(model, 40, optimizer)
    told = [f.where for f in watch.findings if f.rule == "not_in_optimizer"]
    assert told == [f"0.parametrizations.weight.original{n}" for n in (0, 1)]
    assert set(said(watch)) == {"not_in_optimizer"}


class Actor(nn.Module):
    """Answers with a distribution, and a value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.actor, self.critic = nn.Linear(12, 4), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> tuple[torch.distributions.Distribution, Tensor]:
        return torch.distributions.Categorical(logits=self.actor(x)), self.critic(x)


@pytest.mark.parametrize("detaches", [False, True])
def test_what_shapes_a_distribution_shapes_the_answer(detaches: bool) -> None:
    """PPO's ratio has no gradient where the old log-probability keeps its own."""
    model = Actor()
    optimizer = Adam(model.parameters(), lr=1e-2)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(30):
            x = numbers(step)
            action = model(x)[0].sample()
            before, (policy, value) = model(x)[0].log_prob(action), model(x)
            gain = (policy.log_prob(action) - (before.detach() if detaches else before)).exp() * (action == 1)
            optimizer.zero_grad()
            (value.square().mean() - gain.mean()).backward()
            optimizer.step()
    told = [(f.severity, f.where) for f in watch.findings if f.rule == "no_gradient"]
    assert told == ([] if detaches else [("error", "actor.weight and 1 more")])


# ---- programs that are well, and look strange -----------------------------------------------------------------------------


class Odd(nn.Module):
    """`how` it answers, or is asked."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.up, self.down = how, nn.Linear(12, 32), nn.Linear(32, 12)
        if how == "starts at zero":
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> object:
        y = self.down(F.relu(self.up(x / 255 if self.how == "pictures" else x)))
        if self.how == "generator":
            return (row for row in y)
        if self.how == "physical units":
            return 101325 + 50 * y
        if self.how == "padded vocabulary":
            return torch.cat([y, torch.full_like(y, -1e4)], -1)
        if self.how == "first places alike":
            return torch.cat([torch.ones_like(y)[:, None], y[:, None].expand(-1, 63, -1)], 1)  # (B, 64, 12)
        return y


@pytest.mark.parametrize(
    "how",
    [
        "generator",
        "physical units",
        "padded vocabulary",
        "first places alike",
        "pictures",
        "starts at zero",
        "few answers",
        "momentum",
    ],
)
def test_strange_programs_that_are_well(how: str) -> None:
    model = Odd(how)
    untouched = [p.clone() for p in model.parameters()]
    make = (lambda ps: SGD(ps, lr=1e-5, momentum=1.0)) if how == "momentum" else (lambda ps: AdamW(ps, lr=1e-3))
    optimizer = make(model.parameters())
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(60):
            x = numbers(step) * (255 if how == "pictures" else 1)
            answer = model(x)
            y = torch.stack(list(answer)) if how == "generator" else answer
            y = y[:, :1] if how == "few answers" else y.flatten(1)[:, -12:] if how != "padded vocabulary" else y[:, :12]
            goal = torch.tanh(x @ WAY).expand_as(y)
            optimizer.zero_grad()
            F.mse_loss((y - 101325) / 50 if how == "physical units" else y, goal).backward()
            optimizer.step()
    assert said(watch) == []
    assert not any(torch.equal(a, b) for a, b in zip(untouched, model.parameters(), strict=True))


def test_what_came_without_a_gradient_is_not_decayed_away() -> None:
    model = nn.ModuleDict({"used": nn.Linear(12, 1), "unused": nn.Linear(12, 16)})
    model.forward = lambda x: model["used"](x)
    watch = trained(model, 40, SGD(model.parameters(), lr=0.1, weight_decay=0.01))
    assert "heavy_decay" not in said(watch)


class Scaled(nn.Module):
    """A convolution on raw pictures, with what stands behind it."""

    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), *behind, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_norm_right_behind_makes_large_numbers_small() -> None:
    assert "input_scale" in looked_at(Scaled(), pictures)
    assert "input_scale" not in looked_at(Scaled(nn.BatchNorm2d(8)), pictures)


def test_a_transform_of_the_whole_model_ends_nothing() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(11):
            optimizer.zero_grad()
            model(numbers(step)).square().mean().backward()
            optimizer.step()
            torch.func.vmap(model)(numbers(step)[:4].unsqueeze(1))
    assert "not_measured" not in said(watch)
