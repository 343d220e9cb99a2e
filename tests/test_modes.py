"""What training and evaluation compute, one beside the other."""

from functools import partial

import pytest
import torch
from test_examine import Tiny, batch
from torch import Tensor, nn
from torch.optim import AdamW

from moe_lab.health import check_train_eval, examine


def test_dropout_is_no_difference_between_modes() -> None:
    model, ids = Tiny(), batch()[0]
    modes = (lambda x: model.train()(x)), (lambda x: model.eval()(x))
    assert check_train_eval(*modes, ids) is None
    model.dropout.p = 0.0
    finding = check_train_eval(modes[0], lambda x: 1.1 * model.eval()(x), ids)
    assert (finding.rule, finding.severity) == ("mode_mismatch", "info")


class Noisy(nn.Module):
    """x + Wx, and then what `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.drop = kind, nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        if self.kind == "anew":
            return x + nn.Linear(8, 8)(x)
        if self.kind == "filled":  # a layer that is only a way to write a product
            layer = nn.Linear(8, 8)
            layer.weight, layer.bias = self.layer.weight, self.layer.bias
            return x + layer(x)
        if "set again" in self.kind:  # as a dropout of weights does
            self.layer.weight = nn.Parameter(self.layer.weight.detach())
        if self.kind == "attention":
            return nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)[0]
        if self.kind == "positional":
            return torch.dropout(x, 0.5, True)
        if self.kind == "inverted":
            return nn.functional.dropout(x, 0.5, training=not self.training)
        if self.kind == "sampled":
            return x + torch.randn_like(x)
        by_kind = {"function": nn.functional.dropout, "sound": partial(nn.functional.dropout, training=self.training)}
        return by_kind.get(self.kind.removeprefix("set again, "), self.drop)(x)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("function", ("mode_mismatch", "warning", "dropout")),
        ("attention", ("mode_mismatch", "warning", "scaled_dot_product_attention")),
        ("positional", ("mode_mismatch", "warning", "dropout")),
        ("inverted", ("mode_mismatch", "warning", "dropout")),
        ("anew", ("mode_mismatch", "info", "evaluation")),
        ("sampled", ("mode_mismatch", "info", "evaluation")),
        ("sound", None),
        ("module", None),
        ("filled", None),
        ("set again", None),
        ("set again, function", ("mode_mismatch", "warning", "dropout")),
    ],
)
def test_what_is_random_in_evaluation(kind: str, told: tuple | None) -> None:
    torch.manual_seed(0)
    model, x = Noisy(kind), torch.randn(16, 8)
    before = torch.get_rng_state()
    finding = check_train_eval(lambda x: model.train()(x), lambda x: model.eval()(x), x)
    assert (finding and (finding.rule, finding.severity, finding.where)) == told
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_that_each_pass_makes_is_in_no_optimizer() -> None:
    model, x = Noisy("anew"), torch.randn(16, 8)
    told = examine(model, x, lambda model, x: model(x).square().mean(), AdamW(model.parameters()))
    assert [(f.rule, f.severity) for f in told.findings if f.severity != "info"] == [("not_in_optimizer", "error")]


def test_a_module_that_reads_its_childs_weights_by_hand_is_heard_too() -> None:
    """As routers in float32 do; one that both modes call is well."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * nn.functional.linear(x, self.gate.weight).sigmoid()

    router, x = Router(), torch.randn(3, 4)
    assert check_train_eval(router, router, x) is None
    finding = check_train_eval(router, lambda x: x, x)
    assert (finding.rule, finding.severity) == ("mode_mismatch", "warning") and finding.where.startswith("Router")


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_layers_that_training_leaves_out_at_random(share: float) -> None:
    """LayerDrop (Fan et al. 2020) is well; a layer that no training pass computes is not."""

    class Stack(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = x if self.training and torch.rand(()) < share else layer(x)
            return x

    torch.manual_seed(3)
    model = Stack(*(nn.Linear(4, 4) for _ in range(8)))
    finding = check_train_eval(lambda x: model.train()(x), lambda x: model.eval()(x), torch.randn(3, 4))
    alarm = finding.where if finding and finding.severity == "warning" else None
    assert alarm == (None if share < 1 else "Linear(4, 4)")


class NoisyExperts(nn.Module):
    """Each token goes to one of four experts, by noise in training; in evaluation all go to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x) + (torch.randn(len(x), 4) if self.training else 0)
        chosen, out = logits.argmax(1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (mine := (chosen == i).nonzero().flatten()).numel():
                out = out.index_add(0, mine, expert(x[mine]) * logits.softmax(1)[mine, i, None])
        return out


def test_experts_that_only_noise_chooses_are_no_modules_of_one_mode() -> None:
    """They are given different numbers of tokens; a block of a stack is given as many as the others."""
    model, x = NoisyExperts(), torch.randn(32, 8)
    modes = (lambda x: model.train()(x)), (lambda x: model.eval()(x))
    found = check_train_eval(*modes, x)
    assert found is None or "training only" not in found.message


def test_torchs_own_layers_that_take_another_way_in_evaluation() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    assert check_train_eval(lambda x: model.train()(x), lambda x: model.eval()(x), x) is None
    assert torch.backends.mha.get_fastpath_enabled()


class OwnDropout(nn.Module):
    def __init__(self, p: float, divides: bool) -> None:
        super().__init__()
        self.p, self.divides = p, divides

    def forward(self, x: Tensor) -> Tensor:
        kept = x * (torch.rand_like(x) > self.p)
        return x if not self.training else kept / (1 - self.p) if self.divides else kept


@pytest.mark.parametrize(("p", "divides", "is_told"), [(0.5, False, True), (0.2, False, True), (0.5, True, False)])
def test_a_dropout_of_ones_own_that_divides_by_nothing(p: float, divides: bool, is_told: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 64), OwnDropout(p, divides), nn.ReLU(), nn.Linear(64, 4)), torch.randn(256, 8)
    found = examine(model, x, lambda model, x: model(x).square().mean()).findings
    assert [(f.rule, f.where) for f in found if f.severity == "warning"] == [("mode_mismatch", "1")] * is_told


def test_batch_norms_may_make_answers_of_another_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 4))
    finding = check_train_eval(lambda x: model.train()(x), lambda x: model.eval()(x), 9 * torch.randn(256, 8))
    assert finding is None  # and no evaluation is called random for statistics that moved


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(()) > 0.2) / 0.8 if self.training else x


def test_a_branch_that_is_dropped_for_the_whole_batch_and_divides_is_well() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), DropPath(), nn.Linear(8, 4)), torch.randn(64, 8)
    for _ in range(20):
        assert examine(model, x, lambda model, x: model(x).square().mean()).findings == []
