"""Rules about the set-up: a training in which each must speak, and ones in which it must not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from toy import Toy, adamw, finding, loss_of, said, toy, train, watched

from moe_lab.health import Watch, examine


def test_what_no_optimizer_holds() -> None:
    model = toy()
    some = [p for name, p in model.named_parameters() if not name.startswith("head")]
    assert said(Watch(model, AdamW(some)), "error") == ["not_in_optimizer"]
    assert said(Watch(model, AdamW(some), expect_frozen=["head."]), "error") == []


@pytest.mark.parametrize(
    ("late", "thaws", "told"),
    [(None, True, True), (0, True, False), (2, True, False), (None, False, False)],  # updates until its group is added
)
def test_a_part_that_is_thawed_and_that_nobody_moves(late: int | None, thaws: bool, told: bool) -> None:
    """What is named as frozen is so until it begins to train."""
    model = toy()
    model.up.requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def stage(step: int) -> None:
        if step == 15 and thaws:
            model.up.requires_grad_(True)
        if late is not None and step == 15 + late:
            optimizer.add_param_group({"params": list(model.up.parameters())})

    watch = watched(model, [optimizer], 40, before_step=stage, expect_frozen=["up."])
    assert ("not_in_optimizer" in said(watch)) == told
    assert not told or finding(watch, "not_in_optimizer").step == 30


def test_what_is_left_out_on_purpose_need_not_be_frozen() -> None:
    model = toy()
    optimizer = AdamW([p for name, p in model.named_parameters() if not name.startswith("up.")], lr=0.01)
    assert said(watched(model, [optimizer], 40, expect_frozen=["up."])) == []


def test_parameters_that_are_replaced_mid_run() -> None:
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        train(watch, model, [optimizer], 15)
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    setattr(module, name, nn.Parameter(p.detach().clone()))
        train(watch, model, [optimizer], 15, start=15)
    assert said(watch)[0] == "not_in_optimizer" and finding(watch, "not_in_optimizer").step == 20


@pytest.mark.parametrize("requires_grad", [True, False])
def test_an_average_that_the_model_keeps_of_itself_is_neither_frozen_nor_forgotten(requires_grad: bool) -> None:
    model = toy()
    trained = [*model.parameters()]
    model.kept = nn.ModuleDict({"average": copy.deepcopy(model).requires_grad_(requires_grad)})

    def follow(step: int) -> None:
        for p, mean in zip(trained, model.kept.parameters(), strict=True):
            mean.data.lerp_(p.data, 0.01)

    assert said(watched(model, [AdamW(trained, lr=0.01)], 30, before_step=follow)) == []


def test_norms_are_no_copies_of_the_only_one_that_trains() -> None:
    model = toy()
    model.more = nn.RMSNorm(16)
    (found,) = Watch(model, AdamW([model.norm.weight])).findings[:1]
    assert found.rule == "not_in_optimizer" and found.value == 7


def test_a_layer_that_began_as_a_copy_of_another_is_forgotten_all_the_same() -> None:
    model = toy()
    model.more = copy.deepcopy(model.up)
    model.more.requires_grad_(False)
    assert "frozen_module" in said(Watch(model, AdamW([p for p in model.parameters() if p.requires_grad])))


HELD = {"frozen": [("info", 10), ("warning", 50)], "by hand": [], "meant": [], "a module's own": [("info", 0)]}


@pytest.mark.parametrize("kind", HELD)
def test_frozen_parts_that_an_optimizer_holds(kind: str) -> None:
    """As `AdamW(model.parameters())` does; or which are given gradients that no backward pass makes."""
    model = toy()
    if kind == "a module's own":
        model.up.correction = nn.Parameter(torch.zeros(1, 32), requires_grad=False)
    optimizer = AdamW(model.parameters(), lr=0.01)
    watch = Watch(model, optimizer, expect_frozen=["up."] if kind == "meant" else [])
    model.up.weight.requires_grad_(kind == "a module's own")
    model.up.bias.requires_grad_(kind == "a module's own")

    def give(step: int) -> None:
        if kind == "by hand":
            model.up.weight.grad = torch.randn_like(model.up.weight)
            model.up.bias.grad = torch.randn_like(model.up.bias)

    with watch:
        for step in range(60):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            give(step)
            optimizer.step()
    told = [(f.severity, f.step) for f in watch.findings if f.rule == "frozen_module"]
    assert told == HELD[kind]


def test_frozen_parts() -> None:
    def frozen(names, **options):
        model = toy()
        for name in names:
            model.get_submodule(name).requires_grad_(False)
        return Watch(model, AdamW([p for p in model.parameters() if p.requires_grad]), **options)

    assert said(frozen(["up"]), "warning") == ["frozen_module"]
    assert said(frozen(["up"], expect_frozen=["up."])) == []
    assert said(frozen(["up", "embedding"])) == ["frozen_module"]
    # as under adapters; or one table of fixed positions, tokens or classes
    for names in (["embedding", "head", "norm", "down"], ["embedding"], ["head"]):
        assert said(frozen(names)) == [] and "frozen_module" in said(frozen(names), "info")
    model = toy()
    model.positions = nn.Parameter(torch.randn(1, 16, 16), requires_grad=False)
    assert said(Watch(model, AdamW([p for p in model.parameters() if p.requires_grad]))) == []


class Detached(Toy):
    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x)))).detach()
        return self.head(x)


class Spare(Toy):
    """One layer more: never called, taken without a call in vain, called in vain, or for a loss term that nobody adds."""

    def __init__(self, way: str):
        super().__init__()
        self.spare, self.way = nn.Linear(16, 16), way
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, ids):
        x = self.embedding(ids)
        if self.way == "called":
            self.spare(x)
        if self.way == "kept":
            self.term = self.spare(x).square().mean()
        if self.way == "taken":
            F.linear(x, self.spare.weight, self.spare.bias)
        if self.way != "nothing":
            x = x * self.scale
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class Adapted(Toy):
    """A low-rank addition whose second factor starts at zero: the first has no gradient in the first update."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(x + self.second(self.first(x)))


