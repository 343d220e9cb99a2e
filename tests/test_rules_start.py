"""What a model begins with: special start values that an init overwrote, units that are alike, dropout that leaves nothing."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW
from toy import said

from moe_lab.health import Watch, examine


def told(model: nn.Module) -> list[str]:
    return said(Watch(model, AdamW(model.parameters(), weight_decay=0.0), quiet=True))


# ---- time steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "wanted"), [(None, []), (0.0, ["delta_start"]), (-12.0, ["delta_start"])])
def test_time_steps_of_a_fresh_state_space(bias: float | None, wanted: list[str]) -> None:
    torch.manual_seed(0)
    config = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**config))
    if bias is not None:
        nn.init.constant_(model.backbone.layers[0].mixer.dt_proj.bias, bias)
    watch = Watch(model, torch.optim.AdamW(model.parameters()))
    assert said(watch) == wanted
    (rule,) = [rule for rule in watch.rules if rule.id == "weight_decay_on_norms"]
    assert {"backbone.layers.*.mixer.A_log", "backbone.layers.*.mixer.D"} <= rule.when(watch.state).keys()
    assert "backbone.layers.*.mixer.in_proj.weight" not in rule.when(watch.state)
    model.backbone.layers[0].mixer.A_log.data += 0.1 * torch.randn(64, 8)  # has been trained
    assert said(Watch(model, torch.optim.AdamW(model.parameters()))) == []


@pytest.mark.parametrize("is_drawn", [True, False])
def test_the_bias_of_an_output_is_no_time_step(is_drawn: bool) -> None:
    mixer = nn.Module()
    mixer.A_log = nn.Parameter(torch.arange(1.0, 9.0).log().repeat(32, 1))
    mixer.steps, mixer.out = nn.Linear(32, 32), nn.Linear(32, 32)
    nn.init.constant_(mixer.steps.bias, -4.6 if is_drawn else 0.0)  # a time step of 0.01 or 0.7
    watch = Watch(nn.Sequential(mixer), torch.optim.AdamW(mixer.parameters(), weight_decay=0.0))
    assert said(watch) == ["delta_start"] * (not is_drawn)


# ---- norms ---------------------------------------------------------------------------------------------------------------


def normed(begin: Callable[[nn.LayerNorm], object], n: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    between = [layer for _ in range(n - 1) for layer in (nn.Linear(32, 32), nn.LayerNorm(32))]
    model = nn.Sequential(nn.Linear(4, 32), nn.LayerNorm(32), *between, nn.Linear(32, 1))
    for norm in (m for m in model if isinstance(m, nn.LayerNorm)):
        with torch.no_grad():
            begin(norm)
    return model


def damp(norm: nn.LayerNorm) -> None:
    norm.eps = 1.0


BEGINNINGS: dict[str, tuple[Callable, bool]] = {  # of all norms of a model, and whether that is told
    "drawn": (lambda norm: norm.weight.normal_(0.0, 0.02), True),
    "large": (lambda norm: norm.weight.fill_(5.0), True),
    "moved": (lambda norm: norm.bias.fill_(2.0), True),
    "damped": (damp, True),
    "ones": (lambda norm: norm.weight.fill_(1.0), False),
    "zeros": (lambda norm: norm.weight.zero_(), False),  # on purpose, at a branch's end
    "small": (lambda norm: norm.weight.fill_(0.1), False),
    "around one": (lambda norm: norm.weight.normal_(1.0, 0.02), False),
    "trained": (lambda norm: norm.weight.uniform_(-0.1, 0.4), False),
    "trained to be large": (lambda norm: norm.weight.uniform_(4.0, 6.0), False),
    "trained biases": (lambda norm: norm.bias.uniform_(1.0, 2.0), False),
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_norms_that_an_init_of_all_tensors_reached(kind: str) -> None:
    begin, is_told = BEGINNINGS[kind]
    model = normed(begin)
    assert ("norm_start" in told(model)) == is_told
    with torch.no_grad():  # one is as it should be: no init went over all
        model[1].weight.fill_(1.0)
        model[1].bias.zero_()
        model[1].eps = 1e-5
    assert "norm_start" not in told(model)


@pytest.mark.parametrize("kind", ["large", "moved", "damped"])
def test_the_only_norm_of_a_model_may_be_meant_so(kind: str) -> None:
    """As SSD's norm, whose gains begin at 20."""
    assert "norm_start" not in told(normed(BEGINNINGS[kind][0], n=1))