def test_a_branch_without_gradient() -> None:
    model = toy(kind=Detached)
    watch = watched(model, adamw(model), 40)
    assert "no_gradient" in said(watch, "error")
    assert {r.name: r.gradient for r in watch.readings}["up.weight"] == "none"


@pytest.mark.parametrize("way", ["nothing", "taken", "called", "kept"])
def test_what_no_pass_takes_or_in_vain_is_told_and_no_alarm(way: str) -> None:
    """As the cross-attention of a decoder that is used alone, a pooled state that is thrown away, and a scale that its own module
    never reads; but a term that is left on the module was meant for the loss."""
    model = toy(kind=Spare, way=way)
    watch = watched(model, adamw(model), 40)
    assert said(watch) == (["no_gradient"] if way == "kept" else [])
    found = finding(watch, "no_gradient")
    assert found.severity == ("warning" if way == "kept" else "info")
    assert ("3 trainable" in found.message) == (way == "nothing")


def test_two_factors_that_are_both_zero_are_not_in_vain() -> None:
    model = toy(kind=Adapted)
    nn.init.zeros_(model.first.weight)
    assert finding(watched(model, adamw(model), 40), "no_gradient").severity == "warning"


@pytest.mark.parametrize(("least", "told"), [(-10.0, []), (10.0, ["no_gradient"])])
def test_an_output_that_is_clamped_where_nothing_comes_back(least: float, told: list[str]) -> None:
    """No tensor has a say in the output then, and yet it is no part that this use of the model has no need of."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Hardtanh(least, 100.0))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer) as watch:
        for _ in range(30):
            x = torch.randn(16, 4)
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    assert said(watch) == told and (not told or "none of the 4 trainable" in finding(watch, "no_gradient").message)


@pytest.mark.parametrize("dead", [False, True])
def test_a_bias_that_a_difference_of_two_scores_cancels(dead: bool) -> None:
    """A critic's. The bias of units that are all dead has no gradient either, and their weights have none."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    nn.init.constant_(model[0].bias, -99.0 if dead else 0.0)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer) as watch:
        for _ in range(30):
            optimizer.zero_grad()
            (model(torch.randn(16, 4) + 1) - model(torch.randn(16, 4))).mean().backward()
            optimizer.step()
    assert {r.name: r.gradient for r in watch.readings}["4.bias"] == "zero"
    assert [f.where.split()[0] for f in watch.findings if f.rule == "no_gradient"] == ["0.bias"] * dead


def test_what_the_last_pass_did_not_call_is_not_called_unused() -> None:
    """Two kinds of passes by turns, of which one throws its own layer's answer away."""
    model = toy(kind=Spare, way="called")
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        for step in range(40):
            model.way = "passed by" if step % 2 else "called"  # a check follows an odd one
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert finding(watch, "no_gradient").severity == "warning"


class Skipping(Toy):
    """A layer that in training serves half of the tokens alone: those whose score is highest, or in `hard` mode above 0."""

    def __init__(self, hard: bool = False):
        super().__init__()
        self.score, self.hard = nn.Linear(16, 1, bias=False), hard

    def forward(self, ids):
        x = self.embedding(ids)
        score = self.score(x)  # (B, T, 1)
        keep = score > (0 if self.hard else score.median(1, keepdim=True).values) if self.training else True
        return self.head(x + keep * self.down(F.gelu(self.up(self.norm(x)))))


@pytest.mark.parametrize("hard", [False, True])
def test_what_chooses_in_training_alone_is_cut_off_and_not_idle(hard: bool) -> None:
    """In evaluation no token is skipped, and a score plus a number is the same choice."""
    found = finding(watched(model := toy(kind=Skipping, hard=hard), adamw(model), 40), "no_gradient")
    assert (found.severity, found.where) == ("error", "score.weight")
    assert "autograd.Function" in found.advice and "reentrant" in found.advice


@pytest.mark.parametrize("on_a_frozen_base", [False, True])
def test_a_factor_that_starts_at_zero_is_waited_for(on_a_frozen_base: bool) -> None:
    model = toy(kind=Adapted)
    for name in ("up", "down", "norm"):
        delattr(model, name)
    for module in (model.embedding, model.head):
        module.requires_grad_(not on_a_frozen_base)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = ["embedding.", "head."] if on_a_frozen_base else []
    watch = watched(model, [AdamW(trained, lr=0.01)], 40, expect_frozen=frozen)
    assert said(watch) == [] and "frozen_module" not in said(watch, "info")
    first = {r.name: r for r in watch.readings}["first.weight"]
    assert (first.zero_gradient, first.gradient) == (1, "yes")


@pytest.mark.parametrize("when", ["before", "loaded", "healthy", "later"])
def test_what_an_optimizer_keeps_and_cannot_use(when: str) -> None:
    """After a batch of old with a fill value in it, the second moments are infinite and the gradients are not. Of moments that
    become so in this run, the gradients speak."""
    model = toy()
    (optimizer,) = adamw(model)
    train(None, model, [optimizer], 3)
    state = copy.deepcopy(optimizer.state_dict())
    if when == "before":
        optimizer.state[model.up.weight]["exp_avg_sq"][3] = torch.inf
    with Watch(model, optimizer) as watch:
        at_start = said(watch)
        train(watch, model, [optimizer], 12, start=3)
        if when == "loaded":
            state["state"][3]["exp_avg_sq"].fill_(torch.inf)
            optimizer.load_state_dict(state)
        if when == "later":
            model.up.weight.grad[0] = torch.inf
            optimizer.step()
        train(watch, model, [optimizer], 30, start=15)
    assert (at_start == ["nonfinite_values"]) == (when == "before")
    assert ("nonfinite_values" in said(watch)) == (when in ("before", "loaded"))
    if when == "before":
        found = finding(watch, "nonfinite_values")
        assert "exp_avg_sq of up.weight" in found.message and found.value == 16 and found.severity == "error"


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.tanh(self.body(x)))


@pytest.mark.parametrize(
    ("names", "told"), [(["classifier"], True), (["score"], False), (["classifier", "score"], False), (None, False)]
)
def test_what_is_to_be_trained_beside_an_adapter_and_is_not_there(names: list[str] | None, told: bool) -> None:
    """Of a library's own list one name is enough. By the adapter's own config, and by one that is handed to examine."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=names)
    model = peft.get_peft_model(Classifier(), config)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    assert ("modules_to_save" in {f.where for f in Watch(model, optimizer, quiet=True).findings}) == told
    batch, loss = (torch.randn(8, 8), torch.randint(3, (8,))), lambda m, b: F.cross_entropy(m(b[0]), b[1])
    both = examine(model, batch, loss, optimizer)  # its own look, and that of a watch's start
    assert [f.where for f in both.findings].count("modules_to_save") == told
    given = examine(Classifier(), batch, loss, config={"lora": {"modules_to_save": names}} if names else None)
    assert ("modules_to_save" in {f.where for f in given.findings}) == told


@pytest.mark.parametrize(("width", "severity"), [(8, "info"), (4, "warning")])
def test_a_target_network_is_frozen_on_purpose(width: int, severity: str) -> None:
    """It looks like the network that trains, and need not hold its numbers: it lags. One of other shapes is another matter."""
    online, target = (nn.Sequential(nn.Linear(4, n), nn.Tanh(), nn.Linear(n, 2)) for n in (8, width))
    model = nn.ModuleDict({"online": online, "target": target.requires_grad_(False)})
    watch = Watch(model, AdamW(online.parameters(), weight_decay=0.0), quiet=True)
    assert [(f.rule, f.severity) for f in watch.findings] == [("frozen_module", severity)]