# ---- units that are alike ------------------------------------------------------------------------------------------------


def layers() -> nn.ModuleDict:
    """One of each kind, as torch draws it: 16 units of 12 elements and more."""
    torch.manual_seed(0)
    kinds = {"linear": nn.Linear(12, 16), "table": nn.Embedding(16, 12), "kernels": nn.Conv1d(4, 16, 3)}
    kinds |= {"by channel": nn.Conv1d(16, 16, 5, groups=16), "turned": transformers.pytorch_utils.Conv1D(16, 12)}
    return nn.ModuleDict(kinds)


def repeat(weight: Tensor) -> Tensor:
    """Heads of four units: each is the first one."""
    return weight.copy_(weight[:4].repeat(len(weight) // 4, *[1] * (weight.ndim - 1)))


ALIKE: dict[str, tuple[str, Callable[[Tensor], Tensor], bool]] = {  # the layer, how it begins, and whether that is told
    "ones": ("linear", lambda w: w.fill_(1.0), True),
    "repeated heads": ("linear", repeat, True),
    "half is zeros": ("linear", lambda w: w[::2].zero_(), True),
    "half of the tokens are zeros": ("table", lambda w: w[8:].zero_(), True),
    "kernels by a constant": ("kernels", lambda w: w.fill_(0.1), True),
    "columns of ones": ("turned", lambda w: w.copy_(w[:, :1].expand_as(w)), True),
    "inputs that are zeros": ("linear", lambda w: w[:, ::2].zero_(), True),
    "all zeros": ("linear", lambda w: w.zero_(), False),  # a branch's end
    "a token of padding": ("table", lambda w: w[0].zero_(), False),
    "some tokens are a mean": ("table", lambda w: w[:3].copy_(w.mean(0)), False),
    "a kernel per channel": ("by channel", lambda w: w.fill_(0.2), False),
    "frozen": ("linear", lambda w: w.requires_grad_(False).fill_(1.0), False),
}


@pytest.mark.parametrize("case", ALIKE)
def test_units_that_begin_as_copies_of_each_other(case: str) -> None:
    kind, begin, is_told = ALIKE[case]
    model = layers()
    with torch.no_grad():
        begin(model[kind].weight)
    found = [f for f in Watch(model, AdamW(model.parameters()), quiet=True).findings if f.rule == "alike_units"]
    zeros = "zeros" in case
    assert [(f.where, f.severity) for f in found] == [(kind, "info" if zeros else "warning")] * is_told
    assert not is_told or ("are zeros" in found[0].message) == zeros


def test_a_large_diagonal_is_looked_at_whole() -> None:
    """Of its first few elements most units have zeros alone."""
    model = nn.Linear(64, 64)
    nn.init.eye_(model.weight)
    watch = Watch(model, AdamW(model.parameters(), weight_decay=0.0), quiet=True)
    assert "alike_units" not in {f.rule for f in watch.findings}  # nor as an info of zeros


def test_a_trained_model_may_hold_units_that_died() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16))
    with torch.no_grad():
        repeat(model[0].weight)
    assert "alike_units" in told(model)
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    assert "alike_units" not in told(model)


def test_examine_tells_of_units_that_are_alike() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 1))
    nn.init.ones_(model[0].weight)
    batch, loss = torch.randn(8, 12), lambda model, x: model(x).square().mean()
    found = examine(model, batch, loss, AdamW(model.parameters())).findings
    assert "alike_units" in {f.rule for f in found}


# ---- dropout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "is_told"), [(0.95, True), (0.9, True), (0.8, False), (0.1, False)])
def test_a_dropout_that_keeps_next_to_nothing_is_told(p: float, is_told: bool) -> None:
    model = nn.Sequential(nn.Linear(12, 32), nn.Dropout(p), nn.ReLU(), nn.Linear(32, 1))
    assert ("heavy_dropout" in told(model)) == is_told
